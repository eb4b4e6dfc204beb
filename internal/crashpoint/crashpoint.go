// Package crashpoint names the steps at which a crash is tried: the writes to the
// metadata store and to object stores that must not be lost, doubled or left
// half done.
//
//	var atCommit = crashpoint.New("create.commit")
//
//	atCommit.Before()
//	res, err := kv.Txn(ctx, txn)
//	atCommit.After()
//
// In a release all of it is empty and is inlined to nothing: there is neither a
// name nor a branch in the program. With the build tag crashpoints a point enters
// its name when its package is initialized, so that whoever goes through them all
// cannot miss a new one, and the process kills itself with SIGKILL at the one that
// the environment variable SNAPSHOTD_CRASH says:
//
//	SNAPSHOTD_CRASH=create.commit:before     the first time that it is about to
//	SNAPSHOTD_CRASH=create.commit:after:2    the second time that it has
//
// After means that the step was made, not that it succeeded: a transaction whose
// compares did not hold, or that got no answer, counts as well. A step is made
// every time that its code comes by, also by another goroutine.
//
// Where SNAPSHOTD_CRASH_FROM names a file, passes count from when that is there,
// for points that a start comes by as well. Where SNAPSHOTD_CRASH_REACHED names
// one, the process adds a line to it when a side of a point is passed for the first
// time: name:before or name:after.
//
// A name is the operation, a dot and the step, both in small letters. Points are
// package variables, each of a name of its own.
package crashpoint
