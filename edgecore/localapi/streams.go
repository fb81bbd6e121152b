package localapi

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	kubeauthorizer "k8s.io/apiserver/pkg/authorization/authorizer"

	"github.com/skerry-io/skerry/edgecore/store"
)

// stream is a request that the kubelet answers: a pod's log, exec, attach or
// port-forward.
type stream struct{ namespace, pod, sub string }

// parseStream reads /api/v1/namespaces/NS/pods/POD/SUB; nil if it is none.
func parseStream(path string) *stream {
	p := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(p) != 7 || p[0] != "api" || p[1] != "v1" || p[2] != "namespaces" || p[4] != "pods" || slices.Contains(p, "") {
		return nil
	}
	switch p[6] {
	case "log", "exec", "attach", "portforward":
		return &stream{p[3], p[5], p[6]}
	}
	return nil
}

// serveStream hands the request to the kubelet. Logs are read by whom RBAC
// lets; what acts in a container is the administrator's.
func (s *Server) serveStream(w http.ResponseWriter, r *http.Request, who user.Info, q *stream) error {
	attr := kubeauthorizer.AttributesRecord{
		User: who, Verb: "get", APIVersion: "v1", Resource: "pods", Subresource: q.sub,
		Namespace: q.namespace, Name: q.pod, Path: r.URL.Path, ResourceRequest: true,
	}
	if q.sub != "log" {
		attr.Verb = "create"
		if !slices.Contains(who.GetGroups(), user.SystemPrivilegedGroup) {
			return s.may.readOnly(attr)
		}
	} else if r.Method != http.MethodGet {
		return apierrors.NewMethodNotSupported(schema.GroupResource{Resource: "pods/log"}, strings.ToLower(r.Method))
	}
	if err := s.permit(r.Context(), attr); err != nil {
		return err
	}
	o, ok := s.cfg.Store.Get(store.Key{Resource: "pods", Namespace: q.namespace, Name: q.pod})
	if !ok {
		return apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, q.pod)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(o.Body, &pod); err != nil {
		return apierrors.NewInternalError(fmt.Errorf("pod %s/%s: %w", q.namespace, q.pod, err))
	}
	path, query, err := kubeletRequest(q, &pod, r.URL.Query())
	if err != nil {
		return err
	}
	kubelet, err := s.cfg.Kubelet(r.Context())
	if err != nil {
		return apierrors.NewServiceUnavailable(err.Error())
	}
	out := r.Clone(r.Context())
	out.URL = &url.URL{Path: path, RawQuery: query.Encode()}
	out.RequestURI = out.URL.RequestURI()
	kubelet.ServeHTTP(w, out)
	return nil
}

// kubeletRequest is what the API server would ask of the kubelet
// (pkg/registry/core/pod, LogLocation and the like).
func kubeletRequest(q *stream, pod *corev1.Pod, in url.Values) (string, url.Values, error) {
	out := url.Values{}
	if q.sub == "portforward" {
		for _, p := range in["ports"] {
			out.Add("port", p)
		}
		return "/portForward/" + pod.Namespace + "/" + pod.Name, out, nil
	}
	container, err := containerOf(pod, in.Get("container"))
	if err != nil {
		return "", nil, err
	}
	where := pod.Namespace + "/" + pod.Name + "/" + container
	if q.sub == "log" {
		for _, k := range []string{"follow", "previous", "timestamps", "sinceSeconds", "sinceTime", "tailLines", "limitBytes", "stream"} {
			if in.Has(k) {
				out.Set(k, in.Get(k))
			}
		}
		return "/containerLogs/" + where, out, nil
	}
	for theirs, ours := range map[string]string{"stdin": corev1.ExecStdinParam, "stdout": corev1.ExecStdoutParam, "stderr": corev1.ExecStderrParam, "tty": corev1.ExecTTYParam} {
		if in.Has(theirs) && in.Get(theirs) != "false" && in.Get(theirs) != "0" {
			out.Set(ours, "1")
		}
	}
	if q.sub == "attach" {
		return "/attach/" + where, out, nil
	}
	for _, c := range in["command"] {
		out.Add(corev1.ExecCommandParam, c)
	}
	return "/exec/" + where, out, nil
}

// containerOf is the container asked for, or the only one.
func containerOf(pod *corev1.Pod, name string) (string, error) {
	var names []string
	for _, c := range pod.Spec.Containers {
		names = append(names, c.Name)
	}
	if name == "" {
		if len(names) == 1 {
			return names[0], nil
		}
		return "", apierrors.NewBadRequest(fmt.Sprintf("a container name must be specified for pod %s, choose one of: %v", pod.Name, names))
	}
	for _, c := range pod.Spec.InitContainers {
		names = append(names, c.Name)
	}
	for _, c := range pod.Spec.EphemeralContainers {
		names = append(names, c.Name)
	}
	if !slices.Contains(names, name) {
		return "", apierrors.NewBadRequest(fmt.Sprintf("container %s is not valid for pod %s", name, pod.Name))
	}
	return name, nil
}
