// Package kubeletproxy is the far end of the API server's connections to
// kubelets when both run in one process. A node's kubelet has no port; the API
// server is given DialNode, and this package stands in for the kubelet's TLS:
// it presents a certificate for the node's virtual InternalIP, demands the API
// server's own kubelet client certificate, and then copies bytes to and from a
// tunnel stream that ends at the node's kubelet handler.
//
// It speaks TLS and nothing above it: requests, upgrades and whatever follows
// them pass as bytes. It never decides whether a caller may do something; the
// API server has done so before it dials.
package kubeletproxy
