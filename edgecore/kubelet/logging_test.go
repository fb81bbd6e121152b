package kubelet

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"k8s.io/klog/v2"
)

func TestKlogGoesToTheLogger(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", "edge-1")
	routeKlog(log, slog.LevelInfo)
	t.Cleanup(klog.ClearLogger)

	klog.InfoS("pod started", "pod", klog.KRef("default", "web"))
	klog.V(2).InfoS("a detail")
	klog.FromContext(t.Context()).WithName("cm").Error(errors.New("gone"), "read a checkpoint")
	text := out.String()
	for _, want := range []string{
		`level=INFO msg="pod started" node=edge-1 component=kubelet pod.name=web pod.namespace=default`,
		`level=ERROR msg="read a checkpoint" node=edge-1 component=kubelet`,
		`err=gone`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if strings.Contains(text, "a detail") {
		t.Errorf("a verbose line came through:\n%s", text)
	}

	out.Reset()
	routeKlog(log, slog.LevelWarn)
	klog.InfoS("pod started")
	klog.ErrorS(nil, "pod failed")
	if text := out.String(); strings.Contains(text, "started") || !strings.Contains(text, "pod failed") {
		t.Errorf("at level warn:\n%s", text)
	}
}
