// Package store owns the node's copy of its Kubernetes objects and the outbox
// of what the node still has to tell the cloud.
//
// Everything is loaded from one bbolt file into memory before [Open] returns;
// reads never touch the disk. A write is visible only after the commit that
// holds it, and the outbox entry it causes is part of the same commit.
// Concurrent local writes share commits. Leases live in memory only, and so do
// Events until they have waited for the cloud a while.
//
// Bodies returned by the store are shared: nobody may change them.
//
// The store has its own resourceVersion. The cloud's revision of an object is
// kept beside it as an opaque string and is never compared with the store's.
//
// It never dials anything, never serves a partial copy, and never starts empty
// where it held objects before. Beside the database FILE lie
//
//	FILE.pods     which pods there are; what a damaged file is held against, see ledger
//	FILE.good     the last good copy; see copyLoop
//	FILE.damaged  the last damaged file, kept for diagnosis
//	FILE.key      the key of what is encrypted
//	FILE.lock     held by the process that uses the store
//
// A damaged file is mended from what is left of it and the good copy if that
// brings back exactly the pods that there were, and the store says so; else
// opening it is an error that names the way out; see mend.
//
// A disk that takes no writes, being full, read-only or broken, makes writes fail
// with [ErrDisk]. Reads go on. The store takes writes again when the disk does.
//
// Flash is a budget. Bytes written are counted, see [Wear]; what would be made
// anew after a power cut waits for a commit that happens anyway, see [Tx.Soon],
// and waits longer while the day's budget is used up. What was acknowledged never
// waits.
//
// Order, retries and waits go by the monotonic clock; the time of day is only
// ever shown.
//
// Secrets and service account tokens are encrypted with AES-256-GCM under the
// key file, which has mode 0600. As the key lies beside the database, this
// protects a copy or backup of the database that got into the wrong hands. It
// does not protect a stolen disk: whoever has the disk has the key, and an edge
// that boots with no one there cannot keep it elsewhere.
package store
