//go:build lab

package hypervisor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMove(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	for _, test := range []struct {
		name                string
		persistent, suspend bool
	}{
		{"transient", false, false},
		{"persistent", true, false},
		{"paused", true, true},
		{"device", true, false},
		{"uefi", true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			var device string
			if test.name == "device" {
				file := filepath.Join(dst.dir, "disks/loop")
				write(t, file, strings.Repeat("\xff", raw))
				device = attachLoop(t, file)
			}
			dom := newGuest(t, src, test.name, test.persistent)
			if test.suspend {
				if err := src.host.Suspend(t.Context(), dom.UUID); err != nil {
					t.Fatal(err)
				}
			}
			f := prepare(t, src, dst, dom, manner{persist: test.persistent, paused: test.suspend, device: device})
			cookie := f.perform(t)
			wantState(t, src, dom.UUID, Paused)
			stats, err := src.host.JobStats(t.Context(), dom.UUID)
			if err != nil {
				t.Fatal(err)
			}
			if !stats.Active || stats.DiskTotal != raw+32<<20 || stats.MemoryTotal < 64<<20 || stats.PageSize != 4096 || stats.Elapsed == 0 {
				t.Errorf("source's statistics after Perform: %+v", stats)
			}
			if err := f.in.Finish(within(t, time.Minute), cookie, false); err != nil {
				t.Fatal(err)
			}
			if err := f.out.Confirm(within(t, time.Minute), nil, false); err != nil {
				t.Fatal(err)
			}
			wantGone(t, src, dom.UUID)
			if test.suspend {
				wantState(t, dst, dom.UUID, Paused)
			} else {
				wantState(t, dst, dom.UUID, Running)
			}
			f.wantDisks(t)
			stats, err = dst.host.CompletedJobStats(t.Context(), dom.UUID)
			if err != nil {
				t.Fatal(err)
			}
			if stats.Active || stats.MemoryTotal < 64<<20 || stats.NormalPages == 0 {
				t.Errorf("destination's statistics after Finish: %+v", stats)
			}
			there, err := dst.host.Domain(t.Context(), dom.UUID)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(dst.dir, "lib/libvirt/qemu/nvram/uefi_VARS.fd")); (err == nil) != (there.NVRAM != "") {
				t.Errorf("UEFI variables at %q: %v", there.NVRAM, err)
			}
			if there.Persistent != test.persistent {
				t.Errorf("persistent at the destination: %v, want %v", there.Persistent, test.persistent)
			}
			for _, d := range there.Disks {
				if d.Path != "" && !strings.HasPrefix(d.Path, dst.dir) && d.Path != device {
					t.Errorf("disk %s is %s", d.Target, d.Path)
				}
			}
			if strings.Contains(there.InactiveXML, src.dir) {
				t.Errorf("the definition names the source's folder:\n%s", there.InactiveXML)
			}
			if err := dst.host.Destroy(t.Context(), dom.UUID); err != nil {
				t.Fatal(err)
			}
			if test.persistent {
				if err := dst.host.Undefine(t.Context(), dom.UUID, true); err != nil {
					t.Fatal(err)
				}
			}
			wantGone(t, dst, dom.UUID)
		})
	}
}

// stalled prepares a move whose memory socket accepts and never reads.
func stalled(t *testing.T, f *flight) {
	t.Helper()
	f.ram.close()
	l := listen(t, f.src, f.sram)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

func TestPerformCancelled(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", true)
	f := prepare(t, src, dst, dom, manner{persist: true})
	stalled(t, f)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the operator said so")
	go func() {
		for ctx.Err() == nil {
			s, err := src.host.JobStats(t.Context(), dom.UUID)
			if err == nil && s.MemoryTotal > 0 {
				cancel(why)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	_, err := f.out.Perform(ctx, f.in.Cookie, f.sram, f.snb)
	cancel(nil)
	if !errors.Is(err, why) {
		t.Fatalf("Perform: %v, want its context's cause", err)
	}
	t.Log(err)
	wantState(t, src, dom.UUID, Running)
	if err := f.in.Finish(within(t, time.Minute), nil, true); err != nil {
		t.Fatal(err)
	}
	wantGone(t, dst, dom.UUID)
	if err := f.out.Confirm(t.Context(), nil, true); err != nil {
		t.Fatal(err)
	}
	again(t, f)
}

// again shows that nothing of a failed move stands in the way of the next.
func again(t *testing.T, f *flight) {
	t.Helper()
	f.in.Close()
	f.out.Close()
	f.ram.close()
	f.nbd.close()
	for _, d := range f.dom.Disks {
		if d.Device == "disk" {
			if err := f.dst.host.RemoveDisk(t.Context(), filepath.Join(f.dst.dir, "disks", filepath.Base(d.Path))); err != nil {
				t.Fatal(err)
			}
		}
	}
	dom, err := f.src.host.Domain(t.Context(), f.dom.UUID)
	if err != nil {
		t.Fatal(err)
	}
	f = prepare(t, f.src, f.dst, dom, manner{persist: dom.Persistent})
	cookie := f.perform(t)
	if err := f.in.Finish(within(t, time.Minute), cookie, false); err != nil {
		t.Fatal(err)
	}
	if err := f.out.Confirm(within(t, time.Minute), nil, false); err != nil {
		t.Fatal(err)
	}
	wantGone(t, f.src, dom.UUID)
	wantState(t, f.dst, dom.UUID, Running)
	f.wantDisks(t)
}

// A mirror that waits for a stalled target ends when its sockets close.
func TestMirrorCancelled(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", true)
	f := prepare(t, src, dst, dom, manner{persist: true})
	f.nbd.stall(1 << 20)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the link is gone")
	go func() {
		<-f.nbd.stalled
		cancel(why)
		// Only now does the abort have something to wait for.
		time.Sleep(time.Second)
		f.nbd.close()
	}()
	_, err := f.out.Perform(ctx, f.in.Cookie, f.sram, f.snb)
	cancel(nil)
	if !errors.Is(err, why) {
		t.Fatalf("Perform: %v, want its context's cause", err)
	}
	wantState(t, src, dom.UUID, Running)
	if err := f.in.Finish(within(t, time.Minute), nil, true); err != nil {
		t.Fatal(err)
	}
	wantGone(t, dst, dom.UUID)
	again(t, f)
}

func TestBrokenLink(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", true)
	f := prepare(t, src, dst, dom, manner{persist: true})
	f.nbd.stall(1 << 20)
	go func() {
		<-f.nbd.stalled
		f.nbd.close()
		f.ram.close()
	}()
	if _, err := f.out.Perform(within(t, time.Minute), f.in.Cookie, f.sram, f.snb); err == nil || errors.Is(err, ErrNoAnswer) {
		t.Fatalf("Perform: %v", err)
	}
	wantState(t, src, dom.UUID, Running)
	// The destination's agent sees only that its peer is gone.
	f.in.Close()
	eventually(t, "the end of the incoming domain", func() bool {
		_, err := dst.host.State(t.Context(), dom.UUID)
		return errors.Is(err, ErrNoDomain)
	})
	again(t, f)
}

func TestPrepareFails(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", true)
	out, err := src.host.BeginOut(t.Context(), dom, OutOptions{DestXML: dom.XML, Disks: []string{"vda", "vdb"}})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	ram, nbd, err := dst.host.DestinationSockets(t.Context(), "m1", dom.Name)
	if err != nil {
		t.Fatal(err)
	}
	xml, err := Rewrite(out.XML, Changes{Disks: map[string]DiskChange{"vda": {Path: "/no/such/disk", Type: "file"}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = dst.host.PrepareIn(t.Context(), InOptions{Name: dom.Name, XML: xml, Cookie: out.Cookie, RAMSocket: ram, NBDSocket: nbd, Disks: []string{"vda", "vdb"}})
	if err == nil || !strings.Contains(err.Error(), "/no/such") {
		t.Fatalf("PrepareIn: %v", err)
	}
	wantGone(t, dst, dom.UUID)
	if s, err := src.host.JobStats(t.Context(), dom.UUID); err != nil || !s.Active {
		t.Errorf("job before Confirm: %+v, %v", s, err)
	}
	if err := out.Confirm(t.Context(), nil, true); err != nil {
		t.Fatal(err)
	}
	wantState(t, src, dom.UUID, Running)
	if err := src.host.Undefine(t.Context(), dom.UUID, false); err != nil {
		t.Error("after the migration:", err)
	}
}

// libvirt compares the devices: an emptied drive passes, a missing one does not.
func TestDevicesMustStay(t *testing.T) {
	src := newSite(t, "amsterdam")
	dom := newGuest(t, src, "guest", true)
	doc, err := parseXML(dom.XML, "domain")
	if err != nil {
		t.Fatal(err)
	}
	cd := diskElements(doc)[2]
	cd.Parent().RemoveChild(cd)
	xml, err := doc.WriteToString()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := src.host.BeginOut(t.Context(), dom, OutOptions{DestXML: xml, Disks: []string{"vda", "vdb"}}); err == nil {
		out.Close()
		t.Error("a removed CD-ROM drive passes")
	}
	wantState(t, src, dom.UUID, Running)
}

// A stopped libvirtd answers nothing; its clients' contexts end their calls.
func TestNoAnswer(t *testing.T) {
	src := newSite(t, "amsterdam")
	dom := newGuest(t, src, "guest", true)
	resume := src.freeze(t)
	_, err := src.host.State(within(t, 300*time.Millisecond), dom.UUID)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("State: %v", err)
	}
	if _, err := New(src.socket(), src.host.log).Info(within(t, 300*time.Millisecond)); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("Open: %v", err)
	}
	resume()
	wantState(t, src, dom.UUID, Running)
}

func TestConfirmCancelled(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", true)
	f := prepare(t, src, dst, dom, manner{persist: true})
	seen := make(chan Event, 100)
	stop, err := src.host.Watch(t.Context(), dom.UUID, func(e Event) { seen <- e })
	if err != nil {
		t.Fatal(err)
	}
	f.perform(t)
	wantState(t, src, dom.UUID, Paused)
	stop()
	close(seen)
	kinds := map[string]int{}
	for e := range seen {
		kinds[strings.TrimSpace(string(e.Kind)+" "+e.Detail)]++
	}
	if kinds["iteration"] == 0 || kinds["suspended migrated"] != 1 || len(kinds) != 2 {
		t.Errorf("events of Perform: %v", kinds)
	}
	if err := f.in.Finish(within(t, time.Minute), nil, true); err != nil {
		t.Fatal(err)
	}
	wantGone(t, dst, dom.UUID)
	if err := f.out.Confirm(within(t, time.Minute), nil, true); err != nil {
		t.Fatal(err)
	}
	wantState(t, src, dom.UUID, Running)
	again(t, f)
}

func TestConnectionsClosed(t *testing.T) {
	src, dst := newSite(t, "amsterdam"), newSite(t, "boston")
	dom := newGuest(t, src, "guest", false)
	f := prepare(t, src, dst, dom, manner{})
	f.perform(t)
	f.out.Close()
	f.in.Close()
	eventually(t, "the end of the incoming domain", func() bool {
		_, err := dst.host.State(t.Context(), dom.UUID)
		return errors.Is(err, ErrNoDomain)
	})
	wantState(t, src, dom.UUID, Paused)
	if err := f.out.Confirm(within(t, time.Minute), nil, true); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("Confirm on a closed connection: %v", err)
	}
	if err := src.host.Resume(t.Context(), dom.UUID); err != nil {
		t.Fatal(err)
	}
	wantState(t, src, dom.UUID, Running)
	again(t, f)
}

func TestRestartedLibvirtd(t *testing.T) {
	src := newSite(t, "amsterdam")
	dom := newGuest(t, src, "guest", true)
	src.restart(t)
	if _, err := src.host.Domain(t.Context(), dom.Name); err != nil {
		t.Fatal(err)
	}
}

func TestWatch(t *testing.T) {
	src := newSite(t, "amsterdam")
	dom := newGuest(t, src, "guest", true)
	events := make(chan Event, 100)
	stop, err := src.host.Watch(t.Context(), dom.UUID, func(e Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for _, step := range []error{src.host.Suspend(ctx, dom.UUID), src.host.Resume(ctx, dom.UUID), src.host.Destroy(ctx, dom.UUID), src.host.Undefine(ctx, dom.UUID, true)} {
		if step != nil {
			t.Fatal(step)
		}
	}
	for _, want := range []Event{{Kind: EventSuspended, Detail: "paused"}, {Kind: EventResumed, Detail: "unpaused"}, {Kind: EventShutdown}, {Kind: EventStopped, Detail: "destroyed"}, {Kind: EventUndefined}} {
		select {
		case e := <-events:
			if e.Kind != want.Kind || e.Detail != want.Detail || e.Time.IsZero() {
				t.Errorf("event %+v, want %+v", e, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no event %+v", want)
		}
	}
	stop()
	if len(events) != 0 {
		t.Errorf("event after the stop: %+v", <-events)
	}
}
