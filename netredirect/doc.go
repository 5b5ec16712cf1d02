// Package netredirect keeps connections to a VM alive while and after it moves
// to another host: packets for it go on to its old place and are carried from
// there to the new one in a tunnel, until DNS or routes lead to the new place
// and nothing uses the tunnel any more.
//
//	client ──► source host ══ tunnel wm… ══► destination host ──► VM
//	   ▲        rule: to VM ► table           table: VM ► bridge    │
//	   │        proxy ARP/NDP for the VM      fwmark ► tunnel       │
//	   └──────────── answers take the way that the question took ◄──┘
//
// A Manager keeps the redirects of one host. Each has a Plan: reversible changes
// of the host's network (package hostnet), in the journal before they are made.
// Everything in it is ours alone: routing tables from 77000, rules of priority
// 7000 and below, routes and rules of protocol 119, nftables tables wanmig_…,
// devices wm…, and bits 20 to 30 of packet and connection marks.
//
//	source                                        destination
//	Begin   tunnel, then for each kind:    ────►  open: tunnel
//	        probes of the path's MTU       ◄───►  answers
//	        table with the VM's routes     ────►  arm: routes to the tap, marks, answers for the gateway
//	Switch  at the stop: rule, proxy entry,
//	        frames for the VM turned to us ═════► they wait in the VM's tap
//	                                              Resuming: gateway's entry corrected
//	Decide  went                                  went: DNS, BGP
//	        sync, every second             ────►  decide: stays, or can go
//	        remove                         ────►  end: the tunnel goes; foreign addresses are served on
//
// The tunnel is the kernel's where it has one, else package encap's. What comes
// out of it passes only if a redirect's table has marked it: addressed to the VM
// at the destination, from the VM at the source. Everything else is dropped and
// counted.
//
// A VM may move on while its tunnel stands. Then sync tells the source so, which
// opens a tunnel to the new destination (open, arm, stand): see onward.go.
//
// As long as a VM lives at a host to whose networks its addresses do not belong,
// that host stays its gateway (the plan's part Stay), after the tunnel is gone,
// too; it ends when the VM leaves.
package netredirect
