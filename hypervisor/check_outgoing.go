package hypervisor

import (
	"context"
	"fmt"
	"slices"

	"github.com/digitalocean/go-libvirt"
)

// CheckOutgoing finds everything about a domain that would make its move fail,
// or surprise. The error is for what could not be looked at.
func (h *Host) CheckOutgoing(ctx context.Context, dom *Domain) ([]Finding, error) {
	var f findings
	switch dom.State {
	case Running, Paused:
	case Suspended:
		f.fatal("state", "the guest sleeps", "wake it (virsh dompmwakeup)")
	default:
		f.fatal("state", "the domain is "+string(dom.State), "start it: only a running or paused domain moves")
	}
	doc, err := parseXML(dom.XML, "domain")
	if err != nil {
		f.badDocument(err)
		return f, nil
	}
	f.checkDevices(doc)
	for _, d := range dom.Disks {
		f.checkOutgoingDisk(d)
	}
	for _, e := range diskElements(doc) {
		for _, tag := range []string{"slices", "reservations"} {
			if child(e, "source", tag) != nil {
				f.fatal("disk "+attr(e, "dev", "target"), "its source has <"+tag+">, which cannot be carried over", "attach it without")
			}
		}
	}
	switch attr(doc.Root(), "mode", "cpu") {
	case "host-passthrough", "maximum":
		f.notice("cpu", "the guest sees this host's CPU itself", "make sure that the destination's CPU is of the same model, or give the guest a named model")
	}
	f.checkDefinition(dom)
	err = h.checkJobs(ctx, &f, dom)
	return f, err
}

// checkDefinition looks for disks of the definition that the running guest lacks.
func (f *findings) checkDefinition(dom *Domain) {
	if dom.InactiveXML == "" {
		return
	}
	def, err := readDomain(dom.InactiveXML)
	if err != nil {
		f.badDocument(err)
		return
	}
	for _, d := range def.Disks {
		if d.Path != "" && !slices.ContainsFunc(dom.Disks, func(r Disk) bool { return r.Target == d.Target }) {
			f.notice("disk "+d.Target, "the definition has it and the running guest does not: it is not copied", "move "+d.Path+" by other means, or remove it from the definition")
		}
	}
}

func (f *findings) checkOutgoingDisk(d Disk) {
	check := "disk " + d.Target
	switch {
	case !d.Media():
	case d.Device == "cdrom" || d.Device == "floppy": // the caller carries it or not
	case d.ReadOnly:
		f.notice(check, "it is read-only and not copied", "the destination must have the same content at "+d.Path)
	default:
		f.checkDisk(d)
		if d.Snapshots > 0 {
			f.notice(check, fmt.Sprintf("the %d snapshots inside its image stay behind", d.Snapshots), "")
		}
		if d.HasBacking {
			f.notice(check, "it stands on a backing image, and arrives as one flat image", "")
		}
	}
}

// checkJobs asks libvirt for what the domain's XML does not tell.
func (h *Host) checkJobs(ctx context.Context, f *findings, dom *Domain) error {
	return h.onDomain(ctx, "check domain", dom.UUID, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		snapshots, _, err := l.DomainListAllSnapshots(d, 1, 0)
		if err != nil {
			return err
		}
		if len(snapshots) > 0 {
			f.fatal("snapshots", fmt.Sprintf("libvirt moves no domain with snapshots, and this one has %d", len(snapshots)),
				"delete them (virsh snapshot-delete), or with --metadata only libvirt's knowledge of them")
		}
		if !dom.State.Active() {
			return nil
		}
		kind, params, err := l.DomainGetJobStats(d, 0)
		if err != nil {
			return err
		}
		if readJobStats(libvirt.DomainJobType(kind), params).Active {
			f.fatal("job", "another job of this domain is under way", "wait for it (virsh domjobinfo) or end it (virsh domjobabort)")
		}
		for _, disk := range dom.Disks {
			if !disk.measured() {
				continue
			}
			found, _, _, _, _, err := l.DomainGetBlockJobInfo(d, disk.Target, 0)
			if err != nil {
				return err
			}
			if found != 0 {
				f.fatal("disk "+disk.Target, "a block job of it is under way", "wait for it or end it (virsh blockjob)")
			}
		}
		return nil
	})
}
