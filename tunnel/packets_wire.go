package tunnel

import (
	"fmt"
	"io"
)

// MaxTag is the largest tag of a connection for packets in bytes.
const MaxTag = 64

const tagVersion = 1

// appendTag writes the request of a connection for packets.
func appendTag(b, tag []byte) []byte {
	return append(append(b, tagVersion, byte(len(tag))), tag...)
}

// readTag reads a request up to its tag.
func readTag(r io.Reader) ([]byte, error) {
	var fixed [2]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return nil, cutShort(err)
	}
	if fixed[0] < tagVersion {
		return nil, fmt.Errorf("%w: request of version %d", ErrFormat, fixed[0])
	}
	if fixed[1] > MaxTag {
		return nil, fmt.Errorf("%w: tag of %d bytes, allowed are %d", ErrFormat, fixed[1], MaxTag)
	}
	tag := make([]byte, fixed[1])
	if _, err := io.ReadFull(r, tag); err != nil {
		return nil, cutShort(err)
	}
	return tag, nil
}
