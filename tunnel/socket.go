package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/quic-go/quic-go"
)

// portTries is how often a UDP port that the kernel chose is given up because
// TCP has none of that number.
const portTries = 32

// listenBoth opens addr for UDP and TCP, at the same port.
func listenBoth(addr string, log *slog.Logger) (socket *net.UDPConn, tcp net.Listener, err error) {
	local, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, nil, err
	}
	for range portTries {
		socket, tcp, err = listenAt(local, log)
		if err == nil || local.Port != 0 || !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return socket, tcp, err
}

func listenAt(local *net.UDPAddr, log *slog.Logger) (*net.UDPConn, net.Listener, error) {
	family := ""
	if local.IP.To4() != nil { // else 0.0.0.0 would listen on IPv6 too
		family = "4"
	}
	socket, err := net.ListenUDP("udp"+family, local)
	if err != nil {
		return nil, nil, err
	}
	config := net.ListenConfig{
		KeepAliveConfig: tcpKeepAlive,
		Control: func(_, _ string, raw syscall.RawConn) error {
			return tuneTCP(raw, false, log)
		},
	}
	config.SetMultipathTCP(false) // its sockets lack options and counters
	both := *local
	both.Port = socket.LocalAddr().(*net.UDPAddr).Port
	tcp, err := config.Listen(context.Background(), "tcp"+family, both.String())
	if err != nil {
		socket.Close()
		return nil, nil, err
	}
	return socket, tcp, nil
}

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
