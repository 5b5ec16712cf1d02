package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/wanmig/wanmig/hypervisor"
	"github.com/wanmig/wanmig/migrate"
	"github.com/wanmig/wanmig/netredirect"
	"github.com/wanmig/wanmig/tunnel"
)

// maxBody bounds a request of the command.
const maxBody = 1 << 20

// routes is the local API; api.go lists it.
func (a *agent) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/agent", a.getAgent)
	mux.HandleFunc("GET /v1/sites", a.getSites)
	mux.HandleFunc("PUT /v1/sites/{name}", a.putSite)
	mux.HandleFunc("DELETE /v1/sites/{name}", a.deleteSite)
	mux.HandleFunc("GET /v1/sites/{name}/check", a.checkSite)
	mux.HandleFunc("POST /v1/moves", a.postMove)
	mux.HandleFunc("GET /v1/moves", a.getMoves)
	mux.HandleFunc("GET /v1/moves/{id}", a.getMove)
	mux.HandleFunc("GET /v1/moves/{id}/watch", a.watchMove)
	mux.HandleFunc("POST /v1/moves/{id}/cancel", a.cancelMove)
	mux.HandleFunc("POST /v1/moves/{id}/recover", a.recoverMove)
	mux.HandleFunc("POST /v1/moves/{id}/rollback", a.rollbackMove)
	mux.HandleFunc("GET /v1/moves/{id}/copy", a.getCopy)
	mux.HandleFunc("POST /v1/moves/{id}/copy/start", a.startCopy)
	mux.HandleFunc("PUT /v1/moves/{id}/limit", a.limitMove)
	mux.HandleFunc("GET /v1/redirects", a.getRedirects)
	mux.HandleFunc("GET /v1/redirects/{move}", a.getRedirect)
	mux.HandleFunc("POST /v1/redirects/{move}/drain", a.drainRedirect)
	mux.HandleFunc("POST /v1/redirects/{move}/cut", a.cutRedirect)
	mux.HandleFunc("GET /v1/copies", a.getCopies)
	mux.HandleFunc("DELETE /v1/copies/{vm}", a.removeCopies)
	mux.HandleFunc("GET /v1/seeds", a.getSeeds)
	mux.HandleFunc("POST /v1/seeds/scan", a.scanSeeds)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, http.StatusNotFound, fmt.Errorf("%s %s is not in this agent's API (version %s): update the older of command and agent", r.Method, r.URL.Path, Version))
	})
	return mux
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the command is gone: nobody to tell
}

func fail(w http.ResponseWriter, status int, err error) {
	reply(w, status, map[string]string{"error": err.Error()})
}

// receive decodes a request's body.
func receive(w http.ResponseWriter, r *http.Request, into any) bool {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		fail(w, http.StatusBadRequest, fmt.Errorf("request: %w", err))
		return false
	}
	return true
}

func (a *agent) getAgent(w http.ResponseWriter, r *http.Request) {
	info := Info{ID: string(a.identity.ID()), Site: a.config.Site, Version: Version, Listen: a.endpoint.Addr().String()}
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if host, err := a.host.Info(ctx); err != nil {
		info.Problem = err.Error()
	} else {
		info.Libvirt, info.QEMU = host.LibvirtVersion, host.QEMUVersion
	}
	reply(w, http.StatusOK, info)
}

func (a *agent) getSites(w http.ResponseWriter, _ *http.Request) {
	list := a.sites.all()
	if list == nil {
		list = []Site{}
	}
	reply(w, http.StatusOK, list)
}

func (a *agent) putSite(w http.ResponseWriter, r *http.Request) {
	var site Site
	if !receive(w, r, &site) {
		return
	}
	if site.Name != r.PathValue("name") {
		fail(w, http.StatusBadRequest, fmt.Errorf("the site's name differs from the path's"))
		return
	}
	if err := a.sites.put(site, a.identity.ID()); err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	a.log.Info("site added", "site", site.Name, "address", site.Address, "id", site.ID)
	w.WriteHeader(http.StatusNoContent)
}

func (a *agent) deleteSite(w http.ResponseWriter, r *http.Request) {
	if err := a.sites.remove(r.PathValue("name")); err != nil {
		fail(w, statusOf(err), err)
		return
	}
	a.log.Info("site removed", "site", r.PathValue("name"))
	w.WriteHeader(http.StatusNoContent)
}

func (a *agent) checkSite(w http.ResponseWriter, r *http.Request) {
	site, err := a.sites.get(r.PathValue("name"))
	if err != nil {
		fail(w, statusOf(err), err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 45*time.Second)
	defer cancel()
	c := SiteCheck{Site: site.Name, Address: site.Address, ID: site.ID}
	transports := []tunnel.Transport{tunnel.QUIC, tunnel.TCP}
	if t := site.transport(); t != tunnel.Auto {
		transports = []tunnel.Transport{t}
	}
	probe, err := a.engine.Probe(ctx, site.Name, transports)
	c.Carriers = probe.Carriers
	if err != nil {
		c.Findings = append(c.Findings, migrate.Finding{Check: "reachable", Problem: err.Error(), Remedy: reachRemedy(err), Fatal: true})
		reply(w, http.StatusOK, c)
		return
	}
	c.Reachable, c.PeerSite, c.Version, c.Libvirt, c.QEMU = true, probe.Site, probe.Version, probe.Libvirt, probe.QEMU
	c.RTTMS = float64(probe.RTT.Microseconds()) / 1000
	c.ClockOffsetMS = float64(probe.ClockOffset.Microseconds()) / 1000
	c.Findings = append(c.Findings, probe.Findings...)
	reply(w, http.StatusOK, c)
}

func reachRemedy(err error) string {
	if errors.Is(err, tunnel.ErrUntrusted) {
		return "compare wanmig id at both sites with wanmig site list at the other"
	}
	return "check that the agent runs there and that UDP or TCP passes to its port"
}

func (a *agent) postMove(w http.ResponseWriter, r *http.Request) {
	var req migrate.Request
	if !receive(w, r, &req) {
		return
	}
	if err := req.Validate(); err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	if _, err := a.sites.get(req.To); err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	m, err := a.engine.Start(a.ctx, req)
	if err != nil {
		status := http.StatusConflict
		if errors.Is(err, hypervisor.ErrNoDomain) {
			status = http.StatusNotFound
		}
		fail(w, status, err)
		return
	}
	reply(w, http.StatusCreated, m.Status())
}

func (a *agent) getMoves(w http.ResponseWriter, _ *http.Request) {
	list := []migrate.Status{}
	for _, m := range a.engine.Moves() {
		list = append(list, m.Status())
	}
	reply(w, http.StatusOK, list)
}

// move finds the move of a path, or answers that there is none.
func (a *agent) move(w http.ResponseWriter, r *http.Request) (*migrate.Move, bool) {
	m, ok := a.engine.Move(r.PathValue("id"))
	if !ok {
		fail(w, http.StatusNotFound, fmt.Errorf("no move %q here: wanmig list shows them", r.PathValue("id")))
	}
	return m, ok
}

func (a *agent) getMove(w http.ResponseWriter, r *http.Request) {
	if m, ok := a.move(w, r); ok {
		reply(w, http.StatusOK, m.Status())
	}
}

// watchMove writes the status now and at each change, until the move is over.
// A slow reader misses states in between, never the last one.
func (a *agent) watchMove(w http.ResponseWriter, r *http.Request) {
	m, ok := a.move(w, r)
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	flush := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	for {
		s, changed := m.Changed()
		if err := enc.Encode(s); err != nil {
			return
		}
		if err := flush.Flush(); err != nil {
			return
		}
		if s.Result != nil && (s.Phase.Final() || s.Phase == migrate.PhaseInDoubt) {
			return
		}
		select {
		case <-m.Done():
			if last, _ := m.Changed(); last.Ended == s.Ended {
				return
			}
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func (a *agent) cancelMove(w http.ResponseWriter, r *http.Request) {
	m, ok := a.move(w, r)
	if !ok {
		return
	}
	if s := m.Status(); s.Phase.Final() {
		err := fmt.Errorf("move %s is over: %s", s.Move, s.Phase)
		if s.Result != nil && s.Result.Next != "" {
			err = fmt.Errorf("%w; it is tried again as %s", err, s.Result.Next)
		}
		fail(w, http.StatusConflict, err)
		return
	}
	if s := m.Status(); s.Phase == migrate.PhaseInDoubt {
		fail(w, http.StatusConflict, fmt.Errorf("move %s is in doubt, and can't be cancelled: wanmig status shows what it waits for, and what decides it", s.Move))
		return
	}
	if err := m.Cancel(migrate.ErrCancelled); err != nil {
		fail(w, http.StatusConflict, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

func (a *agent) recoverMove(w http.ResponseWriter, r *http.Request) {
	var ask Word
	if !receive(w, r, &ask) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), rollbackTimeout)
	defer cancel()
	switch err := a.engine.Resolve(ctx, r.PathValue("id"), ask.Word); {
	case errors.Is(err, migrate.ErrNoMove):
		fail(w, http.StatusNotFound, err)
	case err != nil:
		fail(w, http.StatusConflict, err)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func (a *agent) rollbackMove(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), rollbackTimeout)
	defer cancel()
	move, err := a.engine.Rollback(ctx, r.PathValue("id"))
	if err != nil {
		fail(w, statusOfRollback(err), err)
		return
	}
	reply(w, http.StatusCreated, Rollback{move})
}

func (a *agent) getCopy(w http.ResponseWriter, r *http.Request) {
	since, err := a.engine.CopySince(r.PathValue("id"))
	if err != nil {
		fail(w, statusOfRollback(err), err)
		return
	}
	reply(w, http.StatusOK, LeftCopy{since})
}

func (a *agent) startCopy(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), rollbackTimeout)
	defer cancel()
	if err := a.engine.StartCopy(ctx, r.PathValue("id")); err != nil {
		fail(w, statusOfRollback(err), err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// rollbackTimeout is shorter than the command's patience.
const rollbackTimeout = 55 * time.Second

func statusOfRollback(err error) int {
	switch {
	case errors.Is(err, migrate.ErrNoMove):
		return http.StatusNotFound
	case errors.Is(err, migrate.ErrNotReached):
		return http.StatusBadGateway
	}
	return http.StatusConflict
}

func (a *agent) limitMove(w http.ResponseWriter, r *http.Request) {
	var ask Limit
	if !receive(w, r, &ask) {
		return
	}
	switch err := a.engine.Limit(r.PathValue("id"), ask.Rate); {
	case errors.Is(err, migrate.ErrNoMove):
		fail(w, http.StatusNotFound, err)
	case err != nil:
		fail(w, http.StatusConflict, err)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func (a *agent) getCopies(w http.ResponseWriter, _ *http.Request) {
	list, err := a.engine.Copies()
	if err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	reply(w, http.StatusOK, list)
}

func (a *agent) removeCopies(w http.ResponseWriter, r *http.Request) {
	vm := r.PathValue("vm")
	switch n, err := a.engine.RemoveCopies(r.Context(), vm); {
	case err != nil:
		fail(w, http.StatusInternalServerError, err)
	case n == 0:
		fail(w, http.StatusNotFound, fmt.Errorf("no copies of %q are kept here: wanmig copies shows those that are", vm))
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func (a *agent) getRedirects(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, a.redirects.All())
}

func (a *agent) getRedirect(w http.ResponseWriter, r *http.Request) {
	x, ok := a.redirects.Find(r.PathValue("move"))
	if !ok {
		noRedirect(w, r)
		return
	}
	reply(w, http.StatusOK, x.Status())
}

func noRedirect(w http.ResponseWriter, r *http.Request) {
	fail(w, http.StatusNotFound, fmt.Errorf("no redirect of %q stands here: wanmig redirect list shows those that do", r.PathValue("move")))
}

func (a *agent) drainRedirect(w http.ResponseWriter, r *http.Request) {
	x, ok := a.redirects.Find(r.PathValue("move"))
	if !ok {
		noRedirect(w, r)
		return
	}
	if s := x.Status(); !carrying(s.State) {
		fail(w, http.StatusConflict, fmt.Errorf("no tunnel of %s is there to drain: its redirect is %s", s.Move, s.State))
		return
	}
	x.Drain()
	w.WriteHeader(http.StatusNoContent)
}

func (a *agent) cutRedirect(w http.ResponseWriter, r *http.Request) {
	var ask Cut
	if !receive(w, r, &ask) {
		return
	}
	x, ok := a.redirects.Find(r.PathValue("move"))
	if !ok {
		noRedirect(w, r)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	before := x.Status().State
	if err := x.Cut(ctx, ask.Force); err != nil {
		fail(w, statusOfCut(before, err), err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (a *agent) getSeeds(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, a.seeds.Status())
}

func (a *agent) scanSeeds(w http.ResponseWriter, r *http.Request) {
	a.seeds.Refresh(r.Context())
	w.WriteHeader(http.StatusNoContent)
}

// carrying reports whether a redirect of a state has a tunnel that packets take.
func carrying(s netredirect.State) bool {
	return s == netredirect.Standing || s == netredirect.Draining
}

// statusOfCut is that of an error of Cut, which a redirect of the state gave.
func statusOfCut(before netredirect.State, err error) int {
	_, used := errors.AsType[netredirect.ErrInUse](err)
	if used || !carrying(before) {
		return http.StatusConflict
	}
	return http.StatusBadGateway
}

func statusOf(err error) int {
	if errors.Is(err, errNoSite) {
		return http.StatusNotFound
	}
	return http.StatusInternalServerError
}
