package kubelet

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/klog/v2"
)

func TestRunEndsBeforeARuntimeIsThere(t *testing.T) {
	t.Cleanup(klog.ClearLogger)
	k := mustSettings(t, Config{RuntimeEndpoint: socket(t)})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.Run(ctx); err != nil {
		t.Errorf("a stop is no error: %v", err)
	}
	if err := k.Run(ctx); err == nil || !strings.Contains(err.Error(), "restart the process") {
		t.Errorf("ran twice: %v", err)
	}
}

func TestRunRefusesAnUnusableHost(t *testing.T) {
	t.Cleanup(klog.ClearLogger)
	path := socket(t)
	(&fakeRuntime{name: "containerd", version: "1.7.0"}).serve(t, path)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k := mustSettings(t, Config{RuntimeEndpoint: path, RootDir: file + "/kubelet"})
	err := k.Run(t.Context())
	var ce *CheckError
	if !errors.As(err, &ce) || !strings.Contains(err.Error(), file) {
		t.Errorf("error %v", err)
	}
}

func TestHandlerWaitsForAStart(t *testing.T) {
	k := mustSettings(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.Handler(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestCheckTellsOfABadConfiguration(t *testing.T) {
	got := Check(t.Context(), Config{NodeName: "edge-1", Overlay: []byte("maxPodz: 1\n")})
	wants(t, got, Error, "configuration", "maxPodz", "correct")
}

func TestCheckPutsErrorsFirst(t *testing.T) {
	got := Check(t.Context(), Config{NodeName: "edge-1", RuntimeEndpoint: socket(t), RootDir: t.TempDir(), PodLogsDir: t.TempDir()})
	if len(got) == 0 || got[0].Severity != Error {
		t.Fatalf("findings %v", got)
	}
	warned := false
	for _, f := range got {
		if f.Severity == Warning {
			warned = true
		} else if warned {
			t.Errorf("%v after a warning", f)
		}
	}
}
