//go:build lab

package netredirect

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDeviceReadsProbesAlone has other packets come out of the tunnel, too.
func TestDeviceReadsProbesAlone(t *testing.T) {
	s := planSite(t)
	far := s.tun("wmqtest")
	var port *device
	s.must(func() (err error) {
		port, err = openDevice("wmqtest")
		return err
	})
	defer port.Close()
	buf := make([]byte, maxMTU)
	for _, probe := range probes(t)[1:] { // one of no size may be of less
		if len(probe) > 1480 {
			continue
		}
		far.write(t, addr("203.0.113.50"), addr("192.0.2.10"))
		far.write(t, addr("2001:db8:5::50"), addr("2001:db8:1::10"))
		if _, err := far.Write(probe); err != nil {
			t.Fatal(err)
		}
		far.write(t, addr("203.0.113.50"), addr("192.0.2.10"))
		n, err := port.receive(buf, time.Now().Add(5*time.Second))
		if err != nil || !bytes.Equal(buf[:n], probe) {
			t.Errorf("of a probe of %d bytes come %d: %v", len(probe), n, err)
		}
		if n, err := port.receive(buf, time.Now().Add(50*time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("something else is read: %x, %v", buf[:n], err)
		}
	}
}

// TestFullQueueIsNoError sends what no one takes out of the TUN.
func TestFullQueueIsNoError(t *testing.T) {
	s := planSite(t)
	s.tun("wmqtest")
	s.sh("ip link set wmqtest txqueuelen 1")
	var port *device
	s.must(func() (err error) {
		port, err = openDevice("wmqtest")
		return err
	})
	defer port.Close()
	if err := unix.SetsockoptInt(port.fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil { // it would drop in silence
		t.Fatal(err)
	}
	probe := slices.Clone(probes(t)[1])
	to := &unix.SockaddrLinklayer{Protocol: 8, Ifindex: port.index} // ETH_P_IP in network order
	full := false
	for range 5000 {
		if full = unix.Sendto(port.fd, probe, 0, to) == unix.ENOBUFS; full {
			break
		}
	}
	if !full {
		t.Fatal("the queue does not fill: the test shows nothing")
	}
	for range 100 {
		if err := port.send(probe, true); err != nil {
			t.Fatal(err)
		}
	}
}
