package lab

import (
	"context"
	"crypto/ed25519"
	"encoding/pem"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"golang.org/x/crypto/ssh"
)

// sshKeys are the keys of all guests of an image cache, and of their clients.
type sshKeys struct {
	client     []byte // private, as OpenSSH has it
	authorized []byte // the client's public key, a line of authorized_keys
	host       []byte // private, as dropbear has it
	known      []byte // the host's public key, a line of known_hosts
}

// sshHost is the name under which clients know the guests' key, whatever their addresses are.
const sshHost = "wanlab-guest"

// files are the keys by the names that they have in a directory.
func (k *sshKeys) files() map[string]*[]byte {
	return map[string]*[]byte{"client": &k.client, "authorized_keys": &k.authorized, "host": &k.host, "known_hosts": &k.known}
}

// sshKeys returns the keys of the cache, which makes them when they are first asked for.
func (im *Images) sshKeys(ctx context.Context) (*sshKeys, error) {
	unlock, err := im.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	dir, err := im.make("ssh", func(dir string) error {
		k, err := newSSHKeys()
		if err != nil {
			return err
		}
		return writeKeys(dir, k.files())
	})
	if err != nil {
		return nil, fmt.Errorf("make ssh keys: %w", err)
	}
	k := new(sshKeys)
	for name, content := range k.files() {
		if *content, err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			return nil, fmt.Errorf("read ssh keys: %w", err)
		}
	}
	return k, nil
}

func newSSHKeys() (*sshKeys, error) {
	_, client, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	_, host, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(client, "wanlab")
	if err != nil {
		return nil, err
	}
	authorized, err := ssh.NewPublicKey(client.Public())
	if err != nil {
		return nil, err
	}
	known, err := ssh.NewPublicKey(host.Public())
	if err != nil {
		return nil, err
	}
	return &sshKeys{
		client:     pem.EncodeToMemory(block),
		authorized: ssh.MarshalAuthorizedKey(authorized),
		// Dropbear keeps the type, and seed and public key in one string, as Go does (its ed25519.c).
		host: ssh.Marshal(struct {
			Type string
			Key  []byte
		}{ssh.KeyAlgoED25519, host}),
		known: append([]byte(sshHost+" "), ssh.MarshalAuthorizedKey(known)...),
	}, nil
}

func writeKeys(dir string, files map[string]*[]byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), *content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// install writes what a client needs to a directory.
func (k *sshKeys) install(dir string) error {
	if err := writeKeys(dir, map[string]*[]byte{"client": &k.client, "known_hosts": &k.known}); err != nil {
		return fmt.Errorf("install ssh keys: %w", err)
	}
	return nil
}

// server is dropbear with these keys, and with busybox for root's shell.
func (k *sshKeys) server() software {
	return software{
		packages: []string{"dropbear-bin", "libc6", "libcrypt1", "libgmp10", "libtomcrypt1", "libtommath1", "zlib1g"},
		program:  "/usr/sbin/dropbear",
		files: []initrdFile{
			{name: "etc/passwd", mode: 0o644, content: []byte("root:x:0:0:root:/root:/bin/sh\n")},
			{name: "etc/dropbear/host", mode: 0o600, content: k.host},
			{name: "root/.ssh/authorized_keys", mode: 0o600, content: k.authorized},
			{name: "bin/sh", link: "busybox"},
		},
	}
}

// sshDir holds what clients of the VM need, while the VM exists and runs dropbear.
func (v *VM) sshDir() string {
	return filepath.Join(v.lab.vmDir(), url.PathEscape(v.Name)+".ssh")
}
