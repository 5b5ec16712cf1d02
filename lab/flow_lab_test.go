//go:build lab

package lab

import (
	"context"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// flows are all kinds of them, from the users to one address.
type flows struct {
	stream   *Stream
	udp      *UDPFlow
	download *Download
	ssh      *SSHSession
}

type flowResults struct {
	stream   StreamResult
	udp      UDPResult
	download DownloadResult
	ssh      SSHResult
}

func startFlows(t *testing.T, v *VM, to netip.Addr, o DownloadOptions) (f flows) {
	t.Helper()
	const interval = 10 * time.Millisecond
	var err error
	// Before the guest is busy with the others: this takes it long.
	if f.ssh, err = v.StartSSH(t.Context(), Users, to); err != nil {
		t.Fatal(err)
	}
	if f.stream, err = v.StartStream(t.Context(), Users, to, interval); err != nil {
		t.Fatal(err)
	}
	if f.udp, err = v.StartUDP(t.Context(), Users, to, interval); err != nil {
		t.Fatal(err)
	}
	if f.download, err = v.StartDownload(t.Context(), Users, to, o); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f flows) stop(t *testing.T) flowResults {
	t.Helper()
	var r flowResults
	var all sync.WaitGroup
	all.Go(func() { r.stream = f.stream.Stop() })
	all.Go(func() { r.udp = f.udp.Stop() })
	all.Go(func() { r.download = f.download.Stop() })
	all.Go(func() { r.ssh = f.ssh.Stop() })
	all.Wait()
	t.Logf("stream    %v", r.stream)
	t.Logf("udp       %v", r.udp)
	t.Logf("download  %v", r.download)
	t.Logf("ssh       %v", r.ssh)
	return r
}

func (r flowResults) wantWell(t *testing.T) {
	t.Helper()
	for name, err := range map[string]error{"stream": r.stream.Err(), "udp": r.udp.Err(), "download": r.download.Err(), "ssh": r.ssh.Err()} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if r.stream.Sent < 50 || r.stream.Answered != r.stream.Sent || r.udp.Answered < 50 || r.ssh.Lines < 2 || r.ssh.Echoed < 5 || r.ssh.Echoed != r.ssh.Sent {
		t.Error("too little came back")
	}
}

// suspend stops the guest for a time.
func suspend(t *testing.T, v *VM, length time.Duration) {
	t.Helper()
	site := v.lab.Sites[LocalDC]
	if _, err := site.virsh(t.Context(), nil, "suspend", v.UUID); err != nil {
		t.Fatal(err)
	}
	time.Sleep(length)
	if _, err := site.virsh(t.Context(), nil, "resume", v.UUID); err != nil {
		t.Fatal(err)
	}
}

func TestFlows(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeLab(t, DefaultLink())
	v := createVM(t, l, VMOptions{Name: "web server", SSH: true, Memory: 256 << 20, Disks: []DiskOptions{{Size: 16 << 20, Format: "raw", Bus: "virtio"}}})

	for name, to := range map[string]netip.Addr{"IPv4": v.Address, "IPv6": v.LinkLocal.WithZone("eth0")} {
		t.Run(name, func(t *testing.T) {
			f := startFlows(t, v, to, DownloadOptions{MiB: 16})
			time.Sleep(2 * time.Second)
			select {
			case <-f.download.Done():
			case <-time.After(30 * time.Second):
				t.Error("the download does not end")
			}
			r := f.stop(t)
			r.wantWell(t)
			if !r.download.Complete() || r.download.Bytes != 16<<20 {
				t.Errorf("the download is not complete: %+v", r.download)
			}
		})
	}

	// Most of this time passes in the guest's absence; a busy machine only adds to it.
	t.Run("a stop of the guest", func(t *testing.T) {
		const stop, loosely = 2 * time.Second, 10 * time.Second // longer than a busy machine keeps a guest waiting
		f := startFlows(t, v, v.Address, DownloadOptions{MiB: 64, Limit: 2 << 20})
		time.Sleep(time.Second)
		before := time.Now()
		suspend(t, v, stop)
		after := time.Now()
		time.Sleep(time.Second)
		r := f.stop(t)
		r.wantWell(t)
		for name, gap := range map[string]Silence{"stream": r.stream.LongestGap, "udp": r.udp.LongestGap, "ssh": r.ssh.LongestGap} {
			if gap.Length < stop || gap.Length > loosely || gap.Start.Before(before.Add(-loosely)) || gap.Start.After(after) {
				t.Errorf("%s: the guest stopped for %v from %v on, and this is seen: %+v", name, stop, before, gap)
			}
		}
		if r.stream.LongestAge < stop-50*time.Millisecond || r.udp.LongestAge < stop-50*time.Millisecond {
			t.Errorf("no answer waited for the guest: %v, %v", r.stream.LongestAge, r.udp.LongestAge)
		}
		if r.download.LongestGap.Length < stop/4 {
			t.Errorf("the download saw a gap of %v", r.download.LongestGap.Length)
		}
		if d := r.download; d.Complete() || d.Bytes == 0 || d.Rate() > 2.2*(1<<20) {
			t.Errorf("64 MiB at 2 MiB/s for a few seconds: %+v", d)
		}
	})

	t.Run("dropped", func(t *testing.T) {
		f := startFlows(t, v, v.Address, DownloadOptions{MiB: 64, Limit: 1 << 20})
		time.Sleep(500 * time.Millisecond)
		filter(t, l, "tcp dport { 7, 22, 80 } drop; tcp sport { 7, 22, 80 } drop; udp sport 7 drop")
		time.Sleep(2500 * time.Millisecond)
		r := f.stop(t)
		if r.stream.Err() == nil || r.stream.Broken == "" || r.stream.Resets != 0 || r.stream.Answered >= r.stream.Sent || r.stream.LongestGap.Length < time.Second {
			t.Errorf("stream %+v", r.stream)
		}
		if r.udp.Err() == nil || r.udp.Lost == 0 || r.udp.Unanswered < time.Second {
			t.Errorf("udp %+v", r.udp)
		}
		if r.ssh.Err() == nil || r.ssh.Broken == "" || r.ssh.LongestGap.Length < time.Second {
			t.Errorf("ssh %+v", r.ssh)
		}
		if r.download.Complete() || r.download.LongestGap.Length < time.Second || !strings.Contains(r.download.Broken, "nothing came in the last ") {
			t.Errorf("download %+v", r.download)
		}
	})

	t.Run("reset", func(t *testing.T) {
		f := startFlows(t, v, v.Address, DownloadOptions{MiB: 64, Limit: 1 << 20})
		time.Sleep(500 * time.Millisecond)
		filter(t, l, "tcp dport { 7, 22, 80 } reject with tcp reset; udp dport 7 reject")
		for name, done := range map[string]<-chan struct{}{"stream": f.stream.Done(), "ssh": f.ssh.Done(), "download": f.download.Done()} {
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Errorf("%s goes on", name)
			}
		}
		r := f.stop(t)
		if r.stream.Resets != 1 || r.stream.Err() == nil || r.download.Resets != 1 || r.download.Err() == nil {
			t.Errorf("stream %+v, download %+v", r.stream, r.download)
		}
		if r.ssh.Err() == nil || !strings.Contains(r.ssh.Broken, "exit status 255") {
			t.Errorf("ssh %+v", r.ssh)
		}
		if r.udp.Errors == 0 || r.udp.Err() == nil {
			t.Errorf("udp %+v", r.udp)
		}
	})

	t.Run("killed", func(t *testing.T) {
		f := startFlows(t, v, v.Address, DownloadOptions{MiB: 64, Limit: 1 << 20})
		time.Sleep(500 * time.Millisecond)
		if _, err := l.Sites[LocalDC].virsh(t.Context(), nil, "destroy", v.UUID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2500 * time.Millisecond)
		r := f.stop(t)
		if r.stream.Err() == nil || r.udp.Err() == nil || r.ssh.Err() == nil || r.download.Err() == nil {
			t.Errorf("%+v", r)
		}
		if _, err := v.StartStream(t.Context(), Users, v.Address, time.Second); err == nil {
			t.Error("a guest that was killed is connected to")
		}
		if _, err := v.StartSSH(t.Context(), Users, v.Address); err == nil || !strings.Contains(err.Error(), "no session: exit status 255: ssh: connect to host 10.10.0.10") {
			t.Errorf("ssh to a guest that was killed: %v", err)
		}
	})

	if err := v.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNothingLeft(t, l, v.Name)
}

// filter has the users' host apply rules to what it sends, for as long as the test runs.
func filter(t *testing.T, l *Lab, rules string) {
	t.Helper()
	nft := func(stdin string, args ...string) {
		cmd := exec.Command("ip", append([]string{"netns", "exec", l.Sites[Users].Namespace, "nft"}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
	}
	rules = strings.ReplaceAll(rules, "; ", "\n")
	nft("table inet flowtest {\nchain out { type filter hook output priority 0\n"+rules+"\n}\nchain in { type filter hook input priority 0\n"+
		strings.ReplaceAll(rules, "with tcp reset", "")+"\n}\n}\n", "-f", "-")
	t.Cleanup(func() { nft("", "delete", "table", "inet", "flowtest") })
}

func TestGuestAgentKnowsTheAddresses(t *testing.T) {
	t.Parallel() // in a lab of its own, mostly waiting for its guest
	l := makeLab(t, LinkSettings{Rate: 1e9, RTT: 10 * time.Millisecond})
	v := createVM(t, l, VMOptions{Name: "web", GuestAgent: true, Memory: 256 << 20, Disks: []DiskOptions{{Size: 16 << 20, Format: "raw", Bus: "virtio"}}})
	awaitAgent(t, v, LocalDC)
	if _, err := v.StartSSH(t.Context(), Users, v.Address); err == nil || !strings.Contains(err.Error(), "wanlab vm --ssh") {
		t.Errorf("ssh to a guest without: %v", err)
	}

	if out, err := exec.Command("truncate", "-s", "16M", l.Sites[RemoteDC].Dir+v.Disks[0]).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	run(t, l, LocalDC, "virsh", "migrate", "--live", "--copy-storage-all", "--persistent", "--undefinesource", v.UUID, l.Sites[RemoteDC].LibvirtURI)
	awaitAgent(t, v, RemoteDC)
}

// awaitAgent waits until libvirt has the guest's addresses from its agent.
func awaitAgent(t *testing.T, v *VM, site string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		out, err := v.lab.Sites[site].virsh(ctx, nil, "domifaddr", v.UUID, "--source", "agent")
		text := string(out)
		if err == nil && strings.Contains(text, v.MAC) && strings.Contains(text, v.Address.String()+"/24") && strings.Contains(text, v.LinkLocal.String()+"/64") {
			return
		}
		if pause(ctx) != nil {
			t.Fatalf("the guest agent at %s says %q, %v", site, text, err)
		}
	}
}
