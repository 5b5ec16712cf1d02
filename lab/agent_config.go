package lab

import (
	"context"
	"fmt"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"
)

const agentFile = "/etc/wanmig/agent.yaml"

// agentConfig is the configuration of a data centre's agent: what the lab
// gives, with the keys of AgentConfig in place of or besides its own.
func (l *Lab) agentConfig(s *Site) (string, error) {
	text := fmt.Sprintf(`site: %s
listen: "%s"
api: /run/wanmig/agent.sock
state: /var/lib/wanmig
libvirt: /run/libvirt/libvirt-sock
`, s.Name, s.AgentAddr)
	if l.Services {
		text += l.servicesConfig(s)
	}
	if strings.TrimSpace(l.AgentConfig[s.Name]) == "" {
		return text, nil
	}
	text, err := overlayYAML(text, l.AgentConfig[s.Name])
	if err != nil {
		return "", fmt.Errorf("configuration of the agent of %s: %w", s.Name, err)
	}
	return text, nil
}

// servicesConfig is what a lab with services adds.
func (l *Lab) servicesConfig(s *Site) string {
	u := l.uplink(s)
	n := dcNumber(s.Name)
	return fmt.Sprintf(`redirect: {quiet: 5s}
dns: {servers: [%s], key_file: %s, ttl: 2s}
bgp:
  asn: %d
  router_id: %s
  next_hops: [%s, "%s"]
  communities: ["65020:100"]
  peers: [{address: %s, asn: %d, local: %s}]
addresses: {pool: [10.%d0.0.192/27, "fd00:%d0::1:0/124", 10.%d1.0.192/27, "fd00:%d1::1:0/124"]}
`, l.nameServer(), DNSKeyFile, u.AgentASN, u.Agent.Addr(), u.DC.Addr(), u.DC6.Addr(), u.Users.Addr(), usersASN, u.Agent.Addr(), n, n, n, n)
}

// overlayYAML puts the keys of one mapping over those of another.
func overlayYAML(base, over string) (string, error) {
	var lower, upper yaml.Node
	for text, to := range map[string]*yaml.Node{base: &lower, over: &upper} {
		if err := yaml.Unmarshal([]byte(text), to); err != nil {
			return "", err
		}
		if to.Kind != yaml.DocumentNode || to.Content[0].Kind != yaml.MappingNode {
			return "", fmt.Errorf("want keys and values, not %q", text)
		}
	}
	merged := lower.Content[0]
	entries := upper.Content[0].Content // keys and values in turn
	for i := 0; i < len(entries); i += 2 {
		replaced := false
		for j := 0; j < len(merged.Content); j += 2 {
			if merged.Content[j].Value == entries[i].Value {
				merged.Content[j+1], replaced = entries[i+1], true
			}
		}
		if !replaced {
			merged.Content = append(merged.Content, entries[i:i+2]...)
		}
	}
	out, err := yaml.Marshal(merged)
	return string(out), err
}

// SetAgentConfig replaces what the configuration of a data centre's agent says
// besides what the lab gives it, as YAML, and starts the agent again if it runs.
func (l *Lab) SetAgentConfig(ctx context.Context, site, config string) error {
	s, err := l.Site(site)
	if err != nil {
		return err
	}
	changed := *l
	changed.AgentConfig = map[string]string{site: config}
	text, err := changed.agentConfig(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.Dir+agentFile, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	daemons, err := s.Daemons(ctx)
	if err != nil || !daemons[Agent].Running {
		return err
	}
	if err := s.KillAgent(ctx); err != nil {
		return err
	}
	return s.StartAgent(ctx)
}
