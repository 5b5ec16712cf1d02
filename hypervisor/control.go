package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// State tells what the domain does now.
func (h *Host) State(ctx context.Context, uuid string) (State, error) {
	state := Unknown
	err := h.onDomain(ctx, "domain state", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		s, _, err := l.DomainGetState(d, 0)
		state = stateOf(s)
		return err
	})
	return state, err
}

// Suspend stops the domain's vCPUs.
func (h *Host) Suspend(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, "suspend", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainSuspend(d)
	})
}

// Resume lets the vCPUs of a paused domain run. A running domain stays as it is.
func (h *Host) Resume(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, "resume", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		err := l.DomainResume(d)
		if err == nil {
			return nil
		}
		if s, _, serr := l.DomainGetState(d, 0); serr == nil && stateOf(s) == Running {
			return nil
		}
		return err
	})
}

// Destroy kills the domain's QEMU, like pulling a plug. A transient domain is
// gone with it; one that does not run stays as it is.
func (h *Host) Destroy(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, "destroy", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		s, _, err := l.DomainGetState(d, 0)
		if err != nil || !stateOf(s).Active() {
			return err
		}
		return l.DomainDestroyFlags(d, 0)
	})
}

// Start runs a domain that is shut off, or defines it by its document before:
// one that is not persistent is only run.
func (h *Host) Start(ctx context.Context, uuid, xml string, persistent bool) error {
	state, err := h.State(ctx, uuid)
	switch {
	case errors.Is(err, ErrNoDomain) && xml == "":
		return err
	case errors.Is(err, ErrNoDomain) && !persistent:
		return h.call(ctx, "start", func(l *libvirt.Libvirt) error {
			_, err := l.DomainCreateXML(xml, 0)
			return err
		})
	case errors.Is(err, ErrNoDomain):
		if err := h.Define(ctx, xml); err != nil {
			return err
		}
	case err != nil:
		return err
	case state.Active():
		return fmt.Errorf("start: domain %s is %s already", uuid, state)
	}
	return h.onDomain(ctx, "start", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error { return l.DomainCreate(d) })
}

// Undefine removes the domain's persistent definition, and its UEFI variables
// when nvram is set. A running domain goes on as a transient one.
func (h *Host) Undefine(ctx context.Context, uuid string, nvram bool) error {
	flags := libvirt.DomainUndefineKeepNvram
	if nvram {
		flags = libvirt.DomainUndefineNvram
	}
	return h.onDomain(ctx, "undefine", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainUndefineFlags(d, flags)
	})
}

// Persistent tells whether the domain has a definition that outlives its run.
func (h *Host) Persistent(ctx context.Context, uuid string) (bool, error) {
	persistent := false
	err := h.onDomain(ctx, "persistence", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		v, err := l.DomainIsPersistent(d)
		persistent = v != 0
		return err
	})
	return persistent, err
}

// Define makes the document the persistent definition of its domain.
func (h *Host) Define(ctx context.Context, xml string) error {
	return h.call(ctx, "define", func(l *libvirt.Libvirt) error {
		_, err := l.DomainDefineXMLFlags(xml, 0)
		return err
	})
}

// definitions are where libvirtd for the whole system keeps what is defined, and which
// of it starts with the host.
var definitions = []string{"/etc/libvirt/qemu", "/etc/libvirt/qemu/autostart"}

// SyncDefinitions makes durable what has been defined and undefined until now: libvirt
// writes and renames files, and leaves their folder to the kernel.
func SyncDefinitions() error {
	for _, dir := range definitions {
		if err := syncFolder(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("make definitions of domains durable: %w", err)
		}
	}
	return nil
}

// SetAutostart tells libvirtd whether to start the persistent domain with the
// host. The setting does not travel in the domain's XML.
func (h *Host) SetAutostart(ctx context.Context, uuid string, on bool) error {
	var v int32
	if on {
		v = 1
	}
	return h.onDomain(ctx, "set autostart", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainSetAutostart(d, v)
	})
}

// MaxDowntimeLimit is the longest downtime that QEMU accepts as a goal.
const MaxDowntimeLimit = 2000 * time.Second

// SetMaxDowntime tells QEMU how long its final stop may be estimated to take;
// it may be set before and during Perform.
func (h *Host) SetMaxDowntime(ctx context.Context, uuid string, d time.Duration) error {
	if d < 0 || d > MaxDowntimeLimit {
		return fmt.Errorf("maximum downtime %v is out of range: use 0 to %v", d, MaxDowntimeLimit)
	}
	return h.onDomain(ctx, "set maximum downtime", uuid, func(l *libvirt.Libvirt, dom libvirt.Domain) error {
		return l.DomainMigrateSetMaxDowntime(dom, uint64(d.Milliseconds()), 0)
	})
}

// Abort cancels the domain's job. A Perform under way then returns an error, and
// its guest runs on.
func (h *Host) Abort(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, "abort job", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainAbortJob(d)
	})
}
