package blocksync

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/wanmig/wanmig/blocksync/nbd"
)

// A mirror that copies a block again for a page of it sends that page.
func TestRecall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1 << 20)
		x := newTransfer(t, d, newBudget(t, 1<<20, 0))
		want := make([]byte, d.Size())
		x.start(t.Context())
		synctest.Wait()
		write := func(what string, p []byte, off int64, sent int64) {
			t.Helper()
			before := x.outbox.Stats().SentData
			copy(want[off:], p)
			mustWrite(t, x.outbox, p, off)
			synctest.Wait()
			if n := x.outbox.Stats().SentData - before; n != sent {
				t.Errorf("%s: %d bytes sent, %d differ", what, n, sent)
			}
		}
		block := noise(1, blockSize)
		write("first", block, 0, blockSize)
		write("again", block, 0, 0)
		copy(block[5*page:], noise(2, page))
		write("a page changed", block, 0, page)
		write("a sector changed", noise(3, sectorSize), 7*page+sectorSize, sectorSize)
		copy(block[7*page+sectorSize:], noise(3, sectorSize))
		write("after a sector", block, 0, page) // which page that is in is not known
		if err := x.outbox.Zero(t.Context(), 0, blockSize, nbd.ZeroFlags{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		write("after zeros", block, 0, blockSize)
		write("at another place", block, blockSize, blockSize) // nothing is offered here
		if err := errors.Join(x.finish(), x.settled()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(d.content, want) {
			t.Error("content differs")
		}
	})
}
