//go:build bench

package bench

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/wanmig/wanmig/tunnel"
)

// What carries a load.
const (
	plainQUIC     = "plain-quic" // one connection of quic-go with two streams, as it comes
	session       = "session"
	sessionQUIC   = "session-quic"   // over QUIC alone
	sessionTCP    = "session-tcp"    // over TLS and TCP alone
	sessionPolite = "session-polite" // leaves room to others
)

// listen waits for one sender.
func listen(ctx context.Context, kind, addr, shared string) (peer, error) {
	if kind == plainQUIC {
		return listenQUIC(ctx, addr, shared)
	}
	return listenSession(ctx, addr, shared)
}

func dial(ctx context.Context, kind, addr, shared string) (load, error) {
	server, err := awaitServer(ctx, shared)
	if err != nil {
		return nil, err
	}
	if kind == plainQUIC {
		return dialQUIC(ctx, addr)
	}
	return dialSession(ctx, kind, addr, shared, tunnel.ID(server))
}

// announce says who the server is, once it listens.
func announce(shared, id string) error {
	path := filepath.Join(shared, "server")
	if err := os.WriteFile(path+".new", []byte(id), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func awaitServer(ctx context.Context, shared string) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		b, err := os.ReadFile(filepath.Join(shared, "server"))
		if err == nil {
			return string(b), nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return "", fmt.Errorf("no server: %w", err)
		}
	}
}

// endpoint opens an end with an identity of its own.
func endpoint(addr, folder string) (*tunnel.Endpoint, tunnel.ID, error) {
	id, err := tunnel.LoadOrCreateIdentity(folder)
	if err != nil {
		return nil, "", err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	e, err := tunnel.Listen(addr, id, func(tunnel.ID) bool { return true }, log)
	return e, id.ID(), err
}

// channels are an end of a session, either one.
type channels struct {
	endpoint           *tunnel.Endpoint
	session            *tunnel.Session
	bulkCh, control    *tunnel.Channel
	bulkBuf, probesBuf []byte
}

const (
	bulkChannel    = "bulk"
	controlChannel = "control"
)

// sessionPeer and sessionLoad are the two sides of channels.
type (
	sessionPeer struct{ *channels }
	sessionLoad struct{ *channels }
)

func listenSession(ctx context.Context, addr, shared string) (peer, error) {
	e, id, err := endpoint(addr, filepath.Join(shared, "server-identity"))
	if err != nil {
		return nil, err
	}
	if err := announce(shared, string(id)); err != nil {
		return nil, err
	}
	c := &channels{endpoint: e}
	if c.session, err = e.Accept(ctx); err != nil {
		return nil, err
	}
	for range 2 {
		ch, err := c.session.Accept(ctx)
		if err != nil {
			return nil, err
		}
		if ch.Name() == bulkChannel {
			c.bulkCh = ch
		} else {
			c.control = ch
		}
	}
	return sessionPeer{c}, nil
}

func dialSession(ctx context.Context, kind, addr, shared string, server tunnel.ID) (load, error) {
	e, _, err := endpoint(":0", filepath.Join(shared, "sender-identity"))
	if err != nil {
		return nil, err
	}
	c := &channels{endpoint: e}
	transports := map[string]tunnel.Transport{sessionQUIC: tunnel.QUIC, sessionTCP: tunnel.TCP} // of others Auto
	if c.session, err = e.Dial(ctx, addr, server, tunnel.DialOptions{Transport: transports[kind]}); err != nil {
		return nil, err
	}
	c.session.SetPolite(kind == sessionPolite)
	if c.bulkCh, err = c.session.Open(ctx, bulkChannel, tunnel.Disk); err != nil {
		return nil, err
	}
	if c.control, err = c.session.Open(ctx, controlChannel, tunnel.Control); err != nil {
		return nil, err
	}
	return sessionLoad{c}, nil
}

func (l sessionLoad) bulk(ctx context.Context, frame []byte) error {
	return l.bulkCh.Send(ctx, frame)
}

func (l sessionLoad) probe(ctx context.Context, frame []byte) error {
	return l.control.Send(ctx, frame)
}

func (l sessionLoad) answer(ctx context.Context) (frame []byte, err error) {
	l.probesBuf, err = l.control.Recv(ctx, l.probesBuf)
	return l.probesBuf, err
}

func (l sessionLoad) carriers() string {
	count := map[tunnel.Transport]int{}
	for _, c := range l.session.Link().Carriers {
		count[c.Transport]++
	}
	return fmt.Sprintf("%d QUIC, %d TCP", count[tunnel.QUIC], count[tunnel.TCP])
}

func (l sessionLoad) close() error { return l.endpoint.Close() }

func (p sessionPeer) bulk(ctx context.Context) (n int, err error) {
	p.bulkBuf, err = p.bulkCh.Recv(ctx, p.bulkBuf)
	return len(p.bulkBuf), err
}

func (p sessionPeer) probe(ctx context.Context) (frame []byte, err error) {
	p.probesBuf, err = p.control.Recv(ctx, p.probesBuf)
	return p.probesBuf, err
}

func (p sessionPeer) answer(ctx context.Context, frame []byte) error {
	return p.control.Send(ctx, frame)
}

// plain is an end of a connection of quic-go: a stream of bulk, and one of
// probes and answers. The first byte of each stream says which it is.
type plain struct {
	conn            *quic.Conn
	bulkSt, control *quic.Stream
}

type (
	plainPeer struct{ *plain }
	plainLoad struct{ *plain }
)

const (
	bulkStream    = 'b'
	controlStream = 'c'
	plainALPN     = "bench"
)

func listenQUIC(ctx context.Context, addr, shared string) (peer, error) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	certificate, err := x509.CreateCertificate(nil, template, template, public, private)
	if err != nil {
		return nil, err
	}
	l, err := quic.ListenAddr(addr, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: private}},
		NextProtos:   []string{plainALPN},
	}, nil)
	if err != nil {
		return nil, err
	}
	if err := announce(shared, plainQUIC); err != nil {
		return nil, err
	}
	p := &plain{}
	if p.conn, err = l.Accept(ctx); err != nil {
		return nil, err
	}
	for range 2 {
		stream, err := p.conn.AcceptStream(ctx)
		if err != nil {
			return nil, err
		}
		var which [1]byte
		if _, err := io.ReadFull(stream, which[:]); err != nil {
			return nil, err
		}
		if which[0] == bulkStream {
			p.bulkSt = stream
		} else {
			p.control = stream
		}
	}
	return plainPeer{p}, nil
}

func dialQUIC(ctx context.Context, addr string) (load, error) {
	// The certificate was made a moment ago, and nobody else is on the link.
	conn, err := quic.DialAddr(ctx, addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{plainALPN}}, nil)
	if err != nil {
		return nil, err
	}
	p := &plain{conn: conn}
	for which, stream := range map[byte]**quic.Stream{bulkStream: &p.bulkSt, controlStream: &p.control} {
		if *stream, err = conn.OpenStreamSync(ctx); err != nil {
			return nil, err
		}
		if _, err := (*stream).Write([]byte{which}); err != nil {
			return nil, err
		}
	}
	return plainLoad{p}, nil
}

func (l plainLoad) bulk(_ context.Context, frame []byte) error {
	_, err := l.bulkSt.Write(frame)
	return err
}

func (l plainLoad) probe(_ context.Context, frame []byte) error {
	_, err := l.control.Write(frame)
	return err
}

func (l plainLoad) answer(context.Context) ([]byte, error) {
	frame := make([]byte, answerSize)
	_, err := io.ReadFull(l.control, frame)
	return frame, err
}

func (l plainLoad) carriers() string { return "1 QUIC" }

func (l plainLoad) close() error { return l.conn.CloseWithError(0, "") }

func (p plainPeer) bulk(context.Context) (int, error) {
	return p.bulkSt.Read(make([]byte, bulkFrame))
}

func (p plainPeer) probe(context.Context) ([]byte, error) {
	frame := make([]byte, probeSize)
	_, err := io.ReadFull(p.control, frame)
	return frame, err
}

func (p plainPeer) answer(_ context.Context, frame []byte) error {
	_, err := p.control.Write(frame)
	return err
}
