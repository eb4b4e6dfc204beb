// Package clock provides the time for all lifetimes: the expiry of snapshots and pins, the age of a dropped segment,
// the deadline of a restore. A wall clock alone can be wrong by hours and can step. Therefore lifetimes are stamped and
// judged by readings of one kind, and judging stops while a clock has stepped.
//
// # Terms
//
//	own clock    the wall clock of this host
//	elapsed      a counter that runs while the host sleeps (CLOCK_BOOTTIME) and never steps
//	store        the clock of the object store, if that is another host's
//	authority    the store's clock, or without one the own clock
//	measurement  of both clocks against elapsed. Between two measurements the authority is the last one plus the elapsed
//	             time
//	off          own clock and store differ by over a minute
//	step         the authority moved by over a minute against elapsed
//	record       the key /clock: the reading of the leader's last measurement, written once a minute
//
// # Readings
//
//	stamp  not earlier than the true time: the later of own clock and store; the store's if the own clock is off; the own
//	       clock if there is no other
//	judge  not later than the true time: the earlier of the two; else as stamp. A lifetime has ended if its end is not
//	       after this reading
//
// The two clocks that a reading selects from differ by at most a minute, so a lifetime that one replica stamped and
// another judges never ends early, and ends at most two minutes late.
//
// # States
//
//	         step, gap                  recover, a day of steady clocks
//	running ----------> stopped (/clock) -----------------------------> running
//
// While the clock is stopped, Judge fails: nothing expires and nothing is collected. Stamp fails as well, except after
// a gap: a clock that is ahead makes lifetimes longer, never shorter.
//
//	step     two measurements of one process differ by more than a minute, forward or backward; or the authority is more
//	         than a minute before the record
//	gap      the first measurement is more than the maximum downtime after the record: no process ran, or the clock
//	         stepped meanwhile. A shorter gap counts as downtime
//	ahead    without a store's clock: the record changes between two measurements, so the leader wrote it in that time,
//	         and the authority is further ahead of it than the sum of that time, the longest write of a record and a
//	         minute. One of the two clocks is wrong
//	suspect  a process that saw a step, or is ahead, and does not lead. Its own counter may have stopped, as in a paused
//	         virtual machine. It neither stamps nor judges until a record of another replica agrees with its reading, or
//	         until it leads
//	steady   the time without a step, as elapsed in leaders, since the clock stopped
//
// # Transactions
//
//	record   compares: /clock as read, the leader's election key
//	         puts: /clock with the reading; while stopped also the previous cause and the steady time, which a step
//	         resets to zero; after a day of steady time without a cause
//	stop     is a record with a cause
//	recover  compares: /clock as read
//	         puts: /clock with the reading and without a cause, also if the clock is not stopped
//
// # Failures
//
//	store unavailable           the last measurement is used for a day. Without one, Stamp and Judge fail with the
//	                            store's error
//	metadata store unavailable  Stamp and Judge fail once the last measurement is older than measureInterval
//	record: no reply            the next measurement reads the result
//	stop: no reply              the process remembers the step and does not judge; the next record retries
//	process dies before the     the next process compares its first measurement with the record. A step forward of less
//	stop is written             than the maximum downtime then counts as downtime
//	leader is frozen            its record fails on the election key
//	recover: no reply           a repeat finds it done, or does it
//	host sleeps                 elapsed continues: no step
//	two replicas without a      the one whose clock is over a minute before the record neither stamps nor judges, nor
//	store's clock               does one that is ahead. If the latter becomes leader, its first record stops the clock
//	a replica leads before it   its difference from the record of the last leader counts as downtime
//	has seen two records
package clock
