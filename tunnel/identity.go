package tunnel

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

const (
	pemType         = "PRIVATE KEY" // PKCS #8, RFC 5958
	maxIdentityFile = 16 << 10
)

// Identity is an agent's key, and the certificate that carries it.
type Identity struct {
	key         ed25519.PrivateKey
	id          ID
	certificate tls.Certificate
}

// ID returns the fingerprint by which other agents know this one.
func (i *Identity) ID() ID { return i.id }

// LoadOrCreateIdentity reads the agent's key from the file at path, a PKCS #8
// PEM file that only its owner may read. Where there is no such file it makes a
// new key and writes it durably.
func LoadOrCreateIdentity(path string) (*Identity, error) {
	key, err := loadKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, err = createKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return newIdentity(key)
}

func newIdentity(key ed25519.PrivateKey) (*Identity, error) {
	// The dates are the widest that RFC 5280 knows: the key is what is trusted,
	// and a host whose clock is wrong must still be reachable.
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "wanmig"},
		NotBefore:    time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("identity: make certificate: %w", err)
	}
	return &Identity{
		key:         key,
		id:          idOf(key.Public().(ed25519.PublicKey)),
		certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
	}, nil
}

// resetKey returns the key of this agent's stateless resets (RFC 9000, section
// 10.3). It comes from the identity, so that an agent that was restarted can
// tell its peers at once that their sessions are gone.
func (i *Identity) resetKey() ([32]byte, error) {
	raw, err := hkdf.Key(sha256.New, i.key.Seed(), nil, "wanmig stateless reset", 32)
	if err != nil {
		return [32]byte{}, fmt.Errorf("derive reset key: %w", err)
	}
	return [32]byte(raw), nil
}

func loadKey(path string) (ed25519.PrivateKey, error) {
	if err := checkFolder(filepath.Dir(path)); err != nil {
		return nil, err
	}
	// Without O_NONBLOCK, opening a FIFO would wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: move it away, and a new identity is made at the next start", path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o, so others than its owner may use the key: run chmod 600 %s; "+
			"if someone may have read it, remove it instead, and have every site trust the new ID", path, perm, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxIdentityFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: restore the file from a backup, or remove it to get a new identity, which every site must then trust", path, err)
	}
	return key, nil
}

func parseKey(data []byte) (ed25519.PrivateKey, error) {
	if len(data) > maxIdentityFile {
		return nil, fmt.Errorf("larger than %d bytes, so no key file", maxIdentityFile)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != pemType {
		return nil, fmt.Errorf("holds no PEM block %q", pemType)
	}
	if len(bytes.TrimSpace(rest)) != 0 {
		return nil, errors.New("holds more than one key")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("damaged key: %w", err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("holds a %T, not an Ed25519 key", parsed)
	}
	return key, nil
}

func checkFolder(folder string) error {
	info, err := os.Stat(folder)
	if err != nil {
		return err
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("folder %s has mode %04o, so others could replace the key: run chmod 700 %s", folder, perm, folder)
	}
	return nil
}

func createKey(path string) (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	folder := filepath.Dir(path)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	if err := checkFolder(folder); err != nil {
		return nil, err
	}
	err = writeNew(path, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}))
	if errors.Is(err, fs.ErrExist) { // another process was faster: its key counts
		return loadKey(path)
	}
	if err != nil {
		return nil, err
	}
	return key, nil
}

// writeNew writes a file that either exists whole and durable or not at all. It
// links instead of renaming, since a rename would replace a key that another
// process has made meanwhile.
func writeNew(path string, data []byte) error {
	folder := filepath.Dir(path)
	f, err := os.CreateTemp(folder, ".identity-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", f.Name(), err)
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	// The folder may be new as well, so its own entry has to be durable too.
	return errors.Join(syncFolder(folder), syncFolder(filepath.Dir(folder)))
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
