package lab

import (
	"context"
	"strings"
)

// Status is what runs in a lab.
type Status struct {
	Dir        string       `json:"dir"`
	Supervisor int          `json:"supervisor"` // process ID, 0 when the lab does not run
	Link       *LinkState   `json:"link,omitempty"`
	Sites      []SiteStatus `json:"sites,omitempty"`
	Problems   []string     `json:"problems,omitempty"` // what could not be read, and why
}

// SiteStatus is what runs in a site: the users are among them in a lab with services.
type SiteStatus struct {
	Name    string                  `json:"name"`
	Daemons map[string]DaemonStatus `json:"daemons,omitempty"`
	Guests  []Guest                 `json:"guests,omitzero"` // of a data centre
}

// Guest is a domain of a site's libvirtd, in a state as virsh names it.
type Guest struct {
	Name  string `json:"name"`
	State string `json:"state"`
}

// Status reads what runs. What does not answer is among the problems.
func (l *Lab) Status(ctx context.Context) Status {
	status := Status{Dir: l.Dir}
	running := supervisors(l.Dir)
	if len(running) == 0 {
		return status
	}
	status.Supervisor = running[0]
	problem := func(err error) {
		if err != nil {
			status.Problems = append(status.Problems, err.Error())
		}
	}
	link, err := l.LinkState(ctx)
	if problem(err); err == nil {
		status.Link = &link
	}
	for _, name := range l.DataCentres() {
		site := SiteStatus{Name: name, Guests: []Guest{}}
		site.Daemons, err = l.Sites[name].Daemons(ctx)
		problem(err)
		if site.Daemons[Libvirtd].Running {
			site.Guests, err = l.guests(ctx, name)
			problem(err)
		}
		status.Sites = append(status.Sites, site)
	}
	if l.Services {
		users := SiteStatus{Name: Users}
		users.Daemons, err = l.Sites[Users].Daemons(ctx)
		problem(err)
		status.Sites = append(status.Sites, users)
	}
	return status
}

func (l *Lab) guests(ctx context.Context, site string) ([]Guest, error) {
	names, err := l.output(ctx, site, "virsh", "list", "--all", "--name")
	if err != nil {
		return nil, err
	}
	guests := []Guest{}
	for name := range strings.Lines(names) {
		if name = strings.TrimSuffix(name, "\n"); name == "" {
			continue
		}
		state, err := l.output(ctx, site, "virsh", "domstate", "--domain", name)
		if err != nil {
			return nil, err
		}
		guests = append(guests, Guest{Name: name, State: state})
	}
	return guests, nil
}
