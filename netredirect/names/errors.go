package names

import (
	"errors"
	"strings"
)

var (
	// ErrChanged is returned when a record is neither as it was found nor as a
	// move leaves it. Nothing was overwritten.
	ErrChanged = errors.New("changed by someone else")
	// ErrRefused is returned when a server refuses an update or a query.
	ErrRefused = errors.New("refused")
	// ErrKey is returned when a server does not know the key, or has another
	// secret for it.
	ErrKey = errors.New("key not accepted")
	// ErrClock is returned when the clocks of this host and of a server are
	// further apart than TSIG allows.
	ErrClock = errors.New("clocks differ")
	// ErrFailed is returned when a server says that it has failed.
	ErrFailed = errors.New("server failure")
	// ErrSilent is returned when a server does not answer.
	ErrSilent = errors.New("no answer")
	// ErrAnswer is returned when an answer breaks the protocol, or is not signed
	// as it must be.
	ErrAnswer = errors.New("unusable answer")
	// ErrAlias is returned when a name is an alias (CNAME) of another.
	ErrAlias = errors.New("is an alias")
	// ErrNotServed is returned when no configured server is authoritative for a
	// name, or its zone is not among those of the configuration.
	ErrNotServed = errors.New("not served by the configured servers")
	// ErrReverse is returned when all names have moved but a PTR record could
	// not follow.
	ErrReverse = errors.New("reverse record not moved")
)

// problems are errors of several servers or zones, on one line.
type problems []error

func (p problems) Error() string {
	lines := make([]string, len(p))
	for i, err := range p {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "; ")
}

func (p problems) Unwrap() []error { return p }

// joined returns nil for no error.
func joined(errs []error) error {
	if len(errs) < 2 {
		return errors.Join(errs...)
	}
	return problems(errs)
}
