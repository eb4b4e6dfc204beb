// Package sim simulates a cluster in virtual time: real replicas of the manager, with the
// copy jobs, references, collector and epochs below it, over the stores in memory. It has
// only tests; `make sim` runs them.
//
// # How it works
//
// Each replica reaches the two stores through a gate. Every call waits there, and nothing
// proceeds until all goroutines wait. Then the scheduler sorts the waiting calls by names
// that are the same in each run (replica, method, keys, a digest of the arguments). A
// generator, whose only input is the seed, chooses one step: a call takes effect and is
// answered; fails before it has an effect, or after; is held up; a replica crashes,
// freezes, thaws or restarts; a caller makes a request; or time passes. A call whose
// caller gave up, or died, may still take effect at any later time. Ids and jitter also
// come from the seed.
//
// The stores may return wrong data: an object is read with a wrong byte, in part, or from
// another range, once or for a while by all replicas; a scan or a list ends early; a list
// omits a key, or has it twice; a failed copy leaves an upload open; a foreign object
// appears where a create is about to write. Clocks differ and jump, on the replicas and
// in the object store. A run may have more requests of some kinds than of others, and
// slow calls of one kind. The objects of package epoch, which have no digest, are always
// read correctly.
//
// The oracle follows the metadata store by its own watch and records the content of each
// object since it was written. After each step it judges the changes:
//
//   - every file of a committed snapshot exists with its content at the commit, and the
//     snapshot's own objects are whole;
//   - no object is deleted that a committed snapshot, a segment or a unit that is not
//     granted needs at that moment, and no foreign object;
//   - no key of the object store ever holds two contents, and no id is allocated twice;
//   - an acknowledged create exists, shows everything that was acknowledged before it
//     began, and is listed and read until it is dropped; a create that failed never
//     appears; a repeat gets the same answer;
//   - nothing holds a granted unit; a grant stays until its files are deleted;
//   - the target of a COMPLETED restore has everything that the snapshot has; any other
//     ended restore leaves nothing in the catalog;
//   - a pinned snapshot is not dropped; a pin is as it was answered, the pin of a restore
//     ends only with its job, and while the job is open the snapshot stays;
//   - the records of snapshots, jobs and tasks make only legal transitions, and a record
//     that is COMMITTED or ended does not change; a result is that of the newest attempt;
//   - the target of a restore appears in the transaction that makes the job COMPLETED;
//   - what only the leader may write is written under the term of the leader, and only a
//     replica that has read the references of each snapshot of the collection grants;
//   - a snapshot expires by two clocks that agree, and a sweep deletes what is old enough
//     by the clock of the object store;
//   - the metadata store is marked as rolled back only after it went back in time.
//
// In the end all faults stop, everything is dropped and time passes. Then the stores must
// be empty but for the standing keys and objects. No copy leaves an upload open after a
// jump of the object store's clock: its start then shows no order.
//
// In runs of another kind the metadata store goes back to an earlier revision, after
// heartbeats have recorded a later one. Once that is noticed nothing is deleted, granted
// or allocated; after the recovery no id is allocated that was in use, and objects that
// may belong to the lost store stay.
//
// # Replay
//
// A seed gives the same run each time, with the same trace: a digest of all choices and
// answers. The runtime of Go has other sources of randomness: the choice of a select among
// ready cases, the order of a map and of timers of one instant, and the preemption of
// goroutines. So one processor runs the simulation, no garbage collection happens in a
// run, and names instead of arrivals order the calls; and `make sim` builds with a patched
// runtime in which the seed decides these as well (exact.sh, the tag exact).
// `make sim-replay` requires the same trace of two runs of a seed (TestReplay). An
// ordinary `go test`, and `make sim` on a Go release that exact.sh does not know,
// run the same simulation on the unpatched runtime. A seed that fails there gives
// the profile and the workload, and mostly not the same trace.
package sim
