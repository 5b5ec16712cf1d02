package hypervisor

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/beevik/etree"
)

// Changes say how the destination's document differs from the source's.
type Changes struct {
	// Disks by target. A disk that is copied belongs here even if its path
	// stays, so that its backing chain goes.
	Disks map[string]DiskChange
	// Networks by the source's name of a network, bridge or device.
	Networks map[string]string
}

// DiskChange is where a disk is at the destination.
type DiskChange struct {
	Path string
	Type string // "file" or "block"
	// Drop empties a CD-ROM or floppy drive. The drive itself must stay: libvirt
	// refuses a live migration to a domain with other devices.
	Drop bool
}

// Rewrite makes the destination's document from the source's, [Domain].XML or
// InactiveXML. What the changes do not name stays as it is. A change of a disk
// that the document lacks is ignored: a definition need not have what was
// plugged into the running guest.
//
// Backing chains of the named disks are removed: a disk arrives flattened.
func Rewrite(xml string, c Changes) (string, error) {
	doc, err := parseXML(xml, "domain")
	if err != nil {
		return "", err
	}
	found := map[string]bool{}
	for _, e := range diskElements(doc) {
		target := attr(e, "dev", "target")
		change, ok := c.Disks[target]
		if !ok {
			continue
		}
		if found[target] {
			return "", fmt.Errorf("%w: disk target %q is used twice", ErrBadXML, target)
		}
		found[target] = true
		if err := change.apply(e); err != nil {
			return "", fmt.Errorf("disk %s: %w", target, err)
		}
	}
	for _, e := range devices(doc, "interface") {
		a := networkAttr(attr(e, "type"))
		if a == "" || attr(e, a, "source") == "" {
			continue
		}
		if to, ok := c.Networks[attr(e, a, "source")]; ok {
			if err := checkValue(to); err != nil {
				return "", fmt.Errorf("network %s: %w", attr(e, a, "source"), err)
			}
			child(e, "source").CreateAttr(a, to)
		}
	}
	return doc.WriteToString()
}

func (c DiskChange) apply(e *etree.Element) error {
	for _, tag := range []string{"backingStore", "mirror"} {
		for _, b := range elements(e, tag) {
			e.RemoveChild(b)
		}
	}
	sources := elements(e, "source")
	if c.Drop {
		if d := cmp.Or(attr(e, "device"), "disk"); d != "cdrom" && d != "floppy" {
			return fmt.Errorf("a %s cannot be dropped from a running guest, only a CD-ROM or floppy", d)
		}
		for _, s := range sources {
			e.RemoveChild(s)
		}
		e.CreateAttr("type", "file")
		return nil
	}
	name := map[string]string{"file": "file", "block": "dev"}[c.Type]
	if name == "" {
		return fmt.Errorf("type %q at the destination: only file and block are supported", c.Type)
	}
	if !filepath.IsAbs(c.Path) || filepath.Clean(c.Path) != c.Path {
		return fmt.Errorf("path %q at the destination: it must be absolute and clean", c.Path)
	}
	if err := checkValue(c.Path); err != nil {
		return err
	}
	if len(sources) != 1 {
		return fmt.Errorf("%w: it has %d <source> elements", ErrBadXML, len(sources))
	}
	src := sources[0]
	e.CreateAttr("type", c.Type)
	// What names the old place goes; startupPolicy, and children such as
	// <seclabel>, stay.
	src.Attr = slices.DeleteFunc(src.Attr, func(a etree.Attr) bool {
		return slices.Contains([]string{"file", "dev", "pool", "volume", "mode", "index"}, a.FullKey())
	})
	src.CreateAttr(name, c.Path)
	return nil
}

// checkValue refuses what XML, or libvirt, cannot carry.
func checkValue(s string) error {
	if s == "" || len(s) > 4096 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' }) {
		return fmt.Errorf("%q is empty, too long or holds control characters", s)
	}
	return nil
}
