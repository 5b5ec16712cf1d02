package hypervisor

import (
	"context"

	"github.com/digitalocean/go-libvirt"
)

// PlannedNICs are the network interfaces that a domain of this XML would have
// here. The bridge of a network is looked up.
func (h *Host) PlannedNICs(ctx context.Context, xml string) ([]NIC, error) {
	var nics []NIC
	err := h.call(ctx, "read network interfaces", func(l *libvirt.Libvirt) error {
		dom, err := readDomain(xml)
		if err != nil {
			return err
		}
		nics = dom.Networks
		for i := range nics {
			nics[i].Tap = "" // another host's
			if nics[i].Kind != "network" {
				continue
			}
			network, err := l.NetworkLookupByName(nics[i].Source)
			if hasCode(err, libvirt.ErrNoNetwork) {
				continue // the checks tell
			}
			if err != nil {
				return err
			}
			// A network of another kind has no bridge.
			if bridge, err := l.NetworkGetBridgeName(network); err == nil {
				nics[i].Bridge = bridge
			}
		}
		return nil
	})
	return nics, err
}
