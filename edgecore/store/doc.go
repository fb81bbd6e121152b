// Package store owns the node's copy of its Kubernetes objects and the outbox
// of what the node still has to tell the cloud.
//
// Everything is loaded from one bbolt file into memory before [Open] returns;
// reads never touch the disk. A write is visible only after the commit that
// holds it, and the outbox entry it causes is part of the same commit.
// Concurrent local writes share commits. Leases and events live in memory only.
//
// Bodies returned by the store are shared: nobody may change them.
//
// The store has its own resourceVersion. The cloud's revision of an object is
// kept beside it as an opaque string and is never compared with the store's.
//
// It never dials anything, never serves a partial copy, and never starts empty
// where it held objects before: a damaged file is an error that names the way
// out.
package store
