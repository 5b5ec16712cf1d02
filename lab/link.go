package lab

import (
	"fmt"
	"slices"
	"time"
)

// LinkSettings describe the WAN between the data centres. Both directions of a
// link are alike, and so are all links. The zero value is a link without limit, delay or loss.
type LinkSettings struct {
	Rate  int64         `json:"rate_bits_per_s"`    // of each direction, in bits of IP packets per second; 0 is unlimited
	RTT   time.Duration `json:"rtt_ns"`             // half of it delays each direction
	Loss  float64       `json:"loss"`               // share of the packets lost in each direction, 0 to below 1
	Burst float64       `json:"burst_packets"`      // mean length of a burst of losses; 0 loses packets independently
	Queue int64         `json:"queue_bytes"`        // bytes that wait before a direction drops; 0 is DefaultQueue
	Seed  uint64        `json:"seed"`               // of everything random
	Cut   []string      `json:"cut_from,omitempty"` // sites whose packets all vanish

	Reorder   float64 `json:"reorder"`   // share of the packets that others overtake, by up to maxHold
	Duplicate float64 `json:"duplicate"` // share of the packets that arrive twice

	// MTU is the largest packet in bytes of IP, of a hop right behind either site;
	// 0 is that of the sites' interfaces, 1500. Below 1280 IPv6 does not work.
	MTU    int      `json:"mtu"`
	NoICMP bool     `json:"no_icmp"`         // that hop says nothing of what it drops: a black hole
	Block  []string `json:"block,omitempty"` // protocols that a firewall drops: "tcp", "udp"
	NAT    []string `json:"nat,omitempty"`   // sites behind a NAT, see nat
}

// DefaultLink is a WAN of 100 Mbit/s and 50 ms that loses nothing by chance.
func DefaultLink() LinkSettings {
	return LinkSettings{Rate: 100e6, RTT: 50 * time.Millisecond, Seed: 1}
}

// DefaultQueue is the queue of a link that names none: its bandwidth-delay
// product, which lets one loss-based flow fill the link, and at least 64 KiB.
func (s LinkSettings) DefaultQueue() int64 {
	return max(64<<10, s.bandwidthDelay())
}

func (s LinkSettings) bandwidthDelay() int64 {
	return int64(float64(s.Rate) / 8 * s.RTT.Seconds())
}

func (s LinkSettings) queue() int64 {
	if s.Queue == 0 {
		return s.DefaultQueue()
	}
	return s.Queue
}

const (
	maxRTT       = time.Minute
	maxLinkBytes = 1 << 30 // what a direction may hold in its queue, and again under way
	minLinkMTU   = 576     // RFC 1122, section 3.3.2: every host takes as much
)

// validate checks settings for links between these sites.
func (s LinkSettings) validate(sites []string) error {
	switch {
	case s.Rate < 0:
		return fmt.Errorf("bad rate %d: want bits per second", s.Rate)
	case s.RTT < 0 || s.RTT > maxRTT:
		return fmt.Errorf("bad rtt %v: want 0 to %v", s.RTT, maxRTT)
	case s.bandwidthDelay() > maxLinkBytes:
		return fmt.Errorf("a link of %s and %v holds more than 1 GiB under way: lower --rate or --rtt", FormatRate(s.Rate), s.RTT)
	case !(s.Loss >= 0 && s.Loss < 1):
		return fmt.Errorf("bad loss %v: want 0%% to below 100%%; --cut loses everything", s.Loss)
	case s.Burst != 0 && !(s.Burst >= 1 && s.Burst <= 1e6):
		return fmt.Errorf("bad burst %v: want the mean number of packets lost in a row, from 1 to 1000000", s.Burst)
	case s.Burst != 0 && s.Loss > s.Burst/(s.Burst+1):
		return fmt.Errorf("a loss of %s cannot come in bursts of %g packets: at least one packet arrives between two bursts", FormatLoss(s.Loss), s.Burst)
	case s.Queue != 0 && (s.Queue < linkMTU || s.Queue > maxLinkBytes):
		return fmt.Errorf("bad queue %d: want %d bytes to 1 GiB", s.Queue, linkMTU)
	case !(s.Reorder >= 0 && s.Reorder < 1):
		return fmt.Errorf("bad share %v of reordered packets: want 0%% to below 100%%", s.Reorder)
	case !(s.Duplicate >= 0 && s.Duplicate < 1):
		return fmt.Errorf("bad share %v of duplicated packets: want 0%% to below 100%%", s.Duplicate)
	case s.MTU != 0 && (s.MTU < minLinkMTU || s.MTU > linkMTU):
		return fmt.Errorf("bad mtu %d: want %d to %d bytes", s.MTU, minLinkMTU, linkMTU)
	}
	for _, name := range s.Block {
		if _, known := blockable[name]; !known {
			return fmt.Errorf("cannot block %q: want tcp or udp", name)
		}
	}
	for _, site := range slices.Concat(s.Cut, s.NAT) {
		if !slices.Contains(sites, site) {
			return unknownSite(site, sites)
		}
	}
	return nil
}

// LinkChange changes a running link: what is nil stays.
type LinkChange struct {
	Rate  *int64         `json:"rate_bits_per_s,omitempty"`
	RTT   *time.Duration `json:"rtt_ns,omitempty"`
	Loss  *float64       `json:"loss,omitempty"`
	Burst *float64       `json:"burst_packets,omitempty"`
	Queue *int64         `json:"queue_bytes,omitempty"`
	Cut   *[]string      `json:"cut_from,omitempty"`

	Reorder   *float64  `json:"reorder,omitempty"`
	Duplicate *float64  `json:"duplicate,omitempty"`
	MTU       *int      `json:"mtu,omitempty"`
	NoICMP    *bool     `json:"no_icmp,omitempty"`
	Block     *[]string `json:"block,omitempty"`
	NAT       *[]string `json:"nat,omitempty"`
}

// ApplyTo returns the settings with the change made.
func (c LinkChange) ApplyTo(s LinkSettings) LinkSettings {
	set(&s.Rate, c.Rate)
	set(&s.RTT, c.RTT)
	set(&s.Loss, c.Loss)
	set(&s.Burst, c.Burst)
	set(&s.Queue, c.Queue)
	set(&s.Cut, c.Cut)
	set(&s.Reorder, c.Reorder)
	set(&s.Duplicate, c.Duplicate)
	set(&s.MTU, c.MTU)
	set(&s.NoICMP, c.NoICMP)
	set(&s.Block, c.Block)
	set(&s.NAT, c.NAT)
	return s
}

func set[T any](to, value *T) {
	if value != nil {
		*to = *value
	}
}

// LinkCounters count one direction of the link since the last reset.
type LinkCounters struct {
	Bytes   uint64 `json:"bytes"`   // IP bytes put on the wire, lost ones included
	Packets uint64 `json:"packets"` // packets put on the wire, lost ones included
	Lost    uint64 `json:"lost"`    // of Packets: lost at random or in bursts, as asked
	Cut     uint64 `json:"cut"`     // of Packets: vanished while the link was cut
	Dropped uint64 `json:"dropped"` // packets refused before the wire, because the queue was full
	Blocked uint64 `json:"blocked"` // packets that a firewall or a NAT did not let through
	TooBig  uint64 `json:"too_big"` // packets larger than the MTU, none of them put on the wire

	Reordered  uint64 `json:"reordered"`  // of Packets: held back, so that others may overtake them
	Duplicated uint64 `json:"duplicated"` // of Packets: delivered twice
}

// LinkState is the WAN as it runs. Counters are keyed by the sending site, those
// of a third data centre's links by both ends: "third-dc>local-dc".
type LinkState struct {
	Settings LinkSettings            `json:"settings"`
	Counters map[string]LinkCounters `json:"counters"`
}
