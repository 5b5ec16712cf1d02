package migrate

import (
	"math"
	"slices"
)

// claim is a move that wants to send, as divide sees it. Rates are in bytes per
// second.
type claim struct {
	site    string
	weight  int
	own     int64 // its own limit; 0: none
	used    int64 // what it has sent lately
	given   int64 // what it was allowed meanwhile; 0: anything
	stopped bool  // its guest stands still until the rest has crossed
}

// bound is a limit of all moves to a site together, or of all moves.
type bound struct {
	site string // "": all
	most int64
	what string // for the operator
}

// grant is what a move may send.
type grant struct {
	rate int64  // 0: anything
	by   string // the bound that holds it; "" where its own limit does, or none
}

const (
	// inUse is the part of what a move was given from which on it counts as using it.
	inUse = 0.9
	// growth is how many times what it uses a move may want in the next second,
	// when others want more than they get; leastWant is always left for it.
	growth    = 1.5
	leastWant = 1 << 20
	// stoppedWeight goes before everything else: a guest stands still.
	stoppedWeight = 1000
)

// otherMoves is the bound of moves that give way where nothing else limits them.
const otherMoves = "moves of higher priority"

// itself is the bound of a move that does not want more.
const itself = "itself"

// divide gives each move its share of what bounds allow, by weight. What a move does
// not use others get; what nobody wants is shared too, so that a move that wants
// more finds room at once, and what all are given is exactly the bound.
//
// Where no bound holds and moves of several priorities go to one site, only those
// of the highest run free. The others share with them what all of them have
// reached together lately.
func divide(claims []claim, bounds []bound, reached map[string]int64) []grant {
	var limits []limit
	for i, c := range claims {
		if c.own > 0 {
			limits = append(limits, limit{float64(c.own), []int{i}, ""})
		}
	}
	for _, b := range bounds {
		var of []int
		for i, c := range claims {
			if b.site == "" || b.site == c.site {
				of = append(of, i)
			}
		}
		limits = append(limits, limit{float64(b.most), of, b.what})
	}
	free := allot(claims, limits)
	polite := allot(claims, append(slices.Clone(limits), giveWay(claims, reached)...))
	grants := make([]grant, len(claims))
	for i, c := range claims {
		given := free[i]
		if c.order() < heaviest(claims, c.site) && polite[i].rate < given.rate {
			given = polite[i]
		}
		if !math.IsInf(given.rate, 1) {
			grants[i] = grant{max(int64(given.rate), 1), given.by}
		}
	}
	return grants
}

// allot shares what moves are known to want first, and then what is left.
func allot(claims []claim, limits []limit) []filled {
	wanted := slices.Clone(limits)
	for i, c := range claims {
		if w, known := c.wants(); known {
			wanted = append(wanted, limit{w, []int{i}, itself})
		}
	}
	share := fill(claims, wanted)
	left := slices.Clone(limits)
	for l := range left {
		for _, i := range left[l].of {
			left[l].most -= share[i].rate
		}
	}
	all := fill(claims, left)
	for i := range all {
		all[i].rate += share[i].rate
		if share[i].by != itself {
			all[i].by = share[i].by
		}
	}
	return all
}

// wants is what a move will use at most, if that is known.
func (c claim) wants() (rate float64, known bool) {
	if c.stopped || c.given > 0 && float64(c.used) >= inUse*float64(c.given) {
		return 0, false
	}
	return max(growth*float64(c.used), leastWant), true
}

// order is the weight that counts now.
func (c claim) order() int {
	if c.stopped {
		return stoppedWeight
	}
	return c.weight
}

func heaviest(claims []claim, site string) (weight int) {
	for _, c := range claims {
		if c.site == site {
			weight = max(weight, c.order())
		}
	}
	return weight
}

// giveWay are the bounds of sites to which moves of several priorities go.
func giveWay(claims []claim, reached map[string]int64) []limit {
	var limits []limit
	seen := map[string]bool{}
	for _, c := range claims {
		if seen[c.site] || reached[c.site] == 0 {
			continue
		}
		seen[c.site] = true
		var of []int
		differ := false
		for i, o := range claims {
			if o.site == c.site {
				of = append(of, i)
				differ = differ || o.order() != c.order()
			}
		}
		if differ {
			limits = append(limits, limit{float64(reached[c.site]), of, otherMoves})
		}
	}
	return limits
}

// limit is what some claims together get at most.
type limit struct {
	most float64
	of   []int
	what string
}

type filled struct {
	rate float64
	by   string
}

// fill raises the level of all claims, each by its weight, until a limit is
// reached, which ends it for the claims in it, and so on: max-min fairness
// (Bertsekas and Gallager, Data Networks, section 6.5.2).
func fill(claims []claim, limits []limit) []filled {
	out := make([]filled, len(claims))
	fixed := make([]bool, len(claims))
	for {
		step, at := math.Inf(1), -1
		for l, lim := range limits {
			left, weight := lim.most, 0
			for _, i := range lim.of {
				left -= out[i].rate
				if !fixed[i] {
					weight += claims[i].order()
				}
			}
			if weight > 0 && max(left, 0)/float64(weight) < step {
				step, at = max(left, 0)/float64(weight), l
			}
		}
		for i := range claims {
			if !fixed[i] {
				out[i].rate += step * float64(claims[i].order())
			}
		}
		if at < 0 {
			return out
		}
		for _, i := range limits[at].of {
			if !fixed[i] {
				fixed[i], out[i].by = true, limits[at].what
			}
		}
	}
}
