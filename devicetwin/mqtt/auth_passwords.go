package mqtt

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
)

const (
	maxPasswordFile = 4 << 20
	maxPassword     = 1024
	// A hash that costs more than this is refused: who may write the file may
	// not by that stop the node.
	maxArgonMemory     = 256 << 10 // KiB
	maxArgonTime       = 16
	maxBcryptCost      = 14
	maxPBKDF2Iteration = 5_000_000
	// So many passwords are hashed at a time: each costs a core.
	maxHashing = 2
)

// Passwords knows devices by the passwords in a file of lines user:hash, where
// a hash is bcrypt ($2b$), argon2id ($argon2id$) or what mosquitto_passwd
// writes ($7$, PBKDF2). The file is read again when it has changed; one that
// cannot be read or parsed leaves the users as they were.
type Passwords struct {
	path string
	slot chan struct{} // bounds hashing
	key  [32]byte      // of verified

	mu       sync.Mutex
	modified time.Time
	size     int64
	checked  time.Time
	broken   error // why the file as it now is was not taken
	hashes   map[string]string
	// verified holds, by user, a MAC of hash and password that were found to
	// match: devices reconnect in storms, and a hash is slow by intent.
	verified map[string][32]byte
}

// NewPasswords reads the file, which nobody but its owner may be able to read.
func NewPasswords(path string) (*Passwords, error) {
	p := &Passwords{path: path, slot: make(chan struct{}, maxHashing)}
	if _, err := rand.Read(p.key[:]); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refreshLocked(time.Now())
	if p.broken != nil {
		return nil, p.broken
	}
	return p, nil
}

func (p *Passwords) Authenticate(ctx context.Context, c Credentials) (Principal, error) {
	if c.User == "" || len(c.Password) == 0 || len(c.Password) > maxPassword {
		return Principal{}, ErrUnknownCredentials
	}
	p.mu.Lock()
	p.refreshLocked(time.Now())
	hash, known := p.hashes[c.User]
	had, wasVerified := p.verified[c.User]
	p.mu.Unlock()
	if !known {
		return Principal{}, ErrUnknownCredentials
	}
	mac := p.mac(hash, c.Password)
	if !wasVerified || subtle.ConstantTimeCompare(had[:], mac[:]) != 1 {
		select {
		case p.slot <- struct{}{}:
		case <-ctx.Done():
			return Principal{}, ctx.Err()
		}
		ok, err := checkPassword(hash, c.Password)
		<-p.slot
		if err != nil {
			return Principal{}, fmt.Errorf("user %q in %s: %w", c.User, p.path, err)
		}
		if !ok {
			return Principal{}, ErrBadCredentials
		}
		p.mu.Lock()
		if p.hashes[c.User] == hash {
			p.verified[c.User] = mac
		}
		p.mu.Unlock()
	}
	return Principal{Kind: PrincipalDevice, Name: c.User}, nil
}

// Err is why the file as it now is has not been taken; nil: it has.
func (p *Passwords) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.broken
}

func (p *Passwords) mac(hash string, password []byte) (sum [32]byte) {
	m := hmac.New(sha256.New, p.key[:])
	io.WriteString(m, hash)
	m.Write([]byte{0})
	m.Write(password)
	m.Sum(sum[:0])
	return sum
}

func (p *Passwords) refreshLocked(now time.Time) {
	if !p.checked.IsZero() && now.Sub(p.checked) < time.Second {
		return
	}
	p.checked = now
	info, err := os.Stat(p.path)
	if err != nil {
		p.broken = fmt.Errorf("passwords: %w", err)
		return
	}
	if info.ModTime().Equal(p.modified) && info.Size() == p.size {
		return
	}
	hashes, err := readPasswords(p.path)
	if err != nil {
		p.broken = err
		return
	}
	p.broken, p.modified, p.size = nil, info.ModTime(), info.Size()
	p.hashes, p.verified = hashes, map[string][32]byte{}
}

func readPasswords(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("passwords: %w", err)
	}
	defer f.Close()
	if err := onlyOwners(f); err != nil {
		return nil, fmt.Errorf("passwords: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPasswordFile+1))
	if err != nil {
		return nil, fmt.Errorf("passwords: %w", err)
	}
	if len(b) > maxPasswordFile {
		return nil, fmt.Errorf("passwords: %s has more than %d bytes", path, maxPasswordFile)
	}
	hashes, err := parsePasswords(b)
	if err != nil {
		return nil, fmt.Errorf("passwords: %s: %w", path, err)
	}
	return hashes, nil
}

func onlyOwners(f fs.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%s can be read by others (%04o): chmod 600 it", info.Name(), perm)
	}
	return nil
}

func parsePasswords(b []byte) (map[string]string, error) {
	hashes := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		user, hash, ok := strings.Cut(line, ":")
		if !ok || user == "" {
			return nil, fmt.Errorf("line %d: want user:hash", n)
		}
		if _, err := parseHash(hash); err != nil {
			return nil, fmt.Errorf("line %d: user %q: %w", n, user, err)
		}
		hashes[user] = hash
	}
	return hashes, lines.Err()
}

var errHash = errors.New("not a bcrypt ($2b$), argon2id ($argon2id$v=19$) or mosquitto ($7$) hash within bounds")

// parseHash gives what checks a password against hash.
func parseHash(hash string) (func(password []byte) bool, error) {
	switch {
	case strings.HasPrefix(hash, "$2"):
		cost, err := bcrypt.Cost([]byte(hash))
		if err != nil || cost > maxBcryptCost {
			return nil, errHash
		}
		return func(password []byte) bool {
			return bcrypt.CompareHashAndPassword([]byte(hash), password) == nil
		}, nil
	case strings.HasPrefix(hash, "$argon2id$"):
		return parseArgon2(strings.TrimPrefix(hash, "$argon2id$"))
	case strings.HasPrefix(hash, "$7$"):
		return parseMosquitto(strings.TrimPrefix(hash, "$7$"))
	}
	return nil, errHash
}

// parseArgon2 takes v=19$m=65536,t=3,p=4$salt$sum.
func parseArgon2(s string) (func([]byte) bool, error) {
	parts := strings.Split(s, "$")
	if len(parts) != 4 || parts[0] != "v=19" {
		return nil, errHash
	}
	var memory, time uint32
	var threads uint8
	if n, err := fmt.Sscanf(parts[1], "m=%d,t=%d,p=%d", &memory, &time, &threads); err != nil || n != 3 {
		return nil, errHash
	}
	salt, err1 := base64.RawStdEncoding.DecodeString(parts[2])
	sum, err2 := base64.RawStdEncoding.DecodeString(parts[3])
	if err1 != nil || err2 != nil || len(salt) < 8 || len(sum) < 16 || len(sum) > 64 ||
		memory == 0 || memory > maxArgonMemory || time == 0 || time > maxArgonTime || threads == 0 {
		return nil, errHash
	}
	return func(password []byte) bool {
		got := argon2.IDKey(password, salt, time, memory, threads, uint32(len(sum)))
		return subtle.ConstantTimeCompare(got, sum) == 1
	}, nil
}

// parseMosquitto takes iterations$salt$sum, PBKDF2 with SHA-512.
func parseMosquitto(s string) (func([]byte) bool, error) {
	parts := strings.Split(s, "$")
	if len(parts) != 3 {
		return nil, errHash
	}
	iterations, err := strconv.Atoi(parts[0])
	salt, err1 := base64.StdEncoding.DecodeString(parts[1])
	sum, err2 := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || err1 != nil || err2 != nil || iterations < 1 || iterations > maxPBKDF2Iteration ||
		len(salt) < 8 || len(sum) != sha512.Size {
		return nil, errHash
	}
	return func(password []byte) bool {
		got, err := pbkdf2.Key(sha512.New, string(password), salt, iterations, len(sum))
		return err == nil && subtle.ConstantTimeCompare(got, sum) == 1
	}, nil
}

func checkPassword(hash string, password []byte) (bool, error) {
	check, err := parseHash(hash)
	if err != nil {
		return false, err
	}
	return check(password), nil
}
