package autonomy

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/skerry-io/skerry/edgecore/store"
	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// have is a runtime with these images.
type have struct {
	images []string
	err    error
}

func (h *have) Missing(_ context.Context, refs []string) (missing []string, err error) {
	for _, r := range refs {
		if !slices.Contains(h.images, r) {
			missing = append(missing, r)
		}
	}
	return missing, h.err
}
func (h *have) Filesystems(context.Context) ([]string, error) { return []string{"/images"}, nil }
func (h *have) SandboxImage(context.Context) string           { return "pause" }

type rig struct {
	*Monitor
	store  *store.Store
	images *have
	link   atomic.Pointer[Link]
	free   map[string]freeSpace // by directory
	cert   *x509.Certificate
	now    time.Time
}

func newRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	s, err := store.Open(store.Config{Path: filepath.Join(t.TempDir(), "store.db")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r := &rig{store: s, images: &have{images: []string{"pause", "app"}}, free: map[string]freeSpace{}, now: time.Now()}
	r.link.Store(&Link{Connected: true, Since: r.now})
	cfg := Config{
		Store: s, NodeName: "edge-1", Images: r.images, Link: func() Link { return *r.link.Load() },
		Certificate: func() *x509.Certificate { return r.cert }, Dirs: map[string]string{"store": "/store"},
		Settle: time.Millisecond, Spare: time.Nanosecond, Clock: func() time.Time { return r.now },
	}
	if change != nil {
		change(&cfg)
	}
	if r.Monitor, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	r.statfs = func(dir string) (freeSpace, unix.Fsid, error) {
		f, ok := r.free[dir]
		if !ok {
			return freeSpace{}, unix.Fsid{}, errors.New("no such directory")
		}
		return f, unix.Fsid{Val: [2]int32{int32(len(dir))}}, nil
	}
	return r
}

func (r *rig) put(t *testing.T, resource, namespace, name string, obj any) {
	t.Helper()
	body, err := json.Marshal(obj)
	if err != nil {
		t.Fatal(err)
	}
	err = r.store.ApplyDelta(t.Context(), store.Delta{Synced: "1", Upserts: []store.Upsert{{
		Key: store.Key{Resource: resource, Namespace: namespace, Name: name}, UID: "uid-" + name, Rev: "1", Body: body}}})
	if err != nil {
		t.Fatal(err)
	}
}

func (r *rig) synced(t *testing.T) {
	t.Helper()
	if err := r.store.SetSynced(t.Context(), "1"); err != nil {
		t.Fatal(err)
	}
}

func env(from corev1.EnvVarSource) corev1.PodSpec {
	return corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "app", Env: []corev1.EnvVar{{Name: "E", ValueFrom: &from}}}}}
}

func volume(v corev1.VolumeSource) corev1.PodSpec {
	return corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "app"}}, Volumes: []corev1.Volume{{Name: "v", VolumeSource: v}}}
}

func projected(s corev1.VolumeProjection) corev1.PodSpec {
	return volume(corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{s}}})
}

func claim(name string) corev1.PodSpec {
	return volume(corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}})
}

func TestWhatAPodNeeds(t *testing.T) {
	local := func(name string) corev1.LocalObjectReference { return corev1.LocalObjectReference{Name: name} }
	for name, c := range map[string]struct {
		spec   corev1.PodSpec
		strict bool
		csi    bool
		want   string // reason; empty: nothing is wrong
		warns  bool
	}{
		"nothing":             {spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "app"}}}},
		"an image":            {spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "other"}}}, want: ReasonImageMissing},
		"an init image":       {spec: corev1.PodSpec{InitContainers: []corev1.Container{{Image: "other"}}}, want: ReasonImageMissing},
		"an image volume":     {spec: volume(corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: "other"}}), want: ReasonImageMissing},
		"policy Always":       {spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "app", ImagePullPolicy: corev1.PullAlways}}}},
		"strict":              {spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "app", ImagePullPolicy: corev1.PullAlways}}}, strict: true, want: ReasonPullPolicyAlways},
		"a Secret":            {spec: env(corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local("none"), Key: "k"}}), want: ReasonSecretMissing},
		"a key":               {spec: env(corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local("secret"), Key: "none"}}), want: ReasonSecretMissing},
		"a key it has":        {spec: env(corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local("secret"), Key: "k"}})},
		"an optional key":     {spec: env(corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local("none"), Key: "k", Optional: ptr.To(true)}})},
		"a ConfigMap":         {spec: env(corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: local("none"), Key: "k"}}), want: ReasonConfigMapMissing},
		"all of a Secret":     {spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "app", EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: local("none")}}}}}}, want: ReasonSecretMissing},
		"a Secret volume":     {spec: volume(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "none"}}), want: ReasonSecretMissing},
		"an optional volume":  {spec: volume(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "none", Optional: ptr.To(true)}})},
		"an item":             {spec: volume(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: local("config"), Items: []corev1.KeyToPath{{Key: "none"}}}}), want: ReasonConfigMapMissing},
		"a binary item":       {spec: volume(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: local("config"), Items: []corev1.KeyToPath{{Key: "b"}}}})},
		"a projected Secret":  {spec: projected(corev1.VolumeProjection{Secret: &corev1.SecretProjection{LocalObjectReference: local("none")}}), want: ReasonSecretMissing},
		"its own token":       {spec: projected(corev1.VolumeProjection{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}})},
		"a token for others":  {spec: projected(corev1.VolumeProjection{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "vault"}}), want: ReasonTokenForOthers, warns: true},
		"a trust bundle":      {spec: projected(corev1.VolumeProjection{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{}}), want: ReasonNeedsCloud},
		"a pull secret":       {spec: corev1.PodSpec{ImagePullSecrets: []corev1.LocalObjectReference{local("none")}}, want: ReasonPullSecretMissing, warns: true},
		"a runtime class":     {spec: corev1.PodSpec{RuntimeClassName: ptr.To("none")}, want: ReasonRuntimeClassMissing},
		"one it has":          {spec: corev1.PodSpec{RuntimeClassName: ptr.To("class")}},
		"resource claims":     {spec: corev1.PodSpec{ResourceClaims: []corev1.PodResourceClaim{{Name: "r"}}}, want: ReasonNeedsCloud},
		"a claim":             {spec: claim("none"), want: ReasonVolumeMissing},
		"an unbound claim":    {spec: claim("unbound"), want: ReasonVolumeMissing},
		"a local volume":      {spec: claim("local")},
		"a CSI volume":        {spec: claim("csi"), want: ReasonVolumeNeedsCloud},
		"to be attached":      {spec: claim("csi"), csi: true, want: ReasonVolumeNeedsCloud},
		"not to be attached":  {spec: claim("csi-local"), csi: true},
		"an ephemeral volume": {spec: volume(corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}), want: ReasonVolumeMissing},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(cfg *Config) { cfg.StrictPull, cfg.CSI = c.strict, c.csi })
			r.put(t, "secrets", "ns", "secret", corev1.Secret{Data: map[string][]byte{"k": nil}})
			r.put(t, "configmaps", "ns", "config", corev1.ConfigMap{Data: map[string]string{"k": ""}, BinaryData: map[string][]byte{"b": nil}})
			r.put(t, "runtimeclasses", "", "class", nodev1.RuntimeClass{})
			for pvc, pv := range map[string]corev1.PersistentVolumeSource{
				"local":     {Local: &corev1.LocalVolumeSource{}},
				"csi":       {CSI: &corev1.CSIPersistentVolumeSource{Driver: "attaches"}},
				"csi-local": {CSI: &corev1.CSIPersistentVolumeSource{Driver: "local"}},
			} {
				r.put(t, "persistentvolumeclaims", "ns", pvc, corev1.PersistentVolumeClaim{Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv-" + pvc}})
				r.put(t, "persistentvolumes", "", "pv-"+pvc, corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: pv}})
			}
			r.put(t, "persistentvolumeclaims", "ns", "unbound", corev1.PersistentVolumeClaim{})
			r.put(t, "csidrivers", "", "local", storagev1.CSIDriver{Spec: storagev1.CSIDriverSpec{AttachRequired: ptr.To(false)}})
			r.put(t, "pods", "ns", "p", corev1.Pod{Spec: c.spec})
			r.put(t, "pods", "ns", "ended", corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "gone"}}}, Status: corev1.PodStatus{Phase: corev1.PodFailed}})

			got := r.Check(t.Context())
			if c.want == "" {
				if !got.Ready || len(got.Findings) > 0 || got.Pods != 1 {
					t.Errorf("%+v", got)
				}
				return
			}
			if len(got.Findings) != 1 || got.Findings[0].Reason != c.want || got.Findings[0].Breaks == c.warns || got.Ready != c.warns || got.Findings[0].Remedy == "" {
				t.Fatalf("%+v, want %s", got, c.want)
			}
			if got.Findings[0].Subject != "pod ns/p" {
				t.Errorf("about %s", got.Findings[0].Subject)
			}
		})
	}
}

func TestWhatTheNodeNeeds(t *testing.T) {
	reasons := func(r *rig) string {
		var all []string
		for _, f := range r.Check(t.Context()).Findings {
			all = append(all, fmt.Sprintf("%s:%v", f.Reason, f.Breaks))
		}
		return strings.Join(all, " ")
	}
	r := newRig(t, nil)
	if got := reasons(r); got != "NotSynced:true" {
		t.Errorf("before the first sync: %s", got)
	}
	r.synced(t)
	if got := reasons(r); got != "" {
		t.Errorf("with nothing to run: %s", got)
	}
	r.free["/store"], r.free["/images"] = freeSpace{50, 1 << 30}, freeSpace{7, 1 << 30}
	if got := reasons(r); got != "DiskNearlyFull:false" {
		t.Errorf("images nearly full: %s", got)
	}
	r.free["/store"] = freeSpace{50, 1 << 20}
	if got := reasons(r); got != "DiskFull:true DiskNearlyFull:false" {
		t.Errorf("store full: %s", got)
	}
	r.free = nil
	r.images.err = errors.New("connection refused")
	if got := reasons(r); got != "RuntimeUnknown:false" {
		t.Errorf("no runtime: %s", got)
	}
	r.images.err = nil
	r.cert = &x509.Certificate{NotBefore: r.now.Add(-99 * time.Hour), NotAfter: r.now.Add(time.Hour)}
	if got := reasons(r); got != "CertificateExpires:false" {
		t.Errorf("certificate: %s", got)
	}
	r.cert = &x509.Certificate{NotBefore: r.now.Add(1000 * time.Hour), NotAfter: r.now.Add(2000 * time.Hour)}
	if got := reasons(r); got != "ClockWrong:false" {
		t.Errorf("clock: %s", got)
	}
	r.cert = nil
	r.put(t, "nodes", "", "edge-1", corev1.Node{Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue}}}})
	if got := reasons(r); got != "DiskFull:true" {
		t.Errorf("disk pressure: %s", got)
	}
}

// A limit on the size of files stands in for a full disk. It holds for a whole
// process, so this is one of its own.
func TestADiskThatTakesNoWritesIsTold(t *testing.T) {
	if os.Getenv("SKERRY_AUTONOMY_FULL") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), "SKERRY_AUTONOMY_FULL=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	r := newRig(t, nil)
	r.synced(t)
	signal.Ignore(syscall.SIGXFSZ)
	var old syscall.Rlimit
	if err := errors.Join(syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old), syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 1, Max: old.Max})); err != nil {
		t.Fatal(err)
	}
	if err := r.store.SetSynced(t.Context(), "2"); err == nil {
		t.Fatal("a disk without room took a write")
	}
	got := r.Check(t.Context())
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if got.Ready || got.Findings[0].Reason != ReasonStoreTrouble {
		t.Errorf("%+v", got)
	}
}

func TestAMessageNamesTheFirstFew(t *testing.T) {
	r := Report{}
	for i := range 9 {
		r.Findings = append(r.Findings, Finding{true, ReasonImageMissing, fmt.Sprintf("pod ns/p%d", 8-i), "image x is not on this node", "-"}, Finding{false, ReasonTokenForOthers, "pod ns/q", "its token", "-"})
	}
	r.finish()
	reason, message := r.words()
	if reason != ReasonImageMissing || message != "would not come back as it is: pod ns/p0: image x is not on this node; pod ns/p1: image x is not on this node; pod ns/p2: image x is not on this node; and 6 more, see edgecore status" {
		t.Errorf("%s: %s", reason, message)
	}
	if r.Breaking() != 9 || r.Warnings() != 1 {
		t.Errorf("%d break, %d warn", r.Breaking(), r.Warnings())
	}
}

func (r *rig) condition(t *testing.T, typ string) (c corev1.NodeCondition) {
	t.Helper()
	o, ok := r.store.Get(store.Key{Resource: "nodes", Name: "edge-1"})
	var n corev1.Node
	if !ok || json.Unmarshal(o.Body, &n) != nil {
		t.Fatal("no Node")
	}
	for _, have := range n.Status.Conditions {
		if string(have.Type) == typ {
			c = have
		}
	}
	return c
}

func (r *rig) await(t *testing.T, typ string, is func(c corev1.NodeCondition) bool) corev1.NodeCondition {
	t.Helper()
	for range 1000 {
		if c := r.condition(t, typ); is(c) {
			return c
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%+v", r.condition(t, typ))
	return corev1.NodeCondition{}
}

func TestTheNodeTells(t *testing.T) {
	r := newRig(t, nil)
	r.put(t, "nodes", "", "edge-1", map[string]any{"status": map[string]any{
		"conditions": []any{map[string]any{"type": "Ready", "status": "True", "novel": 1}}, "novel": "kept"}})
	r.put(t, "pods", "ns", "p", corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "app"}}}})
	r.cfg.Conditions = func() []corev1.NodeCondition {
		return []corev1.NodeCondition{{Type: "Other", Status: corev1.ConditionTrue, Reason: "AsToldElsewhere", Message: "fine"}}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	c := r.await(t, edgeapi.ConditionAutonomyReady, func(c corev1.NodeCondition) bool { return c.Status == corev1.ConditionTrue })
	if c.Reason != "AllIsHere" || c.LastTransitionTime.IsZero() {
		t.Errorf("%+v", c)
	}
	r.put(t, "pods", "ns", "q", corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Image: "other"}}}})
	c = r.await(t, edgeapi.ConditionAutonomyReady, func(c corev1.NodeCondition) bool { return c.Status == corev1.ConditionFalse })
	if c.Reason != ReasonImageMissing || !strings.Contains(c.Message, "pod ns/q: image other is not on this node") {
		t.Errorf("%+v", c)
	}
	if r.condition(t, "Ready").Status != "True" {
		t.Error("Ready is gone")
	}
	if c := r.condition(t, "Other"); c.Reason != "AsToldElsewhere" || c.LastTransitionTime.IsZero() {
		t.Errorf("another part's condition: %+v", c)
	}
	o, _ := r.store.Get(store.Key{Resource: "nodes", Name: "edge-1"})
	for _, want := range []string{`"novel":1`, `"novel":"kept"`} {
		if !strings.Contains(string(o.Body), want) {
			t.Errorf("%s is lost from %s", want, o.Body)
		}
	}
	if r.store.Outbox().Depth() != 1 {
		t.Errorf("%d entries wait for the cloud", r.store.Outbox().Depth())
	}
	if got := r.condition(t, edgeapi.ConditionConnected); got.Status != corev1.ConditionTrue {
		t.Errorf("%+v", got)
	}
}

func TestTheLinksWordsChangeSeldom(t *testing.T) {
	r := newRig(t, nil)
	r.put(t, "nodes", "", "edge-1", corev1.Node{})
	s := scribe{m: r.Monitor}
	since, sync := time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC), time.Date(2026, 11, 20, 9, 59, 0, 0, time.UTC)
	write := func(l Link) (commits uint64) {
		r.link.Store(&l)
		before := r.store.Commits()
		s.wrote = time.Time{}
		s.write(t.Context(), Report{})
		return r.store.Commits() - before
	}
	away := func(outbox int) Link { return Link{Since: since, LastSync: sync, Outbox: outbox} }
	if n := write(away(0)); n != 1 {
		t.Errorf("%d commits for the loss of the link", n)
	}
	writes := uint64(0)
	for n := range 2000 {
		writes += write(away(n))
		writes += write(away(n / 2))
	}
	if writes != 4 { // fewer than 10, 100, 1000, 10000
		t.Errorf("%d commits while the outbox grew to 2000", writes)
	}
	c := r.condition(t, edgeapi.ConditionConnected)
	want := "no tunnel to the hub since 2026-11-20T10:00:00Z; last in step with the cloud at 2026-11-20T09:59:00Z; fewer than 10000 changes wait to be sent"
	if c.Status != corev1.ConditionFalse || c.Message != want || !c.LastTransitionTime.Equal(ptr.To(metav1.NewTime(since))) {
		t.Errorf("%+v", c)
	}
	if r.store.Outbox().Depth() != 0 {
		t.Error("the node's view of its link is to go up")
	}
	write(Link{Since: since, LastSync: sync, Drill: true})
	if c := r.condition(t, edgeapi.ConditionConnected); c.Reason != "Drill" {
		t.Errorf("%+v", c)
	}

	// A link that flaps is told of at most once in the spare time.
	r.cfg.Spare = time.Hour
	s.wrote = time.Now()
	before := r.store.Commits()
	for i := range 100 {
		r.link.Store(&Link{Connected: i%2 == 0, Since: since.Add(time.Duration(i) * time.Second)})
		s.write(t.Context(), Report{})
	}
	if n := r.store.Commits() - before; n != 0 {
		t.Errorf("%d commits of a flapping link", n)
	}
}

func FuzzReplaceConditions(f *testing.F) {
	f.Add([]byte(`{"status":{"conditions":[{"type":"AutonomyReady","status":"True"}]}}`))
	f.Add([]byte(`{"status":null}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		want := []corev1.NodeCondition{{Type: edgeapi.ConditionAutonomyReady, Status: corev1.ConditionFalse, Reason: "R", Message: "m"}}
		out, _, differs, err := replaceConditions(body, want, metav1.Now())
		if err != nil || !differs {
			return
		}
		if _, _, again, err := replaceConditions(out, want, metav1.Now()); err != nil || again {
			t.Errorf("%s: not settled: %v %v", out, again, err)
		}
	})
}

func BenchmarkCheck30Pods(b *testing.B) {
	s, err := store.Open(store.Config{Path: filepath.Join(b.TempDir(), "store.db")})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	var d store.Delta
	for i := range 30 {
		body, _ := json.Marshal(corev1.Pod{Spec: env(corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}, Key: "k", Optional: ptr.To(true)}})})
		d.Upserts = append(d.Upserts, store.Upsert{Key: store.Key{Resource: "pods", Namespace: "ns", Name: fmt.Sprint(i)}, UID: fmt.Sprint(i), Rev: "1", Body: body})
	}
	if err := s.ApplyDelta(b.Context(), d); err != nil {
		b.Fatal(err)
	}
	m, err := New(Config{Store: s, NodeName: "n", Images: &have{images: []string{"app", "pause"}}, Link: func() Link { return Link{} }, Certificate: func() *x509.Certificate { return nil }})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		m.Check(b.Context())
	}
}
