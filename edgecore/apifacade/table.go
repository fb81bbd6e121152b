package apifacade

import (
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/printers"
	"k8s.io/kubernetes/pkg/printers/internalversion"

	// The types that the printers know by their internal versions.
	_ "k8s.io/kubernetes/pkg/apis/coordination/install"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	_ "k8s.io/kubernetes/pkg/apis/discovery/install"
	_ "k8s.io/kubernetes/pkg/apis/node/install"
	_ "k8s.io/kubernetes/pkg/apis/rbac/install"
	_ "k8s.io/kubernetes/pkg/apis/storage/install"
)

// format is how a client wants objects.
type format struct {
	table   bool
	include metav1.IncludeObjectPolicy // what of the object stands in a row
}

// negotiate reads the Accept headers: kubectl asks for a table and takes
// objects too. False: nothing that the client takes is served here.
func negotiate(r *http.Request) (format, bool) {
	accept := strings.Join(r.Header.Values("Accept"), ",")
	if strings.TrimSpace(accept) == "" {
		return format{}, true
	}
	for _, clause := range strings.Split(accept, ",") {
		media, params, err := mime.ParseMediaType(clause)
		if err != nil {
			continue
		}
		switch media {
		case "application/json", "application/*", "*/*":
		default:
			continue
		}
		switch {
		case params["as"] == "":
			return format{}, true
		case params["as"] == "Table" && params["g"] == metav1.GroupName && params["v"] == "v1":
			include := metav1.IncludeObjectPolicy(r.URL.Query().Get("includeObject"))
			switch include {
			case metav1.IncludeNone, metav1.IncludeObject:
			default:
				include = metav1.IncludeMetadata
			}
			return format{table: true, include: include}, true
		}
	}
	return format{}, false
}

// printer makes rows; it is never changed once made.
var printer = sync.OnceValue(func() *printers.HumanReadableGenerator {
	return printers.NewTableGenerator().With(internalversion.AddHandlers)
})

// table collects rows for one answer.
type table struct {
	kind    schema.GroupVersionKind
	include metav1.IncludeObjectPolicy
	plain   bool // Kubernetes has no columns of its own for the kind
	metav1.Table
}

// plainColumns are an API server's for a kind that has none of its own.
var plainColumns = []metav1.TableColumnDefinition{
	{Name: "Name", Type: "string", Format: "name"}, {Name: "Created At", Type: "date"},
}

// table begins one, with the columns of the resource.
func (r *resource) table(f format) (*table, error) {
	t := &table{kind: schema.GroupVersionKind{Group: r.group, Version: r.version, Kind: r.kind}, include: f.include}
	t.TypeMeta = metav1.TypeMeta{Kind: "Table", APIVersion: metav1.SchemeGroupVersion.String()}
	t.Rows = []metav1.TableRow{}
	if r.group == rbacv1.GroupName && (r.kind == "Role" || r.kind == "ClusterRole") {
		t.plain, t.ColumnDefinitions = true, plainColumns
		return t, nil
	}
	list, err := legacyscheme.Scheme.New(schema.GroupVersionKind{Group: r.group, Version: runtime.APIVersionInternal, Kind: r.kind + "List"})
	if err != nil {
		return nil, fmt.Errorf("table of %s: %w", r.name, err)
	}
	empty, err := printer().GenerateTable(list, printers.GenerateOptions{Wide: true})
	if err != nil {
		return nil, fmt.Errorf("table of %s: %w", r.name, err)
	}
	t.ColumnDefinitions = empty.ColumnDefinitions
	return t, nil
}

// add makes a row of an object.
func (t *table) add(body []byte) error {
	rows, err := t.rows(body)
	if err != nil {
		return fmt.Errorf("table of %s: %w", t.kind.Kind, err)
	}
	object, err := t.rowObject(body)
	if err != nil {
		return fmt.Errorf("table of %s: %w", t.kind.Kind, err)
	}
	for i := range rows {
		rows[i].Object = runtime.RawExtension{Raw: object}
	}
	t.Rows = append(t.Rows, rows...)
	return nil
}

func (t *table) rows(body []byte) ([]metav1.TableRow, error) {
	obj, err := legacyscheme.Scheme.New(t.kind)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(body, obj); err != nil {
		return nil, err
	}
	if t.plain {
		m := obj.(metav1.Object)
		return []metav1.TableRow{{Cells: []any{m.GetName(), m.GetCreationTimestamp().UTC().Format(time.RFC3339)}}}, nil
	}
	internal, err := legacyscheme.Scheme.ConvertToVersion(obj, schema.GroupVersion{Group: t.kind.Group, Version: runtime.APIVersionInternal})
	if err != nil {
		return nil, err
	}
	printed, err := printer().GenerateTable(internal, printers.GenerateOptions{Wide: true, NoHeaders: true})
	if err != nil {
		return nil, err
	}
	return printed.Rows, nil
}

func (t *table) rowObject(body []byte) ([]byte, error) {
	switch t.include {
	case metav1.IncludeNone:
		return nil, nil
	case metav1.IncludeObject:
		return body, nil
	}
	var o struct {
		Kind       string          `json:"kind"`
		APIVersion string          `json:"apiVersion"`
		Metadata   json.RawMessage `json:"metadata"`
	}
	if err := json.Unmarshal(body, &o); err != nil {
		return nil, err
	}
	o.Kind, o.APIVersion = "PartialObjectMetadata", metav1.SchemeGroupVersion.String()
	return json.Marshal(o)
}

// at is the table as of a resourceVersion.
func (t *table) at(rv uint64) *metav1.Table {
	t.ResourceVersion = strconv.FormatUint(rv, 10)
	return &t.Table
}

// next empties the table for the next event of a watch, which has no columns
// any more.
func (t *table) next() { t.Rows, t.ColumnDefinitions = t.Rows[:0], nil }
