// Package machine runs private edge machines on one Linux host: each has its
// own disk, process tree, network, mounts and containerd, as a kind node has,
// but needs neither Docker nor a registry, and can be powered off as if its
// plug were pulled.
//
// A machine is a set of namespaces (mount, pid, net, uts, ipc) whose pid 1 is
// the calling program started again; so Main must be the first call of that
// program's main or TestMain:
//
//	func TestMain(m *testing.M) {
//		machine.Main()
//		os.Exit(m.Run())
//	}
//
// What is where:
//
//   - The disk is Dir/disk, seen as / inside. It outlives PowerOff and Start.
//     The host's /usr is shared read-only; /etc holds a few files copied from
//     the host and no secret of it. Nothing else of the host is visible,
//     except what Config.Binds names.
//   - /run is a tmpfs, /proc, /sys and /dev/pts are the machine's own; cgroups
//     are the host's, and the machine may use those below CgroupRoot.
//   - The network is a /30, 10.199.N.1 (the host, on bridge skbrN) and
//     10.199.N.2 (the machine); pods get 10.200.N.0/24, which the host reaches
//     through the machine. There is no way to anywhere else, and no DNS.
//     CutLink takes it away, ShapeLink makes it late, slow and lossy.
//
// Everything a machine makes on the host (bridge, cgroups, the disk) is gone
// after Destroy; Snapshot and Leaks check that.
//
// The package knows nothing of Skerry's programs: callers start them with
// Exec.
package machine
