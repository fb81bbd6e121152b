package twindb

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
)

// ident is the identity beside the database: what was used up, whatever becomes
// of the file.
type ident struct {
	Incarnation string `json:"incarnation"`
	Epoch       uint64 `json:"epoch"`
}

// readIdent returns nil when there is none, or none that is whole.
func readIdent(path string) (*ident, error) {
	f, err := os.Open(identPath(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return nil, err
	}
	return decodeIdent(b), nil
}

func decodeIdent(b []byte) *ident {
	var sum uint32
	var at int
	if n, err := fmt.Sscanf(string(b), "%08x\n", &sum); n != 1 || err != nil || len(b) < 9 {
		return nil
	}
	at = 9
	if crc32.Checksum(b[at:], castagnoli) != sum {
		return nil
	}
	var id ident
	if json.Unmarshal(b[at:], &id) != nil || len(id.Incarnation) != 16 {
		return nil
	}
	return &id
}

func writeIdent(path string, id ident) error {
	body, err := json.Marshal(id)
	if err != nil {
		return err
	}
	name := identPath(path)
	f, err := os.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%08x\n%s", crc32.Checksum(body, castagnoli), body)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, removeIfThere(name+".new"))
	}
	return replace(name+".new", name)
}
