// Package robustness runs snapshotd as it is run, and harms what it runs on: three
// members of etcd, an S3 server behind a proxy that fails as planned, and three
// replicas of the built program, each a process of its own that is killed,
// stopped or cut off while clients are at work. It has tests alone; `make
// robustness` runs them. With all other tests run only those of its judges, on
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
// leads, a replica whose watches were compacted away once it says so. Kinds of harm
// take turns until each that is planned has fired.
//
// Some scenarios have a collection and a client of their own: where the copies of a
// worker are to be met in their middle, where objects are large enough to be copied
// in parts, and where somebody replaces and deletes files of snapshots past
// snapshotd, which the judges then do not ask for.
//
// Objects of nobody's lie in all places that deletes come by, and must be there in
// the end. Objects under the ids of dropped snapshots, as a process writes that was
// thought dead, must not. A sweep may delete what is an hour old; the proxy has every
// listing say that all objects are, so that nothing but the rules of the sweep, and
// not their age, protects what is needed.
//
// Then all harm ends, and a create, a restore, a round of the collector and a sweep
// must succeed. What is left is judged:
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
// # How a run ends
//
// The last line of the program's output is one of these, and its exit status says
// the same; make turns each that is not 0 into 2:
//
//	robustness: ok            0  all promises were kept
//	robustness: FAILED        1  a promise was broken, or the run itself went wrong
//	robustness: INCONCLUSIVE  3  nothing was broken, but in a scenario a planned fault
//	                          did not fire, too few calls succeeded, a history was
//	                          not judged in time, or no time was left
//
// An INCONCLUSIVE run says nothing. It may be made once more; a second one in a row
// says that the machine is too slow, or that a fault is not one any more.
//
// # Replay
//
// A seed decides what the clients ask for, in which order each of them does, and
// when faults come. It does not decide how the machine schedules processes, so a
// seed brings back the kind of run, and not each event of it; the simulation
// (test/sim) is for that. A run prints its seed, and keeps the logs of a
// scenario that failed.
package robustness
