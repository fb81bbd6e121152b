package images

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/images/pullmanager"

	"github.com/skerry-io/skerry/edgecore/store"
)

// fakeRuntime is the part of a runtime that holds images.
type fakeRuntime struct {
	runtimeapi.UnimplementedImageServiceServer
	runtimeapi.UnimplementedRuntimeServiceServer

	images  []*runtimeapi.Image
	removed []string
	pull    func(ctx context.Context) error
	pulls   atomic.Int32
}

func (f *fakeRuntime) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	return &runtimeapi.StatusResponse{Info: map[string]string{"config": `{"sandboxImage":"registry.k8s.io/pause:3.6"}`}}, nil
}

func (f *fakeRuntime) ListImages(context.Context, *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	return &runtimeapi.ListImagesResponse{Images: f.images}, nil
}

func (f *fakeRuntime) StreamImages(_ *runtimeapi.StreamImagesRequest, out grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	for _, image := range f.images {
		if err := out.Send(&runtimeapi.StreamImagesResponse{Images: []*runtimeapi.Image{image}}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeRuntime) ImageStatus(_ context.Context, req *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	for _, i := range f.images {
		if i.Id == req.Image.Image || slices.Contains(i.RepoTags, req.Image.Image) || slices.Contains(i.RepoDigests, req.Image.Image) {
			return &runtimeapi.ImageStatusResponse{Image: i}, nil
		}
	}
	return &runtimeapi.ImageStatusResponse{}, nil
}

func (f *fakeRuntime) RemoveImage(_ context.Context, req *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	f.removed = append(f.removed, req.Image.Image)
	return &runtimeapi.RemoveImageResponse{}, nil
}

func (f *fakeRuntime) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: "/var/lib/containerd"}}}}, nil
}

func (f *fakeRuntime) PullImage(ctx context.Context, _ *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	f.pulls.Add(1)
	if f.pull != nil {
		if err := f.pull(ctx); err != nil {
			return nil, err
		}
	}
	return &runtimeapi.PullImageResponse{ImageRef: "sha256:new"}, nil
}

// rig is a proxy between a client and a fake runtime, with a real store.
type rig struct {
	*fakeRuntime
	store  *store.Store
	proxy  *Proxy
	client runtimeapi.ImageServiceClient
	root   string // of the kubelet
	link   atomic.Pointer[Link]
}

func newRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "img") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{fakeRuntime: &fakeRuntime{}, root: filepath.Join(dir, "kubelet")}
	if r.store, err = store.Open(store.Config{Path: filepath.Join(dir, "store.db")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.store.Close() })
	r.link.Store(&Link{Connected: true, Since: time.Now()})

	l, err := net.Listen("unix", filepath.Join(dir, "runtime.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	runtimeapi.RegisterImageServiceServer(srv, r.fakeRuntime)
	runtimeapi.RegisterRuntimeServiceServer(srv, r.fakeRuntime)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-served })

	cfg := Config{
		Runtime: "unix://" + l.Addr().String(), Socket: filepath.Join(dir, "images.sock"), Store: r.store,
		Link: func() Link { return *r.link.Load() }, Access: AccessConfig{RecordsDir: r.root},
		Patience: 50 * time.Millisecond,
	}
	if change != nil {
		change(&cfg)
	}
	if r.proxy, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	if err := r.proxy.Listen(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(cfg.Socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("socket: %v %v", info.Mode(), err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.proxy.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient(r.proxy.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	r.client = runtimeapi.NewImageServiceClient(conn)
	return r
}

func (r *rig) put(t *testing.T, resource, namespace, name string, obj any) {
	t.Helper()
	body, err := json.Marshal(obj)
	if err != nil {
		t.Fatal(err)
	}
	err = r.store.ApplyDelta(t.Context(), store.Delta{Upserts: []store.Upsert{{
		Key: store.Key{Resource: resource, Namespace: namespace, Name: name}, UID: "uid-" + name, Rev: "1", Body: body}}})
	if err != nil {
		t.Fatal(err)
	}
}

func (r *rig) pod(t *testing.T, name string, spec corev1.PodSpec, phase corev1.PodPhase) {
	t.Helper()
	r.put(t, "pods", "ns", name, corev1.Pod{Spec: spec, Status: corev1.PodStatus{Phase: phase}})
}

func image(id string, names ...string) *runtimeapi.Image {
	i := &runtimeapi.Image{Id: "sha256:" + id}
	for _, n := range names {
		if strings.Contains(n, "@") {
			i.RepoDigests = append(i.RepoDigests, n)
		} else {
			i.RepoTags = append(i.RepoTags, n)
		}
	}
	return i
}

func containers(refs ...string) (cs []corev1.Container) {
	for _, r := range refs {
		cs = append(cs, corev1.Container{Image: r})
	}
	return cs
}

func TestWhatPodsNeedIsPinnedAndStays(t *testing.T) {
	hash := func(c string) string { return strings.Repeat(c, 64) }
	r := newRig(t, nil)
	needed := []*runtimeapi.Image{
		image(hash("a"), "docker.io/library/busybox:latest"),
		image(hash("b"), "registry.example/init:2", "registry.example/init@sha256:"+hash("1")),
		image(hash("c"), "registry.example/bydigest@sha256:"+hash("2")),
		image(hash("d"), "registry.example/byid:1"),
		image(hash("e"), "registry.example/debug:1"),
		image(hash("f"), "registry.example/volume:1"),
		image(hash("9"), "registry.k8s.io/pause:3.6"),
		image(hash("8"), "registry.example/waits:1"),
	}
	free := []*runtimeapi.Image{
		image(hash("3"), "registry.example/init:1"),
		image(hash("4"), "registry.example/done:1"),
		image(hash("5"), "registry.example/bydigest:latest", "registry.example/bydigest@sha256:"+hash("6")),
	}
	r.images = slices.Concat(needed, free)
	r.pod(t, "p", corev1.PodSpec{
		InitContainers: containers("registry.example/init:2"),
		Containers:     containers("busybox", "registry.example/bydigest:latest@sha256:"+hash("2"), "sha256:"+hash("d")),
		EphemeralContainers: []corev1.EphemeralContainer{{
			EphemeralContainerCommon: corev1.EphemeralContainerCommon{Image: "registry.example/debug:1"}}},
		Volumes: []corev1.Volume{{VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: "registry.example/volume:1"}}}},
	}, corev1.PodRunning)
	r.pod(t, "waits", corev1.PodSpec{Containers: containers("registry.example/waits:1")}, corev1.PodPending)
	r.pod(t, "done", corev1.PodSpec{Containers: containers("registry.example/done:1")}, corev1.PodSucceeded)

	list, err := r.client.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := r.client.StreamImages(t.Context(), &runtimeapi.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i, got := range list.Images {
		streamed, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if want := i < len(needed); got.Pinned != want || streamed.Images[0].Pinned != want {
			t.Errorf("%v %v: pinned %v, streamed %v, want %v", got.RepoTags, got.RepoDigests, got.Pinned, streamed.Images[0].Pinned, want)
		}
		_, err = r.client.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: got.Id}})
		if want := i < len(needed); (status.Code(err) == codes.FailedPrecondition) != want {
			t.Errorf("remove %v %v: %v", got.RepoTags, got.RepoDigests, err)
		}
	}
	if len(r.removed) != len(free) {
		t.Errorf("removed %v", r.removed)
	}

	// A pod that is gone needs nothing.
	err = r.store.Local(t.Context(), func(tx *store.Tx) error {
		_, err := tx.Delete(store.Key{Resource: "pods", Namespace: "ns", Name: "waits"})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "registry.example/waits:1"}}); err != nil {
		t.Error(err)
	}
}

func pullErr(text string) func(context.Context) error {
	return func(context.Context) error { return status.Error(codes.Unknown, text) }
}

func (r *rig) pullImage(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) (string, error) {
	resp, err := r.client.PullImage(ctx, &runtimeapi.PullImageRequest{
		Image: &runtimeapi.ImageSpec{Image: ref}, Auth: auth,
		SandboxConfig: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "ns", Name: "p"}},
	})
	return resp.GetImageRef(), err
}

// The texts are containerd's, of 1.6 and 2.0.
func TestOnlySilenceMakesAPullFallBack(t *testing.T) {
	const prefix = `failed to pull and unpack image "r.example/a:1": failed to resolve reference "r.example/a:1": `
	for text, want := range map[string]bool{
		prefix + `failed to do request: Head "https://r.example/v2/a/manifests/1": dial tcp: lookup r.example on 10.0.0.1:53: no such host`:                           true,
		prefix + `failed to do request: Head "https://r.example/v2/a/manifests/1": dial tcp 192.0.2.1:443: i/o timeout`:                                               true,
		prefix + `failed to do request: Head "https://r.example/v2/a/manifests/1": tls: failed to verify certificate: x509: certificate has expired or not yet valid`: true,
		prefix + `failed to authorize: failed to fetch anonymous token: Get "https://auth.example/token": dial tcp 192.0.2.1:443: connect: network is unreachable`:    true,
		prefix + `unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 503 Service Unavailable`:                                                 true,
		prefix + `unexpected status code [manifests 1]: 502 Bad Gateway`:                                                                                              true,
		prefix + `unexpected status code [manifests 1]: 401 Unauthorized`:                                                                                             false,
		prefix + `failed to authorize: failed to fetch oauth token: unexpected status: 401 Unauthorized`:                                                              false,
		prefix + `pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed`:               false,
		prefix + `unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 403 Forbidden`:                                                           false,
		prefix + `unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 429 Too Many Requests`:                                                   false,
		prefix + `unexpected media type text/html`:         false,
		`failed to extract layer: no space left on device`: false,
		`connection error: desc = "transport: Error while dialing: dial unix /run/containerd/containerd.sock: connect: connection refused"`: false,
	} {
		t.Run(text, func(t *testing.T) {
			r := newRig(t, nil)
			r.images = []*runtimeapi.Image{image("old", "r.example/a:1")}
			r.pull = pullErr(text)
			got, err := r.pullImage(t.Context(), "r.example/a:1", nil)
			if want && (err != nil || got != "sha256:old") || !want && (err == nil || !strings.Contains(err.Error(), text)) {
				t.Errorf("%q, %v; want to fall back: %v", got, err, want)
			}
		})
	}
	if outOfReach(status.Error(codes.NotFound, "failed to do request: not found")) {
		t.Error("NotFound is taken for silence")
	}
}

func TestTheNewestThatCanBeHad(t *testing.T) {
	r := newRig(t, nil)
	r.images = []*runtimeapi.Image{image("old", "r.example/a:1")}
	if got, err := r.pullImage(t.Context(), "r.example/a:1", nil); err != nil || got != "sha256:new" {
		t.Errorf("with its registry: %q, %v", got, err)
	}
	// Alone, with a link that swallows packets: once for all pods.
	r.link.Store(&Link{Since: time.Now().Add(-time.Hour)})
	r.pull = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	r.pulls.Store(0)
	for range 20 {
		if got, err := r.pullImage(t.Context(), "r.example/a:1", nil); err != nil || got != "sha256:old" {
			t.Fatalf("alone: %q, %v", got, err)
		}
	}
	if n := r.pulls.Load(); n != 1 {
		t.Errorf("the registry was tried %d times", n)
	}
	// The node was only starting: the link comes up under the pull.
	r = newRig(t, nil)
	r.images = []*runtimeapi.Image{image("old", "r.example/a:1")}
	r.link.Store(&Link{})
	r.pull = func(context.Context) error {
		r.link.Store(&Link{Connected: true})
		time.Sleep(100 * time.Millisecond) // a download, twice as long as the patience
		return nil
	}
	if got, err := r.pullImage(t.Context(), "r.example/a:1", nil); err != nil || got != "sha256:new" {
		t.Errorf("link up under the pull: %q, %v", got, err)
	}
	// A drill asks nobody.
	r.link.Store(&Link{Drill: true})
	r.pulls.Store(0)
	if got, err := r.pullImage(t.Context(), "r.example/a:1", nil); err != nil || got != "sha256:old" || r.pulls.Load() != 0 {
		t.Errorf("drill: %q, %v, %d pulls", got, err, r.pulls.Load())
	}
}

func TestWhatCannotBePulledIsTold(t *testing.T) {
	const unreachable = "failed to do request: dial tcp: lookup r.example: no such host"
	r := newRig(t, nil)
	r.pull = pullErr(unreachable)
	r.link.Store(&Link{Since: time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)})
	_, err := r.pullImage(t.Context(), "r.example/missing:1", nil)
	st := status.Convert(err)
	// The kubelet looks at the first word, of errors of this code only.
	if st.Code() != codes.Unknown || !strings.HasPrefix(st.Message(), "RegistryUnavailable: ") {
		t.Errorf("%v", err)
	}
	for _, want := range []string{"offline since 2026-11-20T10:00:00Z", "r.example/missing:1 is not on this node", "ctr -n k8s.io images import", unreachable} {
		if !strings.Contains(st.Message(), want) {
			t.Errorf("%q lacks %q", st.Message(), want)
		}
	}
	strict := newRig(t, func(c *Config) { c.NoFallback = true })
	strict.images = []*runtimeapi.Image{image("old", "r.example/a:1")}
	strict.pull = pullErr(unreachable)
	if got, err := strict.pullImage(t.Context(), "r.example/a:1", nil); err == nil || !strings.Contains(err.Error(), "images.localWhenUnreachable") {
		t.Errorf("without fallback: %q, %v", got, err)
	}
}

// pullSecret is a Secret with a registry's password, and the credentials as the
// kubelet shows them.
func pullSecret(name, password string) (corev1.Secret, *runtimeapi.AuthConfig) {
	text := fmt.Sprintf(`{"auths":{"r.example":{"auth":%q}}}`, base64.StdEncoding.EncodeToString([]byte("ada:"+password)))
	return corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name)},
		Type:       corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(text)},
	}, &runtimeapi.AuthConfig{Username: "ada", Password: password}
}

func TestAFallbackIsNoWayAroundCredentials(t *testing.T) {
	type request struct {
		auth *runtimeapi.AuthConfig
		want string // of the refusal; empty: allowed
	}
	good, shown := pullSecret("good", "difference engine")
	renewed, shownRenewed := pullSecret("good", "analytical engine")
	_, other := pullSecret("other", "guess")
	for name, c := range map[string]struct {
		record   *config.ImagePullCredentials
		policy   config.ImagePullCredentialsVerificationPolicy
		requests []request
	}{
		"imported":            {nil, "", []request{{nil, ""}, {other, ""}}},
		"imported, but":       {nil, config.AlwaysVerify, []request{{nil, "AlwaysVerify"}}},
		"public":              {&config.ImagePullCredentials{NodePodsAccessible: true}, "", []request{{nil, ""}, {other, ""}}},
		"private, no matter":  {&config.ImagePullCredentials{}, config.NeverVerify, []request{{nil, ""}}},
		"private, of nobody":  {&config.ImagePullCredentials{}, "", []request{{nil, "does not have"}, {other, "does not have"}}},
		"private":             {&config.ImagePullCredentials{KubernetesSecrets: []config.ImagePullSecret{{UID: "uid-good", Namespace: "ns", Name: "good", CredentialHash: hashOf(shown)}}}, "", []request{{shown, ""}, {nil, "does not have"}, {other, "does not have"}, {shownRenewed, ""}}},
		"private, of another": {&config.ImagePullCredentials{KubernetesSecrets: []config.ImagePullSecret{{UID: "uid-gone", Namespace: "ns", Name: "good", CredentialHash: hashOf(shown)}}}, "", []request{{shown, ""}, {shownRenewed, "does not have"}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(cfg *Config) { cfg.Access.Policy = c.policy })
			r.images = []*runtimeapi.Image{image("old", "r.example/a:1")}
			r.pull = pullErr("failed to do request: dial tcp: no such host")
			r.put(t, "secrets", "ns", good.Name, renewed)
			r.pod(t, "p", corev1.PodSpec{ImagePullSecrets: []corev1.LocalObjectReference{{Name: "good"}}, Containers: containers("r.example/a:1")}, corev1.PodRunning)
			if c.record != nil {
				kubeletPulled(t, r.root, "r.example/a:1", "sha256:old", c.record)
			}
			for _, q := range c.requests {
				got, err := r.pullImage(t.Context(), "r.example/a:1", q.auth)
				if q.want == "" && (err != nil || got != "sha256:old") || q.want != "" && (err == nil || !strings.Contains(err.Error(), q.want)) {
					t.Errorf("with %v: %q, %v; want %q", q.auth, got, err, q.want)
				}
			}
			if c.record != nil && !c.record.NodePodsAccessible && c.policy == "" {
				r.images = []*runtimeapi.Image{image("old", "r.example/alias:1")}
				if got, err := r.pullImage(t.Context(), "r.example/alias:1", shown); err == nil {
					t.Errorf("by another name: %q", got)
				}
			}
		})
	}
}

// kubeletPulled notes a pull as the kubelet does.
func kubeletPulled(t *testing.T, root, ref, id string, creds *config.ImagePullCredentials) {
	t.Helper()
	records, err := pullmanager.NewFSPullRecordsAccessor(klog.Background(), root)
	if err != nil {
		t.Fatal(err)
	}
	m, err := pullmanager.NewImagePullManager(t.Context(), records, pullmanager.NeverVerifyPreloadedPullPolicy(), nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	m.RecordImagePulled(t.Context(), ref, id, creds)
	if _, ok, err := records.GetImagePulledRecord(id); err != nil || !ok {
		t.Fatalf("not recorded: %v", err)
	}
}

func TestAChangeOfTheListIsTold(t *testing.T) {
	var told atomic.Int32
	r := newRig(t, func(cfg *Config) { cfg.Changed = func() { told.Add(1) } })
	list := func(want int32, images ...*runtimeapi.Image) {
		t.Helper()
		r.images = images
		if _, err := r.client.ListImages(t.Context(), &runtimeapi.ListImagesRequest{}); err != nil || told.Load() != want {
			t.Errorf("told %d times, want %d; %v", told.Load(), want, err)
		}
	}
	list(1, image("a", "a:1"), image("b"))
	list(1, image("b"), image("a", "a:1"))
	list(2, image("b"), image("a", "a:2"))
	list(3, image("a", "a:2"))
}

func TestTheRestIsTheRuntimes(t *testing.T) {
	r := newRig(t, nil)
	r.images = []*runtimeapi.Image{image("here", "docker.io/library/busybox:1")}
	if dirs, err := r.proxy.Filesystems(t.Context()); err != nil || !slices.Equal(dirs, []string{"/var/lib/containerd"}) {
		t.Errorf("%v %v", dirs, err)
	}
	if resp, err := r.client.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{}); err != nil || len(resp.ImageFilesystems) != 1 {
		t.Errorf("%v %v", resp, err)
	}
	missing, err := r.proxy.Missing(t.Context(), []string{"busybox:1", "busybox:2"})
	if err != nil || !slices.Equal(missing, []string{"busybox:2"}) {
		t.Errorf("missing %v %v", missing, err)
	}
}

func FuzzReferences(f *testing.F) {
	for _, s := range []string{"busybox", "a:1", "sha256:" + strings.Repeat("a", 64), "r.example:5000/a@sha256:" + strings.Repeat("b", 64), "", "@", "::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		n := needs{}
		n.add(ref, "pod")
		if ref != "" && n.user(ref, nil, nil) != "pod" {
			t.Errorf("%q is not found by its own name", ref)
		}
		withTag(ref)
		repository(ref)
		registryOf(ref)
	})
}

func FuzzSandboxImage(f *testing.F) {
	f.Add(`{"sandboxImage":"registry.k8s.io/pause:3.6"}`)
	f.Fuzz(func(t *testing.T, config string) { sandboxImageIn(config) })
}

// BenchmarkListImages is what the kubelet's look at 20 images costs with 30
// pods: with the proxy, and of the runtime itself.
func BenchmarkListImages(b *testing.B) {
	dir := b.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "r"))
	if err != nil {
		b.Fatal(err)
	}
	runtime := &fakeRuntime{}
	srv := grpc.NewServer()
	runtimeapi.RegisterImageServiceServer(srv, runtime)
	runtimeapi.RegisterRuntimeServiceServer(srv, runtime)
	go srv.Serve(l)
	defer srv.Stop()
	s, err := store.Open(store.Config{Path: filepath.Join(dir, "store.db")})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	var d store.Delta
	for i := range 30 {
		ref := fmt.Sprintf("registry.example/app-%d:1", i%20)
		runtime.images = append(runtime.images, image(strings.Repeat(fmt.Sprint(i%10), 64), ref))
		body, err := json.Marshal(corev1.Pod{Spec: corev1.PodSpec{Containers: containers(ref)}})
		if err != nil {
			b.Fatal(err)
		}
		d.Upserts = append(d.Upserts, store.Upsert{Key: store.Key{Resource: "pods", Namespace: "ns", Name: fmt.Sprint(i)}, UID: fmt.Sprint(i), Rev: "1", Body: body})
	}
	runtime.images = runtime.images[:20]
	if err := s.ApplyDelta(b.Context(), d); err != nil {
		b.Fatal(err)
	}
	p, err := New(Config{
		Runtime: "unix://" + l.Addr().String(), Socket: filepath.Join(dir, "p"), Store: s,
		Link: func() Link { return Link{} }, Access: AccessConfig{RecordsDir: dir},
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := p.Listen(); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	for name, endpoint := range map[string]string{"proxy": p.Endpoint(), "runtime": "unix://" + l.Addr().String()} {
		conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		client := runtimeapi.NewImageServiceClient(conn)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.ListImages(b.Context(), &runtimeapi.ListImagesRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
