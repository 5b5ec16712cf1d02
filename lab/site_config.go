package lab

import (
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
)

// writeConfig makes the sites' directories and the files that their daemons read.
func (l *Lab) writeConfig() error {
	for _, s := range l.Sites {
		if err := l.makePrivateDirs(s); err != nil {
			return err
		}
	}
	for _, name := range l.DataCentres() {
		if err := l.Sites[name].writeConfig(l); err != nil {
			return err
		}
	}
	if !l.Services {
		return nil
	}
	if err := l.writeBird(); err != nil {
		return err
	}
	return l.writeNamed()
}

// writeConfig writes the files of a data centre that every lab has.
func (s *Site) writeConfig(l *Lab) error {
	agent, err := l.agentConfig(s)
	if err != nil {
		return err
	}
	passwd, err := withLine(passwdFile, libvirtUser+":x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin")
	if err != nil {
		return err
	}
	group, err := withLine(groupFile, libvirtUser+":x:64055:")
	if err != nil {
		return err
	}
	files := map[string]string{
		passwdFile:                   passwd,
		groupFile:                    group,
		hostsFile:                    hosts(l),
		"/etc/libvirt/libvirtd.conf": s.libvirtdConfig(l.ID),
		"/etc/libvirt/qemu.conf":     s.qemuConfig(),
		agentFile:                    agent,
	}
	for path, text := range files {
		if err := os.WriteFile(s.Dir+path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
	}
	return nil
}

// libvirtUser is looked up by Debian's libvirtd although its configuration
// here names root. It comes with libvirt-daemon-system, whose services a
// host needs only for guests of its own.
const libvirtUser = "libvirt-qemu"

// withLine returns the text of the host's passwd or group with a line added
// unless its name is there.
func withLine(path, line string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	name, _, _ := strings.Cut(line, ":")
	for l := range strings.Lines(string(text)) {
		if strings.HasPrefix(l, name+":") {
			return string(text), nil
		}
	}
	return strings.TrimSuffix(string(text), "\n") + "\n" + line + "\n", nil
}

// hosts lets each data centre find the other, and itself without asking the
// DNS, which libvirtd does when it starts.
func hosts(l *Lab) string {
	text := "127.0.0.1 localhost\n::1 localhost\n"
	for _, name := range l.DataCentres() {
		text += fmt.Sprintf("%s %s\n", l.Sites[name].WANAddr.Addr(), name)
	}
	return text
}

// hostUUID must differ between two libvirtd that migrate to each other.
func (s *Site) hostUUID(labID string) string {
	sum := sha256.Sum256([]byte(labID + "/" + s.Name))
	sum[6] = sum[6]&0x0f | 0x40 // RFC 9562: version 4
	sum[8] = sum[8]&0x3f | 0x80 // and variant
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[0:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}

func (s *Site) libvirtdConfig(labID string) string {
	return fmt.Sprintf(`host_uuid = "%s"
listen_tls = 0
listen_tcp = 1
listen_addr = "%s"
tcp_port = "%d"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:stderr"
`, s.hostUUID(labID), s.WANAddr.Addr(), libvirtPort)
}

// qemuConfig does without what belongs to a whole host: users, security
// modules, cgroups, device namespaces and virtlogd. Owners are not remembered
// since two libvirtd on one file system would confuse each other's notes.
func (s *Site) qemuConfig() string {
	return fmt.Sprintf(`user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
migration_host = "%s"
`, s.WANAddr.Addr())
}
