// Package convergence holds the model test of the way between the cloud's
// objects and an edge node's copy of them: feed, upstream, edges, tunnel, link,
// store and facade are the real ones, joined over TLS on loopback; a connection
// breaks at any byte. Only the API server and the kubelet are models, small
// enough for thousands of random steps.
//
// It lives outside both programs, as neither may import the other.
package convergence
