package seed

import (
	"maps"
	"slices"
	"time"
)

// State is how far an image is.
type State string

const (
	Waiting  State = "waiting"  // to be indexed
	Indexing State = "indexing" // for the first time or anew
	Ready    State = "ready"    // of use; it may have changed since
	Problem  State = "problem"  // of no use: Status.Problem tells why
)

// Status tells how an image stands, or a listed path that can't be looked through.
type Status struct {
	Path    string     `json:"path"`
	State   State      `json:"state"`
	Percent int        `json:"percent"`           // of an image that is indexed now
	Format  string     `json:"format,omitempty"`  // raw or qcow2, once indexed
	Size    int64      `json:"size"`              // of the content once indexed, else of the file, in bytes
	Pages   int64      `json:"pages"`             // that can be found: distinct, not zero
	Indexed *time.Time `json:"indexed,omitempty"` // when it was last indexed
	Changed bool       `json:"changed"`           // since then
	Problem string     `json:"problem,omitempty"`
}

// Status lists the images by path.
func (l *Library) Status() []Status {
	list := []Status{}
	records := l.all()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range records {
		s := Status{Path: r.path, State: Waiting, Size: r.file.size, Problem: r.problem}
		if x := r.index; x != nil {
			s.State, s.Format, s.Size, s.Pages = Ready, x.format.String(), x.size, x.count
			s.Indexed, s.Changed = &x.indexed, x.file != r.file
		}
		switch {
		case r.of > 0:
			s.State, s.Percent = Indexing, int(r.read*100/r.of)
		case r.index == nil && r.problem != "":
			s.State = Problem
		}
		list = append(list, s)
	}
	for _, path := range slices.Sorted(maps.Keys(l.lists)) {
		if problem := l.lists[path]; problem != "" {
			list = append(list, Status{Path: path, State: Problem, Problem: problem})
		}
	}
	return list
}
