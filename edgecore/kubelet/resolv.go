package kubelet

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The kubelet reads the host's resolv.conf anew for every pod it starts, and
// starts none when the file is not there. On an edge node it often is not: the
// program that writes it waits for a network. So, where the file is missing at
// start, the kubelet is given one of ours, without name servers, that takes the
// host's content over once there is any.

const (
	etcResolvConf     = "/etc/resolv.conf"
	systemdResolvConf = "/run/systemd/resolve/resolv.conf"
	resolvPeriod      = 15 * time.Second
)

// hostResolvConf is the file that pods should get their name servers from;
// empty when there is none now. systemd-resolved's stub address works in the
// host's network namespace only, so behind it stand the real servers.
func hostResolvConf(h host) string {
	text, err := h.read(etcResolvConf)
	if err != nil {
		return ""
	}
	if strings.Contains(text, "nameserver 127.0.0.53") {
		if _, err := os.Stat(h.path(systemdResolvConf)); err == nil {
			return systemdResolvConf
		}
	}
	return etcResolvConf
}

// resolvCopy is our stand-in for a missing resolv.conf.
type resolvCopy struct {
	host host
	path string
}

// update writes what the host has now, if it changed.
func (c resolvCopy) update() error {
	var text string
	if source := hostResolvConf(c.host); source != "" {
		var err error
		if text, err = c.host.read(source); err != nil {
			return err
		}
	}
	if text == "" {
		text = "# The host has no resolv.conf.\n"
	}
	if old, err := os.ReadFile(c.path); err == nil && bytes.Equal(old, []byte(text)) {
		return nil
	}
	next := c.path + ".new"
	if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(next, c.path)
}

// prepareResolvConf sets the file the kubelet reads, unless the overlay did.
// The copy it returns is to be followed; nil where the host's file is used.
func (k *Kubelet) prepareResolvConf(h host) (*resolvCopy, error) {
	if k.settings.ResolverConfig != etcResolvConf {
		return nil, nil
	}
	if source := hostResolvConf(h); source != "" {
		k.settings.ResolverConfig = source
		return nil, nil
	}
	c := &resolvCopy{host: h, path: filepath.Join(k.cfg.RootDir, "resolv.conf")}
	if err := c.update(); err != nil {
		return nil, fmt.Errorf("kubelet: write a resolv.conf in place of the host's missing one: %w; make %s writable", err, k.cfg.RootDir)
	}
	k.cfg.Log.Warn("the host has no resolv.conf; pods start without name servers until it has one", "path", etcResolvConf)
	k.settings.ResolverConfig = c.path
	return c, nil
}

// followResolvConf keeps the copy up to date until ctx ends.
func (k *Kubelet) followResolvConf(ctx context.Context, c *resolvCopy) {
	if c == nil {
		return
	}
	tick := time.NewTicker(resolvPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := c.update(); err != nil {
				k.cfg.Log.Warn("copy the host's resolv.conf", "to", c.path, "err", err)
			}
		}
	}
}
