// Package sim simulates a cluster: real replicas of the manager, with the copy
// jobs, references, collector and epochs below it, over the stores in memory, in
// virtual time. It has tests alone; `make sim` runs them.
//
// # How it works
//
// Each replica reaches the two stores through a gate of its own. Every call
// parks there, and nothing goes on until all goroutines wait. Then the scheduler
// sorts what is parked by names that are the same in each run (replica, method,
// keys, a digest of what is asked), and has a generator, of which the seed is all
// there is to know, choose one thing: a call takes effect and is answered; fails
// before it has an effect, or after; is held up; a replica crashes, freezes,
// thaws or begins anew; a caller asks for something; or time passes. A call whose
// caller gave up, or died, may still take effect, at any time later. Ids and
// jitter come from the seed as well.
//
// The stores may lie: an object is read with a byte that is wrong, in part, or of
// another range, once or for a while by everybody; a scan or a list ends in its
// middle; a list leaves a key out, or has it twice; a copy that fails leaves an
// upload open; somebody else writes where a create is about to. Clocks differ, those
// of the replicas and that of the object store, and jump. A run may have more of
// some requests than of others, and calls of one kind that are slow. The notes of
// package epoch, which have no digest, are always read as they are.
//
// The oracle follows the metadata store by a watch of its own and knows what
// each object held since it was written. After each step it judges what has
// changed:
//
//   - every file that a committed snapshot has is there with its content when it
//     is committed, and the snapshot's own objects are whole;
//   - nothing is deleted that a committed snapshot, a segment or a unit that is
//     not granted needs at that moment, nor what is nobody's;
//   - no key of the object store ever holds two contents, and no id is handed out
//     twice;
//   - a create that was acknowledged is there, shows all that was acknowledged
//     before it began, and is listed and read until somebody drops it; one that
//     was said to have failed never appears; a repeat gets the same answer;
//   - what is granted is held by nobody; a grant stays, and goes only when its
//     files are gone;
//   - a restore that is COMPLETED has a target with all that the snapshot has; of
//     one that ended otherwise nothing is left in the catalog;
//   - a snapshot that is pinned is not dropped; a pin is as it was answered, that of
//     a restore ends with its job alone, and while that is open the snapshot stays;
//   - the records of snapshots, jobs and tasks move as they may, and nothing changes
//     that is COMMITTED, or has ended; a result is that of the newest attempt;
//   - the target of a restore shows in the transaction that makes the job COMPLETED;
//   - what is the leader's alone is written under the term of the leader, and a grant
//     is made by who has read what each snapshot of the collection references;
//   - a snapshot expires by two clocks that agree, and a sweep takes what is old
//     enough by that of the object store;
//   - the metadata store is noted to be behind only after it went back in time.
//
// In the end all faults are off, all is dropped and time passes. Then the stores
// must be empty but for what stands for ever.
//
// In runs of another kind the metadata store goes back to what it was in the middle
// of the course, when beats have noted since how far it had come. Once that is
// noticed nothing is deleted, granted, or handed out; after the recovery no id is one
// that stood for something, and what may be of the store that is lost stays.
//
// # Replay
//
// A seed gives the same run each time, which its trace shows: a digest of all
// that was chosen, with what was answered. What could keep it from that is in the
// runtime of Go: which of several ready cases a select takes, the order of a map
// and of timers of one instant, and when goroutines are interrupted. So one
// processor runs the simulation, no collection of garbage happens in a run, and
// names instead of arrivals order the calls; and `make sim` builds with a patched
// runtime in which the seed decides these things too (exact.sh, the tag exact).
// `make sim-replay` requires the same trace of two runs of a seed (TestReplay). An
// ordinary `go test`, and `make sim` on a Go release that exact.sh does not know,
// run the same simulation on the unpatched runtime. A seed that fails there gives
// the profile and the workload, and mostly not the same trace.
package sim
