package lab

import (
	"strings"
	"testing"
)

const servicesOfRemoteDC = `site: remote-dc
listen: "10.255.0.2:7946"
api: /run/wanmig/agent.sock
state: /var/lib/wanmig
libvirt: /run/libvirt/libvirt-sock
redirect: {quiet: 5s}
dns: {servers: [10.10.0.1], key_file: /etc/wanmig/dns.key, ttl: 2s}
bgp:
  asn: 65021
  router_id: 10.254.2.3
  next_hops: [10.254.2.1, "fd00:254:2::1"]
  communities: ["65020:100"]
  peers: [{address: 10.254.2.2, asn: 65030, local: 10.254.2.3}]
addresses: {pool: [10.20.0.192/27, "fd00:20::1:0/124", 10.21.0.192/27, "fd00:21::1:0/124"]}
`

func TestAgentConfigOfALabWithServices(t *testing.T) {
	l := newLab("/lab")
	l.Services = true
	if got, err := l.agentConfig(l.Sites[RemoteDC]); err != nil || got != servicesOfRemoteDC {
		t.Errorf("%v, got\n%s", err, got)
	}
	got, err := l.agentConfig(l.Sites[LocalDC])
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"asn: 65011", "router_id: 10.10.0.2", `next_hops: [10.10.0.1, "fd00:10::1"]`,
		"peers: [{address: 10.10.0.100, asn: 65030, local: 10.10.0.2}]", `pool: [10.10.0.192/27, "fd00:10::1:0/124", 10.11.0.192/27, "fd00:11::1:0/124"]`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
}

func TestAgentConfigIsOverlaid(t *testing.T) {
	l := newLab("/lab")
	l.AgentConfig = map[string]string{LocalDC: "state: /elsewhere\noutbox: {memory: 1MiB}\n"}
	want := `site: local-dc
listen: "10.255.0.1:7946"
api: /run/wanmig/agent.sock
state: /elsewhere
libvirt: /run/libvirt/libvirt-sock
outbox: {memory: 1MiB}
`
	if got, err := l.agentConfig(l.Sites[LocalDC]); err != nil || got != want {
		t.Errorf("%v, got\n%s", err, got)
	}
	for _, bad := range []string{"- a", "a", "a: [", "#"} {
		l.AgentConfig[LocalDC] = bad
		if got, err := l.agentConfig(l.Sites[LocalDC]); err == nil {
			t.Errorf("%q was taken for a configuration:\n%s", bad, got)
		}
	}
}
