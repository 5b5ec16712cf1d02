package tunnel

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlogwriter"
)

const (
	// QlogSize is how large a qlog file becomes at most; it lacks then what comes
	// later.
	QlogSize = 64 << 20
	// QlogFiles is how many qlog files a folder may hold: with as many there, no
	// further connection gets one.
	QlogFiles = 64
)

// qlogFolder takes what QUIC connections did, as draft-ietf-quic-qlog has it, in
// files for qvis and the like.
type qlogFolder struct {
	path string
}

// openQlogFolder makes the folder if need be. Without a path it returns nil.
func openQlogFolder(path string) (*qlogFolder, error) {
	if path == "" {
		return nil, nil
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("qlog: %w", err)
	}
	return &qlogFolder{path}, nil
}

// traceQUIC is a quic.Config's Tracer: nil means none for this connection.
func (e *Endpoint) traceQUIC(_ context.Context, dialled bool, id quic.ConnectionID) qlogwriter.Trace {
	if e.qlog == nil {
		return nil
	}
	w, err := e.qlog.create(dialled, id)
	if err != nil {
		e.log.Warn("a connection gets no qlog file", "error", err)
		return nil
	}
	trace := qlogwriter.NewConnectionFileSeq(w, dialled, id)
	if err := e.run(trace.Run); err != nil {
		w.Close()
		return nil
	}
	return trace
}

func (q *qlogFolder) create(dialled bool, id quic.ConnectionID) (io.WriteCloser, error) {
	there, err := filepath.Glob(filepath.Join(q.path, "*.sqlog"))
	if err != nil {
		return nil, err
	}
	if len(there) >= QlogFiles {
		return nil, fmt.Errorf("%s holds %d files: remove some", q.path, len(there))
	}
	side := "accepted"
	if dialled {
		side = "dialled"
	}
	f, err := os.OpenFile(filepath.Join(q.path, id.String()+"-"+side+".sqlog"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &qlogFile{file: f, buffer: bufio.NewWriter(f), left: QlogSize}, nil
}

// qlogFile stops growing at its limit.
type qlogFile struct {
	file   *os.File
	buffer *bufio.Writer
	left   int
}

func (q *qlogFile) Write(b []byte) (int, error) {
	if len(b) > q.left {
		q.left = 0
	}
	if q.left == 0 {
		return len(b), nil
	}
	q.left -= len(b)
	return q.buffer.Write(b)
}

func (q *qlogFile) Close() error {
	if err := q.buffer.Flush(); err != nil {
		q.file.Close()
		return err
	}
	return q.file.Close()
}
