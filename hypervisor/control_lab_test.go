//go:build lab

package hypervisor

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestControl(t *testing.T) {
	src := newSite(t, "amsterdam")
	ctx := t.Context()
	dom := newGuest(t, src, "guest", true)
	if dom.Autostart {
		t.Error("a new domain starts with the host")
	}
	if err := src.host.SetAutostart(ctx, dom.UUID, true); err != nil {
		t.Fatal(err)
	}
	for _, d := range []time.Duration{0, 250 * time.Millisecond, MaxDowntimeLimit} {
		if err := src.host.SetMaxDowntime(ctx, dom.UUID, d); err != nil {
			t.Errorf("downtime %v: %v", d, err)
		}
	}
	for _, d := range []time.Duration{-1, MaxDowntimeLimit + 1} {
		if err := src.host.SetMaxDowntime(ctx, dom.UUID, d); err == nil {
			t.Errorf("downtime %v is no error", d)
		}
	}
	for range 2 { // the second time it runs already
		if err := src.host.Resume(ctx, dom.UUID); err != nil {
			t.Error(err)
		}
	}
	if err := src.host.Define(ctx, strings.Replace(dom.InactiveXML, "<vcpu", "<title>Renewed</title><vcpu", 1)); err != nil {
		t.Fatal(err)
	}
	now, err := src.host.Domain(ctx, "guest")
	if err != nil {
		t.Fatal(err)
	}
	if !now.Autostart || !strings.Contains(now.InactiveXML, "Renewed") {
		t.Errorf("autostart %v, definition\n%s", now.Autostart, now.InactiveXML)
	}
	for range 2 { // the second time it is shut off already
		if err := src.host.Destroy(ctx, dom.UUID); err != nil {
			t.Fatal(err)
		}
	}
	list, err := src.host.Domains(ctx)
	if err != nil || len(list) != 1 || list[0] != (Summary{Name: "guest", UUID: dom.UUID, State: ShutOff}) {
		t.Errorf("domains %+v, %v", list, err)
	}
	if err := src.host.Undefine(ctx, dom.UUID, true); err != nil {
		t.Fatal(err)
	}
	if _, err := src.host.Domain(ctx, "guest"); !errors.Is(err, ErrNoDomain) {
		t.Errorf("after its end: %v", err)
	}
}
