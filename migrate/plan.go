package migrate

import (
	"fmt"
	"path/filepath"
	"sort"
	"strings"

	"github.com/wanmig/wanmig/hypervisor"
)

// plan says what becomes of each disk and network of a domain.
type plan struct {
	disks    []wireDisk
	source   map[string]string // target: path here
	changes  hypervisor.Changes
	remove   []string // files here that go when the guest has left
	findings []Finding
}

// mirrored are the targets that QEMU's mirror copies.
func (p plan) mirrored() []string {
	var targets []string
	for _, d := range p.disks {
		if !d.Static {
			targets = append(targets, d.Target)
		}
	}
	return targets
}

// makePlan maps disks and networks as the request wants it. A mapping that
// applies to nothing is a mistake of the operator's and an error.
func makePlan(dom *hypervisor.Domain, req Request) (plan, error) {
	p := plan{source: map[string]string{}, changes: hypervisor.Changes{Disks: map[string]hypervisor.DiskChange{}, Networks: req.Networks}}
	used := map[string]bool{}
	for _, d := range dom.Disks {
		switch {
		case !d.Media():
			continue // an empty drive
		case d.Device == "floppy", d.Device == "cdrom" && !req.CopyCDROM:
			p.changes.Disks[d.Target] = hypervisor.DiskChange{Drop: true}
			p.findings = append(p.findings, Finding{Check: d.Device, Problem: fmt.Sprintf("%s (%s) is ejected at the destination", d.Target, d.Path),
				Remedy: "a CD-ROM is carried with --copy-cdrom"})
			continue
		case d.Device == "cdrom":
			size, err := staticSize(d.Path)
			if err != nil {
				return p, fmt.Errorf("--copy-cdrom: %s: %w", d.Target, err)
			}
			d.VirtualSize, d.Allocated = size, size
		}
		path := mapStorage(d, req.Storage, used)
		kind := "file"
		if d.Type == "block" {
			kind = "block"
		}
		p.disks = append(p.disks, wireDisk{Target: d.Target, Export: d.Export, Path: path, Block: kind == "block", Format: d.Format,
			Size: d.VirtualSize, Allocated: d.Allocated, ClusterSize: d.ClusterSize, Static: d.Device == "cdrom"})
		p.source[d.Target] = d.Path
		p.changes.Disks[d.Target] = hypervisor.DiskChange{Path: path, Type: kind}
		if d.Type != "block" && d.Device != "cdrom" {
			p.remove = append(p.remove, d.Path)
		}
	}
	if dom.NVRAM != "" {
		p.remove = append(p.remove, dom.NVRAM)
	}
	if err := unusedStorage(dom, req.Storage, used); err != nil {
		return p, err
	}
	return p, unusedNetworks(dom, req.Networks)
}

// mapStorage finds the path of a disk at the destination: by its target, by its
// path, or by the longest folder above it; else the path stays.
func mapStorage(d hypervisor.Disk, storage map[string]string, used map[string]bool) string {
	best := ""
	for from := range storage {
		switch {
		case from == d.Target || from == d.Path:
			used[from] = true
			return storage[from]
		case strings.HasPrefix(d.Path, strings.TrimSuffix(from, "/")+"/") && len(from) > len(best):
			best = from
		}
	}
	if best == "" {
		return d.Path
	}
	used[best] = true
	return filepath.Join(storage[best], strings.TrimPrefix(d.Path, strings.TrimSuffix(best, "/")))
}

func unusedStorage(dom *hypervisor.Domain, storage map[string]string, used map[string]bool) error {
	for from, to := range storage {
		if used[from] {
			if !filepath.IsAbs(to) {
				return fmt.Errorf("--storage %s=%s: the path at the destination must begin with /", from, to)
			}
			continue
		}
		var have []string
		for _, d := range dom.Disks {
			have = append(have, fmt.Sprintf("%s (%s)", d.Target, d.Path))
		}
		return fmt.Errorf("--storage %s=%s fits no disk of %q: it has %s", from, to, dom.Name, strings.Join(have, ", "))
	}
	return nil
}

func unusedNetworks(dom *hypervisor.Domain, networks map[string]string) error {
	have := map[string]bool{}
	for _, n := range dom.Networks {
		have[n.Source] = true
	}
	for from, to := range networks {
		if have[from] {
			continue
		}
		var names []string
		for n := range have {
			names = append(names, n)
		}
		sort.Strings(names)
		return fmt.Errorf("--network %s=%s fits no interface of %q: it is on %s", from, to, dom.Name, strings.Join(names, ", "))
	}
	return nil
}

// journalRoom is what a journal must have room for before a move begins: its few
// records, of a file that grows by doubling up to 32 MiB.
const journalRoom = 32 << 20

// checkJournal finds a journal that would be full when the move is to be decided.
func (e *Engine) checkJournal(where string) []Finding {
	room, err := e.Journal.Room()
	switch {
	case err != nil:
		return []Finding{{Check: "journal", Problem: err.Error(), Remedy: "look at the agent's state folder " + where, Fatal: true}}
	case room < journalRoom:
		return []Finding{{Check: "journal", Problem: fmt.Sprintf("%d MiB are free %s beside %s: a move's decision has to be written there", room>>20, where, e.Journal.Path()),
			Remedy: fmt.Sprintf("free %d MiB, or set state in agent.yaml to another folder", (journalRoom-room)>>20+1), Fatal: true}}
	}
	return nil
}

// convert takes the hypervisor's findings into ours. What kept it from looking
// is a finding as well.
func convert(from []hypervisor.Finding, err error, check, remedy string) []Finding {
	out := make([]Finding, 0, len(from)+1)
	for _, f := range from {
		out = append(out, Finding{Check: f.Check, Problem: f.Problem, Remedy: f.Remedy, Fatal: f.Level == hypervisor.Fatal})
	}
	if err != nil {
		out = append(out, Finding{Check: check, Problem: err.Error(), Remedy: remedy, Fatal: true})
	}
	return out
}
