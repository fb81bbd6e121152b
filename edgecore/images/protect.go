package images

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// needs are the references that must not be lost, with who needs them.
type needs map[string]string

// needed reads the node's pods. It does so for every list, each half a minute
// or so: a pod that was bound a moment ago counts.
func (p *Proxy) needed(ctx context.Context) needs {
	n := needs{}
	if s := p.sandboxImage(ctx); s != "" {
		n.add(s, "every pod's sandbox")
	}
	pods, _ := p.cfg.Store.List("pods", "")
	for _, o := range pods {
		var pod struct {
			Spec   corev1.PodSpec `json:"spec"`
			Status struct {
				Phase corev1.PodPhase `json:"phase"`
			} `json:"status"`
		}
		if err := json.Unmarshal(o.Body, &pod); err != nil {
			// The kubelet cannot read it either, and so runs nothing of it.
			p.log.Warn("a pod's images are not protected", "namespace", o.Namespace, "pod", o.Name, "err", err)
			continue
		}
		if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			continue // it never starts again
		}
		for _, ref := range References(&pod.Spec) {
			n.add(ref, "pod "+o.Namespace+"/"+o.Name)
		}
	}
	return n
}

// References are the images that a pod needs to start, each once.
func References(spec *corev1.PodSpec) []string {
	var refs []string
	seen := map[string]bool{}
	add := func(ref string) {
		if ref != "" && !seen[ref] {
			seen[ref] = true
			refs = append(refs, ref)
		}
	}
	for i := range spec.InitContainers {
		add(spec.InitContainers[i].Image)
	}
	for i := range spec.Containers {
		add(spec.Containers[i].Image)
	}
	for i := range spec.EphemeralContainers {
		add(spec.EphemeralContainers[i].Image)
	}
	for i := range spec.Volumes {
		if v := spec.Volumes[i].Image; v != nil {
			add(v.Reference)
		}
	}
	return refs
}

func (n needs) add(ref, user string) {
	for _, form := range forms(ref) {
		if _, known := n[form]; !known {
			n[form] = user
		}
	}
}

// user is who needs an image; empty when nobody does.
func (n needs) user(id string, tags, digests []string) string {
	for _, names := range [][]string{{id}, tags, digests} {
		for _, name := range names {
			for _, form := range forms(name) {
				if user, ok := n[form]; ok {
					return user
				}
			}
		}
	}
	return ""
}

// forms are the ways to write a reference under which needs and images meet: as
// it is, and as the runtime writes it in full (docker.io/library/…:latest). An
// image ID may come with and without its algorithm.
func forms(ref string) []string {
	if ref == "" {
		return nil
	}
	out := []string{strings.TrimPrefix(ref, "sha256:")}
	if named, err := reference.ParseDockerRef(ref); err == nil && named.String() != ref {
		out = append(out, named.String())
	}
	return out
}

// withTag is a reference as the kubelet asks the runtime for it.
func withTag(ref string) string {
	if named, err := reference.ParseDockerRef(ref); err == nil {
		return named.String()
	}
	return ref
}

// pin marks the images that are needed.
func (p *Proxy) pin(ctx context.Context, images []*runtimeapi.Image) {
	n := p.needed(ctx)
	for _, image := range images {
		if !image.Pinned && n.user(image.Id, image.RepoTags, image.RepoDigests) != "" {
			image.Pinned = true
		}
	}
}

// sandboxImage asks the runtime what it makes sandboxes from. containerd tells
// before 2.0; since 1.7 it pins the image itself.
func (p *Proxy) sandboxImage(ctx context.Context) string {
	p.mu.Lock()
	image, at := p.sandbox, p.sandboxAt
	p.mu.Unlock()
	if !at.IsZero() && time.Since(at) < sandboxPeriod {
		return image
	}
	resp, err := p.runtime.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		p.log.Debug("the runtime's sandbox image is not known", "err", err)
		return image
	}
	image = sandboxImageIn(resp.GetInfo()["config"])
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sandbox, p.sandboxAt = image, time.Now()
	return image
}

// sandboxImageIn reads containerd's CRI configuration as its status shows it.
func sandboxImageIn(config string) string {
	var c struct {
		SandboxImage string `json:"sandboxImage"`
	}
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return "" // another runtime
	}
	return c.SandboxImage
}
