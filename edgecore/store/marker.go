package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// marker is a file beside the database that remembers whether it held pods. A
// database that was deleted or emptied would otherwise look like a new node's,
// and the kubelet would kill every container for want of its pod.
//
// Only the safe direction may be stale after a crash: it is set after the
// commit that brought the first pod and cleared before the one that removes
// the last.
type marker struct {
	Format  int    `json:"format"`
	StoreID string `json:"storeID"`
	Pods    bool   `json:"pods"`
}

func markerPath(path string) string { return path + ".marker" }

// readMarker returns nil when there is none.
func readMarker(path string) (*marker, error) {
	raw, err := os.ReadFile(markerPath(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("store %s: read its marker: %w", path, err)
	}
	var m marker
	if err := json.Unmarshal(raw, &m); err != nil || m.Format != 1 {
		return nil, damaged(path, fmt.Errorf("its marker file %s is unreadable", markerPath(path)))
	}
	return &m, nil
}

func (s *Store) writeMarker(pods bool) error {
	m := marker{Format: 1, StoreID: s.storeID, Pods: pods}
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := writeFileSync(markerPath(s.cfg.Path), append(raw, '\n')); err != nil {
		return fmt.Errorf("store %s: write its marker: %w", s.cfg.Path, err)
	}
	s.bytesWritten.Add(uint64(len(raw)) + 1)
	s.marker = m
	return nil
}
