// Package metrics owns a program's own Prometheus registry and the handler that
// exposes it: the figures of the Go runtime, of the process, and those each
// part of the program registers by an explicit call.
//
// Its subpackages measure the node: host the machine, by gopsutil, and
// containers every cgroup, by cAdvisor. It never uses Prometheus's global
// registry, never opens a listener, and never answers a request its caller's
// Authorize has not let through.
package metrics
