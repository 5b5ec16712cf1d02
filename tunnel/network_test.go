package tunnel

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestNetworkChangesAreCollected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &networkWatch{}
		one, stopOne := w.listen()
		two, stopTwo := w.listen()
		defer stopTwo()
		events := make(chan error)
		done := make(chan error)
		go func() { done <- w.follow(func() error { return <-events }) }()

		began := time.Now()
		for range 5 { // one address, say
			events <- nil
			time.Sleep(networkSettle / 10)
		}
		<-one
		<-two
		if took := time.Since(began); took != networkSettle {
			t.Errorf("told after %v", took)
		}
		time.Sleep(10 * networkSettle)
		if len(one)+len(two) != 0 {
			t.Error("told more than once")
		}
		events <- syscall.ENOBUFS
		stopOne()
		<-two
		if len(one) != 0 {
			t.Error("told one who has stopped to listen")
		}
		for range 3 { // nobody takes it
			events <- nil
			time.Sleep(2 * networkSettle)
		}
		if len(two) != 1 {
			t.Errorf("%d changes wait", len(two))
		}
		broken := errors.New("broken")
		events <- broken
		if err := <-done; !errors.Is(err, broken) {
			t.Errorf("it ends with %v", err)
		}
	})
}

func TestNetworkWatchEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	book := &logBook{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		new(networkWatch).watch(ctx, book.logger())
	}()
	cancel()
	<-done
	if book.String() != "" {
		t.Errorf("it logs %s", book)
	}
}
