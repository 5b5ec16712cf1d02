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
	end     chan struct{}
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
	err := vigil(ctx, s.end, s.question, s.answers)
	return time.Since(began), err
}

func TestVigil(t *testing.T) {
	test := func(name string, f func(*testing.T, *watched)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f(t, &watched{answers: make(chan struct{}, 1), end: make(chan struct{})})
			})
		})
	}
	test("answered until the end", func(t *testing.T, s *watched) {
		go func() {
			for range 100 {
				time.Sleep(50 * time.Millisecond)
				s.answers <- struct{}{}
				time.Sleep(vigilEvery)
			}
			close(s.end)
		}()
		if d, err := s.after(t.Context()); err != nil || d < 100*time.Second || s.asked < 100 {
			t.Errorf("ends after %v and %d questions: %v", d, s.asked, err)
		}
	})
	test("no answer", func(t *testing.T, s *watched) {
		go func() { time.Sleep(time.Second); s.answers <- struct{}{} }()
		if d, err := s.after(t.Context()); !errors.Is(err, ErrStillLost) || d != time.Second+vigilEvery+silence {
			t.Errorf("ends after %v: %v", d, err)
		}
	})
	test("the question does not leave", func(t *testing.T, s *watched) {
		s.ask = func() <-chan error { return make(chan error) }
		go func() { time.Sleep(time.Second); close(s.end) }()
		if d, err := s.after(t.Context()); !errors.Is(err, ErrStillLost) || d != silence {
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
