package lab

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// linkedTree has this machine's true and its libraries, where a package would have them.
func linkedTree(t *testing.T) (tree string, program []byte) {
	t.Helper()
	tree = t.TempDir()
	program, err := os.ReadFile("/usr/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	loader, err := interpreter(program)
	if err != nil {
		t.Fatal(err)
	}
	needs, err := libraries(program)
	if err != nil || len(needs) == 0 {
		t.Fatalf("libraries %v, %v", needs, err)
	}
	writeIn(t, tree, "usr/bin/true", program)
	for _, name := range append(needs, filepath.Base(loader)) {
		content, err := os.ReadFile(filepath.Join("/lib/x86_64-linux-gnu", name))
		if err != nil {
			t.Fatal(err)
		}
		writeIn(t, tree, "usr/lib/x86_64-linux-gnu/"+name, content)
	}
	return tree, program
}

func writeIn(t *testing.T, tree, name string, content []byte) {
	t.Helper()
	path := filepath.Join(tree, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestLinkedFiles(t *testing.T) {
	tree, program := linkedTree(t)
	files, err := linkedFiles([]string{t.TempDir(), tree}, "/usr/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, f.name)
	}
	for _, want := range []string{"usr/bin/true", "lib/libc.so.6", "lib64/ld-linux-x86-64.so.2"} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s among %v", want, names)
		}
	}
	if !bytes.Equal(files[0].content, program) {
		t.Error("the program has other content")
	}
	if err := os.Remove(filepath.Join(tree, "usr/lib/x86_64-linux-gnu/libc.so.6")); err != nil {
		t.Fatal(err)
	}
	if _, err := linkedFiles([]string{tree}, "/usr/bin/true"); err == nil || !strings.Contains(err.Error(), "no libc.so.6") {
		t.Errorf("without a library: %v", err)
	}
	if _, err := linkedFiles([]string{tree}, "/usr/bin/false"); err == nil || !strings.Contains(err.Error(), "no false") {
		t.Errorf("without the program: %v", err)
	}
}

func TestDamagedProgramsAreRefused(t *testing.T) {
	tree, program := linkedTree(t)
	// Linkage is described in the first pages and by the sections at the end.
	for _, n := range []int{0, 1, 3, 16, 63, 64, 100, 500, 1000, len(program) / 2, len(program) - 1} {
		writeIn(t, tree, "usr/bin/true", program[:n])
		if _, err := linkedFiles([]string{tree}, "/usr/bin/true"); err == nil {
			t.Errorf("the first %d of %d bytes are a program", n, len(program))
		}
	}
	writeIn(t, tree, "usr/bin/true", []byte("#!/bin/sh\n"))
	if _, err := linkedFiles([]string{tree}, "/usr/bin/true"); err == nil {
		t.Error("a script is a program")
	}
}

func TestAddedFilesHaveTheirDirectories(t *testing.T) {
	var b bytes.Buffer
	c := &cpioWriter{w: &b}
	addFiles(c, []initrdFile{
		{name: "root/.ssh/key", mode: 0o600, content: []byte("k")},
		{name: "bin/sh", link: "busybox"},
		{name: "root/.ssh/other", mode: 0o644},
		{name: "bin/sh", link: "twice"},
		{name: "top", mode: 0o755},
	})
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	got := readCPIO(t, b.Bytes())
	none := [2]int64{}
	want := []cpioEntry{
		{"root", 0o40755, none, ""}, {"root/.ssh", 0o40755, none, ""}, {"root/.ssh/key", 0o100600, none, "k"},
		{"bin", 0o40755, none, ""}, {"bin/sh", 0o120777, none, "busybox"}, {"root/.ssh/other", 0o100644, none, ""}, {"top", 0o100755, none, ""},
	}
	if !slices.Equal(got, want) {
		t.Errorf("wrote %v, want %v", got, want)
	}
}

func TestSSHKeysBelongTogether(t *testing.T) {
	im := testImages(t)
	k, err := im.sshKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client, err := ssh.ParsePrivateKey(k.client)
	if err != nil {
		t.Fatal(err)
	}
	authorized, _, _, _, err := ssh.ParseAuthorizedKey(k.authorized)
	if err != nil || !bytes.Equal(authorized.Marshal(), client.PublicKey().Marshal()) {
		t.Errorf("the client's key is not the authorized one: %v", err)
	}
	_, hosts, known, _, _, err := ssh.ParseKnownHosts(k.known)
	if err != nil || !slices.Equal(hosts, []string{sshHost}) {
		t.Fatalf("known hosts %v, %v", hosts, err)
	}
	var host struct {
		Type string
		Key  []byte
	}
	if err := ssh.Unmarshal(k.host, &host); err != nil || host.Type != ssh.KeyAlgoED25519 || len(host.Key) != 64 {
		t.Fatalf("dropbear's key %+v, %v", host, err)
	}
	if !bytes.HasSuffix(known.Marshal(), host.Key[32:]) {
		t.Error("the host's key is not the known one")
	}
	again, err := im.sshKeys(t.Context())
	if err != nil || !bytes.Equal(again.client, k.client) || !bytes.Equal(again.host, k.host) {
		t.Errorf("the next guest has other keys: %v", err)
	}
	dir := filepath.Join(t.TempDir(), "web.ssh")
	if err := k.install(dir); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, "client"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the private key is readable: %v, %v", info, err)
	}
}

func TestOnlyTheGuestAgentHasAChannel(t *testing.T) {
	for _, agent := range []bool{false, true} {
		text, err := (&domain{Name: "web", GuestAgent: agent}).xml()
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "<target type='virtio' name='org.qemu.guest_agent.0'/>") != agent {
			t.Errorf("with a guest agent %v:\n%s", agent, text)
		}
	}
}
