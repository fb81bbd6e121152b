// Package v1alpha1 is the API devices.skerry.dev/v1alpha1: what a kind of
// device can do (DeviceModel), one device and what is wanted of it (Device),
// where devices are found (DeviceDiscovery) and where their readings go
// (TelemetryRoute).
//
// It owns the types, their CustomResourceDefinitions and the checks that need
// no cluster. It never talks to one. Both programs import it.
//
// What is generated of them, definitions and copies, is made by "make generate".
//
// +kubebuilder:object:generate=true
// +groupName=devices.skerry.dev
package v1alpha1
