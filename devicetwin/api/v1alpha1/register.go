package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// SchemeGroupVersion is the group and version of these types.
var SchemeGroupVersion = schema.GroupVersion{Group: Group, Version: APIVersion}

// AddToScheme makes the types known to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(SchemeGroupVersion,
		&DeviceModel{}, &DeviceModelList{},
		&Device{}, &DeviceList{},
		&DeviceDiscovery{}, &DeviceDiscoveryList{},
		&TelemetryRoute{}, &TelemetryRouteList{},
	)
	metav1.AddToGroupVersion(s, SchemeGroupVersion)
	return nil
}

// Resource is the group, version and resource of one of the resource names
// above.
func Resource(name string) schema.GroupVersionResource {
	return SchemeGroupVersion.WithResource(name)
}
