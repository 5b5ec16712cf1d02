package tunnel

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// keyPath returns where a key may be, in a folder that exists.
func keyPath(t testing.TB) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "agent")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(folder, "identity.pem")
}

func testIdentity(t testing.TB) *Identity {
	t.Helper()
	id, err := LoadOrCreateIdentity(filepath.Join(t.TempDir(), "agent", "identity.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestIdentityIsMadeOnceAndKept(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "agent")
	path := filepath.Join(folder, "identity.pem")
	first, err := LoadOrCreateIdentity(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadOrCreateIdentity(path)
	if err != nil {
		t.Fatal(err)
	}
	if first.ID() != second.ID() {
		t.Errorf("the ID changed from %s to %s", first.ID(), second.ID())
	}
	for path, want := range map[string]os.FileMode{path: 0o600, folder: 0o700} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o, want %04o", path, info.Mode().Perm(), want)
		}
	}
	entries, err := os.ReadDir(folder)
	if err != nil || len(entries) != 1 {
		t.Errorf("the folder holds %v (%v), want the key only", entries, err)
	}
}

func TestIdentityMadeByTwoAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent", "identity.pem")
	ids := make([]ID, 8)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			id, err := LoadOrCreateIdentity(path)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = id.ID()
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("different identities: %v", ids)
		}
	}
}

func TestIdentityFaults(t *testing.T) {
	good := func() []byte {
		path := keyPath(t)
		if _, err := LoadOrCreateIdentity(path); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}()
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecDER, err := x509.MarshalPKCS8PrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	write := func(data []byte, mode os.FileMode) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := []struct {
		name  string
		make  func(t *testing.T, path string)
		wants []string
	}{
		{"readable by group", write(good, 0o640), []string{"mode 0640", "chmod 600"}},
		{"readable by others", write(good, 0o604), []string{"mode 0604", "chmod 600"}},
		{"empty", write(nil, 0o600), []string{"no PEM block", "backup"}},
		{"garbage", write([]byte("hello"), 0o600), []string{"no PEM block", "backup"}},
		{"cut", write(good[:len(good)/2], 0o600), []string{"no PEM block", "backup"}},
		{"two keys", write(append(append([]byte{}, good...), good...), 0o600), []string{"more than one key"}},
		{"huge", write(make([]byte, maxIdentityFile+1), 0o600), []string{"larger than"}},
		{"damaged", write(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: []byte{1, 2, 3}}), 0o600), []string{"damaged key"}},
		{"another kind of key", write(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: ecDER}), 0o600), []string{"not an Ed25519 key"}},
		{"a folder", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, []string{"not a regular file"}},
		{"a FIFO", func(t *testing.T, path string) {
			if err := syscall.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"not a regular file"}},
		{"a key in a folder that others may write", func(t *testing.T, path string) {
			write(good, 0o600)(t, path)
			if err := os.Chmod(filepath.Dir(path), 0o770); err != nil {
				t.Fatal(err)
			}
		}, []string{"mode 0770", "chmod 700"}},
		{"no key in a folder that others may write", func(t *testing.T, path string) {
			if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
				t.Fatal(err)
			}
		}, []string{"mode 0777", "chmod 700"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := keyPath(t)
			test.make(t, path)
			_, err := LoadOrCreateIdentity(path)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range append(test.wants, filepath.Dir(path)) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
		})
	}
}

func TestCertificateTellsNothingAndOutlastsClockSkew(t *testing.T) {
	cert, err := x509.ParseCertificate(testIdentity(t).certificate.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if cert.Subject.String() != "CN=wanmig" || len(cert.DNSNames)+len(cert.IPAddresses) != 0 {
		t.Errorf("the certificate names %s %v %v", cert.Subject, cert.DNSNames, cert.IPAddresses)
	}
	for _, year := range []int{2001, 2500} {
		now := time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)
		if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
			t.Errorf("not valid in %d", year)
		}
	}
}
