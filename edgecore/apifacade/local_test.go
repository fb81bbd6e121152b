package apifacade

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/edgecore/store"
)

const asTable = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json"

// ask does a GET as kubectl does.
func ask(t *testing.T, f *Facade, path, accept string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://edge.invalid"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	res, err := f.Transport().RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func tableFrom(t *testing.T, r io.Reader) metav1.Table {
	t.Helper()
	var table metav1.Table
	if err := json.NewDecoder(r).Decode(&table); err != nil {
		t.Fatal(err)
	}
	if table.Kind != "Table" || table.APIVersion != "meta.k8s.io/v1" {
		t.Fatalf("no table: %+v", table.TypeMeta)
	}
	return table
}

func columns(table metav1.Table) []string {
	var names []string
	for _, c := range table.ColumnDefinitions {
		names = append(names, c.Name)
	}
	return names
}

func runningPod() *corev1.Pod {
	p := pod("a", "u1")
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.7", PodIPs: []corev1.PodIP{{IP: "10.0.0.7"}},
		ContainerStatuses: []corev1.ContainerStatus{{Name: "c", Ready: true, RestartCount: 3, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}}
	return p
}

func TestTables(t *testing.T) {
	r := newRig(t)
	r.deliver(t, upsert(t, "pods", runningPod(), "10"), upsert(t, "pods", pod("b", "u2"), "11"))

	table := tableFrom(t, ask(t, r.Facade, "/api/v1/pods?limit=500", asTable).Body)
	if got := columns(table); !slices.Equal(got[:5], []string{"Name", "Ready", "Status", "Restarts", "Age"}) {
		t.Errorf("columns %q", got)
	}
	if len(table.Rows) != 2 || table.ResourceVersion == "" {
		t.Fatalf("table %+v", table)
	}
	if c := table.Rows[0].Cells; c[0] != "a" || c[1] != "1/1" || c[2] != "Running" || c[3] != "3" || c[5] != "10.0.0.7" {
		t.Errorf("cells %v", c)
	}
	var partial metav1.PartialObjectMetadata
	if err := json.Unmarshal(table.Rows[0].Object.Raw, &partial); err != nil || partial.Kind != "PartialObjectMetadata" || partial.Namespace != "default" || partial.Labels["app"] != "a" {
		t.Errorf("row object %+v (%v)", partial, err)
	}
	one := tableFrom(t, ask(t, r.Facade, "/api/v1/namespaces/default/pods/a?includeObject=Object", asTable).Body)
	if len(one.Rows) != 1 || !bytes.Contains(one.Rows[0].Object.Raw, []byte(`"spec"`)) {
		t.Errorf("table of one %+v", one)
	}

	// Every resource that is served has columns, and a row for each object.
	for _, res := range resources() {
		if !res.verbs.has("list") {
			continue
		}
		empty, err := res.table(format{table: true})
		if err != nil || len(empty.ColumnDefinitions) == 0 {
			t.Errorf("%s: %v, columns %v", res.name, err, empty)
			continue
		}
		body := `{"kind":"` + res.kind + `","apiVersion":"` + res.apiVersion() + `","metadata":{"name":"x"}}`
		if err := empty.add([]byte(body)); err != nil || len(empty.Rows) != 1 {
			t.Errorf("%s: %v, %d rows", res.name, err, len(empty.Rows))
		}
	}
}

// The columns come with the first event of a watch, and not again.
func TestTableWatch(t *testing.T) {
	r := newRig(t)
	r.deliver(t, upsert(t, "pods", runningPod(), "10"), upsert(t, "pods", pod("b", "u2"), "11"))
	res := ask(t, r.Facade, "/api/v1/pods?watch=true", asTable)
	lines := bufio.NewScanner(res.Body)
	next := func() (string, metav1.Table) {
		t.Helper()
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		var e struct {
			Type   string
			Object json.RawMessage
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		return e.Type, tableFrom(t, bytes.NewReader(e.Object))
	}
	if typ, table := next(); typ != "ADDED" || len(table.ColumnDefinitions) == 0 || len(table.Rows) != 1 {
		t.Errorf("first event %s %+v", typ, table)
	}
	if typ, table := next(); typ != "ADDED" || len(table.ColumnDefinitions) != 0 || len(table.Rows) != 1 || table.Rows[0].Cells[0] != "b" {
		t.Errorf("second event %s %+v", typ, table)
	}
	if err := r.store.ApplyDelta(t.Context(), store.Delta{Deletions: []store.Deletion{{Key: store.Key{Resource: "pods", Namespace: "default", Name: "a"}}}}); err != nil {
		t.Fatal(err)
	}
	if typ, table := next(); typ != "MODIFIED" || table.Rows[0].Cells[2] != "Terminating" {
		t.Errorf("deletion %s %+v", typ, table)
	}
}

func TestNegotiate(t *testing.T) {
	for accept, want := range map[string]struct{ ok, table bool }{
		"": {true, false}, "*/*": {true, false}, "application/json": {true, false}, asTable: {true, true},
		"application/vnd.kubernetes.protobuf":                                          {false, false},
		"application/vnd.kubernetes.protobuf, application/json":                        {true, false},
		"application/json;as=Table;v=v1beta1;g=meta.k8s.io":                            {false, false},
		"application/json;as=PartialObjectMetadataList;g=meta.k8s.io,application/json": {true, false},
	} {
		r, _ := http.NewRequest(http.MethodGet, "/api/v1/pods", nil)
		r.Header.Set("Accept", accept)
		if f, ok := negotiate(r); ok != want.ok || f.table != want.table {
			t.Errorf("%q: table %v, %v", accept, f.table, ok)
		}
	}
}

// What is authorised is what is done, whatever the path and query look like.
func TestAuthorize(t *testing.T) {
	var got []Access
	deny := false
	r := newRig(t, func(_ *store.Config, c *Config) {
		c.Authorize = func(_ *http.Request, a Access) error {
			got = append(got, a)
			if deny {
				return apierrors.NewForbidden(schema.GroupResource{Resource: a.Resource}, a.Name, errors.New("not you"))
			}
			return nil
		}
	})
	r.deliver(t, upsert(t, "pods", pod("a", "u1"), "10"))
	for path, want := range map[string]Access{
		"/api/v1/pods":                                               {Verb: "list", Resource: "pods", Version: "v1"},
		"/api/v1/namespaces/default/pods":                            {Verb: "list", Resource: "pods", Version: "v1", Namespace: "default"},
		"/api/v1/namespaces/default/pods/a":                          {Verb: "get", Resource: "pods", Version: "v1", Namespace: "default", Name: "a"},
		"/api/v1/namespaces/default/pods/a/status":                   {Verb: "get", Resource: "pods", Version: "v1", Namespace: "default", Name: "a", Subresource: "status"},
		"/api/v1/pods?fieldSelector=metadata.name%3Da":               {Verb: "list", Resource: "pods", Version: "v1", Name: "a"},
		"/api/v1/pods?fieldSelector=metadata.name%21%3Da":            {Verb: "list", Resource: "pods", Version: "v1"},
		"/apis/rbac.authorization.k8s.io/v1/clusterroles":            {Verb: "list", Group: rbacv1.GroupName, Resource: "clusterroles", Version: "v1"},
		"/api/v1/namespaces/default/pods/a?watch=1&timeoutSeconds=1": {Verb: "watch", Resource: "pods", Version: "v1", Namespace: "default", Name: "a"},
		"/api/v1":  {Verb: "get"},
		"/version": {Verb: "get"},
	} {
		got = nil
		ask(t, r.Facade, path, "application/json").Body.Close()
		want.Path, _, _ = strings.Cut(path, "?")
		if len(got) != 1 || got[0] != want {
			t.Errorf("%s: asked for %+v, want %+v", path, got, want)
		}
	}
	deny = true
	for _, path := range []string{"/api/v1/pods", "/api/v1/namespaces/default/pods/a", "/api/v1/pods?watch=1", "/api", "/healthz"} {
		if res := ask(t, r.Facade, path, asTable); res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %s", path, res.Status)
		}
	}
	ctx := t.Context()
	if err := r.client.CoreV1().Pods("default").Delete(ctx, "a", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) || got[len(got)-1].Verb != "delete" {
		t.Errorf("delete: %v, asked %+v", err, got[len(got)-1])
	}
	if err := r.client.CoreV1().Pods("default").DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); !apierrors.IsForbidden(err) || got[len(got)-1].Verb != "deletecollection" {
		t.Errorf("delete of a collection: %v, asked %+v", err, got[len(got)-1])
	}
}

// One facade's clients see an object otherwise than the store has it.
func TestView(t *testing.T) {
	seen := func(o *store.Object) []byte { return bytes.ReplaceAll(o.Body, []byte(`"cloud"`), []byte(`"edge"`)) }
	r := newRig(t, func(_ *store.Config, c *Config) { c.View, c.Notice = seen, func() string { return `only "here"` } })
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cm", Namespace: "default", UID: "uc"}, Data: map[string]string{"k": "cloud"}}
	r.deliver(t, upsert(t, "configmaps", cm, "3"))
	check := func(what string, got *corev1.ConfigMap) {
		t.Helper()
		if got.Data["k"] != "edge" {
			t.Errorf("%s: %q", what, got.Data["k"])
		}
	}
	ctx, client := t.Context(), kubernetes.Interface(r.client)
	one, err := client.CoreV1().ConfigMaps("default").Get(ctx, "cm", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	check("get", one)
	list, err := client.CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	check("list", &list.Items[0])
	w, err := client.CoreV1().ConfigMaps("default").Watch(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	check("watch", (<-w.ResultChan()).Object.(*corev1.ConfigMap))
	cm.Labels = map[string]string{"a": "b"}
	r.deliver(t, upsert(t, "configmaps", cm, "4"))
	check("change", (<-w.ResultChan()).Object.(*corev1.ConfigMap))
	if got := ask(t, r.Facade, "/api/v1/configmaps", "application/json").Header.Get("Warning"); got != `299 - "only \"here\""` {
		t.Errorf("warning %s", got)
	}
}
