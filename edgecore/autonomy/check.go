package autonomy

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/skerry-io/skerry/edgecore/images"
	"github.com/skerry-io/skerry/edgecore/store"
)

// The runtime has this long for all its answers; edgecore status waits for them.
const checkTimeout = 4 * time.Second

// Check looks at everything now. Its cost grows with the pods: each is decoded,
// and the runtime is asked once for each image.
func (m *Monitor) Check(ctx context.Context) Report {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	c := &check{m: m, report: Report{At: m.cfg.Clock()}, users: map[string]string{}}
	if !m.cfg.Store.Synced() {
		c.breaks(ReasonNotSynced, "node", "its first sync with the hub is not complete", "connect it to the hub until edgecore status says it is in step")
	}
	if t := m.cfg.Store.Trouble(); t != nil {
		c.breaks(ReasonStoreTrouble, "node", "its disk takes no writes, so what changed since is lost in a restart", "look into edgecore status and the kernel's log for what is wrong with the disk")
	}
	objects, _ := m.cfg.Store.List("pods", "")
	for _, o := range objects {
		var pod corev1.Pod
		if err := json.Unmarshal(o.Body, &pod); err != nil {
			c.breaks(ReasonNeedsCloud, "pod "+o.Namespace+"/"+o.Name, "the copy of it on this node is unreadable: "+err.Error(), "delete the pod and let it be made anew")
			continue
		}
		if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			continue // it need not come back
		}
		c.report.Pods++
		c.pod(&pod)
	}
	c.images(ctx)
	c.disks(ctx)
	c.identity()
	c.report.finish()
	return c.report
}

// check is one look.
type check struct {
	m      *Monitor
	report Report
	users  map[string]string // image reference -> the first pod that names it
}

func (c *check) breaks(reason, subject, problem, remedy string) {
	c.report.Findings = append(c.report.Findings, Finding{true, reason, subject, problem, remedy})
}

func (c *check) warns(reason, subject, problem, remedy string) {
	c.report.Findings = append(c.report.Findings, Finding{false, reason, subject, problem, remedy})
}

// pod looks at what a pod needs of the store.
func (c *check) pod(pod *corev1.Pod) {
	subject := "pod " + pod.Namespace + "/" + pod.Name
	for _, ref := range images.References(&pod.Spec) {
		if _, known := c.users[ref]; !known {
			c.users[ref] = subject
		}
	}
	if c.m.cfg.StrictPull {
		for _, con := range allContainers(&pod.Spec) {
			if con.ImagePullPolicy == corev1.PullAlways {
				c.breaks(ReasonPullPolicyAlways, subject, "container "+con.Name+" wants its registry asked at each start", "set images.localWhenUnreachable, or imagePullPolicy to IfNotPresent")
			}
		}
	}
	for _, s := range pod.Spec.ImagePullSecrets {
		if _, ok := c.get("secrets", pod.Namespace, s.Name); s.Name != "" && !ok {
			c.warns(ReasonPullSecretMissing, subject, "pull secret "+s.Name+" does not exist", "create it, or take it out of imagePullSecrets")
		}
	}
	if name := pod.Spec.RuntimeClassName; name != nil && *name != "" {
		if _, ok := c.get("runtimeclasses", "", *name); !ok {
			c.breaks(ReasonRuntimeClassMissing, subject, "runtime class "+*name+" is not on this node", "create it, and connect the node until it is in step")
		}
	}
	if len(pod.Spec.ResourceClaims) > 0 {
		c.breaks(ReasonNeedsCloud, subject, "it uses resource claims, which only the API server answers for", "use a device plugin instead")
	}
	c.environment(pod, subject)
	for i := range pod.Spec.Volumes {
		c.volume(pod, &pod.Spec.Volumes[i], subject)
	}
}

func allContainers(spec *corev1.PodSpec) []corev1.Container {
	return append(slices.Clone(spec.InitContainers), spec.Containers...)
}

func (c *check) environment(pod *corev1.Pod, subject string) {
	for _, con := range allContainers(&pod.Spec) {
		for _, from := range con.EnvFrom {
			if r := from.SecretRef; r != nil {
				c.secret(pod, subject, r.Name, r.Optional)
			}
			if r := from.ConfigMapRef; r != nil {
				c.configMap(pod, subject, r.Name, r.Optional)
			}
		}
		for _, env := range con.Env {
			if env.ValueFrom == nil {
				continue
			}
			if r := env.ValueFrom.SecretKeyRef; r != nil {
				c.secret(pod, subject, r.Name, r.Optional, r.Key)
			}
			if r := env.ValueFrom.ConfigMapKeyRef; r != nil {
				c.configMap(pod, subject, r.Name, r.Optional, r.Key)
			}
		}
	}
}

func (c *check) volume(pod *corev1.Pod, v *corev1.Volume, subject string) {
	switch {
	case v.Secret != nil:
		c.secret(pod, subject, v.Secret.SecretName, v.Secret.Optional, keysOf(v.Secret.Items)...)
	case v.ConfigMap != nil:
		c.configMap(pod, subject, v.ConfigMap.Name, v.ConfigMap.Optional, keysOf(v.ConfigMap.Items)...)
	case v.Projected != nil:
		for _, s := range v.Projected.Sources {
			switch {
			case s.Secret != nil:
				c.secret(pod, subject, s.Secret.Name, s.Secret.Optional, keysOf(s.Secret.Items)...)
			case s.ConfigMap != nil:
				c.configMap(pod, subject, s.ConfigMap.Name, s.ConfigMap.Optional, keysOf(s.ConfigMap.Items)...)
			case s.ServiceAccountToken != nil && s.ServiceAccountToken.Audience != "":
				c.warns(ReasonTokenForOthers, subject, fmt.Sprintf("its token for %q cannot be renewed without the cloud, and one that this node issues is good for its local API only", s.ServiceAccountToken.Audience), "have whoever takes the token bear with an outage")
			case s.ClusterTrustBundle != nil && (s.ClusterTrustBundle.Optional == nil || !*s.ClusterTrustBundle.Optional):
				c.breaks(ReasonNeedsCloud, subject, "volume "+v.Name+" wants a ClusterTrustBundle, which is not kept on the node", "put the certificates into a ConfigMap")
			case s.PodCertificate != nil:
				c.breaks(ReasonNeedsCloud, subject, "volume "+v.Name+" wants a certificate that the cloud issues", "put a certificate into a Secret")
			}
		}
	case v.PersistentVolumeClaim != nil:
		c.claim(pod, v.PersistentVolumeClaim.ClaimName, subject)
	case v.Ephemeral != nil:
		c.claim(pod, pod.Name+"-"+v.Name, subject)
	}
}

func keysOf(items []corev1.KeyToPath) []string {
	var keys []string
	for _, i := range items {
		keys = append(keys, i.Key)
	}
	return keys
}

// claim follows a claim to its volume.
func (c *check) claim(pod *corev1.Pod, name, subject string) {
	const sync = "connect the node until it is in step"
	var pvc corev1.PersistentVolumeClaim
	if !c.read("persistentvolumeclaims", pod.Namespace, name, &pvc) {
		c.breaks(ReasonVolumeMissing, subject, "claim "+name+" is not on this node", sync)
		return
	}
	var pv corev1.PersistentVolume
	if pvc.Spec.VolumeName == "" || !c.read("persistentvolumes", "", pvc.Spec.VolumeName, &pv) {
		c.breaks(ReasonVolumeMissing, subject, "the volume of claim "+name+" is not on this node", sync)
		return
	}
	if pv.Spec.CSI == nil {
		return
	}
	var driver storagev1.CSIDriver
	attach := !c.read("csidrivers", "", pv.Spec.CSI.Driver, &driver) || driver.Spec.AttachRequired == nil || *driver.Spec.AttachRequired
	switch {
	case !c.m.cfg.CSI:
		c.breaks(ReasonVolumeNeedsCloud, subject, "claim "+name+" is for CSI driver "+pv.Spec.CSI.Driver+", and CSI is off", "set kubelet.csi")
	case attach:
		c.breaks(ReasonVolumeNeedsCloud, subject, "claim "+name+" has to be attached by the cloud", "use a CSI driver with attachRequired: false, a local volume or hostPath")
	}
}

func (c *check) secret(pod *corev1.Pod, subject, name string, optional *bool, keys ...string) {
	var s corev1.Secret
	found := c.read("secrets", pod.Namespace, name, &s)
	c.refers(subject, "Secret", ReasonSecretMissing, name, optional, found, keys, func(k string) bool { _, ok := s.Data[k]; return ok })
}

func (c *check) configMap(pod *corev1.Pod, subject, name string, optional *bool, keys ...string) {
	var m corev1.ConfigMap
	found := c.read("configmaps", pod.Namespace, name, &m)
	c.refers(subject, "ConfigMap", ReasonConfigMapMissing, name, optional, found, keys, func(k string) bool {
		_, text := m.Data[k]
		_, binary := m.BinaryData[k]
		return text || binary
	})
}

func (c *check) refers(subject, kind, reason, name string, optional *bool, found bool, keys []string, has func(string) bool) {
	if optional != nil && *optional || name == "" {
		return
	}
	if !found {
		c.breaks(reason, subject, kind+" "+name+" is not on this node", "create it, and connect the node until it is in step")
		return
	}
	for _, k := range keys {
		if !has(k) {
			c.breaks(reason, subject, kind+" "+name+" has no key "+k, "add the key, and connect the node until it is in step")
		}
	}
}

func (c *check) get(resource, namespace, name string) (store.Object, bool) {
	return c.m.cfg.Store.Get(store.Key{Resource: resource, Namespace: namespace, Name: name})
}

func (c *check) read(resource, namespace, name string, into any) bool {
	o, ok := c.get(resource, namespace, name)
	return ok && json.Unmarshal(o.Body, into) == nil
}

// images asks the runtime for what the pods name.
func (c *check) images(ctx context.Context) {
	if s := c.m.cfg.Images.SandboxImage(ctx); s != "" && len(c.users) > 0 {
		c.users[s] = "every pod"
	}
	refs := slices.Sorted(maps.Keys(c.users))
	missing, err := c.m.cfg.Images.Missing(ctx, refs)
	if err != nil {
		c.warns(ReasonRuntimeUnknown, "node", "whether all images are here is not known: "+err.Error(), "look into the runtime's log (journalctl -u containerd)")
		return
	}
	for _, ref := range missing {
		c.breaks(ReasonImageMissing, c.users[ref], "image "+ref+" is not on this node", "wait until it is pulled, or import it: ctr -n k8s.io images import FILE")
	}
}

// The kubelet evicts pods, and admits none, below its thresholds; see
// evictionHard in edgecore/kubelet. The store stops at a full disk.
const (
	fullPercent   = 5
	nearlyPercent = 10
	fullBytes     = 16 << 20 // for what edgecore and the kubelet write at a start
)

func (c *check) disks(ctx context.Context) {
	var node corev1.Node
	if c.read("nodes", "", c.m.cfg.NodeName, &node) {
		for _, cond := range node.Status.Conditions {
			if cond.Type == corev1.NodeDiskPressure && cond.Status == corev1.ConditionTrue {
				c.breaks(ReasonDiskFull, "node", "the kubelet reports disk pressure, and admits no pod", "free some space: logs, files; images that no pod needs the kubelet removes by itself")
			}
		}
	}
	dirs := map[string]string{}
	for use, dir := range c.m.cfg.Dirs {
		dirs[dir] = use
	}
	if fs, err := c.m.cfg.Images.Filesystems(ctx); err == nil { // else told already
		for _, dir := range fs {
			dirs[dir] = "images"
		}
	}
	seen := map[unix.Fsid]bool{}
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		free, id, err := c.m.statfs(dir)
		if err != nil || seen[id] {
			continue // a directory that is not made yet lacks no space
		}
		seen[id] = true
		subject := dir + " (" + dirs[dir] + ")"
		switch {
		case free.percent < fullPercent || free.bytes < fullBytes:
			c.breaks(ReasonDiskFull, subject, fmt.Sprintf("less than %d %% or %d MiB of its disk are free, and no pod is admitted", fullPercent, fullBytes>>20), "free some space: logs, files; images that no pod needs the kubelet removes by itself")
		case free.percent < nearlyPercent:
			c.warns(ReasonDiskNearlyFull, subject, fmt.Sprintf("less than %d %% of its disk are free; below %d %% pods are evicted", nearlyPercent, fullPercent), "free some space: logs, files; images that no pod needs the kubelet removes by itself")
		}
	}
}

type freeSpace struct {
	percent float64
	bytes   uint64
}

func statfs(dir string) (freeSpace, unix.Fsid, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return freeSpace{}, unix.Fsid{}, err
	}
	f := freeSpace{percent: 100, bytes: st.Bavail * uint64(st.Bsize)}
	if st.Blocks > 0 {
		f.percent = 100 * float64(st.Bavail) / float64(st.Blocks)
	}
	return f, st.Fsid, nil
}

// identity looks at what the way back to the hub depends on. Pods do not.
func (c *check) identity() {
	cert := c.m.cfg.Certificate()
	if cert == nil {
		return
	}
	now := c.m.cfg.Clock()
	life := cert.NotAfter.Sub(cert.NotBefore)
	switch left := cert.NotAfter.Sub(now); {
	case now.Before(cert.NotBefore.Add(-time.Hour)):
		c.warns(ReasonClockWrong, "node", "its clock is before its certificate's first day", "set the clock (timedatectl set-time) or let it be synchronised")
	case left < life/10:
		c.warns(ReasonCertificateExpires, "node", "its certificate ends at "+cert.NotAfter.UTC().Format(time.RFC3339), "connect it to the hub, which renews the certificate")
	}
}
