package hostnet

import (
	"encoding/binary"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// typeMask leaves out the flags of an attribute's type (NLA_TYPE_MASK,
// include/uapi/linux/netlink.h).
const typeMask = 1<<14 - 1

// attributes reads what follows the fixed part of a netlink message, by type.
// Of several with the same type the last counts: none that this package reads
// comes twice.
//
//	bytes  field
//	2      length, of these 4 bytes and the value
//	2      type, the upper two bits are flags
//	n      value, padded to 4 bytes
func attributes(b []byte) (map[uint16][]byte, error) {
	found := map[uint16][]byte{}
	for len(b) >= unix.SizeofRtAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofRtAttr || length > len(b) {
			return nil, fmt.Errorf("netlink attribute of %d bytes where %d are left", length, len(b))
		}
		found[binary.NativeEndian.Uint16(b[2:])&typeMask] = b[unix.SizeofRtAttr:length]
		b = b[min((length+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1), len(b)):]
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("%d bytes after the last netlink attribute", len(b))
	}
	return found, nil
}

// native32 reads an attribute in the host's byte order, 0 if it is not there.
func native32(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(value)
}

// request sends one message that the library has no call for, and returns the
// kernel's answers without their headers.
func request(kind uint16, flags int, parts ...nl.NetlinkRequestData) ([][]byte, error) {
	req := nl.NewNetlinkRequest(int(kind), flags)
	for _, p := range parts {
		req.AddData(p)
	}
	return req.Execute(unix.NETLINK_ROUTE, 0)
}
