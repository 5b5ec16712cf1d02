package nbd

import (
	"math/bits"
	"sync"
)

const (
	smallestBuffer = 12 // log2: 4 KiB
	largestBuffer  = 25 // log2: maxData
)

// buffers holds buffers between requests, one pool for each power of two.
var buffers [largestBuffer - smallestBuffer + 1]sync.Pool

func bufferClass(n int) int {
	return max(bits.Len(uint(n-1)), smallestBuffer) - smallestBuffer
}

// getBuffer gives a buffer of n bytes, 1 to maxData, with arbitrary content.
func getBuffer(n int) *[]byte {
	class := bufferClass(n)
	b, ok := buffers[class].Get().(*[]byte)
	if !ok {
		fresh := make([]byte, 1<<(class+smallestBuffer))
		b = &fresh
	}
	*b = (*b)[:n]
	return b
}

func putBuffer(b *[]byte) {
	buffers[bufferClass(cap(*b))].Put(b)
}
