package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/image"
	"github.com/skerry-io/skerry/e2e/machine"
)

const registryConfig = `version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: %[1]s/data}}
http: {addr: "0.0.0.0:5000"}
auth: {htpasswd: {realm: skerry, path: %[1]s/htpasswd}}
`

// startRegistry runs a real registry that wants a password inside the node's
// machine, where the container runtime reaches it as a local one, until the test
// or the function it returns ends it.
func startRegistry(t *testing.T, n *cluster.Node, user, password string) (stop func()) {
	t.Helper()
	const dir = "/var/lib/e2e/registry"
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.Disk(dir+"/data"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"config.yml": fmt.Sprintf(registryConfig, dir), "htpasswd": fmt.Sprintf("%s:%s\n", user, hash),
	} {
		if err := os.WriteFile(filepath.Join(n.Disk(dir), name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	p, err := n.Exec(context.WithoutCancel(t.Context()), machine.Command{
		Args: []string{"docker-registry", "serve", dir + "/config.yml"}, Stdout: &out, Stderr: &out,
	})
	if err != nil {
		t.Fatalf("%v; run make deps", err)
	}
	stop = sync.OnceFunc(func() {
		if err := p.Signal(9); err != nil {
			t.Error(err)
		}
		<-p.Done()
		if t.Failed() {
			t.Logf("the registry:\n%s", out.String())
		}
	})
	t.Cleanup(stop)
	return stop
}

// awaitRegistry waits for the node's registry and returns its URL.
func awaitRegistry(t *testing.T, n *cluster.Node) (url string) {
	t.Helper()
	url = "http://" + n.IP() + ":5000"
	eventually(t, time.Minute, "the registry to ask for a password", func(ctx context.Context) (bool, string) {
		req, err := http.NewRequestWithContext(ctx, "GET", url+"/v2/", nil)
		if err != nil {
			return false, err.Error()
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return false, err.Error()
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusUnauthorized, resp.Status
	})
	return url
}

// pushImage copies an OCI archive into a registry by its HTTP API.
func pushImage(t *testing.T, archive, registry, user, password, repository, tag string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blobs := map[string][]byte{}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if blobs[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
	send := func(method, url, contentType string, body []byte, want int) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(user, password)
		req.Header.Set("Content-Type", contentType)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		if resp.StatusCode != want {
			t.Fatalf("%s %s: %s: %s", method, url, resp.Status, text)
		}
		return resp
	}
	type descriptor struct{ MediaType, Digest string }
	var index struct{ Manifests []descriptor }
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	blob := func(digest string) []byte { return blobs["blobs/"+strings.Replace(digest, ":", "/", 1)] }
	if err := json.Unmarshal(blobs["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	top := index.Manifests[0]
	if err := json.Unmarshal(blob(top.Digest), &manifest); err != nil {
		t.Fatal(err)
	}
	base := registry + "/v2/" + repository
	for _, d := range append(manifest.Layers, manifest.Config) {
		begun := send("POST", base+"/blobs/uploads/", "", nil, http.StatusAccepted)
		to, err := url.Parse(begun.Header.Get("Location"))
		if err != nil {
			t.Fatal(err)
		}
		q := to.Query()
		q.Set("digest", d.Digest)
		to.RawQuery = q.Encode()
		send("PUT", begun.Request.URL.ResolveReference(to).String(), "application/octet-stream", blob(d.Digest), http.StatusCreated)
	}
	send("PUT", base+"/manifests/"+tag, top.MediaType, blob(top.Digest), http.StatusCreated)
}

func TestImagePullSecrets(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	n := node(t, "edge-1")
	const user, password = "ada", "difference engine"
	startRegistry(t, n, user, password)
	registry := awaitRegistry(t, n)
	// An image of its own: the kubelet lets nobody use an image without the
	// credentials that it was pulled with, by whatever name.
	archive, err := image.Build(t.Context(), image.Spec{
		Name: "localhost/skerry/private:1", Entrypoint: []string{"/bin/demo"}, Env: []string{"PRIVATE=yes"},
		Files: []image.File{{Path: "/bin/demo", Host: filepath.Join(world.dir, "images", "demo")}},
		Out:   filepath.Join(t.TempDir(), "private.tar"),
	})
	if err != nil {
		t.Fatal(err)
	}
	pushImage(t, archive, registry, user, password, "private/demo", "1")

	const local = "127.0.0.1:5000" // the runtime takes a local registry without TLS
	auth := func(password string) []byte {
		b, err := json.Marshal(map[string]any{"auths": map[string]any{local: map[string]string{
			"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}}})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, password := range map[string]string{"good": password, "bad": "guess"} {
		if _, err := world.client.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Type: corev1.SecretTypeDockerConfigJson,
			Data: map[string][]byte{corev1.DockerConfigJsonKey: auth(password)},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	spec := func(secrets string) string {
		return fmt.Sprintf("{nodeName: edge-1, imagePullSecrets: [%s], containers: [{name: c, image: %s/private/demo:1, imagePullPolicy: Always}]}", secrets, local)
	}
	startPod(t, ns, "without", spec(""))
	startPod(t, ns, "wrong", spec("{name: bad}"))
	startPod(t, ns, "with", spec("{name: good}"))
	for _, name := range []string{"without", "wrong"} {
		awaitPod(t, ns, name, time.Minute, "to be refused its image", func(p *corev1.Pod) bool {
			w := container(t, p, "c").State.Waiting
			return w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff")
		})
		awaitEvent(t, ns, name, "Failed", "Failed to pull image")
	}
	p := ready(t, ns, "with")
	if got := container(t, p, "c").Image; got != local+"/private/demo:1" {
		t.Errorf("runs %s", got)
	}
	awaitEvent(t, ns, "with", "Pulled", "Successfully pulled image")
	// That it is there now does not make it everybody's.
	startPod(t, ns, "sneaking", fmt.Sprintf("{nodeName: edge-1, containers: [{name: c, image: %s/private/demo:1, imagePullPolicy: IfNotPresent}]}", local))
	awaitEvent(t, ns, "sneaking", "Failed", "401 Unauthorized")

	// A service account's pull secrets are its pods'.
	kubectl(t, "patch", "-n", ns, "serviceaccount", "default", "--type=merge", "-p", `{"imagePullSecrets":[{"name":"good"}]}`)
	startPod(t, ns, "by-account", fmt.Sprintf("{nodeName: edge-1, containers: [{name: c, image: %s/private/demo:1, imagePullPolicy: Always}]}", local))
	ready(t, ns, "by-account")
}
