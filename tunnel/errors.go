package tunnel

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"unicode"

	"github.com/quic-go/quic-go"
)

var (
	// ErrUntrusted is returned by Dial when the agent that answers has another
	// ID than the expected one.
	ErrUntrusted = errors.New("the agent has another identity than expected")
	// ErrRefused is returned by Dial when the agent that answers is the expected
	// one but does not trust this agent.
	ErrRefused = errors.New("the agent does not trust this one")
	// ErrUnreachable is returned by Dial when nothing answers.
	ErrUnreachable = errors.New("no agent answers")
	// ErrVersion is returned by Dial when the peer speaks no common version.
	ErrVersion = errors.New("no common protocol version")
	// ErrBusy is returned by Dial when the peer takes no new sessions at the
	// moment.
	ErrBusy = errors.New("the agent takes no new sessions now")

	// ErrClosed is returned when this side has closed the endpoint, session,
	// channel or connection for packets.
	ErrClosed = errors.New("closed")
	// ErrClosedByPeer is returned when the peer has closed the session
	// or the connection for packets.
	ErrClosedByPeer = errors.New("closed by peer")
	// ErrLost is returned when the peer fell silent for IdleTimeout, no longer
	// knows the session, or when one of its connections failed.
	ErrLost = errors.New("session lost")
	// ErrReset is returned when the peer abandoned a channel.
	ErrReset = errors.New("channel reset by peer")
	// ErrFrameTooLarge is returned by Send for a frame above MaxFrame, and by
	// Recv when the peer announces one.
	ErrFrameTooLarge = errors.New("frame too large")
	// ErrTooLarge is returned by Send for a packet that does not fit the path.
	ErrTooLarge = errors.New("packet too large")
	// ErrFormat is returned when the peer breaks the format of a header, of a
	// channel, of a chunk or of a request.
	ErrFormat = errors.New("malformed header")
)

// resetCode says why one side of a channel has ended early.
type resetCode uint8

const (
	doneAll          resetCode = 0 // not early: all was received
	resetClosed      resetCode = 1
	resetFormat      resetCode = 2
	resetInterrupted resetCode = 3
)

// closeCode says why a connection or a session has ended. QUIC tells it the peer;
// TCP has no words for it.
type closeCode = quic.ApplicationErrorCode

const (
	closeReason closeCode = 0
	closeFormat closeCode = 1
	closeLost   closeCode = 2
)

const (
	alertBadCert       tls.AlertError = 42
	alertNoApplication tls.AlertError = 120

	// QUIC reports TLS alerts as 0x100 + alert (RFC 9001, section 4.8).
	cryptoErrors quic.TransportErrorCode = 0x100
)

// errProtocol is the reason why a peer without our ALPN was not accepted.
var errProtocol = errors.New("another protocol")

// sentAlert says whether err is a TLS alert that this side has sent, and
// gotAlert whether the peer has. Over TCP crypto/tls tells it by its text only.
func sentAlert(err error, alert tls.AlertError) bool {
	var failed *quic.TransportError
	return errors.As(err, &failed) && !failed.Remote && failed.ErrorCode == cryptoErrors+quic.TransportErrorCode(alert)
}

func gotAlert(err error, alert tls.AlertError) bool {
	var failed *quic.TransportError
	if errors.As(err, &failed) {
		return failed.Remote && failed.ErrorCode == cryptoErrors+quic.TransportErrorCode(alert)
	}
	var told *net.OpError
	return errors.As(err, &told) && told.Op == "remote error" && told.Err.Error() == alert.Error()
}

// identityError is the reason why a peer's certificate was not accepted.
type identityError struct {
	presented ID // empty when the certificate carries no Ed25519 key
}

func (e *identityError) Error() string {
	if e.presented == "" {
		return "the peer's certificate carries no Ed25519 key"
	}
	return fmt.Sprintf("the peer's ID %s is not accepted", e.presented)
}

const maxReason = 256

// printable makes a reason fit for the wire and, coming from a peer, for a
// terminal and a log.
func printable(reason string) string {
	if len(reason) > maxReason {
		reason = reason[:maxReason]
	}
	reason = strings.ToValidUTF8(reason, "?")
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, reason)
}
