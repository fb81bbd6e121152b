// Package presence tells on each edge node's Node whether the node is connected,
// since when, and how far it had come: the condition Connected.
//
// The condition is the hub's word, not the node's. It is True while the node's
// tunnel is up and the node has greeted. It is False from when the node was last
// heard, with the reason, the last time it was in step with the cluster, and
// what it then had still to send. It says nothing of the node's health: Ready is
// the kubelet's and the node-lifecycle controller's, and the package never
// writes it, nor anything else of a Node.
//
// # What it costs
//
// Nothing is written while nothing changes. A node that is away for less than
// ten seconds is not told of at all, and one node's condition is written at most
// once in fifteen seconds: a node that flaps every few seconds causes no write,
// one that flaps slower at most four a minute. All nodes together cause at most
// twenty writes a second; when a thousand are lost at once, the last is told of
// within a minute, with its true time.
//
// # Restarts of the hub
//
// What the hub knew goes with it; what the Node says stays. A node that comes
// back within the grace of ninety seconds is not written at all. For one that
// does not, the Lease tells when it was last heard, and carries since the
// package's LastSync, which whoever renews the Lease puts there, when it was
// last in step.
package presence
