//go:build lab

package e2e

import (
	"context"
	"log/slog"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/lab"
)

// The addresses of a real guest, as its agent tells them.
func TestAddressesFromTheGuestAgent(t *testing.T) {
	w := newWorld(t, "100mbit", "50ms")
	v := w.vm(lab.VMOptions{Name: "web", GuestAgent: true, Memory: 256 << 20, Disks: []lab.DiskOptions{disk(t, "16MiB")}})
	h := hypervisor.New(w.path(lab.LocalDC, "/run/libvirt/libvirt-sock"), slog.New(slog.DiscardHandler))
	defer h.Close()
	nics, err := h.NICs(t.Context(), v.UUID)
	if err != nil || len(nics) != 1 || nics[0].MAC != v.MAC || nics[0].Bridge != w.Sites[lab.LocalDC].Bridge || nics[0].Tap == "" {
		t.Fatalf("interfaces %+v, %v", nics, err)
	}
	want := map[string][]netip.Prefix{v.MAC: {netip.PrefixFrom(v.Address, 24), netip.PrefixFrom(v.Address6, 64)}}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for { // the agent starts after the rest of the guest
		found, source, err := h.Addresses(ctx, v.UUID)
		if err != nil {
			t.Fatal(err)
		}
		if source == hypervisor.FromAgent {
			if !reflect.DeepEqual(found, want) {
				t.Errorf("addresses %v, want %v", found, want)
			}
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
