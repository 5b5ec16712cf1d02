// Package faults lets a test meet a move at an exact point: between a record and
// the message that follows it, say. A program that is built with the tag faults
// looks at each point whether the test waits for it there; any other program,
// and so every release, has nothing of it.
//
// A test waits at a point by a file of that name in Folder. What the file says is what the program does when it comes to the point, once:
//
//	stop        renames the file to POINT.reached and stops itself: SIGSTOP, so that no
//	            thread of it runs on. The test then kills or continues it.
//	fail WHY    renames it likewise, and takes WHY for the error of what it was about to do
//	wait        renames it likewise, and holds up the one that came here, until the file
//	            POINT.reached is removed; everything else of the program runs on
//
// A file clock says by how much the time is off that the program tells its peer.
package faults

// Folder is where tests leave their files.
const Folder = "/run/wanmig-faults"
