// Package drill proves on demand that the node can be alone: it cuts the tunnel
// for a while, restarts the node's pods as a power loss would if asked to,
// and reports which came back and how fast.
//
// A restart goes as near to a reboot as a running machine allows. edgecore
// replaces itself (same process id, so whatever supervises it sees nothing),
// and before the new one starts its kubelet it kills the pods' sandboxes
// through CRI and unmounts what the kubelet had mounted for them: Secrets,
// tokens, memory. The kubelet then finds what it finds after a power loss,
// a store, dead sandboxes and empty mount points, and has to get everything
// anew with no cloud. What it does not show: that the machine boots, that
// containerd and edgecore are started, and CSI volumes' staging.
//
// Pods that would not be started again (restartPolicy Never or OnFailure) are
// left alone. While the drill lasts no registry is asked either.
//
// The time offline counts from when the pods have been stopped, for which the
// runtime has a minute more.
//
// A node never stays cut off. The end of the drill is on disk, as time since
// the machine booted, which no change of the clock moves; whoever started the
// drill may go away, edgecore may crash and come back, and after a real reboot
// the drill is over. Stop ends it at once.
package drill
