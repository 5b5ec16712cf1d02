package main

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wanmig/wanmig/lab/guest/api"
)

// guest is everything that the requests are about.
type guest struct {
	name   string
	bootID string
	seed   uint64
	load   *load
	pauses *pauses
	echo   *echo
	off    func() // powers off; does not return

	verifying sync.Mutex
}

func (g *guest) report() api.Report {
	r := api.Report{
		Name:     g.name,
		BootID:   g.bootID,
		UptimeMS: monotonic().Milliseconds(),
		Load:     g.load.get(),
		Memory:   g.load.memory.report(),
		Pause:    g.pauses.report(),
		Echo:     g.echo.report(),
		Disks:    []api.DiskReport{},
	}
	for _, d := range g.load.disks {
		r.Disks = append(r.Disks, d.report())
	}
	return r
}

func (g *guest) serve(l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /report", func(w http.ResponseWriter, r *http.Request) { answer(w, g.report()) })
	mux.HandleFunc("GET /file", g.file)
	mux.HandleFunc("POST /load", g.setLoad)
	mux.HandleFunc("POST /verify", func(w http.ResponseWriter, r *http.Request) { answer(w, g.verify()) })
	mux.HandleFunc("POST /sync", func(w http.ResponseWriter, r *http.Request) { unix.Sync(); answer(w, g.report()) })
	mux.HandleFunc("POST /poweroff", func(w http.ResponseWriter, r *http.Request) {
		answer(w, g.report())
		http.NewResponseController(w).Flush()
		time.AfterFunc(50*time.Millisecond, g.off)
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 10 * time.Minute, MaxHeaderBytes: 16 << 10}
	return s.Serve(l)
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.Encode(v)
}

// verify checks everything the guest knows, one pass at a time.
func (g *guest) verify() api.Verification {
	g.verifying.Lock()
	defer g.verifying.Unlock()
	var v api.Verification
	v.Pages, v.BadPages = g.load.memory.verifyAll()
	for _, d := range g.load.disks {
		blocks, bad := d.verifyBlocks()
		v.Blocks += blocks
		v.BadBlocks += bad
		files, bad := d.verifyFiles()
		v.Files += files
		v.BadFiles += bad
	}
	v.Report = g.report()
	return v
}

func (g *guest) setLoad(w http.ResponseWriter, r *http.Request) {
	want, err := parseLoad(g.load.get(), r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	g.load.set(want)
	answer(w, g.report())
}

// parseLoad changes l as the query asks.
func parseLoad(l api.Load, query url.Values) (api.Load, error) {
	for key, values := range query {
		n, err := api.ParseSize(values[len(values)-1])
		if err != nil {
			return l, fmt.Errorf("%s: %w", key, err)
		}
		switch key {
		case "dirty":
			l.Dirty = n
		case "edit":
			l.Edit = n
		case "write":
			l.Write = n
		case "working-set":
			l.WorkingSet = n
		default:
			return l, fmt.Errorf("unknown parameter %q: want dirty, edit, write or working-set", key)
		}
	}
	return l, nil
}

// file sends a file of cells, the same for the same length.
func (g *guest) file(w http.ResponseWriter, r *http.Request) {
	mib, err := strconv.ParseInt(r.URL.Query().Get("mib"), 10, 64)
	if err != nil || mib < 1 || mib > api.MaxFileMiB {
		http.Error(w, fmt.Sprintf("mib: want a number from 1 to %d", api.MaxFileMiB), http.StatusBadRequest)
		return
	}
	w.Header().Set("Trailer", api.ChecksumTrailer)
	w.Header().Set("Content-Type", "application/octet-stream")
	crc := crc32.New(castagnoli)
	if err := writeFile(io.MultiWriter(w, crc), g.seed, mib); err != nil {
		return // the client has gone
	}
	w.Header().Set(api.ChecksumTrailer, fmt.Sprintf("%08x", crc.Sum32()))
}

func writeFile(w io.Writer, seed uint64, mib int64) error {
	block := make([]byte, api.BlockSize)
	for i := range uint64(mib << 20 / api.BlockSize) {
		api.Cell{Kind: api.FileCell, Index: i, Seed: seed}.Fill(api.Words(block))
		if _, err := w.Write(block); err != nil {
			return err
		}
	}
	return nil
}
