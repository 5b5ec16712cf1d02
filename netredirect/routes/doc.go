// Package routes announces the host routes of VMs by BGP, and sees whether a
// network's routers have them.
//
// A [Speaker] holds one BGP session (RFC 4271) with each configured router,
// which it always opens itself: it listens on no port. Each session carries
// IPv4 and IPv6 unicast (RFC 4760). It is an end point and no router: nothing
// that a peer says is installed anywhere or told to another peer, and it
// announces only prefixes of one address.
//
//	attribute              sent                                      RFC
//	ORIGIN                 IGP                                       4271
//	AS_PATH                the own AS to eBGP peers, empty to iBGP   4271
//	NEXT_HOP, MP_REACH     Config.NextHop4 or 6, else the session's  4271, 4760
//	                       own address
//	LOCAL_PREF             Config.LocalPref, else 100; only to iBGP  4271
//	COMMUNITIES            "65020:100"                               1997
//	LARGE_COMMUNITY        "65020:1:2"                               8092
//
// Both sites of a move look with [Speaker.Arrived] whether their routers have
// learned the VM's new route; [Speaker.Seen] tells from where. A router tells its
// peers only the route that it uses itself; so a site that still announces the
// address does not see another's route before its own loses or is withdrawn.
//
// # Restarts
//
// A VM goes on while its host's agent is restarted, so its route must not go
// away with the session. Graceful restart (RFC 4724) does that: a router that
// supports it keeps the routes of a session that ended without a NOTIFICATION
// for RestartTime.
//
//	agent killed, or Close with routes announced    TCP ends, no NOTIFICATION
//	router                                          routes stay, marked stale
//	New(…, resume): OPEN                            restart and forwarding bits set
//	router                                          keeps the routes
//	UPDATE for each prefix of resume, End-of-RIB    router drops what is still stale
//
// This is why New takes the prefixes that were announced before: a router would
// drop them at an End-of-RIB that came first.
//
// # Limits
//
// The BGP library keeps everything that a peer sends before any policy looks
// at it. A peer that sends more prefixes of a family than Peer.MaxPrefixes
// therefore loses its session (Cease, RFC 4486), and is tried again after a
// minute: its operator filters what it sends to this host. A prefix takes about
// 1 KiB.
package routes
