package tunnel

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
)

const wantedBuffer = 7 << 20 // what quic-go asks the kernel for

// silenceBufferWarning turns off quic-go's own line about socket buffers, which
// goes to the standard logger; reportBuffers says it with the remedy.
var silenceBufferWarning = sync.OnceFunc(func() {
	os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "1")
})

// reportBuffers logs one line when the kernel granted less than want bytes of
// socket buffer: at high rates packets are then lost on this host.
func reportBuffers(socket *net.UDPConn, want int, log *slog.Logger) {
	raw, err := socket.SyscallConn()
	if err != nil {
		log.Debug("socket buffers unknown", "error", err)
		return
	}
	var receive, send int
	var receiveErr, sendErr error
	controlErr := raw.Control(func(fd uintptr) {
		receive, receiveErr = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF)
		send, sendErr = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF)
	})
	if err := errors.Join(controlErr, receiveErr, sendErr); err != nil {
		log.Debug("socket buffers unknown", "error", err)
		return
	}
	if receive < want || send < want {
		log.Warn("small UDP buffers: fast transfers will lose packets on this host",
			"receive", receive, "send", send, "wanted", want,
			"remedy", "sysctl -w net.core.rmem_max=7500000 net.core.wmem_max=7500000")
	}
}
