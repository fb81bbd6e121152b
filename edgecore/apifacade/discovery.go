package apifacade

import (
	"net/http"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-base/version"
)

// serveMeta answers what is about the API rather than its objects; false when
// the path is not such a one.
func (f *Facade) serveMeta(w http.ResponseWriter, r *http.Request) bool {
	v := f.metaValue(strings.Trim(r.URL.Path, "/"))
	if v == nil {
		return false
	}
	if f.cfg.Authorize != nil {
		if err := f.cfg.Authorize(r, Access{Verb: strings.ToLower(r.Method), Path: r.URL.Path}); err != nil {
			f.fail(w, r, err)
			return true
		}
	}
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "only GET is served here", http.StatusMethodNotAllowed)
		return true
	}
	if text, ok := v.(string); ok {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if text != "ok" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = w.Write([]byte(text)) // a client that went away misses nothing
		return true
	}
	if err := f.respondValue(w, http.StatusOK, v); err != nil {
		f.fail(w, r, err)
	}
	return true
}

func (f *Facade) metaValue(path string) any {
	switch path {
	case "version":
		return version.Get()
	case "healthz", "livez":
		return "ok"
	case "readyz":
		if !f.cfg.Store.Synced() {
			return "the first sync with the cloud has not completed"
		}
		return "ok"
	case "api":
		return metav1.APIVersions{
			TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"},
			ServerAddressByClientCIDRs: []metav1.ServerAddressByClientCIDR{},
		}
	case "apis":
		list := metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}}
		for _, g := range f.groups() {
			list.Groups = append(list.Groups, apiGroup(g))
		}
		return list
	case "api/v1":
		return f.resourceList("")
	}
	rest, ok := strings.CutPrefix(path, "apis/")
	if !ok {
		return nil
	}
	group, ver, versioned := strings.Cut(rest, "/")
	switch {
	case !slices.Contains(f.groups(), group):
		return nil
	case !versioned:
		g := apiGroup(group)
		g.Kind, g.APIVersion = "APIGroup", "v1"
		return g
	case ver == "v1":
		return f.resourceList(group)
	}
	return nil
}

// groups lists all but the core group.
func (f *Facade) groups() []string {
	var out []string
	for _, r := range f.table {
		if r.group != "" && !slices.Contains(out, r.group) {
			out = append(out, r.group)
		}
	}
	slices.Sort(out)
	return out
}

func apiGroup(name string) metav1.APIGroup {
	v := metav1.GroupVersionForDiscovery{GroupVersion: name + "/v1", Version: "v1"}
	return metav1.APIGroup{Name: name, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v}
}

func (f *Facade) resourceList(group string) metav1.APIResourceList {
	list := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: "v1"}
	if group != "" {
		list.GroupVersion = group + "/v1"
	}
	for _, r := range f.table {
		if r.group != group {
			continue
		}
		if len(r.verbs) > 0 {
			list.APIResources = append(list.APIResources, metav1.APIResource{
				Name: r.name, SingularName: r.singular, Namespaced: r.namespaced, Kind: r.kind,
				Verbs: metav1.Verbs(r.verbs), ShortNames: r.short,
			})
		}
		for sub, v := range r.subresources {
			res := metav1.APIResource{Name: r.name + "/" + sub, Namespaced: r.namespaced, Kind: r.kind, Verbs: metav1.Verbs(v)}
			if sub == "token" {
				res.Group, res.Version, res.Kind = "authentication.k8s.io", "v1", "TokenRequest"
			}
			list.APIResources = append(list.APIResources, res)
		}
	}
	slices.SortFunc(list.APIResources, func(a, b metav1.APIResource) int { return strings.Compare(a.Name, b.Name) })
	return list
}
