package seed

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/wanmig/wanmig/compress"
)

// bigEnough makes content of a file that counts as an image: some pages and a hole.
func bigEnough(numbers ...int) []byte {
	return append(pages(numbers...), make([]byte, max(minFileSize-len(numbers)*page, 0))...)
}

// shelf is a folder of images and a library of it, with its own clock.
type shelf struct {
	t      *testing.T
	images string
	state  string
	log    bytes.Buffer
	clock  time.Time
	*Library
}

func newShelf(t *testing.T) *shelf {
	s := &shelf{t: t, images: t.TempDir(), state: filepath.Join(t.TempDir(), "seeds"), clock: time.Now()}
	s.restart()
	t.Cleanup(func() { s.Close() })
	return s
}

// restart makes the library anew, as an agent does that starts.
func (s *shelf) restart(paths ...string) {
	s.t.Helper()
	if s.Library != nil {
		if err := s.Close(); err != nil {
			s.t.Fatal(err)
		}
	}
	var err error
	if s.Library, err = New(s.state, append([]string{s.images}, paths...), slog.New(slog.NewTextHandler(&s.log, nil))); err != nil {
		s.t.Fatal(err)
	}
	s.now = func() time.Time { return s.clock }
	s.tidy()
}

// work does what Run does between two waits, and returns how many images were indexed.
func (s *shelf) work() (n int) {
	s.t.Helper()
	s.Scan(s.t.Context())
	s.load(s.t.Context())
	for r := s.next(); r != nil; r = s.next() {
		s.reindex(s.t.Context(), r)
		if n++; n > 100 {
			s.t.Fatal("images are indexed without end")
		}
	}
	return n
}

func (s *shelf) put(name string, numbers ...int) string {
	s.t.Helper()
	path := filepath.Join(s.images, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	write(s.t, path, bigEnough(numbers...))
	if err := os.Chtimes(path, s.clock, s.clock); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// holds looks a page up in all images, reads it where it is said to be and compares.
func (s *shelf) holds(n int) bool {
	s.t.Helper()
	held := false
	sum := compress.Sum(pages(n))
	for _, m := range s.Images() {
		if at, ok := m.Find(sum); ok {
			b := make([]byte, page)
			if m.ReadAt(s.t.Context(), b, at*page) == nil && compress.Sum(b) == sum {
				held = true
			}
		}
		if err := m.Close(); err != nil {
			s.t.Error(err)
		}
	}
	return held
}

// check checks which of the pages 1 to 9 are held.
func (s *shelf) check(when string, want ...int) {
	s.t.Helper()
	var got []int
	for n := 1; n < 10; n++ {
		if s.holds(n) {
			got = append(got, n)
		}
	}
	if len(got) != len(want) {
		s.t.Fatalf("%s: %v are held, not %v", when, got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			s.t.Fatalf("%s: %v are held, not %v", when, got, want)
		}
	}
}

func (s *shelf) indexFiles() []string {
	s.t.Helper()
	all, err := os.ReadDir(s.state)
	if err != nil {
		s.t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// TestIndexesOutliveTheAgent: what is indexed is not read again after a start.
func TestIndexesOutliveTheAgent(t *testing.T) {
	s := newShelf(t)
	s.put("a", 1, 2)
	s.put("of/web/b", 3)
	if n := s.work(); n != 2 {
		t.Fatalf("%d images indexed", n)
	}
	s.check("at first", 1, 2, 3)
	s.restart()
	if n := s.work(); n != 0 {
		t.Fatalf("%d images indexed again", n)
	}
	s.check("after a start", 1, 2, 3)
}

// TestChangedImage: an image that was written is a hint as before, and indexed
// anew when it is left alone.
func TestChangedImage(t *testing.T) {
	s := newShelf(t)
	s.put("a", 1, 2, 3)
	s.work()
	s.clock = s.clock.Add(time.Hour)
	s.put("a", 1, 4, 3)
	if n := s.work(); n != 0 {
		t.Fatal("indexed while it is written")
	}
	s.check("with the old index", 1, 3)
	if st := s.Status(); len(st) != 1 || !st[0].Changed || st[0].State != Ready {
		t.Errorf("%+v", st)
	}
	s.clock = s.clock.Add(settleTime + time.Second)
	if n := s.work(); n != 1 {
		t.Fatalf("indexed %d times", n)
	}
	s.check("with the new one", 1, 3, 4)
	// One that is written all the time is indexed once a day.
	for range 3 {
		s.clock = s.clock.Add(oldIndex - time.Second)
		s.put("a", 5)
		if n := s.work(); n != 0 {
			t.Fatal("indexed within a day")
		}
		s.clock = s.clock.Add(2 * time.Second)
		s.put("a", 5)
		if n := s.work(); n != 1 {
			t.Fatal("not indexed after a day")
		}
	}
	s.check("at last", 5)
}

// TestImageThatChangesDuringAMove: whatever becomes of a file, open or not, what
// is found in it was compared.
func TestImageThatChangesDuringAMove(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"deleted":          os.Remove,
		"truncated":        func(path string) error { return os.Truncate(path, 10) },
		"emptied":          func(path string) error { return os.Truncate(path, 0) },
		"overwritten":      func(path string) error { return os.WriteFile(path, bigEnough(8, 8, 8), 0o600) },
		"replaced":         func(path string) error { return errors.Join(os.Remove(path), os.WriteFile(path, bigEnough(9), 0o600)) },
		"a folder":         func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"a FIFO":           func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
		"a link":           func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/dev/zero", path)) },
		"half of an image": func(path string) error { return os.WriteFile(path, []byte(qcowMagic+"and no more"), 0o600) },
	} {
		for _, when := range []string{"before the first read", "after it"} {
			s := newShelf(t)
			path := s.put("a", 1, 2, 3)
			s.work()
			m := s.Images()[0]
			b := make([]byte, page)
			if when == "after it" {
				if err := m.ReadAt(t.Context(), b, 0); err != nil || !bytes.Equal(b, pages(1)) {
					t.Fatal(err)
				}
			}
			if err := change(path); err != nil {
				t.Fatal(err)
			}
			at, ok := m.Find(compress.Sum(pages(2)))
			if !ok || at != 1 {
				t.Fatalf("%s: the index is not what it was", name)
			}
			err := m.ReadAt(t.Context(), b, at*page)
			kept := when == "after it" && name != "truncated" && name != "emptied" && name != "overwritten" && name != "half of an image"
			if same := err == nil && bytes.Equal(b, pages(2)); same != kept {
				t.Errorf("%s %s: still read: %v, error %v", name, when, same, err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if err := m.ReadAt(t.Context(), b, 0); !errors.Is(err, errClosed) {
				t.Errorf("read after Close: %v", err)
			}
			if _, ok := m.Find(compress.Sum(pages(2))); ok {
				t.Error("found after Close")
			}
		}
	}
}

// TestCrash: whatever a crash leaves of the index files, the next agent has right
// ones, and nothing else is left.
func TestCrash(t *testing.T) {
	s := newShelf(t)
	a, b := s.put("a", 1, 2), s.put("b", 3)
	s.work()
	whole, err := os.ReadFile(indexPath(s.state, a))
	if err != nil {
		t.Fatal(err)
	}
	swapped, err := os.ReadFile(indexPath(s.state, b))
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(whole)
	flipped[headerSize+3] ^= 1
	for name, left := range map[string][]byte{
		"nothing": nil, "empty": {}, "half": whole[:headerSize+5], "header": whole[:headerSize], "zeros": make([]byte, len(whole)),
		"a bit flipped": flipped, "that of another image": swapped,
	} {
		if left == nil {
			if err := os.Remove(indexPath(s.state, a)); err != nil {
				t.Fatal(err)
			}
		} else {
			write(t, indexPath(s.state, a), left)
		}
		write(t, filepath.Join(s.state, tempPrefix+"123"), whole[:100])
		s.restart()
		if n := s.work(); n != 1 {
			t.Errorf("%s: %d images indexed", name, n)
		}
		s.check(name, 1, 2, 3)
		if files := s.indexFiles(); len(files) != 2 {
			t.Errorf("%s: files %v", name, files)
		}
	}
	if n := strings.Count(s.log.String(), "seed index not usable"); n != 6 {
		t.Errorf("%d damaged files logged:\n%s", n, s.log.String())
	}
}

// TestIndexFromBeforeAChange: an agent that starts finds an old index of an image
// that was written while it was down.
func TestIndexFromBeforeAChange(t *testing.T) {
	s := newShelf(t)
	s.put("a", 1, 2)
	s.work()
	s.clock = s.clock.Add(time.Hour)
	s.put("a", 2, 1, 3)
	s.restart()
	s.Scan(t.Context())
	s.load(t.Context())
	s.check("with the old index, pages elsewhere")
	s.clock = s.clock.Add(time.Hour)
	if n := s.work(); n != 1 {
		t.Fatalf("%d images indexed", n)
	}
	s.check("with the new one", 1, 2, 3)
}

// TestImagesThatGo: their index files go with them, also when a move has them open.
func TestImagesThatGo(t *testing.T) {
	s := newShelf(t)
	a := s.put("a", 1)
	s.put("b", 2)
	s.work()
	open := s.Images()
	if err := os.Remove(a); err != nil {
		t.Fatal(err)
	}
	s.work()
	s.check("after one has gone", 2)
	if files := s.indexFiles(); len(files) != 1 {
		t.Errorf("files %v", files)
	}
	if _, ok := open[0].Find(compress.Sum(pages(1))); !ok {
		t.Error("the move lost its index")
	}
	if s.limit.Limit() != busyRate {
		t.Errorf("during a move indexing reads %v bytes a second", s.limit.Limit())
	}
	for _, m := range open {
		if err := errors.Join(m.Close(), m.Close()); err != nil {
			t.Error(err)
		}
	}
	if s.limit.Limit() != idleRate {
		t.Errorf("after the move indexing reads %v bytes a second", s.limit.Limit())
	}
}

// TestWhatIsNoImage: nothing is opened that the operator did not mean.
func TestWhatIsNoImage(t *testing.T) {
	s := newShelf(t)
	elsewhere := write(t, filepath.Join(t.TempDir(), "secret"), bigEnough(1))
	s.put("small", 2)
	if err := os.Truncate(filepath.Join(s.images, "small"), minFileSize-1); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(elsewhere, filepath.Join(s.images, "link")),
		os.Symlink(filepath.Dir(elsewhere), filepath.Join(s.images, "folder")),
		unix.Mkfifo(filepath.Join(s.images, "fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if n := s.work(); n != 0 || len(s.Status()) != 0 {
		t.Errorf("%d indexed: %+v", n, s.Status())
	}
	// By its own path it is one, also by a link, which an operator may have made.
	s.restart(elsewhere, filepath.Join(s.images, "link"), filepath.Join(s.images, "absent"), filepath.Join(s.images, "fifo"))
	if n := s.work(); n != 2 {
		t.Errorf("%d indexed: %+v", n, s.Status())
	}
	problems := 0
	for _, st := range s.Status() {
		if st.State == Problem && (strings.HasSuffix(st.Path, "absent") || strings.HasSuffix(st.Path, "fifo")) {
			problems++
		}
	}
	if problems != 2 {
		t.Errorf("%+v", s.Status())
	}
}

// TestImageThatCanNotBeIndexed is said once, and tried again when it changes.
func TestImageThatCanNotBeIndexed(t *testing.T) {
	s := newShelf(t)
	bad := append([]byte(qcowMagic+"\x00\x00\x00\x09"), make([]byte, minFileSize)...)
	path := write(t, filepath.Join(s.images, "bad"), bad)
	s.put("good", 1)
	for range 3 {
		s.work()
		s.clock = s.clock.Add(2 * retryTime)
	}
	s.check("the other", 1)
	if st := s.Status(); st[0].State != Problem || !strings.Contains(st[0].Problem, "version 9") {
		t.Errorf("%+v", st)
	}
	if n := strings.Count(s.log.String(), "seed not indexed"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, s.log.String())
	}
	write(t, path, bigEnough(2))
	s.work()
	s.check("after it was mended", 1, 2)
}

// TestStateFolderFull: said once, and not tried with one image after the other.
func TestStateFolderFull(t *testing.T) {
	s := newShelf(t)
	s.put("a", 1)
	s.work()
	s.put("b", 2)
	s.put("c", 3)
	s.fault = func(step string) error {
		if step == "WRITE" {
			return unix.ENOSPC
		}
		return nil
	}
	if n := s.work(); n != 1 {
		t.Errorf("%d images tried", n)
	}
	if n := s.work(); n != 0 {
		t.Errorf("%d images tried soon after", n)
	}
	s.check("what was indexed", 1)
	if n := strings.Count(s.log.String(), "level=WARN"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, s.log.String())
	}
	if files := s.indexFiles(); len(files) != 1 {
		t.Errorf("files %v", files)
	}
	s.fault = func(string) error { return nil }
	s.clock = s.clock.Add(retryTime)
	if n := s.work(); n != 2 {
		t.Errorf("%d images tried when there is room", n)
	}
	s.check("all", 1, 2, 3)
}

// TestCrashBetweenSteps ends the making of an index before each of its steps: the
// old index is there, or the new one.
func TestCrashBetweenSteps(t *testing.T) {
	for _, at := range []string{"WRITE", "SYNC", "RENAME", "SYNC FOLDER"} {
		s := newShelf(t)
		s.put("a", 1, 2)
		s.work()
		s.clock = s.clock.Add(time.Hour)
		s.put("a", 1, 3)
		s.clock = s.clock.Add(time.Hour)
		crash := errors.New("crash")
		s.fault = func(step string) error {
			if step == at {
				return crash
			}
			return nil
		}
		s.work()
		s.check("old or new, compared: "+at, 1)
		s.restart()
		again := 1
		if at == "SYNC FOLDER" { // its name is there
			again = 0
		}
		if n := s.work(); n != again {
			t.Errorf("%s: %d images indexed", at, n)
		}
		s.check("after "+at, 1, 3)
		if files := s.indexFiles(); len(files) != 1 {
			t.Errorf("%s: files %v", at, files)
		}
	}
}

// TestRun indexes in the background what comes, and ends when it is told to.
func TestRun(t *testing.T) {
	s := newShelf(t)
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	work.Go(func() { s.Run(ctx) })
	await := func(n int) {
		t.Helper()
		for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			ready := 0
			for _, st := range s.Status() {
				if st.State == Ready {
					ready++
				}
			}
			if ready == n {
				return
			}
			if time.Now().After(until) {
				t.Fatalf("%+v", s.Status())
			}
		}
	}
	s.put("a", 1)
	s.Refresh(ctx)
	await(1)
	s.put("b", 2)
	s.Refresh(ctx)
	await(2)
	// One that takes for ever ends with the agent.
	s.limit.SetLimit(rate.Limit(1))
	s.limit.ReserveN(time.Now(), s.limit.Burst()) // what it has saved up
	s.put("c", 3)
	s.Refresh(ctx)
	cancel()
	work.Wait()
	if files := s.indexFiles(); len(files) != 2 {
		t.Errorf("files %v", files)
	}
}
