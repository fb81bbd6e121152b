package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const keySize = 32

// sealer encrypts records with AES-256-GCM. What a ciphertext is for (bucket
// and key) is authenticated with it, so records cannot be exchanged on disk.
type sealer struct{ aead cipher.AEAD }

func newSealer(key []byte) (*sealer, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &sealer{aead}, nil
}

func aad(purpose string, key []byte) []byte {
	return append([]byte("skerry/store/1\x00"+purpose+"\x00"), key...)
}

func (s *sealer) seal(purpose string, key, plain []byte) ([]byte, error) {
	return s.aead.Seal(nil, nil, plain, aad(purpose, key)), nil
}

func (s *sealer) open(purpose string, key, ct []byte) ([]byte, error) {
	plain, err := s.aead.Open(nil, nil, ct, aad(purpose, key))
	if err != nil {
		return nil, errors.New("cannot be decrypted with this key file")
	}
	return plain, nil
}

func readKey(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s is readable by others (mode %o); chmod 600 it", path, info.Mode().Perm())
	}
	if info.Size() != keySize {
		return nil, fmt.Errorf("key file %s has %d bytes, not %d", path, info.Size(), keySize)
	}
	return os.ReadFile(path)
}

// readOrMakeKey is for a new store only: an existing one without its key is refused.
func readOrMakeKey(path string) ([]byte, error) {
	key, err := readKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = make([]byte, keySize)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	if err := writeFileSync(path, key); err != nil {
		return nil, fmt.Errorf("make key file %s: %w", path, err)
	}
	return key, nil
}

// writeFileSync replaces path so that after a power loss it is either the old
// or the new content.
func writeFileSync(path string, data []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
