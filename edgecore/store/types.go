package store

import (
	"errors"
	"fmt"
)

// Key names one object. Resource is the plural, lower case name used in API
// paths; Namespace is empty for cluster-scoped resources.
type Key struct {
	Resource  string
	Namespace string
	Name      string
}

func (k Key) String() string {
	if k.Namespace == "" {
		return k.Resource + "/" + k.Name
	}
	return k.Resource + "/" + k.Namespace + "/" + k.Name
}

// Object is one stored object. It is immutable once the store handed it out.
type Object struct {
	Key
	UID  string
	RV   uint64 // the store's own resourceVersion
	Rev  string // the cloud's revision, opaque; empty for an object known only here
	Body []byte // JSON with apiVersion and kind; metadata.resourceVersion is RV
}

// Local tells whether the cloud has not confirmed this object yet.
func (o Object) Local() bool { return o.Rev == "" }

// EventType is what happened to an object.
type EventType uint8

const (
	Added EventType = iota + 1
	Modified
	Deleted
)

func (t EventType) String() string {
	switch t {
	case Added:
		return "ADDED"
	case Modified:
		return "MODIFIED"
	case Deleted:
		return "DELETED"
	}
	return fmt.Sprintf("EventType(%d)", uint8(t))
}

// Event is one change. A Deleted event's Object is the last state with the RV
// of the deletion in RV and in the body. Old is the state before a Modified
// event, so that a selector can tell an object that stopped matching.
type Event struct {
	Type   EventType
	Object *Object
	Old    *Object
}

var (
	// ErrExpired: the history a watch asked for is gone; list and watch anew.
	ErrExpired = errors.New("store: resource version is too old")
	// ErrFuture: the resourceVersion asked for is ahead of the store.
	ErrFuture = errors.New("store: resource version is ahead of the store")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store: closed")
	// ErrLocked: another process holds the store.
	ErrLocked = errors.New("in use by another edgecore")
	// ErrDamaged: the store on disk cannot be trusted; the message names the way out.
	ErrDamaged = errors.New("damaged")
)

// Kind describes a resource the store knows by itself.
type Kind struct {
	Resource   string
	APIVersion string
	Kind       string
	Namespaced bool
	Volatile   bool // memory only
	Sealed     bool // encrypted at rest
}

// KindOf returns what the store knows about a resource. Resources it does not
// know are kept too; their bodies must carry apiVersion and kind themselves.
func KindOf(resource string) (Kind, bool) {
	switch resource {
	case "pods":
		return Kind{resource, "v1", "Pod", true, false, false}, true
	case "nodes":
		return Kind{resource, "v1", "Node", false, false, false}, true
	case "configmaps":
		return Kind{resource, "v1", "ConfigMap", true, false, false}, true
	case "secrets":
		return Kind{resource, "v1", "Secret", true, false, true}, true
	case "services":
		return Kind{resource, "v1", "Service", true, false, false}, true
	case "persistentvolumeclaims":
		return Kind{resource, "v1", "PersistentVolumeClaim", true, false, false}, true
	case "persistentvolumes":
		return Kind{resource, "v1", "PersistentVolume", false, false, false}, true
	case "serviceaccounts":
		return Kind{resource, "v1", "ServiceAccount", true, false, false}, true
	case "roles":
		return Kind{resource, "rbac.authorization.k8s.io/v1", "Role", true, false, false}, true
	case "rolebindings":
		return Kind{resource, "rbac.authorization.k8s.io/v1", "RoleBinding", true, false, false}, true
	case "clusterroles":
		return Kind{resource, "rbac.authorization.k8s.io/v1", "ClusterRole", false, false, false}, true
	case "clusterrolebindings":
		return Kind{resource, "rbac.authorization.k8s.io/v1", "ClusterRoleBinding", false, false, false}, true
	case "endpointslices":
		return Kind{resource, "discovery.k8s.io/v1", "EndpointSlice", true, false, false}, true
	case "runtimeclasses":
		return Kind{resource, "node.k8s.io/v1", "RuntimeClass", false, false, false}, true
	case "csidrivers":
		return Kind{resource, "storage.k8s.io/v1", "CSIDriver", false, false, false}, true
	case "csinodes":
		return Kind{resource, "storage.k8s.io/v1", "CSINode", false, false, false}, true
	case "leases":
		return Kind{resource, "coordination.k8s.io/v1", "Lease", true, true, false}, true
	case "events":
		return Kind{resource, "v1", "Event", true, true, false}, true
	}
	return Kind{}, false
}

func volatile(resource string) bool { k, _ := KindOf(resource); return k.Volatile }
func sealed(resource string) bool   { k, _ := KindOf(resource); return k.Sealed }

// Upsert is one object as the feed delivers it.
type Upsert struct {
	Key  Key
	UID  string
	Rev  string // must not be empty
	Body []byte // JSON; apiVersion and kind may be missing for known resources
}

// Deletion removes an object. An empty UID means whatever the cloud delivered
// under this key.
type Deletion struct {
	Key Key
	UID string
}

// Delta is one step of the feed; it is committed as a whole.
type Delta struct {
	Upserts   []Upsert
	Deletions []Deletion
	Synced    string // not empty: after this delta the store is complete as of this epoch
}

// InventoryItem tells the hub what the node has.
type InventoryItem struct {
	Key Key
	UID string
	Rev string
}
