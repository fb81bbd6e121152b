// Package kubelet builds and runs the upstream kubelet inside edgecore. It owns
// the kubelet's configuration, its volume plugins, the checks before its start,
// the choice of the node's address, and the HTTP handler behind kubectl logs,
// exec, attach, port-forward and the stats summary.
//
// It never opens a port, never talks to an API server itself (all clients go
// through Config.Transport), and never stops a container: ending Run leaves
// every pod running, for the next process to take over.
//
// On the host it changes what every kubelet changes: it makes cgroups below
// Config.CgroupRoot, mounts pods' volumes, and sets vm.overcommit_memory,
// vm.panic_on_oom, kernel.panic, kernel.panic_on_oops and the limits of kernel
// keys. It writes no iptables rules unless the overlay asks for them.
//
// # One process, once
//
// The upstream kubelet registers metrics, feature gates and cAdvisor settings
// with the process and leaves goroutines behind when it ends. Run may therefore
// be called once per process, and the process must exit when Run returns. A
// change of the configuration is a restart of the process; pods do not notice.
//
// # The kubelet may end the process
//
// Some upstream failures call os.Exit(1) or klog.Fatal and cannot be turned
// into an error here. They are: a directory below Config.RootDir or
// /var/log/containers that cannot be made, /dev/kmsg that cannot be followed,
// cAdvisor, the container manager or the node's informer that cannot start, the
// pod-resources socket that cannot be listened on, and, with Config.CSI, a
// CSINode object that cannot be written for more than two minutes. Check finds
// the causes that can be known beforehand. The rest is for a supervisor of the
// process (systemd, or a keeper in main) that starts it again with backoff.
//
// Upstream also tells systemd that the service is ready (Type=notify) and
// answers its watchdog (WatchdogSec), when the unit asks for these.
//
// # Who may call the handler
//
// Handler asks nobody for credentials: the caller must have authenticated and
// authorised the request. edgecore serves it only on streams that arrive over
// the tunnel, which the hub has checked as a kubelet would.
package kubelet
