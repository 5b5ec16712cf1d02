package hypervisor

import (
	"context"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// JobStats is libvirt's account of a domain's migration. Sizes are bytes, rates
// per second. A field that libvirt did not report is zero.
type JobStats struct {
	Active bool // a job is under way; from BeginOut to Confirm that is the migration

	Elapsed  time.Duration
	Setup    time.Duration
	Downtime time.Duration // expected, or at the destination after Finish as libvirt measured it

	DiskTotal, DiskProcessed, DiskRemaining       uint64 // the mirrors; frozen once memory started
	MemoryTotal, MemoryProcessed, MemoryRemaining uint64
	MemoryBandwidth                               uint64 // bytes per second
	ConstantPages, NormalPages                    uint64
	DirtyPages                                    uint64 // dirtied per second
	Iteration                                     uint64
	PageSize                                      uint64
	PostcopyRequests                              uint64
	Throttle                                      int // percent of CPU time taken from the guest
}

// JobStats reports the domain's job under way. Between Perform and Confirm it
// holds the figures with which Perform ended.
func (h *Host) JobStats(ctx context.Context, uuid string) (JobStats, error) {
	return h.jobStats(ctx, uuid, 0)
}

// CompletedJobStats reports the domain's last completed job: at the destination
// the migration, after Finish. The source keeps none.
func (h *Host) CompletedJobStats(ctx context.Context, uuid string) (JobStats, error) {
	return h.jobStats(ctx, uuid, libvirt.DomainJobStatsCompleted|libvirt.DomainJobStatsKeepCompleted)
}

func (h *Host) jobStats(ctx context.Context, uuid string, flags libvirt.DomainGetJobStatsFlags) (JobStats, error) {
	var stats JobStats
	err := h.onDomain(ctx, "job statistics", uuid, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		kind, params, err := l.DomainGetJobStats(d, flags)
		if err == nil {
			stats = readJobStats(libvirt.DomainJobType(kind), params)
		}
		return err
	})
	return stats, err
}

func readJobStats(kind libvirt.DomainJobType, params []libvirt.TypedParam) JobStats {
	s := JobStats{Active: kind == libvirt.DomainJobBounded || kind == libvirt.DomainJobUnbounded}
	counts := map[string]*uint64{
		libvirt.DomainJobDiskTotal:          &s.DiskTotal,
		libvirt.DomainJobDiskProcessed:      &s.DiskProcessed,
		libvirt.DomainJobDiskRemaining:      &s.DiskRemaining,
		libvirt.DomainJobMemoryTotal:        &s.MemoryTotal,
		libvirt.DomainJobMemoryProcessed:    &s.MemoryProcessed,
		libvirt.DomainJobMemoryRemaining:    &s.MemoryRemaining,
		libvirt.DomainJobMemoryBps:          &s.MemoryBandwidth,
		libvirt.DomainJobMemoryConstant:     &s.ConstantPages,
		libvirt.DomainJobMemoryNormal:       &s.NormalPages,
		libvirt.DomainJobMemoryDirtyRate:    &s.DirtyPages,
		libvirt.DomainJobMemoryIteration:    &s.Iteration,
		libvirt.DomainJobMemoryPageSize:     &s.PageSize,
		libvirt.DomainJobMemoryPostcopyReqs: &s.PostcopyRequests,
	}
	times := map[string]*time.Duration{
		libvirt.DomainJobTimeElapsed: &s.Elapsed,
		libvirt.DomainJobSetupTime:   &s.Setup,
		libvirt.DomainJobDowntime:    &s.Downtime,
	}
	for _, p := range params {
		switch v := p.Value.I.(type) {
		case uint64:
			if c := counts[p.Field]; c != nil {
				*c = v
			}
			if t := times[p.Field]; t != nil && v <= uint64(1<<40) {
				*t = time.Duration(v) * time.Millisecond
			}
		case int32:
			if p.Field == libvirt.DomainJobAutoConvergeThrottle {
				s.Throttle = int(v)
			}
		}
	}
	return s
}
