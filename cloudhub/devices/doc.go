// Package devices is the hub's half of device twins. It holds, in memory, the
// live values that nodes report, serves them, has desired values and commands
// reach devices, and writes what is worth keeping into the status of Devices,
// under a budget of writes for the whole cluster.
//
// Values are compared property by property by their versions, and taken only
// from the newest tunnel of the node that the Device is bound to. A value of a
// Device that was made anew under the same name is not taken. After a restart
// of the hub nothing has to be recovered: each node tells what differs.
//
// The package never writes a Device's spec by itself, but for what a user asked
// for (as that user) and for overrides whose model says promote; it never dials
// a node or a device: the caller brings the nodes' streams, and the node
// reaches the device.
package devices
