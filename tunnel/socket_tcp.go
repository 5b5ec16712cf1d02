package tunnel

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// congestionControl keeps its rate where single packets are lost.
	congestionControl = "bbr"
	// unsentLimit is how much of what was written the kernel may hold before it
	// sends it: more would only delay what becomes urgent later.
	unsentLimit = 64 << 10
	// narrowSegment fits the smallest packet of IPv6, 1280 bytes, with its
	// header of 40, TCP's of 20, and 40 for options.
	narrowSegment = 1180
)

// tcpKeepAlive keeps NATs open. How long silence is endured is TCP_USER_TIMEOUT's.
var tcpKeepAlive = net.KeepAliveConfig{Enable: true, Idle: KeepAlive, Interval: KeepAlive, Count: int(IdleTimeout / KeepAlive)}

// tuneTCP sets the options of a socket before it connects, or of one that
// listens, whose connections inherit them. TCP_NODELAY and keep-alive are set
// by package net.
func tuneTCP(raw syscall.RawConn, narrow bool, log *slog.Logger) error {
	var congestion, others error
	err := raw.Control(func(fd uintptr) {
		s := int(fd)
		congestion = unix.SetsockoptString(s, unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestionControl)
		others = errors.Join(
			unix.SetsockoptInt(s, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentLimit),
			unix.SetsockoptInt(s, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(IdleTimeout/time.Millisecond)),
		)
		if narrow {
			others = errors.Join(others, unix.SetsockoptInt(s, unix.IPPROTO_TCP, unix.TCP_MAXSEG, narrowSegment))
		}
	})
	if congestion != nil {
		log.Debug("this kernel's default congestion control is used for TCP", "wanted", congestionControl, "error", congestion)
	}
	if err := errors.Join(err, others); err != nil {
		return fmt.Errorf("set socket options: %w", err)
	}
	return nil
}

func tcpInfo(raw *net.TCPConn) (*unix.TCPInfo, error) {
	socket, err := raw.SyscallConn()
	if err != nil {
		return nil, err
	}
	var info *unix.TCPInfo
	var infoErr error
	err = socket.Control(func(fd uintptr) {
		info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	return info, errors.Join(err, infoErr)
}

// tcpStats asks the kernel. Of what the peer sent twice it knows the packets
// only, so received lacks their contents.
func tcpStats(raw *net.TCPConn) (connStats, error) {
	info, err := tcpInfo(raw)
	if err != nil {
		return connStats{}, err
	}
	header := headerIP(raw.RemoteAddr()) + headerTCP
	if info.Options&1 != 0 { // TCPI_OPT_TIMESTAMPS of linux/tcp.h
		header += headerTimestamps
	}
	rtt := time.Duration(info.Rtt) * time.Microsecond
	return connStats{
		sent:        info.Bytes_sent + uint64(info.Segs_out)*header,
		received:    info.Bytes_received + uint64(info.Segs_in)*header,
		packetsLost: uint64(info.Total_retrans),
		rtt:         rtt,
		latestRTT:   rtt,
		minRTT:      time.Duration(info.Min_rtt) * time.Microsecond,
	}, nil
}
