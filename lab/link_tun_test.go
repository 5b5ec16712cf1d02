package lab

import (
	"bytes"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// newWire makes an emulator whose devices are sockets that keep packets apart,
// and returns their other ends.
func newWire(t *testing.T, settings LinkSettings) (*emulator, [2]int) {
	t.Helper()
	var inside [2]tun
	var outside [2]int
	for i := range inside {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		inside[i] = tun{"wan0", pair[0]}
		outside[i] = pair[1]
		t.Cleanup(func() { unix.Close(pair[0]); unix.Close(pair[1]) })
	}
	e, err := newEmulator(settings, wire{[2]string{LocalDC, RemoteDC}, inside})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, d := range e.directions {
			unix.Close(d.wake)
		}
	})
	return e, outside
}

// receiveOne waits for a packet.
func receiveOne(t *testing.T, fd int) []byte {
	t.Helper()
	buf := make([]byte, linkMTU)
	for {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		}
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatalf("receive: %v", err)
		}
		return buf[:n]
	}
}

func TestEmulatorCarriesBothWays(t *testing.T) {
	e, ends := newWire(t, LinkSettings{Rate: 1e9})
	ended := make(chan error)
	go func() { ended <- e.run() }()
	for i, from := range DataCentres {
		for n := range 50 {
			packet := bytes.Repeat([]byte{byte(n)}, 100+n)
			if _, err := unix.Write(ends[i], packet); err != nil {
				t.Fatal(err)
			}
			if got := receiveOne(t, ends[1-i]); !bytes.Equal(got, packet) {
				t.Fatalf("packet %d from %s arrived as %d bytes %x", n, from, len(got), got[:1])
			}
		}
	}
	state, err := e.state()
	if err != nil {
		t.Fatal(err)
	}
	for from, c := range state.Counters {
		if want := (LinkCounters{Bytes: 6225, Packets: 50}); c != want {
			t.Errorf("counters from %s: %+v, want %+v", from, c, want)
		}
	}

	everything := DataCentres
	if err := e.change(LinkChange{Cut: &everything}); err != nil {
		t.Fatal(err)
	}
	e.resetCounters()
	if _, err := unix.Write(ends[0], []byte("lost")); err != nil {
		t.Fatal(err)
	}
	for {
		state, err := e.state()
		if err != nil {
			t.Fatal(err)
		}
		if state.Counters[LocalDC].Cut == 1 {
			break
		}
	}

	// A device that is gone ends its direction, and the link says so.
	for _, fd := range ends {
		if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-ended; err == nil {
		t.Error("the link ended without an error")
	}
	if _, err := e.state(); err == nil {
		t.Error("a link that has ended has a state")
	}
}

func TestLinkHandlerRefusesBadChanges(t *testing.T) {
	e, _ := newWire(t, DefaultLink())
	handler := linkHandler(e)
	for _, body := range []string{
		"", "{", "[]", `{"rate_bits_per_s": -1}`, `{"rate_bits_per_s": 1e99}`, `{"loss": 1}`, `{"burst_packets": 0.1}`,
		`{"queue_bytes": 1}`, `{"rtt_ns": "50ms"}`, `{"cut_from": ["users"]}`, `{"speed": 1}`,
		`{"cut_from": ["` + strings.Repeat("x", maxControlBody) + `"]}`,
	} {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequest("PATCH", "/v1/link", strings.NewReader(body)))
		if w.Code != 400 {
			t.Errorf("change %.60q: status %d, %s", body, w.Code, w.Body)
		}
	}
	state, err := e.state()
	if err != nil {
		t.Fatal(err)
	}
	if state.Settings.Rate != DefaultLink().Rate || state.Settings.RTT != DefaultLink().RTT {
		t.Errorf("refused changes changed the link to %+v", state.Settings)
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest("PATCH", "/v1/link", strings.NewReader(`{"loss": 0.25}`)))
	if state, _ := e.state(); w.Code != 200 || state.Settings.Loss != 0.25 || state.Settings.Rate != DefaultLink().Rate {
		t.Errorf("a good change: status %d, link %+v", w.Code, state.Settings)
	}
}
