// Package seed keeps indexes of images that an operator has listed: golden
// images, disks of other VMs. The content of a guest that arrives is looked for
// in them, so that it need not cross the line.
//
// Whatever an index says is a hint. Whoever finds a page reads it from the image
// and compares its fingerprint. So an image may change, be truncated, replaced or
// deleted at any time, a running guest may write it, and an index may be old: that
// costs bytes on the line and nothing else. Who can choose content can't do more.
//
// # Index files
//
// Each image has a file in the state folder, named by the SHA-256 of its path. It
// is written beside its place, synced, renamed and its folder synced: after a crash
// there is the old file, the new one, or none. What is left beside is removed when
// the agent starts. Numbers are little-endian.
//
//	bytes        what
//	0      8     "wmigseed"
//	8      4     version: 1
//	12     4     format: 1 raw, 2 qcow2
//	16     8     inode of the image's file
//	24     8     size of the file, or of the block device
//	32     8     mtime, ns since 1970
//	40     8     size of the content, as a guest sees it
//	48     8     when the indexing began, ns since 1970
//	56     8     number of entries
//	64     4     CRC-32C of the entries
//	68     4     length of the path, at most 4020
//	72     n     path, zeros up to 4092
//	4092   4     CRC-32C of bytes 0 to 4092
//	4096   12 e  entries: 8 bytes tag, 4 bytes page number
//
// A tag is the begin of a page's fingerprint (package compress), as a big-endian
// number. Entries are in the order of their tags, each tag once. Pages of zeros
// are left out, and those beyond 16 TiB. That makes 12 bytes for a page, which are
// mapped from the file, and 1/16 byte of memory for a table of where the tags'
// first bits begin. The whole file is checked before it is used.
//
// # Images
//
// Raw images and block devices are read where they have data (SEEK_DATA). Of qcow2
// (https://gitlab.com/qemu-project/qemu, docs/interop/qcow2.txt) versions 2 and 3
// are read, with clusters that are compressed by zlib or zstd. An image may be what
// a guest has written and so hostile: no path in it is ever followed, so that of one with
// a backing file its own clusters are read; no table is loaded as a whole; what is kept
// of an open image is at most a MiB, or one, of clusters and of level 2 tables each; and one whose
// tables lead more than twice over its whole file is given up.
package seed
