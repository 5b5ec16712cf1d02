package agent

import (
	"time"

	"github.com/wanmig/wanmig/migrate"
)

// The local API is HTTP with JSON on a unix socket. Every path starts with /v1.
// An error answer has a 4xx or 5xx status and the body {"error": "…"}.
//
//	GET    /v1/agent                  Info
//	GET    /v1/sites                  []Site
//	PUT    /v1/sites/{name}           Site → 204
//	DELETE /v1/sites/{name}           → 204
//	GET    /v1/sites/{name}/check     SiteCheck
//	POST   /v1/moves                  migrate.Request → 201, migrate.Status
//	GET    /v1/moves                  []migrate.Status, oldest first
//	GET    /v1/moves/{id}             migrate.Status
//	GET    /v1/moves/{id}/watch       a migrate.Status per line, now and at each change, until the move is final or in doubt
//	POST   /v1/moves/{id}/cancel      → 202; 409 when it is too late
//	POST   /v1/moves/{id}/recover     Word → 204; 409 when it is not to be said of that move
//	POST   /v1/moves/{id}/rollback    → 201, Rollback: the guest is on its way back; 502 when the other site is not reached
//	GET    /v1/moves/{id}/copy        LeftCopy: what the guest has left here, whole; 409 when it is not there
//	POST   /v1/moves/{id}/copy/start  → 204: the guest was started from it
//	PUT    /v1/moves/{id}/limit       Limit → 204; by the move's ID, or the VM's name while it moves; 409 when it is over
//	                                  or limited elsewhere
//	GET    /v1/redirects              []netredirect.Status, oldest first
//	GET    /v1/redirects/{move}       netredirect.Status; by the move's ID or the VM's name
//	POST   /v1/redirects/{move}/drain → 204; 409 when no tunnel of it stands
//	POST   /v1/redirects/{move}/cut   Cut → 204; 409 when connections use it or no tunnel of it stands,
//	                                  502 when it is removed at this end only
//	GET    /v1/copies                 []migrate.Copy
//	DELETE /v1/copies/{vm}            → 204; by the VM's name or UUID; 404 when there are none
//	GET    /v1/seeds                  []seed.Status, by path
//	POST   /v1/seeds/scan             → 204; seeds were looked for, new ones are indexed from now on

// Info describes an agent.
type Info struct {
	ID      string `json:"id"`
	Site    string `json:"site"`
	Version string `json:"version"`
	Listen  string `json:"listen"`
	Libvirt string `json:"libvirt,omitempty"` // libvirt's version
	QEMU    string `json:"qemu,omitempty"`
	Problem string `json:"problem,omitempty"` // why libvirt can't be used, with the remedy
}

// Site is a peer: another data centre's agent.
type Site struct {
	Name    string `json:"name"`
	Address string `json:"address"` // host:port, UDP and TCP
	ID      string `json:"id"`
	// Transport is what its sessions run over: quic, tcp or, also when empty, auto.
	Transport string `json:"transport,omitempty"`
}

// Limit asks for another limit of a running move.
type Limit struct {
	Rate migrate.Limit `json:"rate"`
}

// Word is what an operator says of a move in doubt: one of migrate's words.
type Word struct {
	Word string `json:"word"`
}

// Rollback is the move by which a guest comes back.
type Rollback struct {
	Move string `json:"move"`
}

// LeftCopy is the copy of a guest that has left.
type LeftCopy struct {
	Since time.Time `json:"since"`
}

// Cut asks for a tunnel to be removed now.
type Cut struct {
	Force bool `json:"force"` // also while connections use it
}

// SiteCheck is what `wanmig site check` found.
type SiteCheck struct {
	Site          string  `json:"site"`
	Address       string  `json:"address"`
	Reachable     bool    `json:"reachable"`
	ID            string  `json:"id"`
	PeerSite      string  `json:"peer_site,omitempty"` // what the peer calls itself
	Version       string  `json:"version,omitempty"`
	Libvirt       string  `json:"libvirt,omitempty"`
	QEMU          string  `json:"qemu,omitempty"`
	RTTMS         float64 `json:"rtt_ms,omitempty"`
	ClockOffsetMS float64 `json:"clock_offset_ms,omitempty"` // the peer's clock minus ours
	// Carriers tells what each transport that the site may use gives.
	Carriers []migrate.CarrierProbe `json:"carriers,omitempty"`
	Findings []migrate.Finding      `json:"findings,omitempty"`
}
