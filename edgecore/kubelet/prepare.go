package kubelet

import (
	"fmt"
	"os"

	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/cm"
)

// prepareHost makes what the kubelet expects to exist.
func (k *Kubelet) prepareHost() error {
	for dir, mode := range map[string]os.FileMode{
		k.cfg.RootDir:       0o750,
		k.cfg.PodLogsDir:    0o755,
		k.cfg.StaticPodPath: 0o755,
	} {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, mode); err != nil {
			return fmt.Errorf("kubelet: make a directory: %w; make its parent writable or choose another one", err)
		}
	}
	return k.makeCgroupRoot()
}

// makeCgroupRoot makes the cgroup the pods live below. The kubelet makes its
// own cgroups under it but refuses a root that is not there.
func (k *Kubelet) makeCgroupRoot() error {
	if k.cfg.CgroupRoot == "" || k.cfg.CgroupRoot == "/" {
		return nil
	}
	subsystems, err := cm.GetCgroupSubsystems()
	if err != nil {
		return fmt.Errorf("kubelet: read the cgroup hierarchies: %w", err)
	}
	manager := cm.NewCgroupManager(klog.Background(), subsystems, k.settings.CgroupDriver)
	name := cm.ParseCgroupfsToCgroupName(k.cfg.CgroupRoot)
	if manager.Exists(name) {
		return nil
	}
	if err := manager.Create(klog.Background(), &cm.CgroupConfig{Name: name, ResourceParameters: &cm.ResourceConfig{}}); err != nil {
		return fmt.Errorf("kubelet: make cgroup %s: %w; make it yourself or change kubelet.cgroupRoot", k.cfg.CgroupRoot, err)
	}
	return nil
}
