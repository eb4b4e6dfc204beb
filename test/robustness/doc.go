// Package robustness runs snapshotd as in production and harms its environment: three
// members of etcd, an S3 server behind a proxy that injects faults, and three replicas
// of the built program. Each is a process that is killed, stopped or cut off while
// clients are at work. The package has only tests; `make robustness` runs them. Other
// test runs include only the tests of its judges, on histories with an injected mistake.
//
// # A scenario
//
// A scenario is one kind of harm. Clients write segments with real objects, compact and
// drop them, take, drop, pin, read and list snapshots under few names, restore, cancel,
// request deletions and collector cycles. The ledger records for each call its start,
// its end, and its outcome: success, a definite error, or no answer, which may mean
// either. Meanwhile the scenario does its harm. It counts each fault once the effect is
// observed: a stopped leader counts once another leads, a compacted watch once the
// replica logs it. Kinds of harm take turns until each planned fault has fired.
//
// Some scenarios have a collection and a client of their own: where the harm must hit
// the copies of a worker, where objects are large enough to be copied in parts, and
// where files of snapshots are replaced or deleted behind snapshotd's back, which the
// judges then do not expect.
//
// Foreign objects are in all places that deletes reach, and must remain to the end.
// Objects under the ids of dropped snapshots, as a process may write that was thought
// dead, must not remain. A sweep may delete objects that are an hour old. The proxy
// reports every object as older than that in listings, so only the rules of the sweep,
// and not the age of objects, protect what is needed.
//
// Then all harm ends, and a create, a restore, a collector cycle and a sweep must
// succeed. The judges check the result:
//
//   - the history of each name is linearizable (register_test.go): an acknowledged
//     snapshot is visible to every later reader, until it is dropped;
//   - no acknowledged snapshot is lost, and each holds exactly the segments that were
//     acknowledged before it began and not removed, no removed segment, and exactly one
//     side of a compaction;
//   - every object of a committed snapshot and of a live segment exists, with the bytes
//     that the client wrote; every object has an owner;
//   - no delete that reached the S3 server was of an object that was needed at that
//     moment (ledger_test.go);
//   - a completed restore has all of its snapshot, byte for byte; any other left neither
//     a name nor an object.
//
// The ledger belongs to the clients: the expected content of an object never comes from
// snapshotd.
//
// # How a run ends
//
// The last line of the output is one of these, with this exit status; make turns each
// status but 0 into 2:
//
//	robustness: ok            0  all promises were kept
//	robustness: FAILED        1  a promise was broken, or the run itself failed
//	robustness: INCONCLUSIVE  3  no promise was broken, but in a scenario a planned
//	                          fault did not fire, too few calls succeeded, a history
//	                          was not judged in time, or no time was left
//
// An INCONCLUSIVE run proves nothing. Repeat it once; a second one in a row means that
// the machine is too slow, or that a fault no longer has an effect.
//
// # Replay
//
// A seed decides the requests of the clients, their order, and the times of faults. It
// does not decide the scheduling of processes, so a seed repeats the kind of run and not
// each event; the simulation (test/sim) does. A run prints its seed, and keeps the logs
// of a scenario that failed.
package robustness
