package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// OutOptions say what leaves.
type OutOptions struct {
	DestXML    string   // the destination's document, see Rewrite
	PersistXML string   // its persistent definition, "" unless Persist
	Disks      []string // targets to copy, such as "vda"; none: memory only
	Persist    bool     // the domain becomes persistent at the destination
	Paused     bool     // it arrives paused; set it when the source is paused
	Throttle   bool     // QEMU takes CPU time from a guest whose memory does not converge
}

// Outgoing is a migration at its source. Its methods are for one caller at a
// time, in the order Perform, Confirm, Close.
type Outgoing struct {
	XML    string // for InOptions.XML
	Cookie []byte // for InOptions.Cookie

	host   *Host
	conn   *conn
	dom    libvirt.Domain
	uuid   string
	flags  libvirt.DomainMigrateFlags
	params []libvirt.TypedParam
	phase  outPhase
}

// outPhase is how far it came.
type outPhase int

const (
	outBegun outPhase = iota
	outPerformed
	outOver // libvirt has ended the migration itself
)

// BeginOut starts a migration: from now on until Confirm or Close libvirt
// refuses to change the domain's configuration.
func (h *Host) BeginOut(ctx context.Context, dom *Domain, opt OutOptions) (*Outgoing, error) {
	o := &Outgoing{host: h, uuid: dom.UUID, params: migrationParams(dom.Name, opt.Disks, opt.Persist, opt.PersistXML)}
	o.flags = migrationFlags(opt.Disks, opt.Persist, opt.Paused) | libvirt.MigrateChangeProtection
	if opt.Throttle {
		o.flags |= libvirt.MigrateAutoConverge
		o.params = append(o.params, intParam(libvirt.MigrateParamAutoConvergeInitial, throttleInitial),
			intParam(libvirt.MigrateParamAutoConvergeIncrement, throttleIncrement))
	}
	var err error
	if o.conn, err = dial(ctx, h.socket); err != nil {
		return nil, err
	}
	err = o.conn.call(ctx, "begin migration", func(l *libvirt.Libvirt) error {
		var err error
		if o.dom, err = lookup(l, dom.UUID); err != nil {
			return err
		}
		params := append([]libvirt.TypedParam{stringParam(libvirt.MigrateParamDestXML, opt.DestXML)}, o.params...)
		o.Cookie, o.XML, err = l.DomainMigrateBegin3Params(o.dom, params, uint32(o.flags))
		return err
	})
	if err != nil {
		o.conn.close()
		return nil, err
	}
	return o, nil
}

// Percent of CPU time that QEMU takes from a guest each time that it finds, for the
// second time, that more than half of what it sent in the last second or longer is dirty
// again (migration_trigger_throttle). libvirt switches that on at the start or never,
// so the first step is one that no guest feels: a guest is throttled only when the
// fourth such time has come.
const (
	throttleInitial   = 1
	throttleIncrement = 20
)

// migrationFlags are the flags that both sides use.
func migrationFlags(disks []string, persist, paused bool) libvirt.DomainMigrateFlags {
	flags := libvirt.MigrateLive
	if len(disks) > 0 {
		flags |= libvirt.MigrateNonSharedDisk
	}
	if persist {
		flags |= libvirt.MigratePersistDest
	}
	if paused {
		flags |= libvirt.MigratePaused
	}
	return flags
}

// migrationParams are the parameters that both sides use.
func migrationParams(name string, disks []string, persist bool, persistXML string) []libvirt.TypedParam {
	params := []libvirt.TypedParam{stringParam(libvirt.MigrateParamDestName, name)}
	for _, d := range disks {
		params = append(params, stringParam(libvirt.MigrateParamMigrateDisks, d))
	}
	if persist && persistXML != "" {
		params = append(params, stringParam(libvirt.MigrateParamPersistXML, persistXML))
	}
	return params
}

func stringParam(name, value string) libvirt.TypedParam {
	return libvirt.TypedParam{Field: name, Value: *libvirt.NewTypedParamValueString(value)}
}

func intParam(name string, value int32) libvirt.TypedParam {
	return libvirt.TypedParam{Field: name, Value: *libvirt.NewTypedParamValueInt(value)}
}

// socketParams tell QEMU where memory and disks go, or come from.
func socketParams(ram, nbd string) []libvirt.TypedParam {
	unix := func(path string) string { return (&url.URL{Scheme: "unix", Path: path}).String() }
	return []libvirt.TypedParam{
		stringParam(libvirt.MigrateParamURI, unix(ram)),
		stringParam(libvirt.MigrateParamDisksURI, unix(nbd)),
	}
}

// abortWait bounds how long a cancelled Perform may take to end.
const abortWait = 30 * time.Second

// Perform moves disks and memory: QEMU connects to nbdSocket once per disk, and
// to ramSocket when every mirror is ready. It returns when the guest is paused
// and everything was taken by those sockets, with the cookie for Finish.
//
// When ctx ends, the migration is aborted; Perform returns after libvirt has
// ended it, and the guest runs on. That takes until QEMU's requests in flight
// are answered, so the caller lets its sockets work or closes them. An abort
// that comes too late does not make Perform fail: a cookie without an error
// always means a paused guest that waits for Confirm.
//
// After an ErrNoAnswer the caller asks [Host.State].
func (o *Outgoing) Perform(ctx context.Context, destCookie []byte, ramSocket, nbdSocket string) ([]byte, error) {
	rpcCtx, giveUp := context.WithCancelCause(context.WithoutCancel(ctx))
	defer giveUp(nil)
	params := append(socketParams(ramSocket, nbdSocket), o.params...)
	var cookie []byte
	done := make(chan error, 1)
	go func() {
		done <- o.conn.call(rpcCtx, "perform migration", func(l *libvirt.Libvirt) error {
			var err error
			cookie, err = l.DomainMigratePerform3Params(o.dom, nil, params, destCookie, o.flags)
			return err
		})
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = o.abort(done, giveUp)
		if err != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
	if err != nil {
		o.phase = outOver
		return nil, err
	}
	o.phase = outPerformed
	return cookie, nil
}

// abort repeats the abort until Perform ends: libvirt refuses one that comes
// before the job has started.
func (o *Outgoing) abort(done <-chan error, giveUp context.CancelCauseFunc) error {
	ctx, cancel := context.WithTimeout(context.Background(), abortWait)
	defer cancel()
	again := time.NewTicker(200 * time.Millisecond)
	defer again.Stop()
	for {
		if err := o.host.Abort(ctx, o.uuid); err != nil {
			o.host.log.Debug("abort refused", "domain", o.uuid, "err", err)
		}
		select {
		case err := <-done:
			return err
		case <-ctx.Done():
			giveUp(errors.New("the aborted migration did not end in time"))
			return <-done
		case <-again.C:
		}
	}
}

// Confirm ends the migration. Without cancelled it kills the paused guest, which
// runs at the destination now; with it, the guest runs here again. After a
// Perform that failed there is nothing left to cancel.
func (o *Outgoing) Confirm(ctx context.Context, cookie []byte, cancelled bool) error {
	if cancelled && o.phase == outOver {
		return nil
	}
	if !cancelled && o.phase != outPerformed {
		return errors.New("confirm migration: it was not performed")
	}
	var c int32
	if cancelled {
		c = 1
	}
	err := o.conn.call(ctx, "confirm migration", func(l *libvirt.Libvirt) error {
		return l.DomainMigrateConfirm3Params(o.dom, o.params, cookie, uint32(o.flags), c)
	})
	if err == nil {
		o.phase = outOver
	}
	return err
}

// Close ends the connection. Before Perform that ends the migration; between
// Perform and Confirm it leaves the guest paused.
func (o *Outgoing) Close() error {
	o.conn.close()
	return nil
}
