package seed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

const (
	scanEvery = 3 * time.Minute
	// An image that is written is indexed again when nobody has written it for
	// settleTime, or at last after oldIndex: until then the old index will do.
	settleTime = 5 * time.Minute
	oldIndex   = 24 * time.Hour
	// retryTime is how long an image that could not be indexed is left alone if
	// it does not change, and all of them when the state folder is full.
	retryTime = time.Hour

	// Indexing reads no faster than this, on one goroutine: a tenth of a core for
	// fingerprints, and a part of what one disk can read. A rate needs no privilege and holds for
	// every scheduler, unlike a priority for I/O. It does not stop for a
	// move, which may last for days, but makes way for one that comes here.
	idleRate = 128 << 20
	busyRate = 16 << 20
)

// Library is the images that an operator has listed, and their indexes.
type Library struct {
	folder string
	listed []string
	log    *slog.Logger
	wake   chan struct{}
	limit  *rate.Limiter
	now    func() time.Time
	fault  func(step string) error

	scanning sync.Mutex // held by one scan at a time

	mu     sync.Mutex
	images map[string]*record
	lists  map[string]string // a listed path: what is wrong with it
	open   int               // images that moves have open
	full   time.Time         // until then no index is made
}

// record is what the library knows of an image.
type record struct {
	path string
	found

	index   *index // nil when there is none
	loaded  bool   // an index file was looked for
	read    int64  // bytes, while it is indexed
	of      int64  // 0 while it is not
	problem string
	tried   identity // that could not be indexed
	again   time.Time
}

// New makes a library of the images in paths: of folders, their regular files and those of
// the folders within, by symbolic links nothing; block devices only by their own path. Index files
// are in folder, which is made.
func New(folder string, paths []string, log *slog.Logger) (*Library, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of seed indexes: %w", err)
	}
	return &Library{folder: folder, listed: paths, log: log, wake: make(chan struct{}, 1), now: time.Now, fault: func(string) error { return nil },
		limit: rate.NewLimiter(idleRate, stretch), images: map[string]*record{}, lists: map[string]string{}}, nil
}

// Run looks for images and indexes them, now and every few minutes, until ctx ends.
func (l *Library) Run(ctx context.Context) {
	l.tidy()
	tick := time.NewTicker(scanEvery)
	defer tick.Stop()
	for {
		l.Scan(ctx)
		l.load(ctx)
		for r := l.next(); r != nil && ctx.Err() == nil; r = l.next() {
			l.reindex(ctx, r)
			select { // images that came meanwhile, before the others are done
			case <-tick.C:
				l.Scan(ctx)
				l.load(ctx)
			default:
			}
		}
		select {
		case <-tick.C:
		case <-l.wake:
		case <-ctx.Done():
			return
		}
	}
}

// Refresh looks for images now, and has new ones indexed soon.
func (l *Library) Refresh(ctx context.Context) {
	l.Scan(ctx)
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// load opens the index files that are there already.
func (l *Library) load(ctx context.Context) {
	for _, r := range l.all() {
		if r.loaded || ctx.Err() != nil {
			continue
		}
		x, err := l.openIndex(r.path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			l.log.Warn("seed index not usable: it is made anew", "image", r.path, "error", err)
		}
		l.mu.Lock()
		r.loaded, r.index = true, x
		l.mu.Unlock()
	}
}

// openIndex opens the index of an image. The file's name is a hash of its path.
func (l *Library) openIndex(path string) (*index, error) {
	x, err := openIndex(indexPath(l.folder, path))
	if err == nil && x.path != path {
		return nil, errors.Join(fmt.Errorf("%w: it is of %q", errIndex, x.path), x.release())
	}
	return x, err
}

// next chooses an image to index: first those that have none.
func (l *Library) next() *record {
	l.mu.Lock()
	defer l.mu.Unlock()
	var best *record
	for _, r := range l.images {
		if r.loaded && l.due(r) && (best == nil || r.index == nil && best.index != nil || (r.index == nil) == (best.index == nil) && r.path < best.path) {
			best = r
		}
	}
	return best
}

// due reports whether an image should be indexed now. The mutex is held.
func (l *Library) due(r *record) bool {
	now := l.now()
	switch {
	case now.Before(l.full):
		return false
	case r.tried == r.file && now.Before(r.again):
		return false
	case r.index == nil:
		return true
	case r.device: // nothing tells when it was written
		return now.Sub(r.index.indexed) > oldIndex
	case r.index.file == r.file:
		return false
	case r.index.file.inode != r.file.inode: // replaced as a whole
		return true
	}
	return now.Sub(time.Unix(0, r.file.mtime)) > settleTime || now.Sub(r.index.indexed) > oldIndex
}

// reindex makes the index of an image.
func (l *Library) reindex(ctx context.Context, r *record) {
	began := l.now()
	file, unread, err := l.build(ctx, r, began)
	var x *index
	if err == nil {
		x, err = l.openIndex(r.path)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r.read, r.of = 0, 0
	if ctx.Err() != nil {
		if x != nil {
			l.warn(x.release())
		}
		return
	}
	if err == nil && l.images[r.path] != r { // it has gone meanwhile
		l.warn(errors.Join(x.release(), os.Remove(indexPath(l.folder, r.path))))
		return
	}
	if err == nil {
		if r.index != nil {
			l.warn(r.index.release())
		}
		r.index, r.problem, r.file = x, "", file
		if unread != nil {
			r.problem = unread.Error()
			l.log.Warn("seed indexed in part", "image", r.path, "error", unread)
		}
		l.log.Info("seed indexed", "image", r.path, "format", x.format, "pages", x.count, "took", l.now().Sub(began).Round(time.Millisecond))
		return
	}
	r.tried, r.again = r.file, began.Add(retryTime)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		l.full = r.again
	}
	if r.problem != err.Error() {
		r.problem = err.Error()
		l.log.Warn("seed not indexed", "image", r.path, "error", err, "again", r.again)
	}
}

func (l *Library) build(ctx context.Context, r *record, began time.Time) (file identity, unread, err error) {
	if len(r.path) > maxPath {
		return file, nil, fmt.Errorf("path of more than %d bytes", maxPath)
	}
	l.mu.Lock()
	listed := r.listed
	l.mu.Unlock()
	f, file, err := openFile(r.path, listed)
	if err != nil {
		return file, nil, err
	}
	img, err := openFormat(f, file.size)
	if err != nil {
		return file, nil, err
	}
	b := builder{folder: l.folder, pace: l.limit.WaitN, most: runEntries, fault: l.fault, done: func(read, of int64) {
		l.mu.Lock()
		defer l.mu.Unlock()
		r.read, r.of = read, of
	}}
	unread, err = b.build(ctx, r.path, began, file, img)
	return file, unread, errors.Join(err, img.close())
}

// warn tells of memory or a file that is not given back. It does no other harm.
func (l *Library) warn(err error) {
	if err != nil {
		l.log.Warn("seed index not cleared away", "error", err)
	}
}

// all lists the records by their paths.
func (l *Library) all() []*record {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := make([]*record, 0, len(l.images))
	for _, r := range l.images {
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b *record) int { return cmp.Compare(a.path, b.path) })
	return list
}

// Images opens all images that have an index, old as it may be. The caller closes each.
func (l *Library) Images() []*Image {
	var list []*Image
	for _, r := range l.all() {
		l.mu.Lock()
		if r.index != nil && r.index.retain() {
			l.used(+1)
			list = append(list, &Image{path: r.path, listed: r.listed, index: r.index, gone: func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				l.used(-1)
			}})
		}
		l.mu.Unlock()
	}
	return list
}

// used counts images that moves have open. The mutex is held.
func (l *Library) used(by int) {
	l.open += by
	if l.open > 0 {
		l.limit.SetLimit(busyRate)
	} else {
		l.limit.SetLimit(idleRate)
	}
}

// Close gives the indexes' memory back, when Run has ended.
func (l *Library) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	for _, r := range l.images {
		if r.index != nil {
			err = errors.Join(err, r.index.release())
			r.index = nil
		}
	}
	return err
}

// tidy removes what a crash has left of indexes that were being made.
func (l *Library) tidy() {
	entries, err := os.ReadDir(l.folder)
	l.warn(err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			l.warn(os.Remove(filepath.Join(l.folder, e.Name())))
		}
	}
}
