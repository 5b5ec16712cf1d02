package tunnel

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"strings"
)

// ID names an agent: the fingerprint of its public key, as eight groups of
// seven letters and digits. IDs made by ParseID and Identity.ID can be compared
// with ==.
type ID string

const (
	sumSize    = 3
	idLetters  = (sha256.Size + sumSize) * 8 / 5
	groupSize  = 7
	maxIDInput = 256
)

// ParseID reads an ID as an operator types or pastes it: upper or lower case,
// with or without spaces and dashes.
func ParseID(s string) (ID, error) {
	if len(s) > maxIDInput {
		return "", fmt.Errorf("not a wanmig ID: %d characters, an ID has %d", len(s), idLetters)
	}
	letters := strings.Map(func(r rune) rune {
		switch {
		case r == ' ' || r == '-' || r == '\t' || r == '\n' || r == '\r':
			return -1
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		}
		return r
	}, s)
	for _, r := range letters {
		if (r < 'A' || r > 'Z') && (r < '2' || r > '7') {
			return "", fmt.Errorf("not a wanmig ID: %q: %q is not used in IDs (letters A to Z, digits 2 to 7)", s, r)
		}
	}
	if len(letters) != idLetters {
		return "", fmt.Errorf("not a wanmig ID: %q: %d characters, an ID has %d", s, len(letters), idLetters)
	}
	raw, err := base32.StdEncoding.DecodeString(letters)
	if err != nil {
		return "", fmt.Errorf("not a wanmig ID: %q: %w", s, err)
	}
	if !bytes.Equal(raw[sha256.Size:], idSum(raw[:sha256.Size])) {
		return "", fmt.Errorf("not a wanmig ID: %q: the check sum differs, so it is mistyped or incomplete", s)
	}
	return groupID(letters), nil
}

func idOf(key ed25519.PublicKey) ID {
	hash := sha256.Sum256(key)
	raw := append(hash[:], idSum(hash[:])...)
	return groupID(base32.StdEncoding.EncodeToString(raw))
}

func idSum(hash []byte) []byte {
	sum := sha256.Sum256(append([]byte("wanmig id"), hash...))
	return sum[:sumSize]
}

func groupID(letters string) ID {
	groups := make([]string, 0, idLetters/groupSize)
	for i := 0; i < len(letters); i += groupSize {
		groups = append(groups, letters[i:i+groupSize])
	}
	return ID(strings.Join(groups, "-"))
}
