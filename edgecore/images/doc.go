// Package images stands between the kubelet and the runtime's image service. It
// keeps what this node's pods need from being thrown away, and lets a pod start
// from the image that is here when its registry cannot be reached.
//
// It serves CRI's ImageService (runtime.v1) on a unix socket that only root may
// open, and passes every call to the runtime but for three:
//
//   - ListImages and StreamImages mark the images that pods of this node name
//     as pinned, and so the kubelet neither collects them at its thresholds nor
//     deletes them under disk pressure. A pod counts from when the node has it
//     until it has ended for good, also while it has no container: static pods,
//     init, sidecar and ephemeral containers and image volumes are all in. So
//     is the sandbox image.
//   - RemoveImage of such an image is refused, for the pod that came between
//     the kubelet's look and its deed.
//   - PullImage of an image that is here falls back to it when the registry
//     cannot be reached. imagePullPolicy Always thus means: the newest that can
//     be had. A registry that answers with a refusal (401, 403, 404) is obeyed.
//     What cannot be started is told with its way out.
//
// The protection is the same with and without the cloud, as an outage may begin
// in the next minute. Its price: under disk pressure the kubelet can free only
// images that no pod names; when that does not suffice it evicts pods, as it
// would for full disks of any other cause, and an evicted pod's images are free
// to go. A fallback never hands an image to a pod that could not have had it:
// the kubelet's own records of the credentials it was pulled with decide, see
// access.go.
//
// Why not otherwise: containerd's label for pinned images needs 1.7 and knows
// whole images, not pods that come and go; with 1.6 not even the sandbox image
// is pinned. Raising the kubelet's thresholds only moves the day. A lease in
// containerd would keep the layers but not the image's name. The kubelet builds
// its image client itself and from an endpoint alone (imageServiceEndpoint), so
// what stands in between has to be a socket.
//
// The package never pulls by itself, never removes anything, and never changes
// what the runtime holds.
package images
