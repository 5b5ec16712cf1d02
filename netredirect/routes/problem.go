package routes

import (
	"fmt"
	"strings"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// unconnected says why a connection to the peer failed with err, an error of
// net.Dialer as text.
func (p Peer) unconnected(err string) string {
	cause := err[strings.LastIndex(err, ": ")+1:]
	where := fmt.Sprintf("%s port %d", p.Address, p.port())
	switch cause = strings.TrimSpace(cause); cause {
	case "i/o timeout":
		password := "a password that only the peer wants"
		if p.PasswordFile != "" {
			password = "another password"
		}
		return fmt.Sprintf("no answer from %s: a wrong address, a firewall, or %s", where, password)
	case "connection refused":
		return fmt.Sprintf("%s refuses connections: is BGP running there?", where)
	case "no route to host", "network is unreachable":
		return fmt.Sprintf("%s is not reachable from here: %s", where, cause)
	case "cannot assign requested address":
		return fmt.Sprintf("the local address %s is not this host's", p.Local)
	}
	return fmt.Sprintf("connect to %s: %s", where, cause)
}

// unopened says why this end sent a NOTIFICATION before the session was up.
func (p Peer) unopened(own uint32, code, subcode uint8) string {
	switch {
	case code == bgp.BGP_ERROR_OPEN_MESSAGE_ERROR && subcode == bgp.BGP_ERROR_SUB_BAD_PEER_AS:
		return fmt.Sprintf("%s is not of AS %d, as configured here", p.Address, p.ASN)
	case code == bgp.BGP_ERROR_OPEN_MESSAGE_ERROR && subcode == bgp.BGP_ERROR_SUB_BAD_BGP_IDENTIFIER:
		return "the peer has this host's router id: give each its own"
	case code == bgp.BGP_ERROR_FSM_ERROR:
		return p.refused(own)
	}
	return "the peer's OPEN is refused here: " + bgp.NewNotificationErrorCode(code, subcode).String()
}

// refused is for a peer that does not want the session.
func (p Peer) refused(own uint32) string {
	from := "the address it connects from"
	if p.Local.IsValid() {
		from = p.Local.String()
	}
	return fmt.Sprintf("%s refuses the session: configure this host there as BGP neighbour %s of AS %d", p.Address, from, own)
}

// tooMany is for a peer that sent more than MaxPrefixes.
func (p Peer) tooMany() string {
	return fmt.Sprintf("closed, since the peer sends more than %d prefixes: let it send this host only host routes; tried again in %s",
		p.maxPrefixes(), limitRetry)
}

// ended says why a session that was in state before fell back to idle; empty if
// that says nothing new.
func (p Peer) ended(own uint32, before string, now apiutil.PeerState) string {
	switch before {
	case "opensent", "openconfirm":
		return p.refused(own)
	case "established":
	default:
		return ""
	}
	_, detail, _ := strings.Cut(now.DisconnectMessage, " ")
	switch now.DisconnectReason {
	case api.PeerState_DISCONNECT_REASON_READ_FAILED,
		api.PeerState_DISCONNECT_REASON_WRITE_FAILED,
		api.PeerState_DISCONNECT_REASON_HOLD_TIMER_EXPIRED,
		api.PeerState_DISCONNECT_REASON_GRACEFUL_RESTART:
		return "the connection was lost, or the peer fell silent"
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_RECEIVED, api.PeerState_DISCONNECT_REASON_HARD_RESET:
		return "closed by the peer: " + detail
	case api.PeerState_DISCONNECT_REASON_NOTIFICATION_SENT:
		return "closed here, for what the peer sent: " + detail
	}
	return "the session ended: " + now.DisconnectMessage
}
