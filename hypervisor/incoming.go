package hypervisor

import (
	"context"
	"errors"

	"github.com/digitalocean/go-libvirt"
)

// InOptions say what arrives.
type InOptions struct {
	Name       string   // the domain's
	XML        string   // Outgoing.XML
	PersistXML string   // as OutOptions.PersistXML
	Cookie     []byte   // Outgoing.Cookie
	RAMSocket  string   // QEMU listens here; see DestinationSockets
	NBDSocket  string   // and here
	Disks      []string // as OutOptions.Disks
	Persist    bool
	Paused     bool
}

// Incoming is a migration at its destination. Its methods are for one caller at
// a time, in the order Finish, Close.
type Incoming struct {
	Cookie []byte // for Outgoing.Perform

	conn   *conn
	flags  libvirt.DomainMigrateFlags
	params []libvirt.TypedParam
}

// PrepareIn starts QEMU for an incoming migration. Both sockets exist and listen
// when it returns. The first connection to RAMSocket is the migration: never
// probe it. The disks must exist with the source's exact virtual sizes.
func (h *Host) PrepareIn(ctx context.Context, opt InOptions) (*Incoming, error) {
	in := &Incoming{
		flags:  migrationFlags(opt.Disks, opt.Persist, opt.Paused),
		params: migrationParams(opt.Name, opt.Disks, opt.Persist, opt.PersistXML),
	}
	var err error
	if in.conn, err = dial(ctx, h.socket); err != nil {
		return nil, err
	}
	params := append(socketParams(opt.RAMSocket, opt.NBDSocket), in.params...)
	params = append(params, stringParam(libvirt.MigrateParamDestXML, opt.XML))
	err = in.conn.call(ctx, "prepare migration", func(l *libvirt.Libvirt) error {
		var err error
		in.Cookie, _, err = l.DomainMigratePrepare3Params(params, opt.Cookie, uint32(in.flags))
		return err
	})
	if err != nil {
		in.conn.close()
		return nil, err
	}
	return in, nil
}

// Finish lets the guest run here, with the cookie of Perform; or, when
// cancelled, removes it, which a nil error confirms.
//
// Finish stops the NBD server, so every disk must be complete. After an
// ErrNoAnswer the caller asks [Host.State].
func (in *Incoming) Finish(ctx context.Context, cookie []byte, cancelled bool) error {
	var c int32
	if cancelled {
		c = 1
	}
	err := in.conn.call(ctx, "finish migration", func(l *libvirt.Libvirt) error {
		_, _, err := l.DomainMigrateFinish3Params(in.params, cookie, uint32(in.flags), c)
		return err
	})
	if !cancelled {
		return err
	}
	// libvirt has no domain to return, so what succeeded comes as an error.
	if hasCode(err, libvirt.ErrMigrateFinishOk) {
		return nil
	}
	if err == nil {
		err = errors.New("finish migration: libvirt kept the domain of a cancelled migration; look at it with virsh list")
	}
	return err
}

// Close ends the connection. Before Finish libvirt then destroys the incoming
// domain.
func (in *Incoming) Close() error {
	in.conn.close()
	return nil
}
