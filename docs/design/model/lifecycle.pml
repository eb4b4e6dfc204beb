/*
 * The life of a snapshot beside the reclamation of files: create, drop, pin,
 * reclaim, the drop of the collection, crashes. check.sh runs it; the argument
 * in words is in ../protocols.md.
 *
 * HOW TO READ IT
 *
 *   atomic { }       one transaction of the metadata store, or one read at a
 *                    revision
 *   a step alone     one call of the object store. It may come arbitrarily late:
 *                    that is a process that was frozen, or a request that was
 *                    in progress when its sender died
 *   no more steps    a process that died. Death and delay are possible between any
 *                    two steps: no process has to continue
 *   say(...)         prints during the replay of a trail, without any other effect
 *
 * STATE
 *
 *   snap[s]          /snapshot/rec/<id>, and DELETING: the objects are going;
 *                    NONE and REMOVED: there is no record
 *   pend[s]          /snapshot/pending/<collection>/<id>, under the create's lease
 *   refs[s]          the units that the snapshot references, one bit each
 *   objs[s]          the snapshot's own objects: manifests, metadata
 *   pins[s]          how many keys are under /snapshot/pin/<id>/
 *   stale[r]         /gc/gen/<collection> moved since reclaimer r read it
 *   unit[f]          LIVE: /catalog/segment/...; DROPPED: /catalog/unit/...;
 *                    GRANTED: neither
 *   tomb[f]          /gc/tomb/<collection>/<unit>
 *   file[f]          the unit's files are in the object store
 *   collActive          the collection's record says ACTIVE
 *   younger[2*s+f]   the pending key of s was created after unit f was dropped
 *   later[2*s+f]     the create revision of the record of s is greater than that of
 *                    unit f
 *   copied[s]        the record of s was copied from another store; its history is
 *                    not that of today
 *
 * PROCESSES
 *
 *   Creator          a replica that runs CreateSnapshot
 *   LateBegin,       a transaction of it that was sent, and applied only after
 *   LateCommit       its answer was given up
 *   Others           processes whose step is one transaction, or a delete that
 *                    needs no memory: leases that end, any number of leaders
 *                    (zombies included), users who drop, compaction
 *   Reclaimer        a replica's collector, or a caller that asked Reclaim and
 *                    deletes itself: the steps are the same
 *                    With PARTS, the operator who copies all keys to another store,
 *                    in the order of their names, and recovers
 *   Restore          the part of a restore that this model needs: pin, read, unpin
 *   Sweeper          removes objects that have no record
 *   Dropper, Reuser, Taker   only run when their rule is broken
 *
 *   Monitor          looks at every state. It asks what must always hold, and what
 *                    would be left over if all processes died now and a healthy
 *                    replica then finished what the records say. It writes nothing
 */

/* ---- RULES: 1 is the protocol, 0 breaks it. -------------------------------- */

#ifndef R_PIN_THEN_LOOK  /* create: the catalog is read at or after the revision of begin */
#define R_PIN_THEN_LOOK 1
#endif
#ifndef R_CAPTURE_ACTIVE /* create: the collection is ACTIVE at the revision that is captured */
#define R_CAPTURE_ACTIVE 1
#endif
#ifndef R_COMMIT_PENDING /* create: commit compares the pending key */
#define R_COMMIT_PENDING 1
#endif
#ifndef R_PENDING_ONCE   /* create: by its create revision, so that one put again is not it */
#define R_PENDING_ONCE 1
#endif
#ifndef R_COMMIT_BUMP    /* create: commit puts the generation */
#define R_COMMIT_BUMP 1
#endif
#ifndef R_OWN_LEASE      /* create: the lease is of this create alone and is revoked at its end */
#define R_OWN_LEASE 1
#endif
#ifndef R_ABORT_VERDICT  /* create: "failed" is only said after give up made commit impossible */
#define R_ABORT_VERDICT 1
#endif
#ifndef R_REAP_STATE     /* leader: reap compares the record, PENDING, and not the pending key alone */
#define R_REAP_STATE 1
#endif
#ifndef R_RECORD_LAST    /* clean: the record goes after the objects */
#define R_RECORD_LAST 1
#endif
#ifndef R_KEY_BY_ID      /* object keys carry the snapshot's id, and ids never return; 0: its name */
#define R_KEY_BY_ID 1
#endif
#ifndef R_SWEEP          /* objects without a record are swept */
#define R_SWEEP 1
#endif
#ifndef R_SWEEP_ORDER    /* sweep: the records are read after the listing */
#define R_SWEEP_ORDER 1
#endif
#ifndef R_GRANT          /* reclaim: nothing is deleted on a look at the references alone */
#define R_GRANT 1
#endif
#ifndef R_GRANT_PENDING  /* reclaim: grant compares the pending keys of the collection
                            1: there is none   2: each is younger than the unit's drop
                            0: not compared    3: each is older (the wrong way around) */
#define R_GRANT_PENDING 1
#endif
#ifndef R_GRANT_GEN      /* reclaim: grant compares the generation */
#define R_GRANT_GEN 1
#endif
#ifndef R_GEN_FIRST      /* reclaim: the generation is read with the references; 2: before them;
                            0: after them */
#define R_GEN_FIRST 1
#endif
#ifndef R_GRANT_UNIT     /* reclaim: grant compares the unit's record */
#define R_GRANT_UNIT 1
#endif
#ifndef R_LATER          /* reclaim: of files of a living segment, a snapshot does not count that
                            1: began after they were taken   2: was committed after it
                            0: all count that have the segment */
#define R_LATER 1
#endif
#ifndef R_HISTORY        /* reclaim: a snapshot of an earlier history counts in any case */
#define R_HISTORY 1
#endif
#ifndef R_ALL_REFS       /* reclaim: no grant while the references of one snapshot are unknown */
#define R_ALL_REFS 1
#endif
#ifndef R_TOMB           /* reclaim: grant leaves a tombstone */
#define R_TOMB 1
#endif
#ifndef R_CONFIRM        /* reclaim: the tombstone goes only when the deletes were confirmed */
#define R_CONFIRM 1
#endif
#ifndef R_GRANT_FINAL    /* reclaim: a grant is never taken back */
#define R_GRANT_FINAL 1
#endif
#ifndef R_NO_REUSE       /* a key that was deleted is never written again */
#define R_NO_REUSE 1
#endif
#ifndef R_DROP_PINS      /* drop: nothing under the snapshot's pins */
#define R_DROP_PINS 1
#endif
#ifndef R_DROP_PINS_TXN  /* drop: compared in the transaction that drops */
#define R_DROP_PINS_TXN 1
#endif
#ifndef R_PIN_DURABLE    /* restore: its pin is under no lease */
#define R_PIN_DURABLE 1
#endif
#ifndef R_PIN_COMPARES   /* restore: the pin's transaction compares the snapshot's record, COMMITTED */
#define R_PIN_COMPARES 1
#endif

/* ---- SIZE: what takes part. -------------------------------------------------- */

#ifndef CREATORS
#define CREATORS 2
#endif
#ifndef UNITS
#define UNITS 2
#endif
#ifndef RECLAIMERS
#define RECLAIMERS 2
#endif
#ifndef RESTORES         /* 1: snapshot 0 is restored */
#define RESTORES 1
#endif
#ifndef DROPCOLL         /* 1: the collection may be dropped */
#define DROPCOLL 1
#endif
#ifndef PARTS            /* 1: a unit is files of a living segment, which each snapshot has */
#define PARTS 0
#endif
#ifndef LOST             /* 1: answers of begin and commit may be lost */
#define LOST 0
#endif
#ifndef LATE_PUT         /* 1: an object may be written late, after its snapshot was given up */
#define LATE_PUT 1
#endif
#ifndef SWEEPERS         /* 1: a sweep runs beside all others */
#define SWEEPERS 0
#endif

/* ---- MODEL. ------------------------------------------------------------------ */

#define say printf

mtype = { NONE, PENDING, COMMITTED, DELETING, REMOVED, LIVE, DROPPED, GRANTED };

mtype snap[2] = NONE;
bool pend[2];
byte refs[2];
bool objs[2];
byte pins[2];
bool partial[2];                /* captured a collection that was not ACTIVE */
mtype unit[2] = LIVE;
bool tomb[2];
bool file[2] = true;
bool stale[2];
bool collActive = true;
#if R_GRANT_PENDING >= 2
bool younger[4];
#endif
#if PARTS
bool later[4];
bool copied[2];
bool moved;                     /* the keys were copied to another store */
#endif
bool reaped[2];                 /* reaped although it was COMMITTED */
#if LOST
bool failureReported[2];             /* the caller was informed of the failure */
bool revoked[2];                /* the lease that a late begin would need */
bool forgotten[2];              /* or it lives on, with its process, for no create */
#endif
#if !R_KEY_BY_ID
bool named;                     /* the one name that both snapshots want is taken */
#define OBJ(s) 0
#else
#define OBJ(s) s
#endif

#define HOLDS(s, f)  (snap[s] == COMMITTED && ((refs[s] >> f) & 1))
#define HELD(f)      (HOLDS(0, f) || HOLDS(1, f))
#if PARTS
#define LACKS(s, f)  (later[2 * s + f] && !(R_HISTORY && copied[s]))
#define REFERS(s, f) (snap[s] == COMMITTED && !(R_LATER && LACKS(s, f)))
#define MAYHOLD(s, f) (snap[s] == COMMITTED && (copied[s] || !later[2 * s + f]))
#define NEEDED(f)    (HELD(f) || MAYHOLD(0, f) || MAYHOLD(1, f))
#else
#define REFERS(s, f) HOLDS(s, f)
#define NEEDED(f)    HELD(f)
#endif
#define NORECORD(s)  (snap[s] == NONE || snap[s] == REMOVED)

#if R_GRANT_PENDING == 0
#define BLOCKED(f) false
#elif R_GRANT_PENDING == 1
#define BLOCKED(f) (pend[0] || pend[1])
#elif R_GRANT_PENDING == 2
#define BLOCKED(f) ((pend[0] && !younger[f]) || (pend[1] && !younger[2 + f]))
#else
#define BLOCKED(f) ((pend[0] && younger[f]) || (pend[1] && younger[2 + f]))
#endif

/* A snapshot has its objects and all files that it references. */
inline check_whole(s) {
	assert(objs[OBJ(s)]);                /* lost: an object of a snapshot */
	assert(!(refs[s] & 1) || file[0]);   /* lost: a file that a snapshot needs */
	assert(!(refs[s] & 2) || file[1])    /* lost: a file that a snapshot needs */
}

inline pending_goes(s) {
	pend[s] = false
#if R_GRANT_PENDING >= 2
	; younger[2 * s] = false; younger[2 * s + 1] = false
#endif
}

inline to_deleting(s) {
	snap[s] = DELETING; pending_goes(s); refs[s] = 0; partial[s] = false
#if PARTS
	; later[2 * s] = false; later[2 * s + 1] = false; copied[s] = false
#endif
#if !R_KEY_BY_ID
	; named = false
#endif
}

inline begin(s) {
	say("create %d: begin: record PENDING, pending key\n", s);
	snap[s] = PENDING; pend[s] = true;
#if R_GRANT_PENDING >= 2
	younger[2 * s] = (unit[0] != LIVE); younger[2 * s + 1] = (unit[1] != LIVE);
#endif
#if PARTS
	later[2 * s] = (unit[0] != LIVE); later[2 * s + 1] = (unit[1] != LIVE);
#endif
#if !R_KEY_BY_ID
	named = true
#else
	skip
#endif
}

inline capture(s) {
	if
	:: snap[s] == DELETING || snap[s] == REMOVED        /* too late: it will not commit */
	:: else ->
		refs[s] = ((unit[0] == LIVE) | ((unit[1] == LIVE) << 1)) & ((1 << UNITS) - 1);
		partial[s] = !collActive
	fi;
	say("create %d: capture: unit 0 %e, unit 1 %e, collection active %d\n", s, unit[0], unit[1], collActive)
}

inline commit(s) {
	say("create %d: commit: record COMMITTED\n", s);
	snap[s] = COMMITTED; pending_goes(s);
#if PARTS && R_LATER == 2
	later[2 * s] = (unit[0] != LIVE); later[2 * s + 1] = (unit[1] != LIVE);
#endif
	if
	:: R_COMMIT_BUMP -> stale[0] = true; stale[1] = true
	:: else
	fi
}

/* A delete of the object store. */
inline delete_files(f) {
	atomic {
		say("reclaimer: the files of unit %d are deleted\n", f); file[f] = false
	}
}

#if LOST
proctype LateBegin(byte s) {
	atomic {
		if
		:: !revoked[s] && snap[s] == NONE && collActive -> say("late: "); begin(s)
		:: else
		fi
	}
}
proctype LateCommit(byte s) {
	atomic {
		if
		:: snap[s] == PENDING && pend[s] -> say("late: "); commit(s)
		:: else
		fi
	}
}
#endif

proctype Creator(byte s) {
#if !R_PIN_THEN_LOOK
	atomic { capture(s) };
#endif
#if LOST
	if
	:: run LateBegin(s);                         /* sent; no answer */
	   atomic {
		if
		:: snap[s] != NONE                   /* read back: it is there */
		:: snap[s] == NONE -> say("create %d: sends begin again\n", s); goto again
		:: snap[s] == NONE ->
			say("create %d: begin without an answer is not there; UNAVAILABLE\n", s);
			revoked[s] = R_OWN_LEASE;    /* then it cannot happen any more */
			forgotten[s] = !R_OWN_LEASE;
			goto end
		fi
	   };
	   goto begun
	:: true
	fi;
again:
#endif
	atomic {
		if
#if LOST
		:: snap[s] != NONE                   /* the one that was sent before */
#endif
#if R_KEY_BY_ID
		:: collActive && snap[s] == NONE -> begin(s)
#else
		:: collActive && !named -> begin(s)
#endif
		:: else -> goto end
		fi
	};
begun:
#if R_PIN_THEN_LOOK
	atomic {
		if
		:: R_CAPTURE_ACTIVE && !collActive -> goto giveup
		:: else -> capture(s)
		fi
	};
#endif
	atomic { LATE_PUT || snap[s] == PENDING -> say("create %d: objects are written\n", s); objs[OBJ(s)] = true };
#if !R_PENDING_ONCE
	atomic {
		if
		:: snap[s] == PENDING && !pend[s] ->
			say("create %d: puts its pending key again\n", s); pend[s] = true
		:: else
		fi
	};
#endif
#if LOST
	if
	:: run LateCommit(s);                        /* sent; no answer */
	   atomic {
		if
		:: snap[s] == PENDING ->             /* read back: not there, which is no verdict */
			if
			:: R_ABORT_VERDICT -> say("create %d: gives up\n", s); to_deleting(s)
			:: else
			fi;
			say("create %d: reports the failure to its caller\n", s);
			failureReported[s] = true; goto end
		:: snap[s] == PENDING -> say("create %d: sends the commit again\n", s)
		:: else -> goto end                  /* committed, or reaped */
		fi
	   }
	:: true
	fi;
#endif
	if
	:: atomic {
		if
		:: snap[s] == PENDING && (!R_COMMIT_PENDING || pend[s]) -> commit(s)
#if LOST
		:: snap[s] == PENDING && !pend[s] -> say("create %d: reports the failure to its caller\n", s); failureReported[s] = true
#endif
		:: else
		fi
	   };
	   goto end
	:: true                                      /* fails for some other reason */
	fi;
giveup:
	atomic {
		if
		:: snap[s] == PENDING -> say("create %d: gives up\n", s); to_deleting(s)
		:: else
		fi
	};
end:	skip
}

#if R_DROP_PINS_TXN
#define DROPPABLE(s) (!R_DROP_PINS || pins[s] == 0)
#else
#define DROPPABLE(s) false                           /* Dropper does it */
#endif

#define SNAPSHOT_STEPS(s) \
	:: atomic { pend[s] -> \
		say("lease of create %d ends: its pending key is gone\n", s); pending_goes(s) } \
	:: atomic { !pend[s] && (snap[s] == PENDING || (!R_REAP_STATE && snap[s] == COMMITTED)) -> \
		say("leader, or a repeat: abandons create %d: record DELETING\n", s); \
		reaped[s] = (snap[s] == COMMITTED); to_deleting(s) } \
	:: atomic { (snap[s] == DELETING || snap[s] == REMOVED) && objs[OBJ(s)] -> /* or any later */ \
		say("leader, perhaps one deposed: deletes the objects of snapshot %d\n", s); objs[OBJ(s)] = false } \
	:: atomic { snap[s] == DELETING && (!objs[OBJ(s)] || !R_RECORD_LAST) -> \
		say("leader: deletes the record of snapshot %d\n", s); snap[s] = REMOVED } \
	:: atomic { snap[s] == COMMITTED && DROPPABLE(s) -> \
		say("user: drops snapshot %d: record DELETING\n", s); to_deleting(s) }

#define UNIT_STEPS(f) \
	:: atomic { unit[f] == LIVE -> say("compaction: unit %d is dropped\n", f); unit[f] = DROPPED }

proctype Others() {
end:	do
	SNAPSHOT_STEPS(0)
#if CREATORS == 2
	SNAPSHOT_STEPS(1)
#endif
	UNIT_STEPS(0)
#if UNITS == 2
	UNIT_STEPS(1)
#endif
#if PARTS
	:: atomic { !moved -> /* units come before snapshots; what is under a lease is lost */
		say("user: copies all keys to another store, and recovers\n"); moved = true;
		pending_goes(0); pending_goes(1); stale[0] = true; stale[1] = true;
		if
		:: snap[0] == COMMITTED -> copied[0] = true; later[0] = true; later[1] = true
		:: else
		fi;
		if
		:: snap[1] == COMMITTED -> copied[1] = true; later[2] = true; later[3] = true
		:: else
		fi }
#endif
#if DROPCOLL
	:: atomic { collActive -> say("user: drops the collection\n"); collActive = false }
#endif
	od
}

/* What a reclaimer begins with: a dropped unit without references, or a tombstone. */
#define REFERENCED(f) (REFERS(1, f) || (R_ALL_REFS && REFERS(0, f)))
#define WANTED(f) ((unit[f] == DROPPED && (R_GEN_FIRST == 2 || !REFERENCED(f))) || tomb[f])

proctype Reclaimer(byte r) {
	byte f;
end:	do
	:: atomic {
		if
		:: WANTED(0)
		:: UNITS == 2 && WANTED(1) -> f = 1
		fi;
		if
		:: unit[f] == DROPPED ->
			say("reclaimer %d: looks at unit %d, no reference\n", r, f);
			stale[r] = false             /* the generation, at the same revision */
		:: else -> goto granted              /* goes on with what another was granted */
		fi
	   };
#if R_GEN_FIRST == 2
	   atomic {
		if
		:: REFERENCED(f) -> stale[r] = false; goto next
		:: else -> say("reclaimer %d: still no reference to unit %d\n", r, f)
		fi
	   };
#elif R_GEN_FIRST == 0
	   atomic { say("reclaimer %d: reads the generation\n", r); stale[r] = false };
#endif
#if R_GRANT
	   atomic {
		if
		:: !BLOCKED(f) && (!R_GRANT_GEN || !stale[r]) && (!R_GRANT_UNIT || unit[f] == DROPPED) ->
			say("reclaimer %d: grant: unit %d leaves the catalog\n", r, f);
			assert(unit[f] == DROPPED); /* granted twice */
			unit[f] = GRANTED; tomb[f] = R_TOMB; stale[r] = false
		:: else -> stale[r] = false; goto next
		fi
	   };
#endif
granted:   if
	   :: delete_files(f);
	      atomic { say("reclaimer %d: confirmed: tombstone of unit %d goes\n", r, f); tomb[f] = false; f = 0 }
	   :: atomic { true -> f = 0 }               /* no answer: it may try again */
#if !R_CONFIRM
	   :: atomic { say("reclaimer %d: no answer: tombstone of unit %d goes\n", r, f); tomb[f] = false; f = 0 }
#endif
	   fi;
next:	   f = 0
	od
}

proctype Restore(byte s) {
#if !R_PIN_COMPARES
	if
	:: snap[s] == COMMITTED -> say("restore: reads that snapshot %d is COMMITTED\n", s)
	:: else -> goto end
	fi;
#endif
	atomic {
		if
		:: snap[s] == COMMITTED || !R_PIN_COMPARES -> say("restore: job, pin of snapshot %d\n", s); pins[s]++
		:: else -> goto end
		fi
	};
#if !R_PIN_DURABLE
	if
	:: atomic { say("restore: its replica dies, the lease of the pin ends; another goes on\n"); pins[s]-- }
	:: true
	fi;
#endif
	atomic { say("restore: reads snapshot %d and its files\n", s); check_whole(s) };
#if R_PIN_DURABLE
	atomic { say("restore: ends: job, pin\n"); pins[s]-- };
#endif
end:	skip
}

#if SWEEPERS
proctype Sweeper(byte s) {
#if !R_SWEEP_ORDER
	if
	:: NORECORD(s) -> say("sweep: reads that there is no record of snapshot %d\n", s)
	:: else -> goto end
	fi;
#endif
	if
	:: objs[OBJ(s)] -> say("sweep: lists objects of snapshot %d\n", s)
	:: else -> goto end
	fi;
#if R_SWEEP_ORDER
	if
	:: NORECORD(s) -> say("sweep: reads that there is no record of snapshot %d\n", s)
	:: else -> goto end
	fi;
#endif
	atomic { say("sweep: deletes objects of snapshot %d\n", s); objs[OBJ(s)] = false };
end:	skip
}
#endif

#if !R_DROP_PINS_TXN
proctype Dropper(byte s) {
	bool pinned;
	atomic { say("user: asks to drop snapshot %d; pins: %d\n", s, pins[s]); pinned = (pins[s] > 0) };
	atomic {
		if
		:: snap[s] == COMMITTED && !pinned -> say("user: drops snapshot %d\n", s); to_deleting(s)
		:: else
		fi
	}
}
#endif
#if !R_NO_REUSE
proctype Reuser() {
	atomic {
		if
		:: unit[0] == GRANTED && !tomb[0] && !file[0] ->
			say("engine: writes unit 0 again, under the same keys\n"); file[0] = true; unit[0] = LIVE
		:: else
		fi
	}
}
#endif
#if !R_GRANT_FINAL
proctype Taker() {
	atomic {
		if
		:: tomb[0] && file[0] ->
			say("reclaim: takes the grant of unit 0 back\n"); tomb[0] = false; unit[0] = LIVE
		:: else
		fi
	}
}
#endif

inline look_at_snapshot(s) {
	if
	:: snap[s] == COMMITTED ->
		check_whole(s);
		assert(!partial[s])                      /* captured half of a collection */
	:: else
	fi;
	assert(!reaped[s]);                              /* lost: a committed snapshot */
#if LOST
	assert(snap[s] != COMMITTED || !failureReported[s]);  /* committed after "it failed" */
	assert(!(pend[s] && forgotten[s]));              /* PENDING forever */
#endif
	rec_ = snap[s]; objs_ = objs[OBJ(s)];
	if
	:: rec_ == PENDING -> rec_ = DELETING            /* its lease ended with its creator */
	:: else
	fi;
	if
	:: rec_ == DELETING -> objs_ = false; rec_ = REMOVED
	:: R_SWEEP && NORECORD(s) -> objs_ = false
	:: else
	fi;
	assert(!objs_ || rec_ == COMMITTED || !R_KEY_BY_ID) /* leaked: an object without a record */
}
inline look_at_unit(f) {
	assert(file[f] || unit[f] != LIVE);              /* lost: a file of the catalog */
	file_ = file[f] && !tomb[f] && !(unit[f] == DROPPED && !REFERS(0, f) && !REFERS(1, f));
	assert(!file_ || unit[f] == LIVE || NEEDED(f))   /* leaked: an unneeded file */
}
proctype Monitor() {
	mtype rec_;
	bool objs_, file_;
end:	do
	:: d_step {
		look_at_snapshot(0); look_at_snapshot(1); look_at_unit(0); look_at_unit(1);
		rec_ = 0; objs_ = false; file_ = false
	   }
	od
}

init {
	atomic {
		run Creator(0);
#if CREATORS == 2
		run Creator(1);
#endif
		run Others();
		run Reclaimer(0);
#if RECLAIMERS == 2
		run Reclaimer(1);
#endif
#if RESTORES
		run Restore(0);
#endif
#if SWEEPERS
		run Sweeper(0);
#endif
#if !R_DROP_PINS_TXN
		run Dropper(0);
#endif
#if !R_NO_REUSE
		run Reuser();
#endif
#if !R_GRANT_FINAL
		run Taker();
#endif
		run Monitor()
	}
}
