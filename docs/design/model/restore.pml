/*
 * One restore: two files are copied into a new collection while leaders change,
 * two attempts of one task run at once, a user cancels, another wants the target's
 * name, the snapshot is dropped, and the published collection is compacted.
 * check.sh runs it; the argument in words is in ../protocols.md.
 *
 * HOW TO READ IT
 *
 *   atomic { }       one transaction of the metadata store, or one read at a
 *                    revision
 *   a step alone     one call of the object store. It may come arbitrarily late
 *   no more steps    a process that died. Death and delay are possible between any
 *                    two steps: no process has to continue
 *   say(...)         prints during the replay of a trail, without any other effect
 *
 * STATE
 *
 *   snap             the snapshot's record; src[f]: the files that it references
 *   pin              the job's key under /snapshot/pin/<id>/
 *   job              the job's record: EXEC until publish or roll back, ROLLBACK,
 *                    DONE, FAILED (or canceled)
 *   coll             the target collection's record
 *   claim            /catalog/name/<db>/<name> stands for the job
 *   part             what prepare puts besides: partitions, indexes, checkpoints
 *   segs             the target segments are registered
 *   taskdone         the task's record says DONE
 *   dst[f]           the target file is there; etag[f]: its bytes, identified by
 *                    the ETag; rec[f]: the ETag that was registered
 *   retired          target unit 0 was dropped and granted after publication; tomb:
 *                    its tombstone is there
 *   taken            another collection has the target's name
 *
 * PROCESSES
 *
 *   Leader(1), (2)   the replica that moves the job; 1 may go on as a zombie when
 *                    2 was elected
 *   Prepare          a transaction of prepare under way: its answer may be lost,
 *                    and it may be applied late
 *   Worker(1), (2)   two attempts of the one task; 1 may go on as a zombie
 *   Cancel, Drop, User   CancelRestore; DropSnapshot and the snapshot's file being
 *                    reclaimed; CreateCollection or RenameCollection
 *   Retire           compaction of the target, and reclamation of what it replaced
 *   Sweeper          removes target objects that have no record
 *
 *   Monitor          looks at every state. It asks what must always hold, and what
 *                    would be left over if all processes died now and a healthy
 *                    leader then finished what the records say. It writes nothing
 */

/* ---- RULES: 1 is the protocol, 0 breaks it. -------------------------------- */

#ifndef R_ADMIT_ONE      /* admit: claim, job and pin in one transaction */
#define R_ADMIT_ONE 1
#endif
#ifndef R_PIN            /* admit: a pin, which only the job's last transaction removes */
#define R_PIN 1
#endif
#ifndef R_CLAIM          /* create and rename compare the name's key, which the job claims */
#define R_CLAIM 1
#endif
#ifndef R_PREPARE_JOB    /* prepare: each transaction compares the job's record */
#define R_PREPARE_JOB 1
#endif
#ifndef R_TASK_JOB       /* copy: what a worker registers compares the job's record */
#define R_TASK_JOB 1
#endif
#ifndef R_TASK_ATTEMPT   /* copy: and the task's attempt */
#define R_TASK_ATTEMPT 1
#endif
#ifndef R_SAME_BYTES     /* copy: each attempt makes the same object (threshold, part size in the job) */
#define R_SAME_BYTES 1
#endif
#ifndef R_VERIFY         /* copy: the target is listed before the task is done */
#define R_VERIFY 1
#endif
#ifndef R_PUBLISH_TASKS  /* publish: all tasks are done */
#define R_PUBLISH_TASKS 1
#endif
#ifndef R_PUBLISH_JOB    /* publish: compares the job's record, EXEC in phase copy */
#define R_PUBLISH_JOB 1
#endif
#ifndef R_ROLLBACK_FIRST /* roll back: no delete before the transaction that excludes publish */
#define R_ROLLBACK_FIRST 1
#endif
#ifndef R_END_LAST       /* roll back: nothing is terminal before the last transaction */
#define R_END_LAST 1
#endif
#ifndef R_LEADER         /* what a leader writes compares the election's key */
#define R_LEADER 1
#endif
#ifndef R_SWEEP          /* objects under the ids of an ended job that have no record are swept
                            2: of a failed one only */
#define R_SWEEP 1
#endif
#ifndef R_SWEEP_ENDED    /* of an ended job only */
#define R_SWEEP_ENDED 1
#endif

/* ---- SIZE: what takes part. -------------------------------------------------- */

#ifndef LEADERS
#define LEADERS 2
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#ifndef CANCELS
#define CANCELS 1
#endif
#ifndef DROPS
#define DROPS 1
#endif
#ifndef USERS
#define USERS 1
#endif
#ifndef RETIRES
#define RETIRES 1
#endif
#ifndef SWEEPERS
#define SWEEPERS 1
#endif

/* ---- MODEL. ------------------------------------------------------------------ */

#define say printf

mtype = { COMMITTED, DELETING, NOJOB, EXEC, ROLLBACK, DONE, FAILED, NOCOLL, RESTORING, ACTIVE };

mtype snap = COMMITTED;
mtype job = NOJOB;
mtype coll = NOCOLL;
bool src[2] = true;
bool dst[2];
byte etag[2];
byte rec[2];
bool claim, pin, part, segs, taskdone, retired, tomb, taken;
bool asked1, asked2;             /* the task was given to attempt 1, 2 */
byte attempt;
byte leader = 1;

#define LEADS(t)  (leader == t || !R_LEADER)
#define ENDED     (job == DONE || job == FAILED)

inline copy(f, a) {
	if
	:: !dst[f] ->
		if
		:: src[f] ->
			if
			:: atomic { say("worker %d: file %d is copied\n", a, f);
				dst[f] = true; etag[f] = (R_SAME_BYTES -> 1 : a) }
			:: say("worker %d: file %d: an answer, but no copy\n", a, f)
			fi
		:: else -> say("worker %d: source %d is gone\n", a, f); goto end
		fi
	:: dst[f]                              /* stands there already */
	fi
}

proctype Prepare(byte t) {
	atomic {
		if
		:: LEADS(t) && (!R_PREPARE_JOB || job == EXEC) ->
			say("leader %d: prepare: partitions are put\n", t); part = true
		:: else
		fi
	}
}

proctype Worker(byte a) {
	byte seen0, seen1;
	copy(0, a);
	copy(1, a);
	if
	:: atomic { !R_VERIFY || (dst[0] && dst[1]) ->
		say("worker %d: lists the target\n", a); seen0 = etag[0]; seen1 = etag[1] }
	:: else -> goto end
	fi;
	atomic {
		if
		:: (!R_TASK_ATTEMPT || attempt == a) && (!R_TASK_JOB || job == EXEC) ->
			say("worker %d: registers the segments, task done\n", a);
			segs = true; taskdone = true; rec[0] = seen0; rec[1] = seen1
		:: else
		fi;
		seen0 = 0; seen1 = 0
	};
end:	skip
}

inline end_failed() {
	job = FAILED; coll = NOCOLL; claim = false; pin = false
}

inline roll_back(t) {
	atomic { say("leader %d: roll back: deletes target file 0\n", t); dst[0] = false };
	dst[1] = false;
	atomic {
		if
		:: LEADS(t) && job == ROLLBACK -> segs = false
		:: else -> goto end
		fi
	};
	atomic {
		if
		:: LEADS(t) && job == ROLLBACK -> part = false
		:: else -> goto end
		fi
	};
	atomic {
		if
		:: LEADS(t) && job == ROLLBACK -> say("leader %d: roll back ends: job FAILED\n", t); end_failed()
		:: else
		fi
	}
}

proctype Leader(byte t) {
	do
	:: atomic { LEADS(t) && job == EXEC && coll == NOCOLL -> /* the name is the job's already */
		say("leader %d: prepare: collection RESTORING\n", t); coll = RESTORING }
	:: job == EXEC && coll == RESTORING && !part ->
		run Prepare(t);
		if
		:: part
		:: goto fail                   /* no answer */
		fi
	:: atomic { LEADS(t) && job == EXEC && part && !asked1 ->
		say("leader %d: attempt 1 of the task\n", t); attempt = 1; asked1 = true; run Worker(1) }
	:: atomic { LEADS(t) && ATTEMPTS == 2 && job == EXEC && asked1 && !asked2 ->
		say("leader %d: attempt 2 of the task\n", t); attempt = 2; asked2 = true; run Worker(2) }
	:: atomic { LEADS(t) && part && coll == RESTORING && (taskdone || !R_PUBLISH_TASKS) &&
		(job == EXEC || (!R_PUBLISH_JOB && job == ROLLBACK)) ->
		say("leader %d: publish: job DONE, collection ACTIVE, pin gone\n", t);
		job = DONE; coll = ACTIVE; claim = false; pin = false }
	:: job == EXEC && (asked2 || (ATTEMPTS == 1 && asked1)) -> goto fail  /* the attempts are used up */
	:: job == ROLLBACK -> roll_back(t); break
	:: ENDED || !LEADS(t) -> break
	od;
	goto end;
fail:
#if !R_ROLLBACK_FIRST
	if
	:: job == EXEC -> say("leader %d: has read that the job is EXEC, gives it up\n", t);
		atomic { say("leader %d: deletes target file 0\n", t); dst[0] = false }; dst[1] = false
	:: else -> goto end
	fi;
#endif
	atomic {
		if
		:: LEADS(t) && job == EXEC ->
#if R_END_LAST
			say("leader %d: job to ROLLBACK\n", t); job = ROLLBACK
#else
			say("leader %d: job FAILED, claim and pin gone\n", t); end_failed()
#endif
		:: else -> goto end
		fi
	};
#if R_END_LAST
	roll_back(t);
#else
	dst[0] = false; dst[1] = false; segs = false; part = false;
#endif
end:	skip
}

proctype Cancel() {
	atomic {
		if
		:: job == EXEC -> say("user: cancels: job to ROLLBACK\n"); job = ROLLBACK
		:: else
		fi
	}
}

proctype Drop() {
	atomic {
		if
		:: snap == COMMITTED && !pin -> say("user: drops the snapshot\n"); snap = DELETING
		:: else -> goto end
		fi
	};
	atomic { say("reclaimer: deletes the sources\n"); src[0] = false; src[1] = false };
end:	skip
}

proctype User() {
	atomic {
		if
		:: !R_CLAIM || (!claim && coll == NOCOLL) -> say("user: creates a collection of the target's name\n"); taken = true
		:: else
		fi
	}
}

proctype Retire() {
endwait:
	atomic { job == DONE -> say("target: unit 0 is dropped and granted\n"); retired = true; tomb = true };
	atomic { say("reclaimer: deletes target file 0\n"); dst[0] = false };
	atomic { say("reclaimer: confirmed: its tombstone goes\n"); tomb = false }
}

proctype Sweeper() {
endwait:
	dst[0] -> say("sweep: lists target file 0\n");
	if
	:: (ENDED || !R_SWEEP_ENDED) && (!segs || (retired && !tomb)) -> say("sweep: it has no record\n")
	:: else -> goto end
	fi;
	atomic { say("sweep: deletes target file 0\n"); dst[0] = false };
end:	skip
}

proctype Monitor() {
	mtype job_;
	bool dst0_, dst1_, left_;
end:	do
	:: d_step {
		assert(job != EXEC || (src[0] && src[1]));         /* a source is gone under a running job */
		if
		:: job == DONE -> /* it is whole, but for what was dropped from it since */
			assert(!taken);                            /* two collections of one name */
			assert(coll == ACTIVE && segs && part && !claim && !pin); /* published and not whole */
			assert(retired || (dst[0] && rec[0] == etag[0])); /* published and not whole */
			assert(dst[1] && rec[1] == etag[1])        /* published and not whole */
		:: else
		fi;
		/* What a healthy leader would leave, which rolls back what runs and sweeps. */
		job_ = job; dst0_ = dst[0]; dst1_ = dst[1]; left_ = segs || part || claim || pin || coll != NOCOLL;
		if
		:: job == EXEC || job == ROLLBACK -> job_ = FAILED; dst0_ = false; dst1_ = false; left_ = false
		:: R_SWEEP && job == FAILED && !segs -> dst0_ = false; dst1_ = false
		:: job == DONE && (tomb || (R_SWEEP == 1 && retired)) -> dst0_ = false
		:: else
		fi;
		assert(job_ != FAILED || (!dst0_ && !dst1_ && !left_)); /* left over by a failed job */
		assert(job_ != DONE || !retired || !dst0_);        /* leaked: a target file */
		job_ = 0; dst0_ = false; dst1_ = false; left_ = false
	   }
	od
}

inline others() {
	if :: CANCELS -> run Cancel() :: else fi;
	if :: DROPS -> run Drop() :: else fi;
	if :: USERS -> run User() :: else fi;
	if :: RETIRES -> run Retire() :: else fi;
	if :: SWEEPERS -> run Sweeper() :: else fi
}

init {
#if R_ADMIT_ONE
	atomic {
		snap == COMMITTED && !taken -> say("restore: admit: job EXEC, claim, pin\n");
		job = EXEC; claim = true; pin = R_PIN
	};
	atomic { run Monitor(); run Leader(1); others() };
#else
	atomic { run Monitor(); others() };
	if
	:: snap == COMMITTED -> say("restore: admit: the snapshot is COMMITTED\n")
	:: else -> goto over
	fi;
	atomic {
		if
		:: !taken -> say("restore: admit: job EXEC, claim\n"); job = EXEC; claim = true
		:: else -> goto over
		fi
	};
	atomic { say("restore: admit: pin\n"); pin = true; run Leader(1) };
#endif
	if
	:: atomic { LEADERS == 2 -> say("leader 2 is elected\n"); leader = 2; run Leader(2) }
	fi;
over:	skip
}
