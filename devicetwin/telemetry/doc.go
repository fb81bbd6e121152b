// Package telemetry carries readings and messages beyond the twin: it writes
// what a TelemetryRoute asks for into the route's log on disk and from there
// sends it to each of the route's sinks, at least once, however long a sink or
// the network is away.
//
// It owns what is durable when. What a sync route captures is on the disk when
// Capture returns, which is before the device has its PUBACK; everything else is
// within 200 ms. A route's log is a queue: its bounds are the only thing that
// takes from it what a sink has not taken, and the sink is told (see seglog). A
// sink that is slow, gone or wrong holds up nothing but itself.
//
// For routes of properties with capture sync the messages of their devices go
// into a log of their own, capture, which no sink reads: after a power cut
// Captured gives back what the twins had not yet flushed, and the readings are
// made from it again. Such readings may come twice, under two IDs but with the
// same device, property and time.
//
// Cursors are written with the twins' next flush, not at each acknowledgement:
// a crash sends some seconds again, under the same IDs, and a commit a second
// would be half of what a node may write in a day.
//
// It never interprets a topic or a payload, never logs a secret, and never
// reaches the hub but over the stream it is given.
package telemetry
