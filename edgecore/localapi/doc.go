// Package localapi lets clients on the device read the Kubernetes API from the
// node's own store, with or without the cloud: the administrator on a loopback
// port, and pods, when that is enabled, at the address that their in-cluster
// variables name.
//
// It owns who may: it tells callers by their tokens (service accounts' from the
// cloud or from this node, or the administrator's from a file that only root
// reads) and judges them by the RBAC objects that the feed has brought, with
// Kubernetes' own evaluation. Nobody is anonymous. A service account's token is
// good while the pod it was made for is on this node.
//
// It never writes objects: clients read here, and write at the cluster's API
// server. Beside the API stands that of the node's devices, see Config.Devices.
// What it serves is what the node has, not what the cluster has; every list
// says so in a warning. It never asks the cloud anything.
package localapi
