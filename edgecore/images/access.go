package images

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/credentialprovider"
	"k8s.io/kubernetes/pkg/credentialprovider/secrets"
	"k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/images/pullmanager"

	"github.com/skerry-io/skerry/edgecore/store"
)

// AccessConfig is how the kubelet of this node is set up to judge who may use
// an image that is here.
type AccessConfig struct {
	// RecordsDir is the kubelet's root directory, where it notes with which
	// credentials it pulled what. Required.
	RecordsDir string
	// Policy and Preloaded are imagePullCredentialsVerificationPolicy and
	// preloadedImagesVerificationAllowlist of the kubelet's configuration.
	Policy    config.ImagePullCredentialsVerificationPolicy
	Preloaded []string
}

// access answers as the kubelet would for imagePullPolicy IfNotPresent: an
// image that it pulled with credentials is for pods that have them, or a later
// version of the Secret that held them.
//
// The kubelet's own function cannot be asked: by the time of the pull it has
// noted its intent, which it takes for an image of unknown origin.
type access struct {
	cfg    AccessConfig
	store  *store.Store
	verify pullmanager.ImagePullPolicyEnforcer

	// The kubelet makes the directory when it starts, before it pulls anything.
	records func() (pullmanager.PullRecordsAccessor, error)
}

func newAccess(cfg AccessConfig, s *store.Store) (*access, error) {
	if cfg.RecordsDir == "" {
		return nil, errors.New("images: Access.RecordsDir is required")
	}
	if cfg.Policy == "" {
		cfg.Policy = config.NeverVerifyPreloadedImages
	}
	verify, err := pullmanager.NewImagePullCredentialVerificationPolicy(cfg.Policy, cfg.Preloaded)
	if err != nil {
		return nil, fmt.Errorf("images: credential verification: %w; correct kubelet.config", err)
	}
	return &access{cfg: cfg, store: s, verify: verify, records: sync.OnceValues(func() (pullmanager.PullRecordsAccessor, error) {
		return pullmanager.NewFSPullRecordsAccessor(klog.Background(), cfg.RecordsDir)
	})}, nil
}

// refuses says why a pod may not have an image that is here; empty if it may.
func (a *access) refuses(ref, imageID string, auth *runtimeapi.AuthConfig, pod *runtimeapi.PodSandboxMetadata) string {
	records, err := a.records()
	if err != nil {
		return "the kubelet's record of its credentials cannot be read: " + err.Error()
	}
	record, pulled, err := records.GetImagePulledRecord(imageID)
	if err != nil {
		return "the kubelet's record of its credentials cannot be read: " + err.Error()
	}
	if !a.verify.RequireCredentialVerificationForImage(ref, pulled) {
		return ""
	}
	const mismatch = "it was pulled with credentials that this pod does not have"
	if !pulled {
		return "imagePullCredentialsVerificationPolicy is " + string(a.cfg.Policy)
	}
	known, ok := record.CredentialMapping[repository(ref)]
	switch {
	case !ok:
		return "it was pulled under another name"
	case known.NodePodsAccessible:
		return ""
	case auth == nil || len(known.KubernetesSecrets) == 0:
		return mismatch
	}
	shown := hashOf(auth)
	for _, s := range known.KubernetesSecrets {
		if s.CredentialHash != "" && s.CredentialHash == shown {
			return ""
		}
	}
	// The Secret may have been renewed since.
	for _, s := range a.pullSecrets(pod) {
		was := func(k config.ImagePullSecret) bool {
			return k.UID == string(s.UID) && k.Namespace == s.Namespace && k.Name == s.Name
		}
		if containsSecret(known.KubernetesSecrets, was) && holds(s, ref, shown) {
			return ""
		}
	}
	return mismatch
}

func containsSecret(all []config.ImagePullSecret, is func(config.ImagePullSecret) bool) bool {
	for _, s := range all {
		if is(s) {
			return true
		}
	}
	return false
}

// pullSecrets are a pod's, as far as the node has them.
func (a *access) pullSecrets(meta *runtimeapi.PodSandboxMetadata) []corev1.Secret {
	o, ok := a.store.Get(store.Key{Resource: "pods", Namespace: meta.GetNamespace(), Name: meta.GetName()})
	if !ok {
		return nil
	}
	var pod corev1.Pod
	if err := json.Unmarshal(o.Body, &pod); err != nil {
		return nil
	}
	var all []corev1.Secret
	for _, ref := range pod.Spec.ImagePullSecrets {
		o, ok := a.store.Get(store.Key{Resource: "secrets", Namespace: pod.Namespace, Name: ref.Name})
		if !ok {
			continue
		}
		var s corev1.Secret
		if err := json.Unmarshal(o.Body, &s); err != nil {
			continue // then the kubelet has not read it either
		}
		all = append(all, s)
	}
	return all
}

// holds tells whether a Secret has the credentials of that hash for the image.
func holds(s corev1.Secret, ref, hash string) bool {
	ring, err := secrets.MakeDockerKeyring([]corev1.Secret{s}, credentialprovider.UnionDockerKeyring{})
	if err != nil {
		return false
	}
	found, _ := ring.Lookup(repository(ref))
	for _, c := range found {
		if hash != "" && hashOf(&runtimeapi.AuthConfig{
			Username: c.Username, Password: c.Password, Auth: c.Auth, ServerAddress: c.ServerAddress,
			IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
		}) == hash {
			return true
		}
	}
	return false
}

// hashOf is the kubelet's hash of credentials.
func hashOf(a *runtimeapi.AuthConfig) string {
	return credentialprovider.NewTrackedAuthConfig(&credentialprovider.AuthConfig{
		Username: a.Username, Password: a.Password, Auth: a.Auth, ServerAddress: a.ServerAddress,
		IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
	}, nil).AuthConfigHash
}

// repository is a reference without tag and digest, as the kubelet's records
// write it.
func repository(ref string) string {
	parsed, err := reference.Parse(ref)
	if err != nil {
		return ref
	}
	if d, ok := parsed.(reference.Digested); ok {
		ref = strings.TrimSuffix(ref, "@"+d.Digest().String())
	}
	if t, ok := parsed.(reference.Tagged); ok {
		ref = strings.TrimSuffix(ref, ":"+t.Tag())
	}
	return ref
}
