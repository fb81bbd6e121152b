// Package autonomy tells what would break if the node restarted now with no
// cloud: an image that is not here, a Secret that a pod names and the node does
// not have, a disk about to be full.
//
// It looks at what the store holds, at the runtime's images and at the disks,
// soon after something changed and every few minutes, and keeps the verdict on
// the node's own Node object: condition AutonomyReady, which goes up with the
// node's status, and condition Connected, the node's own view of its tunnel for
// whoever reads the node locally. Both are written when their words change and
// at most twice a minute, as each write is flash.
//
// A finding that breaks makes AutonomyReady False. The others are warnings:
// the pods come back, but something about them is not as it was.
//
// The package mends nothing, pulls nothing, and keeps no pod from starting.
package autonomy
