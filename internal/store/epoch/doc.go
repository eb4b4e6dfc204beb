// Package epoch detects that the metadata store went back in time, for example after a restore of etcd from a backup.
// Such a store assigns ids that are in use and has no record of newer snapshots, so it must neither allocate nor
// delete. The package therefore records the progress of the metadata store in the object store, which outlives it.
//
// # Terms
//
//	heartbeat   writes the next high-water mark
//	mark        the high-water mark of one heartbeat: the object gc/epoch/<number>.json (field "beat"). The one with the
//	            greatest number is the newest
//	intent      the bytes of the next mark, in /epoch: any replica can finish that heartbeat
//	idLimit     no id at or above it is allocated before a mark has recorded a higher limit (field "ceiling")
//	rolled back the metadata store is older than the newest mark; the key /behind exists
//	lostBelow   ids below it without a record may have been lost in a rollback: their objects are never deleted for lack
//	            of a record (field "floor")
//	history     the number of recoveries, plus one. Create revisions are comparable only between records of one history:
//	            in a store to which records were copied, a recovery excludes the copies
//
// # States
//
//	         intend                   create, check, done
//	mark n ----------> mark n, n+1 intended ----------> mark n+1
//
//	         check                  recover
//	(normal) ------> /behind ------------------> (normal)
//
// # Heartbeat
//
//	read    at one revision: /epoch, /ids, /behind
//	intend  compares: /epoch as read, no /behind
//	        puts: /epoch with the intent: number, nonce, the revision of the read, an idLimit that is not below the
//	        previous one, the time
//	create  (object store) creates the object unless it exists. Equal bytes in an existing object are a success
//	check   as below: a greater mark may exist
//	done    compares: /epoch as intended, no /behind; if the idLimit grew, /ids as read
//	        puts: /epoch with the number, without the intent; if the idLimit grew, /ids with it
//	        then all objects except the newest two are deleted
//
// Any replica may send a heartbeat: the leader does so each minute, and other replicas when they need a higher idLimit.
// A replica that finds an intent finishes that heartbeat first. Every replica writes the same bytes under the same key,
// so finishing one repeatedly or late does no harm. An object that a frozen process creates again after its deletion is
// not the newest, and the next heartbeat deletes it.
//
// # Check
//
// Check lists the objects, reads the newest, and then reads /epoch, which is therefore at least as new as the list. The
// metadata store was rolled back if the newest mark is
//
//	beyond the number that is done, and is not the intended one
//	of a greater revision than that of the store
//	of another cluster
//
// The last two conditions do not apply to marks up to the last recovery. None of the three can hold for a store that
// never went back, because an object is created after its intent is written.
//
//	/behind  compares: /epoch as read, no /behind
//	         puts: /behind
//	recover  compares: /epoch, /ids, /behind as read
//	         puts: /ids, with a next id that is not below the greatest idLimit; /epoch with the greatest number, or the
//	         one beyond the intended one, without the intent, with that next id as lostBelow, and with the next history;
//	         deletes: /behind. If the store was not rolled back, nothing is put unless the recovery is forced
//	         a heartbeat follows
//
// While /behind exists, transactions that allocate ids or grant deletions fail on a compare of that key, and the leader
// does no work.
//
// # Failures
//
//	intend, done: no reply   the heartbeat fails; the next one reads the result and continues from it
//	create: no reply         likewise; the object, if it exists, has the bytes of the intent
//	process dies, freezes    the next heartbeat finishes the intent
//	create: an object with   check decides: rolled back, unless another replica finished the heartbeat meanwhile and the
//	other bytes exists       object was deleted
//	object store unavailable check or heartbeat fails and is retried: this is not a rollback. A leader that works
//	                         continues, one that has not started waits. Ids are allocated up to the idLimit
//	objects are lost         a warning; the next heartbeat creates one
//	objects are not listed   the known mark and its successors are read by name
//	an id is assigned twice  a create whose new id has an object that snapshotd wrote earlier, with other content, puts
//	                         /behind (Alarm). Any other object, and a read that was altered, fails that create alone
//	object is damaged        check fails and names it, until an operator repairs or removes it
//	recover: no reply        a repeat finds it done, or does it
//	recover: the heartbeat   the error reports it. The recovery holds; the next heartbeat writes the mark
//	fails
//
// # Limits
//
// A heartbeat is a sample. Ids that were allocated and deletions that were granted between the last heartbeat before a
// backup and the next one go undetected if the store is replaced before that next one. A forced Recover after every
// restore skips such ids in any case. Replicas that run while their store is replaced detect it at the leader's next
// check; operators must stop them first.
package epoch
