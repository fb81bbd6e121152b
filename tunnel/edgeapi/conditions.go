package edgeapi

// Types of the Node conditions that Skerry adds to the kubelet's.
const (
	// ConditionConnected tells whether the node's tunnel to the hub is up, and
	// since when. The hub writes it in the cloud; the node writes its own view
	// on its own copy of the Node, which is what local clients read. A node's
	// view never goes up: while it is False there is no way to.
	ConditionConnected = "Connected"

	// ConditionAutonomyReady tells whether every pod of the node would come
	// back if the node restarted now with no cloud, and if not, why. The node
	// writes it.
	ConditionAutonomyReady = "AutonomyReady"
)
