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
//   - a snapshot that is pinned is not dropped.
//
// In the end all faults are off, all is dropped and time passes. Then the stores
// must be empty but for what stands for ever.
//
// # Replay
//
// A seed gives the same run each time, which its trace shows: a digest of all
// that was chosen, with what was answered. What could keep it from that is in the
// runtime of Go: which of several ready cases a select takes, the order of a map
// and of timers of one instant, and when goroutines are interrupted. So one
// processor runs the simulation, no collection of garbage happens in a run, and
// names instead of arrivals order the calls; and `make sim` builds with a runtime
// in which the seed decides these things too (exact.sh, the tag exact). There
// TestReplay demands the same trace. An ordinary `go test` makes runs of the same
// kind with the runtime as it is, and they mostly do not replay: a seed that fails
// there names a profile and a workload, no course.
package sim
