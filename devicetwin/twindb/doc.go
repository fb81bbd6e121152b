// Package twindb is where a node's twins outlive the power: a bbolt file of
// records in buckets, each a key and a value that only the caller understands.
//
// It owns when what is on the disk. Commit returns once its records are there,
// together with those of others who asked in the same few milliseconds. Dirty
// notes that a record has changed and is written with the next flush; flushes
// lie 5 s apart, and up to a minute when there is much to write, so that a day
// costs no more than Config.BytesPerDay however many messages the devices send.
// A flush writes what a record is then: a hundred changes cost one write.
//
// It owns the two numbers that order what this node says of its devices
// (v1alpha1.Version): the epoch rises with every Open and is on the disk before
// Open returns, the incarnation is new when the records could not be kept.
//
// The whole file is in memory too, about its own size. So a write that changes
// nothing costs nothing, a copy is made of what was acknowledged and not of what
// the disk has made of it, and a file whose state is not known after a failed
// sync is made anew. Open reads the file page by page with checks of its own,
// since bbolt trusts what it maps (a truncated file is a SIGBUS, a bad page a
// panic in a goroutine that nobody guards), and writes a new one; the old one,
// found whole, becomes the good copy beside it.
//
// It never knows what a twin is, and never waits for anything but the disk.
package twindb
