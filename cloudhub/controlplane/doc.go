// Package controlplane runs the real Kubernetes control plane inside this
// process: etcd on a private unix socket, kube-apiserver, kube-scheduler and
// kube-controller-manager, all unpatched. It owns their data directory: the
// certificates, the service account key, the kubeconfigs and etcd's files.
//
//	DataDir/            0700
//	  lock              held while a plane runs here; names its process
//	  admin.kubeconfig  0600, cluster administrator, self-contained
//	  pki/              0700, authorities and leaves; keys 0600
//	  etcd/             0700, all cluster state
//	  run/etcd.sock     0700 directory; who can open it can read everything
//
// Back up pki/ and etcd/ together; everything else is made again.
//
// The hub's own work is done as the user skerry:cloudhub, whose rights are a
// ClusterRole made at boot: it may read what edge nodes need and act as a
// node, nothing more. The package never dials a node itself: the API server's
// connections to kubelets go through Config.DialNode.
//
// The Kubernetes components share process-wide state (feature gates, metrics
// registry, klog): one plane runs at a time; after it has stopped, another may
// run in the same process.
package controlplane
