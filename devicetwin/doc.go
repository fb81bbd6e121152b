// Package devicetwin keeps, for each device of a node, what is wanted of it and
// what it last said, and brings the two together.
//
// It owns the rules: which of two words is newer, who wins between the cloud
// and the node, what a reading is worth, when a device is taken for gone. It
// speaks to devices through a Driver and never knows their protocol; it never
// knows Kubernetes beyond the types of its API, and never dials.
//
// Reported values have one writer, the device; desired ones have the cloud,
// and, where the model lets it, the node: an override. What holds of the two is
// decided when one of them changes, property by property:
//
//	                                  authority cloud          edge              lww
//	override while connected          the hub checks its base  taken             taken, if later
//	override while away, spec as is   holds until it expires   the same          the same
//	spec's property changed since     the spec, and an Event   the override      the later; a tie is the spec's
//	another property changed          no conflict              the same          the same
//	another UID                       the twin begins anew     the same          the same
//	generation went back, same UID    the spec, whole          the same          the same
//
// A property of authority cloud whose model says nothing of localOverride.when
// is set on the node only while the hub is away; one of authority edge or lww
// always. When the generation goes back (the cluster was restored from a
// backup) all the device's values go up again. Their versions need no new
// epoch for that, since they are above all that the backup can hold.
//
// A version names what was said, quality included. A value restored after a
// restart keeps its version and is shown as stale here; a value of a device
// that goes away is said anew, as stale, because then the node knows it to be
// so. A reading that repeats what is known moves the times of the twin, not its
// version, and is not told on.
//
// Readings are merged where they arrive, under one lock and in about a
// microsecond, so there is no queue of them to bound: the twin itself is the
// newest of each property. Whoever reads, a watcher or the hub, is told what
// changed since it last looked.
package devicetwin
