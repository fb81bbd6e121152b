package main

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"k8s.io/kubernetes/pkg/kubelet/apis/config"

	"github.com/skerry-io/skerry/edgecore/images"
	"github.com/skerry-io/skerry/edgecore/kubelet"
	"github.com/skerry-io/skerry/edgecore/link"
	"github.com/skerry-io/skerry/edgecore/store"
)

// imagesEndpoint is the kubelet's image service, served by edgecore itself.
func imagesEndpoint(dataDir string) (string, error) {
	path, err := filepath.Abs(filepath.Join(dataDir, imagesSocket))
	if err != nil {
		return "", fmt.Errorf("image service: %w", err)
	}
	return "unix://" + path, nil
}

// newImages stands between the kubelet and the runtime's images.
func newImages(cfg Config, endpoint string, db *store.Store, uplink *link.Link, k *kubelet.Kubelet, log *slog.Logger) (*images.Proxy, error) {
	settings := k.Settings()
	return images.New(images.Config{
		Runtime: k.RuntimeEndpoint(), Socket: strings.TrimPrefix(endpoint, "unix://"),
		Store: db, NoFallback: !*cfg.Images.LocalWhenUnreachable, Log: log,
		Link: func() images.Link {
			s := uplink.State()
			return images.Link{Connected: s.Connected, Since: s.Since}
		},
		Access: images.AccessConfig{
			RecordsDir: k.RootDir(),
			Policy:     config.ImagePullCredentialsVerificationPolicy(settings.ImagePullCredentialsVerificationPolicy),
			Preloaded:  settings.PreloadedImagesVerificationAllowlist,
		},
	})
}
