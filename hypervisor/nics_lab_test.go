//go:build lab

package hypervisor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
)

const nicsXML = `
    <interface type='bridge'>
      <mac address='52:54:00:00:00:0A'/>
      <source bridge='br0'/>
      <model type='virtio'/>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:00:00:0b'/>
      <source network='lan'/>
      <model type='e1000'/>
    </interface>
    <interface type='user'>
      <mac address='52:54:00:00:00:0c'/>
      <model type='virtio'/>
    </interface>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <memballoon model='none'/>`

// inside runs a tool in a site's network namespace.
func (s *site) inside(t *testing.T, args ...string) {
	t.Helper()
	tool(t, "nsenter", append([]string{"--net=/proc/" + fmt.Sprint(s.init) + "/ns/net"}, args...)...)
}

// newNetworkedGuest starts a guest that only runs its BIOS, with interfaces.
func newNetworkedGuest(t *testing.T, s *site) *Domain {
	t.Helper()
	for _, b := range []string{"br0", "br1"} {
		s.inside(t, "ip", "link", "add", b, "type", "bridge")
		s.inside(t, "ip", "link", "set", b, "up")
	}
	s.inside(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "br0")
	file := filepath.Join(s.dir, "net.xml")
	write(t, file, "<network><name>lan</name><forward mode='bridge'/><bridge name='br1'/></network>")
	s.virsh(t, "net-define", file)
	s.virsh(t, "net-start", "lan")
	xml := strings.Replace(guestXML, "<memballoon model='none'/>", nicsXML, 1)
	for {
		a := strings.Index(xml, "<disk ")
		if a < 0 {
			break
		}
		b := strings.Index(xml, "</disk>") + len("</disk>")
		xml = xml[:a] + xml[b:]
	}
	file = filepath.Join(s.dir, "guest.xml")
	write(t, file, strings.ReplaceAll(xml, "NAME", "guest"))
	s.virsh(t, "create", file)
	dom, err := s.host.Domain(t.Context(), "guest")
	if err != nil {
		t.Fatal(err)
	}
	return dom
}

func TestNICsAndAddresses(t *testing.T) {
	s := newSite(t, "amsterdam")
	dom := newNetworkedGuest(t, s)
	want := []NIC{
		{Alias: "net0", MAC: "52:54:00:00:00:0a", Kind: "bridge", Source: "br0", Bridge: "br0", Tap: "vnet0", Model: "virtio"},
		{Alias: "net1", MAC: "52:54:00:00:00:0b", Kind: "bridge", Source: "br1", Bridge: "br1", Tap: "vnet1", Model: "e1000"},
		{Alias: "net2", MAC: "52:54:00:00:00:0c", Kind: "user", Model: "virtio"},
	}
	nics, err := s.host.NICs(t.Context(), dom.UUID)
	if err != nil || !reflect.DeepEqual(nics, want) {
		t.Errorf("got  %+v, %v\nwant %+v", nics, err, want)
		t.Log(s.virsh(t, "dumpxml", "guest"))
	}

	// Nobody knows an address of a guest that has none, nor does its agent answer.
	found, source, err := s.host.Addresses(t.Context(), dom.UUID)
	if err != nil || len(found) != 0 || source != "" {
		t.Errorf("of a silent guest: %v from %q, %v", found, source, err)
	}

	// The neighbour table does, once the guest was heard: as far as libvirt can
	// read it, which 9.0 cannot on kernels that end a dump in its last part.
	s.inside(t, "ip", "neigh", "replace", "192.0.2.10", "lladdr", "52:54:00:00:00:0a", "dev", "br0", "nud", "reachable")
	readable := exec.Command("virsh", "-c", "qemu+unix:///system?socket="+s.socket(), "domifaddr", "guest", "--source", "arp").Run() == nil
	found, source, err = s.host.Addresses(t.Context(), dom.UUID)
	switch known := map[string][]netip.Prefix{"52:54:00:00:00:0a": prefixes("192.0.2.10/32")}; {
	case err != nil:
		t.Error(err)
	case readable && (!reflect.DeepEqual(found, known) || source != FromARP):
		t.Errorf("by ARP: %v from %q", found, source)
	case !readable && (len(found) != 0 || source != ""):
		t.Errorf("by an ARP table that libvirt does not read: %v from %q", found, source)
	}

	if err := s.host.Suspend(t.Context(), dom.UUID); err != nil {
		t.Fatal(err)
	}
	if nics, err := s.host.NICs(t.Context(), dom.UUID); err != nil || !reflect.DeepEqual(nics, want) {
		t.Errorf("of a paused guest: %+v, %v", nics, err)
	}
	if _, _, err := s.host.Addresses(t.Context(), "7c5f0d0e-1d2c-4f6e-9a53-0b6a4a8e7a11"); !errors.Is(err, ErrNoDomain) {
		t.Errorf("of no guest: %v", err)
	}
}

// A guest agent that takes a request and never answers costs addressTimeout, and
// the other sources are asked then.
func TestAddressesWhenTheAgentHangs(t *testing.T) {
	s := newSite(t, "amsterdam")
	dom := newNetworkedGuest(t, s)
	socket := filepath.Join(s.dir, "proxy")
	asked := withoutAgent(t, socket, s.socket())
	h := New(socket, slog.New(slog.DiscardHandler))
	defer h.Close()
	began := time.Now()
	found, source, err := h.Addresses(t.Context(), dom.UUID)
	if err != nil || len(found) != 0 || source != "" {
		t.Errorf("got %v from %q, %v", found, source, err)
	}
	if took := time.Since(began); took < addressTimeout || took > 2*addressTimeout {
		t.Errorf("took %v", took)
	}
	if got, want := asked(), []uint32{1, 0, 2}; !slices.Equal(got, want) {
		t.Errorf("asked the sources %v, want %v", got, want)
	}
	// The caller's own limit is the caller's error.
	if _, _, err := h.Addresses(within(t, addressTimeout/4), dom.UUID); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with less time: %v", err)
	}
}

// withoutAgent is a libvirtd that never answers what it would ask a guest agent.
// asked returns the sources of addresses that it was asked for.
func withoutAgent(t *testing.T, socket, libvirtd string) (asked func() []uint32) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var sources []uint32
	var running sync.WaitGroup
	serve := func(client net.Conn) {
		defer client.Close()
		server, err := net.Dial("unix", libvirtd)
		if err != nil {
			t.Error(err)
			return
		}
		defer server.Close()
		running.Go(func() { _, _ = io.Copy(client, server) })
		for head := make([]byte, 4); ; {
			// Length, with itself; program, version, procedure; …; source, flags.
			if _, err := io.ReadFull(client, head); err != nil {
				return
			}
			call := make([]byte, binary.BigEndian.Uint32(head)-4)
			if _, err := io.ReadFull(client, call); err != nil {
				return
			}
			const interfaceAddresses = 353
			if binary.BigEndian.Uint32(call[8:]) == interfaceAddresses {
				from := binary.BigEndian.Uint32(call[len(call)-8:])
				mu.Lock()
				sources = append(sources, from)
				mu.Unlock()
				if from == uint32(libvirt.DomainInterfaceAddressesSrcAgent) {
					continue
				}
			}
			if _, err := server.Write(append(head, call...)); err != nil {
				return
			}
		}
	}
	running.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { serve(client) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		running.Wait()
	})
	return func() []uint32 {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(sources)
	}
}

// The source's part of a redirect begins at EventSuspended.
func TestSuspendedIsReportedAtOnce(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", false)
	first := func(s *site, kind EventKind) <-chan Event {
		seen := make(chan Event, 1)
		stop, err := s.host.Watch(t.Context(), dom.UUID, func(e Event) {
			if e.Kind != kind {
				return
			}
			select {
			case seen <- e:
			default:
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(stop)
		return seen
	}
	suspends, resumptions := first(src, EventSuspended), first(dst, EventResumed)
	// QEMU stamps its own events.
	monitor := func(s *site, event string) *lines {
		return follow(t, "virsh", "-c", "qemu+unix:///system?socket="+s.socket(), "qemu-monitor-event", "--event", event, "--loop")
	}
	stops, resumes := monitor(src, "STOP"), monitor(dst, "RESUME")
	time.Sleep(500 * time.Millisecond) // virsh does not say when it listens
	f := prepare(t, src, dst, dom, manner{})
	cookie := f.perform(t)
	performed := time.Now()
	if err := f.in.Finish(within(t, time.Minute), cookie, false); err != nil {
		t.Fatal(err)
	}
	finished := time.Now()
	if err := f.out.Confirm(within(t, time.Minute), nil, false); err != nil {
		t.Fatal(err)
	}
	stop, resume := stops.stamp(t), resumes.stamp(t)
	suspended, resumed := next(t, suspends), next(t, resumptions)
	t.Logf("after STOP: suspended (%s) %v, Perform returns %v", suspended.Detail, suspended.Time.Sub(stop), performed.Sub(stop))
	t.Logf("after RESUME: resumed (%s) %v, Finish returns %v", resumed.Detail, resumed.Time.Sub(resume), finished.Sub(resume))
	if suspended.Detail != "migrated" || suspended.Time.After(performed) || suspended.Time.Sub(stop) > time.Second {
		t.Errorf("the stop is reported late: %+v", suspended)
	}
	if resumed.Time.Sub(resume) > time.Second {
		t.Errorf("the resume is reported late: %+v", resumed)
	}
}

func next(t *testing.T, events <-chan Event) Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-within(t, 20*time.Second).Done():
		t.Fatal("the event did not come")
		return Event{}
	}
}

// lines are those that a program prints.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// follow collects what a program prints until the test ends.
func follow(t *testing.T, name string, args ...string) *lines {
	t.Helper()
	l := &lines{}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = l, l
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return l
}

// stamp is the time of QEMU's event that virsh prints first.
func (l *lines) stamp(t *testing.T) time.Time {
	t.Helper()
	var sec, usec int64
	eventually(t, "an event of QEMU", func() bool {
		_, rest, ok := strings.Cut(l.String(), " at ")
		n, _ := fmt.Sscanf(rest, "%d.%d for", &sec, &usec)
		return ok && n == 2
	})
	return time.Unix(sec, usec*1000)
}
