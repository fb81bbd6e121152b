// Package apifacade is the Kubernetes API over the node's store: for the
// kubelet through an in-process transport, for local clients behind a listener
// of the caller's.
//
// It behaves as an API server does where the kubelet and client-go can tell:
// resourceVersions, watch history and bookmarks, patches and preconditions,
// graceful deletion, minted uids. What the cloud owns is read-only here; what
// the node writes becomes an outbox entry in the same commit. Pods and services
// are not served before a first complete sync: an empty list would make the
// kubelet kill every container.
//
// It never asks who is calling: whoever puts it behind a listener authenticates,
// and authorises through Config.Authorize. It never dials and holds no state of its own.
package apifacade
