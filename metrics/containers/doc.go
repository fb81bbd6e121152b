// Package containers owns this process's one cAdvisor manager: the machine's
// capacity, the usage of every cgroup below the configured roots, and the fill
// level of the file systems under them. The embedded kubelet and Skerry's own
// metrics read the same manager, so that no cgroup file is read twice.
//
// cAdvisor keeps its settings in flags of the process, so New may be called
// once per process; a manager cannot be stopped for good either, it lives until
// the process ends. The package never writes a cgroup, never starts, stops or
// inspects a container, and opens no listener.
package containers
