/*
 * The handoff of a guest, both sides, as docs/HANDOFF.md tells it, for spin 6.
 * handoff's TestModel runs it, and shows that it finds broken rules.
 *
 * Safety: never two owners; never none when nothing more can happen.
 *	spin -a handoff.pml && cc -O2 -DSAFETY -DNOCLAIM -o pan pan.c && ./pan -E
 * Progress: once faults stop, every order of events comes to an end.
 *	spin -DPROGRESS -a handoff.pml && cc -O2 -o pan pan.c && ./pan -a -f
 *
 * -DOPERATOR adds operators who are right. -DRETURNS, -DUNRECORDED, -DHIDES and
 * -DMUTE break a rule each. -DGOAL=at_source asks for a way to such a state.
 *
 * The wire is a set of messages. Any of them can arrive next (reordering), when it
 * likes (delay, loss), and again (duplication), so that no queue is bounded. What
 * is bounded are CRASHES, of agents and hosts, all together; for progress, which is
 * promised when faults stop, losses and duplicates are among them. A step's actions
 * are done one by one, and anything can come between two. One move is modelled;
 * handoff's simulator in Go has two in a row.
 */
#ifndef CRASHES
#define CRASHES 3
#endif

mtype = { owner, offered, released, returned, claimed, split, receiver, accepted, running, aborted };
mtype = { off, paused, runs };

mtype s = owner, d = receiver;       /* what the agents know, while they are up */
mtype sj = owner, dj = receiver;     /* what their journals hold */
mtype sguest = runs, dguest = off;   /* what is in the hands of libvirt */
bool sup = true, dup = true;         /* the agents are up */
bool fresh = true;                   /* the destination's agent is the one that the offer is for */
bool finishing;                      /* libvirt's Finish is under way, whoever asked for it */
bool sdisks = true, ddisks;

bool offer, query, cancel, told_running, told_aborted, claim;

/* What has happened: the guest ran at the destination, the source took it back,
 * a host and its guest lost power, an operator claimed the guest. */
bool ran, back, sfell, dfell, word;

byte crashes = CRASHES;

inline check() {
	assert(!(sguest == runs && dguest == runs));
	assert(sdisks || ddisks);
	assert(dguest != runs || dj == accepted || dj == running);
	assert(!(ran && back) || word)
}

#define at_source (s == returned && d == aborted && dguest == off && (sguest == runs || sfell || word))
#define at_destination (s == released && d == running && sguest == off && (dguest == runs || dfell))
#define in_doubt (s == offered && d == accepted && dguest == off && !finishing && sguest != runs)
#define both_told (s == split && d == running)
#define ended (sup && dup && (at_source || at_destination || in_doubt || both_told))

#ifdef PROGRESS
#define again(m) if :: m = false :: crashes > 0 -> crashes-- fi
ltl ends { <>[] ended }
#else
#define again(m) if :: m = false :: skip fi
#endif

/* A final state of the source, or Aborted from Receiver, may not get into the
 * journal: it recurs. */
inline recurring(journal, state) { if :: journal = state :: skip fi }

#ifdef MUTE
inline tell_aborted() { skip }
#else
inline tell_aborted() { told_aborted = true }
#endif

active proctype source() {
again_s: {
loop_s:	do
	:: atomic { s == owner && sguest == runs -> sguest = paused }
	:: atomic { s == owner -> cancel = true; s = returned }; goto take_back
	:: atomic { s == owner && told_aborted -> again(told_aborted); s = returned }; goto take_back
	:: atomic { s == owner && sguest == paused -> s = offered };
#ifndef UNRECORDED
		if
		:: sj = offered
		:: atomic { cancel = true; s = returned }; goto take_back /* it can't be written */
		:: atomic { sj = offered; cancel = true; s = returned }; goto take_back /* or so it seems */
		fi;
#endif
		offer = true
	:: atomic { s == offered && told_running -> again(told_running); s = released };
		atomic { sguest = off; sdisks = false; check() };
		atomic { recurring(sj, released) }
	:: atomic { s == offered && told_aborted -> again(told_aborted); s = returned }; goto take_back
	:: atomic { s == offered && !query && !told_running && !told_aborted -> query = true }
#ifdef RETURNS
	:: atomic { s == offered -> s = returned }; goto take_back
#endif
#ifdef OPERATOR
	:: atomic { s == offered && !dup && dguest == off && !finishing && (sguest == paused || sdisks) -> s = claimed };
		sj = claimed;
		atomic { sguest = runs; back = true; word = true; check() };
		claim = true
#endif
	:: atomic { s == claimed && told_running -> again(told_running); s = split };
		atomic { recurring(sj, split) }
	:: atomic { s == claimed && told_aborted -> again(told_aborted); s = returned };
		atomic { recurring(sj, returned) }
	:: atomic { s == claimed && !claim && !told_running && !told_aborted -> claim = true }
	od;
take_back:
	atomic {
		if
		:: sguest == paused -> sguest = runs; if :: sj == offered -> back = true :: else fi
		:: else
		fi;
		check()
	};
	atomic { recurring(sj, returned) };
	goto loop_s
	} unless { !sup };
	/* The agent starts. What was never offered is taken back. */
	atomic {
		sup = true; s = sj;
		if
		:: s == owner -> cancel = true; s = returned; goto restarted
		:: s == claimed -> word = true; goto again_s
		:: else -> goto again_s
		fi
	};
restarted: {
	atomic {
		if
		:: sguest == paused -> sguest = runs
		:: else
		fi;
		check()
	};
	atomic { recurring(sj, returned) }
	} unless { !sup };
	goto again_s
}

active proctype destination() {
again_d: {
loop_d:	do
	:: atomic { d == receiver && fresh && offer -> again(offer); d = accepted };
#ifdef HIDES
		skip;
#else
		if
		:: atomic { dj = accepted; ddisks = true }
		:: d = aborted; goto abort /* it can't be written */
		:: atomic { dj = accepted; ddisks = true; d = aborted }; goto abort /* or so it seems */
		fi;
#endif
		atomic { finishing = true; dguest = paused };
		!finishing;
		if
		:: dguest == runs -> d = running; goto resumed
		:: else -> d = aborted; goto abort
		fi
	:: atomic { d == receiver && cancel -> again(cancel); d = aborted }; goto abort
	:: atomic { d == receiver && query -> again(query); d = aborted }; goto abort
	:: atomic { d == receiver && claim -> again(claim); d = aborted }; goto abort
	:: atomic { d == receiver -> d = aborted }; goto abort /* anything else goes wrong */
	:: atomic { d == accepted && dguest == runs -> d = running }; goto resumed
	:: atomic { d == accepted && dguest != runs && query -> again(query) } /* undecided */
	:: atomic { d == accepted && dguest != runs && claim -> again(claim); d = aborted }; goto halt
#ifdef OPERATOR
	:: atomic { d == accepted && dguest != runs && s == offered && sj == offered && sguest == paused -> word = true; d = aborted }; goto halt
	:: atomic { d == accepted && dguest == off && !finishing && sguest == off && s == offered && sj == offered ->
			word = true; dguest = runs; ran = true; check() }
#endif
	:: atomic { d == running && query -> again(query); told_running = true }
	:: atomic { d == running && claim -> again(claim); told_running = true }
	:: atomic { d == aborted && query -> again(query); tell_aborted() }
	:: atomic { d == aborted && claim -> again(claim); tell_aborted() }
	od;
halt:	atomic { dguest = off; finishing = false };
abort:	if
	:: dj == accepted -> dj = aborted; atomic { ddisks = false; check() }
	:: else -> atomic { recurring(dj, aborted) }
	fi;
	told_aborted = true;
	goto loop_d;
resumed:
	dj = running;
	told_running = true;
	goto loop_d
	} unless { !dup };
	/* The agent starts. The loop above finds what was accepted and runs, and gives
	 * up what was not accepted. */
	atomic { dup = true; fresh = false; d = dj; goto again_d }
}

active proctype libvirt() {
	do
	:: atomic { finishing -> finishing = false; dguest = runs; ran = true; check() }
	:: atomic { finishing -> finishing = false; dguest = off }
	od
}

#ifndef PROGRESS
/* When nothing can happen any more the guest has an owner. */
active proctype judge() { timeout -> assert(ended) }
#endif

#ifdef GOAL
/* Shows that the model comes to what is asked for. */
active proctype goal() { GOAL -> assert(false) }
#endif

/* What goes wrong from outside, for a while. */
active proctype fate() {
	do
	:: atomic { crashes > 0 -> crashes = 0 }
	:: atomic { crashes > 0 && sup -> crashes--; sup = false }
	:: atomic { crashes > 0 && dup -> crashes--; dup = false }
	:: atomic { crashes > 0 && sup -> crashes--; sup = false; sguest = off; sfell = true }
	:: atomic { crashes > 0 && dup -> crashes--; dup = false; dguest = off; finishing = false; dfell = true }
#ifdef PROGRESS
	:: atomic { crashes > 0 && offer -> crashes--; offer = false }
	:: atomic { crashes > 0 && query -> crashes--; query = false }
	:: atomic { crashes > 0 && cancel -> crashes--; cancel = false }
	:: atomic { crashes > 0 && claim -> crashes--; claim = false }
	:: atomic { crashes > 0 && told_running -> crashes--; told_running = false }
	:: atomic { crashes > 0 && told_aborted -> crashes--; told_aborted = false }
#endif
	od
}
