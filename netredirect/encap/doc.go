// Package encap carries packets of VMs between two hosts through a TUN device, as IP in IP or as datagrams of a connection.
package encap
