package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/lab"
)

func clientCommand(dir *string) *cobra.Command {
	var o clientOptions
	var address, download string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "client NAME",
		Short: "Be a client of a guest, and tell what its connections went through",
		Long: `client keeps connections to a guest until it is interrupted, for --for, or until
all have ended, and then prints a line for each: what was sent, what came back,
what of it was wrong, and the longest time without anything. It fails if a
connection broke or anything was wrong.`,
		Example: `  wanlab client web --stream 10ms --udp 10ms --for 30s
  wanlab client web --from remote-dc --download 512,2MiB/s
  wanlab client web --address fe80::5054:ff:fe12:3456%eth0 --ssh`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.parse(address, download); err != nil {
				return err
			}
			l, err := lab.Open(*dir)
			if err != nil {
				return err
			}
			vm, err := l.VM(args[0])
			if err != nil {
				return err
			}
			results, err := runClient(cmd.Context(), vm, o)
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), results); err != nil {
					return err
				}
				return judge(results)
			}
			for _, name := range slices.Sorted(maps.Keys(results)) {
				fmt.Fprintf(cmd.OutOrStdout(), "%-10s%v\n", name, results[name])
			}
			return judge(results)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.from, "from", lab.Users, "site of the client")
	f.StringVar(&address, "address", "", "address of the guest (default: the IPv4 address that it was made with)")
	f.DurationVar(&o.stream, "stream", 0, "send a numbered record over one TCP connection at each interval, such as 10ms")
	f.DurationVar(&o.udp, "udp", 0, "send a numbered UDP echo at each interval")
	f.StringVar(&download, "download", "", "download this many MiB, and at most so fast, such as 512 or 512,2MiB/s")
	f.BoolVar(&o.ssh, "ssh", false, "run an ssh session (needs a guest made with --ssh)")
	f.DurationVar(&o.duration, "for", 0, "end after this time (default: when interrupted)")
	f.BoolVar(&asJSON, "json", false, "print all that was seen as JSON")
	return cmd
}

// clientOptions say which flows to keep. Their zero values keep none.
type clientOptions struct {
	from        string
	address     netip.Addr
	stream, udp time.Duration
	download    *lab.DownloadOptions
	ssh         bool
	duration    time.Duration
}

func (o *clientOptions) parse(address, download string) error {
	if address != "" {
		var err error
		if o.address, err = netip.ParseAddr(address); err != nil {
			return fmt.Errorf("--address: %w", err)
		}
	}
	if download != "" {
		d, err := parseDownload(download)
		if err != nil {
			return fmt.Errorf("--download: %w", err)
		}
		o.download = &d
	}
	if o.stream == 0 && o.udp == 0 && o.download == nil && !o.ssh {
		return errors.New("nothing to do: want --stream, --udp, --download or --ssh")
	}
	if o.duration < 0 {
		return fmt.Errorf("--for %v: want a duration from now", o.duration)
	}
	return nil
}

// parseDownload reads MIB[,RATE].
func parseDownload(s string) (lab.DownloadOptions, error) {
	mib, limit, limited := strings.Cut(s, ",")
	n, err := strconv.ParseInt(mib, 10, 64)
	if err != nil {
		return lab.DownloadOptions{}, fmt.Errorf("%q: want a number of MiB, such as 512, and perhaps a rate, such as 512,2MiB/s", s)
	}
	o := lab.DownloadOptions{MiB: n}
	if limited {
		if o.Limit, err = lab.ParseSize(strings.TrimSuffix(limit, "/s")); err != nil {
			return lab.DownloadOptions{}, err
		}
	}
	return o, nil
}

// result is what a flow saw, in words, and whether all was well.
type result interface {
	String() string
	Err() error
}

// flow is a flow of any kind that was started.
type flow struct {
	name string
	done <-chan struct{}
	stop func() result
}

// started makes a flow of what a VM has started.
func started[R result, F interface {
	Done() <-chan struct{}
	Stop() R
}](f F, err error) (flow, error) {
	if err != nil {
		return flow{}, err
	}
	return flow{done: f.Done(), stop: func() result { return f.Stop() }}, nil
}

// runClient keeps the flows until ctx or their time is over, or all have ended, and returns what each saw by its name. A flow
// that cannot be started is an error.
func runClient(ctx context.Context, vm *lab.VM, o clientOptions) (map[string]result, error) {
	to := o.address
	if !to.IsValid() {
		to = vm.Address
	}
	results := map[string]result{}
	var flows []flow
	defer func() {
		// All at once, so that they see the same time.
		var mu sync.Mutex
		var all sync.WaitGroup
		for _, f := range flows {
			all.Go(func() {
				r := f.stop()
				mu.Lock()
				defer mu.Unlock()
				results[f.name] = r
			})
		}
		all.Wait()
	}()
	for _, kind := range []struct {
		name   string
		wanted bool
		start  func() (flow, error)
	}{
		// First: a busy guest takes long for its key exchange.
		{"ssh", o.ssh, func() (flow, error) { return started(vm.StartSSH(ctx, o.from, to)) }},
		{"stream", o.stream != 0, func() (flow, error) { return started(vm.StartStream(ctx, o.from, to, o.stream)) }},
		{"udp", o.udp != 0, func() (flow, error) { return started(vm.StartUDP(ctx, o.from, to, o.udp)) }},
		{"download", o.download != nil, func() (flow, error) { return started(vm.StartDownload(ctx, o.from, to, *o.download)) }},
	} {
		if !kind.wanted {
			continue
		}
		f, err := kind.start()
		if err != nil {
			return nil, err
		}
		f.name = kind.name
		flows = append(flows, f)
	}
	over := ctx
	if o.duration > 0 {
		var cancel context.CancelFunc
		over, cancel = context.WithTimeout(ctx, o.duration)
		defer cancel()
	}
	for _, f := range flows {
		select {
		case <-f.done:
		case <-over.Done():
		}
	}
	return results, nil
}

// judge is nil if all flows are well.
func judge(results map[string]result) error {
	var wrong []string
	for _, name := range slices.Sorted(maps.Keys(results)) {
		if err := results[name].Err(); err != nil {
			wrong = append(wrong, name+": "+err.Error())
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	return errors.New(strings.Join(wrong, "; "))
}
