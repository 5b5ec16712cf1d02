package tunnel

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/quic-go/quic-go"
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

// localAddr returns the address from which the host sends on a connection, with
// the port of its socket; of a socket bound to the wildcard, the one that the
// kernel's routes choose now.
func localAddr(conn *quic.Conn) net.Addr {
	local, ok := conn.LocalAddr().(*net.UDPAddr)
	if !ok || !local.IP.IsUnspecified() {
		return conn.LocalAddr()
	}
	throwaway, err := net.Dial("udp", conn.RemoteAddr().String()) // sends nothing
	if err != nil {
		return local
	}
	defer throwaway.Close()
	chosen := throwaway.LocalAddr().(*net.UDPAddr)
	return &net.UDPAddr{IP: chosen.IP, Zone: chosen.Zone, Port: local.Port}
}
