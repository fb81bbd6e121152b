// Package tokens answers the kubelet's TokenRequests, with or without the
// cloud: from a stored token that the kubelet would not yet renew, from the
// cloud, from a stored token that is still valid, and else with a token issued
// here.
//
// A token issued here is signed by this node's own key and names this node as
// its issuer, so no API server accepts it: it is good for the node's local API
// only, and short-lived, so that the kubelet soon asks again and a pod has a
// real token within minutes of the cloud's return.
//
// The package never serves HTTP and never dials; the cloud is an interface.
package tokens
