// Package hostnet changes the network of a Linux host in steps that are data:
// each can be shown as the command a network engineer would type, journaled as
// JSON, applied twice without harm and taken back.
//
// A step never touches what it did not make. What is ours is told by a mark
// that the kernel keeps with it:
//
//	step       mark                                      kernel
//	Route      protocol 119                              any
//	Rule       protocol 119                              4.17
//	Neighbour  protocol 119                              5.0
//	Address    metric 119, no prefix route               4.18
//	FDB        static and sticky                         5.0
//	Device     alias "wanmig"                            any
//	Table      name wanmig_*                             nftables
//	Sysctl     none: the value is as it was left         any
//
// Where something else stands in a step's place, Apply leaves it alone and
// returns ErrTaken. Where something else has come into a step's place, Revert
// leaves it alone, and returns nil: ours is gone.
//
// Most steps are netlink messages (rtnetlink(7); include/uapi/linux: if_addr.h,
// if_link.h, fib_rules.h, neighbour.h, rtnetlink.h). Tables go through nft(8),
// sysctls through /proc/sys/net. All of it happens in the network namespace of
// the calling thread; a process that is to change another one runs in it as a
// whole.
package hostnet
