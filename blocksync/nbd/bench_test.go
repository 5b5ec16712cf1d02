package nbd

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// benchmark runs op from 16 goroutines, as QEMU's mirror keeps 16 requests in flight.
func benchmark(b *testing.B, op func(c *Client, p []byte, off int64) error) {
	const size = 1 << 30
	for _, length := range []int{4 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dK", length>>10), func(b *testing.B) {
			_, path := serve(b, map[string]Export{"disk": {Device: nullDevice{size: size}}})
			c := connect(b, path, "disk")
			b.SetBytes(int64(length))
			b.ReportAllocs()
			b.ResetTimer()
			var next atomic.Int64
			var workers sync.WaitGroup
			for range 16 {
				workers.Go(func() {
					p := make([]byte, length)
					for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
						if err := op(c, p, n*int64(length)%size); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			workers.Wait()
		})
	}
}

func BenchmarkServerWrites(b *testing.B) {
	benchmark(b, func(c *Client, p []byte, off int64) error { return c.WriteAt(ctxb, p, off, false) })
}

func BenchmarkClientReads(b *testing.B) {
	benchmark(b, func(c *Client, p []byte, off int64) error { return c.ReadAt(ctxb, p, off) })
}
