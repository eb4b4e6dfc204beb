// Package torture runs snapshotd as it is run, and harms what it runs on: three
// members of etcd, an S3 server behind a proxy that fails as planned, and three
// replicas of the built program, each a process of its own that is killed,
// stopped or cut off while clients are at work. It has tests alone; `make
// torture` runs them. With all other tests run only those of its judges, on
// histories with a mistake planted in them.
//
// # A scenario
//
// A scenario is one kind of harm. Clients write segments with real objects,
// compact and drop them, take, drop, pin, read and list snapshots under few
// names, restore, cancel, ask for deletions and for rounds of the collector. Each
// call is noted with when it was made, when it was answered, and whether the
// answer was a success, a definite error, or no answer at all, which may mean
// either. Meanwhile the scenario does its harm, and counts each fault when it is
// seen to have had its effect: a leader that is stopped counts once another one
// leads. A scenario in which a planned fault did not fire, or too few calls
// succeeded, is INCONCLUSIVE, and the run fails as if a promise were broken.
//
// Then all harm ends, and a create, a restore and a round of the collector must
// succeed. What is left is judged:
//
//   - the history of each name is linearizable (register_test.go): what was
//     acknowledged is seen by whoever asks later, until somebody drops it;
//   - no acknowledged snapshot is lost, and each holds exactly what was
//     acknowledged before it began and not removed, nothing that was removed, and
//     of a compaction one side alone;
//   - every object of a committed snapshot and of a living segment is there, with
//     the bytes that the client wrote; nothing is there that is nobody's;
//   - every delete that reached the S3 server was of something that nobody needed
//     at that moment (ledger_test.go);
//   - a restore that ended well has all of its snapshot, byte for byte; one that
//     did not has left neither name nor object.
//
// The ledger is the clients' own: what an object must hold is never asked of
// snapshotd.
//
// # Replay
//
// A seed decides what the clients ask for, in which order each of them does, and
// when faults come. It does not decide how the machine schedules processes, so a
// seed brings back the kind of run, and not each event of it; the simulation
// (internal/sim) is for that. A run prints its seed, and keeps the logs of a
// scenario that failed.
package torture
