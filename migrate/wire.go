package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// Protocol is the version of the messages between two agents. Both sides must
// have the same; within a version fields are only added.
const Protocol = 1

// A control frame is one kind byte and a JSON object. Numbers are never used
// again for another meaning.
const (
	kindHello     = 1  // both ways, first
	kindRefused   = 2  // destination: the request can't be served; ends the session
	kindPing      = 3  // either; answered by pong
	kindPong      = 4  //
	kindCheck     = 5  // source: what would a move of this domain meet?
	kindChecked   = 6  // destination: findings
	kindPrepare   = 7  // source: make disks and the incoming domain
	kindPrepared  = 8  // destination: they are there, its channels may be opened
	kindCancel    = 9  // source, before its offer: discard everything
	kindOffer     = 10 // source: libvirt's cookie; the decision is the destination's
	kindRunning   = 11 // destination: the guest runs here (durable)
	kindAborted   = 12 // destination: the guest never runs here (durable)
	kindQuery     = 13 // source, in a new session: what became of this move?
	kindUndecided = 14 // destination: ask again
	kindUnknown   = 15 // destination: no record of that move

	kindRedirect   = 16 // source: an operation on a move's redirect, during the move or in a session later
	kindRedirected = 17 // destination: what came of it

	kindMeasure  = 18 // prober: opens a channel and sends as fast as it goes, until it ends the channel
	kindMeasured = 19 // destination: how much came, and how fast

	kindReturn    = 20 // the source of a move that is over: move the guest back
	kindReturning = 21 // its destination: it is on its way
)

const (
	maxDisks   = 64
	maxXML     = 1 << 20 // bytes; libvirt's own limit for a string is 4 MiB
	maxCookie  = 1 << 20
	maxReason  = 4 << 10
	maxFinding = 256
)

type hello struct {
	Protocol int       `json:"protocol"`
	Version  string    `json:"version"`
	Site     string    `json:"site"`
	Libvirt  string    `json:"libvirt"`
	QEMU     string    `json:"qemu"`
	Problem  string    `json:"problem,omitempty"` // why moves can't be served now
	Time     time.Time `json:"time"`
}

type ping struct {
	Time time.Time `json:"time"` // the sender's clock
}

// wireDisk is a disk as the source will send it.
type wireDisk struct {
	Target      string `json:"target"` // vda
	Export      string `json:"export"` // the NBD export's name, the same on both sides
	Path        string `json:"path"`   // at the destination
	Block       bool   `json:"block"`  // a block device, else a file
	Format      string `json:"format"`
	Size        int64  `json:"size"`
	Allocated   int64  `json:"allocated"`
	ClusterSize int64  `json:"cluster_size,omitempty"`
	Static      bool   `json:"static,omitempty"` // does not change: copied from its file, not mirrored
}

type check struct {
	Host  string     `json:"host"` // libvirt's UUID of the source host
	Name  string     `json:"name"`
	UUID  string     `json:"uuid"`
	CPU   string     `json:"cpu"` // libvirt's <cpu> with every feature that the guest sees
	XML   string     `json:"xml"` // as it would run at the destination
	Disks []wireDisk `json:"disks"`

	Fresh bool `json:"fresh,omitempty"`

	Redirect *netredirect.Ask `json:"redirect,omitempty"`
}

type checked struct {
	Findings []Finding          `json:"findings"`
	Redirect *netredirect.Offer `json:"redirect,omitempty"`
}

type redirectRequest struct {
	Seq  uint64          `json:"seq"` // from 1 on in each channel
	Move string          `json:"move"`
	Op   string          `json:"op"`
	Body json.RawMessage `json:"body"`
}

type redirectAnswer struct {
	Seq     uint64          `json:"seq"` // the request's
	Error   string          `json:"error,omitempty"`
	Unknown bool            `json:"unknown,omitempty"` // there is no redirect of that move
	Body    json.RawMessage `json:"body,omitempty"`
}

type prepare struct {
	Move       string     `json:"move"`
	Name       string     `json:"name"`
	UUID       string     `json:"uuid"`
	XML        string     `json:"xml"`
	PersistXML string     `json:"persist_xml,omitempty"`
	Persist    bool       `json:"persist"`
	Autostart  bool       `json:"autostart"`
	Paused     bool       `json:"paused"`
	Cookie     []byte     `json:"cookie"`
	Disks      []wireDisk `json:"disks"`
	Fresh      bool       `json:"fresh,omitempty"` // older copies of the disks don't count
}

type prepared struct {
	Cookie    []byte `json:"cookie"`
	PageStore int64  `json:"page_store,omitempty"` // bytes of the guest's memory that may be kept here
}

type offer struct {
	Cookie []byte `json:"cookie"`
}

// running reports what the destination spent between the offer and the resume.
type running struct {
	DrainMS   float64 `json:"drain_ms"`
	TailMS    float64 `json:"tail_ms"`
	LoadMS    float64 `json:"load_ms"`
	JournalMS float64 `json:"journal_ms"`
	FinishMS  float64 `json:"finish_ms"`
	Paused    bool    `json:"paused"`
}

type reason struct {
	Reason string `json:"reason"`
}

// aborted is the reason of a destination that gives a move up.
type aborted struct {
	Reason string `json:"reason"`
	Kept   Kept   `json:"kept,omitzero"`
	Again  bool   `json:"again,omitempty"` // what failed can come back: another attempt may do better
}

type query struct {
	Move string `json:"move"`
	// Claimed tells that the source runs the guest, as an operator there said.
	Claimed bool `json:"claimed,omitempty"`
}

// giveBack asks for the guest of a move, and says what it had at the source: files
// and devices, and bridges and networks, there = here.
type giveBack struct {
	Move     string            `json:"move"`
	Storage  map[string]string `json:"storage,omitempty"`
	Networks map[string]string `json:"networks,omitempty"`
}

type givenBack struct {
	Move string `json:"move"` // the new one
}

var moveID = regexp.MustCompile(`^mv-[a-z2-7]{8}$`)
var guestUUID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`) // as libvirt writes it, else it may name a guest
var diskTarget = regexp.MustCompile(`^[a-z][a-z0-9]{0,15}$`)
var diskExport = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (c check) validate() error {
	if len(c.Name) == 0 || len(c.Name) > 255 || !guestUUID.MatchString(c.UUID) || len(c.Host) > 64 || len(c.XML) > maxXML || len(c.CPU) > maxXML {
		return errors.New("domain description out of bounds")
	}
	return validateDisks(c.Disks)
}

func (p prepare) validate() error {
	if !moveID.MatchString(p.Move) {
		return fmt.Errorf("bad move ID %.40q", p.Move)
	}
	if len(p.Cookie) > maxCookie || len(p.PersistXML) > maxXML {
		return errors.New("cookie or persistent description out of bounds")
	}
	return check{Name: p.Name, UUID: p.UUID, XML: p.XML, Disks: p.Disks}.validate()
}

// definition is what the guest is started from should its host go down.
func (p prepare) definition() string {
	if p.Persist && p.PersistXML != "" {
		return p.PersistXML
	}
	return p.XML
}

func validateDisks(disks []wireDisk) error {
	if len(disks) > maxDisks {
		return fmt.Errorf("%d disks: at most %d are carried", len(disks), maxDisks)
	}
	seen := map[string]bool{}
	for _, d := range disks {
		switch {
		case !diskTarget.MatchString(d.Target) || !diskExport.MatchString(d.Export):
			return fmt.Errorf("bad disk name %.40q or export %.80q", d.Target, d.Export)
		case seen[d.Target] || seen[d.Export] || seen[d.Path]:
			return fmt.Errorf("disk %s is named twice", d.Target)
		case len(d.Path) == 0 || len(d.Path) > 4096 || d.Path[0] != '/':
			return fmt.Errorf("disk %s: path %.80q is not absolute", d.Target, d.Path)
		case d.Size <= 0 || d.Size > 1<<52 || d.Size%512 != 0 || d.Allocated < 0 || d.ClusterSize < 0 || d.ClusterSize > 2<<20:
			return fmt.Errorf("disk %s: size %d out of bounds", d.Target, d.Size)
		case d.Format != "raw" && d.Format != "qcow2":
			return fmt.Errorf("disk %s: format %.20q is not carried", d.Target, d.Format)
		}
		seen[d.Target], seen[d.Export], seen[d.Path] = true, true, true
	}
	return nil
}

// control is the control channel of a session.
type control struct {
	ch  *tunnel.Channel
	buf []byte
	seq uint64 // of the last operation on a redirect that was asked for
}

func (c *control) send(ctx context.Context, kind byte, body any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encode control message %d: %w", kind, err)
	}
	return c.ch.Send(ctx, append([]byte{kind}, b...))
}

// recv returns the next message, undecoded. It is for one goroutine.
func (c *control) recv(ctx context.Context) (kind byte, body []byte, err error) {
	frame, err := c.ch.Recv(ctx, c.buf)
	if err != nil {
		return 0, nil, err
	}
	if len(frame) == 0 {
		return 0, nil, errors.New("empty control message from the peer")
	}
	c.buf = frame
	return frame[0], frame[1:], nil
}

// expect receives the one answer that fits, or the peer's refusal as an error.
func (c *control) expect(ctx context.Context, want byte, into any) error {
	kind, body, err := c.recv(ctx)
	if err != nil {
		return err
	}
	switch kind {
	case want:
		return decode(body, into)
	case kindRefused, kindAborted:
		return peerReason(body)
	}
	return fmt.Errorf("the peer answered with message %d where %d belongs: its version differs, update both agents", kind, want)
}

func decode(body []byte, into any) error {
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("control message from the peer: %w", err)
	}
	return nil
}

// peerReason is the reason that a peer gave, as an error.
func peerReason(body []byte) error {
	var r reason
	if err := decode(body, &r); err != nil {
		return err
	}
	return fmt.Errorf("%.*s", maxReason, r.Reason)
}
