package migrate

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// watched is a vigil whose questions are answered as a test says.
type watched struct {
	asked   int
	ask     func() <-chan error
	answers chan struct{}
	still   chan struct{}
	end     chan struct{}
	vigil
}

func (s *watched) question() <-chan error {
	s.asked++
	if s.ask != nil {
		return s.ask()
	}
	sent := make(chan error, 1)
	sent <- nil
	return sent
}

// after runs a vigil and tells when it ends, and how.
func (s *watched) after(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	err := s.keep(ctx, s.still, s.end, s.question, s.answers)
	return time.Since(began), err
}

func TestVigil(t *testing.T) {
	test := func(name string, f func(*testing.T, *watched)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f(t, &watched{answers: make(chan struct{}, 1), still: make(chan struct{}), end: make(chan struct{})})
			})
		})
	}
	test("answered until the end", func(t *testing.T, s *watched) {
		go func() {
			close(s.still)
			for range 100 {
				time.Sleep(50 * time.Millisecond)
				s.answers <- struct{}{}
				time.Sleep(vigilEvery)
			}
			close(s.end)
		}()
		if d, err := s.after(t.Context()); err != nil || d != 100*(vigilEvery+50*time.Millisecond) || s.asked < 100 || s.wasSilent(time.Time{}) {
			t.Errorf("ends after %v and %d questions: %v", d, s.asked, err)
		}
	})
	test("no answer while the guest runs", func(t *testing.T, s *watched) {
		go func() {
			time.Sleep(time.Second)
			if s.isSilent() {
				t.Error("silent after a second")
			}
			time.Sleep(time.Second)
			if !s.isSilent() {
				t.Error("not silent after two seconds")
			}
			time.Sleep(time.Hour)
			s.answers <- struct{}{}
			synctest.Wait()
			if s.isSilent() || !s.wasSilent(time.Now().Add(-time.Second)) || s.wasSilent(time.Now()) {
				t.Error("the answer is not known")
			}
			close(s.end)
		}()
		if d, err := s.after(t.Context()); err != nil || d != time.Hour+2*time.Second {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
	test("no answer while the guest stands still", func(t *testing.T, s *watched) {
		close(s.still)
		go func() { time.Sleep(time.Second); s.answers <- struct{}{} }()
		if d, err := s.after(t.Context()); !errors.Is(err, ErrStillLost) || d != time.Second+vigilEvery+stillWait {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
	test("the guest is stopped when there is no answer", func(t *testing.T, s *watched) {
		go func() { time.Sleep(time.Minute); close(s.still) }()
		if d, err := s.after(t.Context()); !errors.Is(err, ErrStillLost) || d != time.Minute+stillWait {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
	test("the question does not leave", func(t *testing.T, s *watched) {
		close(s.still)
		s.ask = func() <-chan error { return make(chan error) }
		go func() { time.Sleep(time.Second); close(s.end) }()
		if d, err := s.after(t.Context()); !errors.Is(err, ErrStillLost) || d != stillWait {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
	test("the question leaves after the end", func(t *testing.T, s *watched) {
		sent := make(chan error)
		s.ask = func() <-chan error { return sent }
		go func() { time.Sleep(time.Second); close(s.end); time.Sleep(time.Second); sent <- nil }()
		if d, err := s.after(t.Context()); err != nil || d != 2*time.Second {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
	test("the session ends", func(t *testing.T, s *watched) {
		gone := errors.New("gone")
		s.ask = func() <-chan error {
			c := make(chan error, 1)
			c <- gone
			return c
		}
		if d, err := s.after(t.Context()); !errors.Is(err, gone) || errors.Is(err, ErrStillLost) || d != 0 {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
	test("the move ends", func(t *testing.T, s *watched) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if d, err := s.after(ctx); err != nil || d != time.Second {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
}

// Time in which the destination does not answer doesn't count.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vigil{}
		ctx, end := context.WithCancelCause(t.Context())
		began := time.Now()
		go func() {
			time.Sleep(10*time.Second + time.Millisecond)
			v.note(true)
			time.Sleep(time.Hour)
			v.note(false)
		}()
		v.patience(ctx, 45*time.Second, end)
		if d := time.Since(began); !errors.Is(context.Cause(ctx), errSlow) || d < time.Hour+45*time.Second || d > time.Hour+46*time.Second {
			t.Errorf("ends after %v: %v", d, context.Cause(ctx))
		}
		ctx, end = context.WithCancelCause(t.Context())
		end(nil)
		v.patience(ctx, 45*time.Second, end)
		if !errors.Is(context.Cause(ctx), context.Canceled) {
			t.Errorf("given up: %v", context.Cause(ctx))
		}
	})
}
