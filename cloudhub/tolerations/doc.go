// Package tolerations keeps pods on edge nodes that fall silent.
//
// Kubernetes evicts the pods of a node that it has not heard of, after the time
// that each pod tolerates the taints node.kubernetes.io/not-ready and
// node.kubernetes.io/unreachable. A pod that names neither is given 300 seconds
// by the API server's admission. For an edge node silence is no failure: its
// pods run on, and a copy elsewhere would be the second. So this package clears
// the time limit of these two tolerations on pods that are bound to enrolled
// edge nodes, and on no others. The Node stays NotReady and tainted: nothing
// new is placed there, and everybody sees the truth.
//
// # What is left alone
//
// Only what admission gives is cleared: a toleration of one of the two keys
// with operator Exists, effect NoExecute and exactly the default number of
// seconds. Any other is the user's word, shorter or longer. Admission leaves no
// trace of what it added, so a user who wants just the default number writes
// one second more or less, or opts out. As the first toleration that matches a
// taint is the one that counts, only that one is looked at.
//
// # Opting out
//
// The annotation skerry.dev/evict-when-silent, "true" or "false", on the pod,
// its namespace or its Node decides; the pod's goes before the namespace's, and
// that before the Node's. It may be set at any time, on a Node that is silent
// too, to have its pods replaced elsewhere: the default limit is put back, and
// counts from then on. For this the annotation skerry.dev/kept-while-silent
// tells which limits were cleared here. One that somebody puts back by hand
// stays.
//
// # Why not by the API server's flags
//
// The flags --default-not-ready-toleration-seconds and
// --default-unreachable-toleration-seconds could give every pod a limit of a
// hundred years. But they are there in a cluster of one's own only; they
// concern the pods of all nodes; and whoever opts out would find that his pod
// has the hundred years already. So a hub that carries its control plane does
// as any other. The price is one patch for each pod, once. It comes within
// moments of the binding, while eviction is a default limit away, and begins
// about 50 seconds after a node's last sign. Pods that were bound while the hub
// was away are found when it lists them at its start: an API server counts the
// limit anew after its own restart, and in another cluster the hub has the
// default limit to come back.
//
// The package never evicts or deletes a pod, and never touches a Node.
package tolerations
