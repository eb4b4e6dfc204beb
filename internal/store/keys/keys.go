// Package keys holds the layout of the metadata store: one key per thing, and
// no value that grows with the number of segments.
//
//	/format                                     the cluster
//	/ids                                        the id allocator
//	/epoch                                      what was last noted in the object store of this store
//	/behind                                     this store is older than that: nothing is deleted
//	/clock                                      the time as the leader read it last
//	/election/leader                            leader of the background loops
//	/store/<alias>                              id of the object store, in hex
//	/snapshot/rec/<id>                          record
//	/snapshot/name/<scope>/<name>               -> id; scope 0 is the cluster
//	/snapshot/pending/<collection>/<id>         held by the creator's lease
//	/snapshot/pin/<id>/<pin>                    what keeps a snapshot
//	/snapshot/unpin                             the pin that was removed last
//	/request/<principal>/<method>/<token>       idempotency
//	/job/rec/<id>                               restore job
//	/job/task/<job>/<task>                      range of its segments
//	/job/progress/<job>/<task>                  how far its attempt has come
//	/job/limits/<job>                           what it may use
//	/worker/rec/<id>                            held by the worker's lease
//	/worker/task/<worker>/<job>/<task>          assignment, held likewise
//	/gc/gen/<collection>                        reference generation
//	/gc/tomb/<collection>/<unit>                granted deletes
//	/gc/round                                   what the leader's last round came to
//	/catalog/name/<db>/<name>                   -> collection id
//	/catalog/collection/<id>                    record
//	/catalog/partition/<collection>/<id>        record
//	/catalog/partition-name/<collection>/<name> -> id
//	/catalog/index/<collection>/<id>            record
//	/catalog/index-name/<collection>/<name>     -> id
//	/catalog/channel/<collection>/<shard>       checkpoint
//	/catalog/segment/<collection>/<id>          record
//	/catalog/root/<store>/<prefix>/<collection> the collection has the root
//	/catalog/unit/<collection>/<unit>           dropped, waits to be reclaimed
//	/catalog/replaced/<collection>/<segment>/<unit>
//	                                            -> unit of a part of a segment
//	/catalog/owner/segment/<id>                 -> collection that claims the id for a segment
//	/catalog/owner/build/<id>                   -> collection that claims the id for a part of one
//	/catalog/owner/range/<last>                 ids that a restore claims, by the last of them
//	/catalog/owners                             every record from before has its claims
//	/catalog/gone/<block>                       ids whose records are gone
//
// Ids are written with leading zeros, so that key order is id order. Names
// follow the rule of names and hold no slash; request tokens are hashed.
package keys

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// The keys that stand alone, and the prefixes that are watched.
const (
	Format              = "/format"
	IDs                 = "/ids"
	Epoch               = "/epoch"
	RolledBack          = "/behind"
	Clock               = "/clock"
	Leader              = "/election/leader"
	SnapshotPrefix      = "/snapshot/rec/"
	AllPinsPrefix       = "/snapshot/pin/"
	Unpin               = "/snapshot/unpin"
	AllTombstonesPrefix = "/gc/tomb/"
	Cycle               = "/gc/round"
	JobPrefix           = "/job/rec/"
	AllTasksPrefix      = "/job/task/"
	AllProgressPrefix   = "/job/progress/"
	LimitsPrefix        = "/job/limits/"
	RequestPrefix       = "/request/"
	WorkerPrefix        = "/worker/rec/"
	AssignedPrefix      = "/worker/task/"
	CollectionPrefix    = "/catalog/collection/"
	AllChannelsPrefix   = "/catalog/channel/"
	AllPartitionsPrefix = "/catalog/partition/"
	AllIndexesPrefix    = "/catalog/index/"
	AllUnitsPrefix      = "/catalog/unit/"
	AllSegmentsPrefix   = "/catalog/segment/"
	OwnerRangePrefix    = "/catalog/owner/range/"
	Owners              = "/catalog/owners"
	GonePrefix          = "/catalog/gone/"

	ownerSegmentPrefix = "/catalog/owner/segment/"
	ownerBuildPrefix   = "/catalog/owner/build/"
)

// All returns the range of every key of the cluster.
func All() (from, to string) { return "/", "0" }

// ID writes an id the way keys hold it.
func ID(id int64) string { return fmt.Sprintf("%019d", id) }

// Store is the id of the object store that an alias stands for.
func Store(alias string) string { return "/store/" + alias }

// VerdictPrefix is what the keys of all verdicts begin with.
const VerdictPrefix = "/verdict/"

// Verdict is what a probe found of the object store that an alias stands for.
func Verdict(alias string) string { return VerdictPrefix + alias }

// Snapshot is a snapshot's record.
func Snapshot(id int64) string { return SnapshotPrefix + ID(id) }

// SnapshotName is what a snapshot's name stands for. The scope is a collection
// id, or 0 where names are unique in the cluster.
func SnapshotName(scope int64, name string) string {
	return "/snapshot/name/" + ID(scope) + "/" + name
}

// PendingPrefix is what all pending keys of a collection begin with.
func PendingPrefix(collection int64) string { return "/snapshot/pending/" + ID(collection) + "/" }

// Pending is the pending key of a create.
func Pending(collection, snapshot int64) string { return PendingPrefix(collection) + ID(snapshot) }

// PinPrefix is what all pins of a snapshot begin with.
func PinPrefix(snapshot int64) string { return AllPinsPrefix + ID(snapshot) + "/" }

// Pin is a pin's record.
func Pin(snapshot, pin int64) string { return PinPrefix(snapshot) + ID(pin) }

// Request is the record of a request token.
func Request(principal, method, token string) string {
	h := sha256.Sum256([]byte(principal + "\x00" + token))
	return RequestPrefix + method + "/" + hex.EncodeToString(h[:])
}

// Job is a restore job's record.
func Job(id int64) string { return JobPrefix + ID(id) }

// JobLimits is what a restore job may use.
func JobLimits(id int64) string { return LimitsPrefix + ID(id) }

// TaskPrefix is what all tasks of a job begin with.
func TaskPrefix(job int64) string { return AllTasksPrefix + ID(job) + "/" }

// Task is a task's record.
func Task(job, task int64) string { return TaskPrefix(job) + ID(task) }

// ProgressPrefix is what the progress of all tasks of a job begins with.
func ProgressPrefix(job int64) string { return AllProgressPrefix + ID(job) + "/" }

// Progress is how far a task's attempt has come.
func Progress(job, task int64) string { return ProgressPrefix(job) + ID(task) }

// Worker is a worker's record.
func Worker(id int64) string { return WorkerPrefix + ID(id) }

// AssignmentPrefix is what all assignments of a worker begin with.
func AssignmentPrefix(worker int64) string { return AssignedPrefix + ID(worker) + "/" }

// Assignment is what gives a task to a worker.
func Assignment(worker, job, task int64) string {
	return AssignmentPrefix(worker) + ID(job) + "/" + ID(task)
}

// Generation is a collection's reference generation.
func Generation(collection int64) string { return "/gc/gen/" + ID(collection) }

// TombstonePrefix is what all tombstones of a collection begin with.
func TombstonePrefix(collection int64) string { return AllTombstonesPrefix + ID(collection) + "/" }

// Tombstone is the tombstone of a unit.
func Tombstone(collection, unit int64) string { return TombstonePrefix(collection) + ID(unit) }

// CollectionName is what a collection's name stands for.
func CollectionName(db, name string) string { return "/catalog/name/" + db + "/" + name }

// Collection is a collection's record.
func Collection(id int64) string { return CollectionPrefix + ID(id) }

// PartitionPrefix is what all partitions of a collection begin with.
func PartitionPrefix(collection int64) string { return AllPartitionsPrefix + ID(collection) + "/" }

// Partition is a partition's record.
func Partition(collection, id int64) string { return PartitionPrefix(collection) + ID(id) }

// PartitionName is what a partition's name stands for.
func PartitionName(collection int64, name string) string {
	return "/catalog/partition-name/" + ID(collection) + "/" + name
}

// IndexPrefix is what all indexes of a collection begin with.
func IndexPrefix(collection int64) string { return AllIndexesPrefix + ID(collection) + "/" }

// Index is an index's record.
func Index(collection, id int64) string { return IndexPrefix(collection) + ID(id) }

// IndexName is what an index's name stands for.
func IndexName(collection int64, name string) string {
	return "/catalog/index-name/" + ID(collection) + "/" + name
}

// ChannelPrefix is what all checkpoints of a collection begin with.
func ChannelPrefix(collection int64) string { return AllChannelsPrefix + ID(collection) + "/" }

// Channel is a channel's checkpoint.
func Channel(collection int64, shard int) string {
	return ChannelPrefix(collection) + ID(int64(shard))
}

// SegmentPrefix is what all segments of a collection begin with.
func SegmentPrefix(collection int64) string { return AllSegmentsPrefix + ID(collection) + "/" }

// Segment is a segment's record.
func Segment(collection, id int64) string { return SegmentPrefix(collection) + ID(id) }

// UnitPrefix is what all dropped units of a collection begin with.
func UnitPrefix(collection int64) string { return AllUnitsPrefix + ID(collection) + "/" }

// Unit is a dropped unit's record.
func Unit(collection, unit int64) string { return UnitPrefix(collection) + ID(unit) }

// ReplacedPrefix is what the keys of all units begin with that were parts of a
// segment: its replaced index builds and files.
func ReplacedPrefix(collection, segment int64) string {
	return AllReplacedPrefix(collection) + ID(segment) + "/"
}

// AllReplacedPrefix is what those of all segments of a collection begin with.
func AllReplacedPrefix(collection int64) string { return "/catalog/replaced/" + ID(collection) + "/" }

// Replaced leads from a segment to a unit that was a part of it. It lasts as
// long as the unit or its tombstone.
func Replaced(collection, segment, unit int64) string {
	return ReplacedPrefix(collection, segment) + ID(unit)
}

// OwnerSegment is which collection claims an id for a segment.
func OwnerSegment(id int64) string { return ownerSegmentPrefix + ID(id) }

// OwnerSegments is the range of the claims of the ids first to last for segments.
func OwnerSegments(first, last int64) (from, to string) { return Span(ownerSegmentPrefix, first, last) }

// OwnerBuild is which collection claims an id for a part of a segment: an index
// build, or files that were taken from it.
func OwnerBuild(id int64) string { return ownerBuildPrefix + ID(id) }

// OwnerBuilds is the range of the claims of the ids first to last for parts.
func OwnerBuilds(first, last int64) (from, to string) { return Span(ownerBuildPrefix, first, last) }

// OwnerRange is the claim of a restore to ids of which last is the last.
func OwnerRange(last int64) string { return OwnerRangePrefix + ID(last) }

// RootPrefix is what the keys of a root begin with, and of all roots below it.
func RootPrefix(store, prefix string) string { return "/catalog/root/" + store + "/" + prefix }

// Root says that a collection has a root. A prefix is empty or ends with a slash, so
// what follows it separates the root from one below it.
func Root(store, prefix string, collection int64) string {
	return RootPrefix(store, prefix) + "/" + ID(collection)
}

// Gone is which ids of a block are gone.
func Gone(block int64) string { return GonePrefix + ID(block) }

// Span returns the range of the ids first to last under prefix, both included.
func Span(prefix string, first, last int64) (from, to string) {
	return prefix + ID(first), prefix + ID(last) + "\x00"
}

// LastTwo reads the two ids that key ends in.
func LastTwo(key string) (first, second int64, err error) {
	if second, err = LastID(key); err != nil {
		return 0, 0, err
	}
	first, err = LastID(key[:max(strings.LastIndexByte(key, '/'), 0)])
	return first, second, err
}

// LastID reads the id that key ends in.
func LastID(key string) (int64, error) {
	id, err := strconv.ParseInt(key[strings.LastIndexByte(key, '/')+1:], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("key %s: %w", key, err)
	}
	return id, nil
}

// AssignedTo reads the worker that the key of an assignment is of.
func AssignedTo(key string) (int64, error) {
	if len(key) < len(AssignedPrefix)+len(ID(0)) {
		return 0, fmt.Errorf("key %s: not an assignment", key)
	}
	return LastID(key[:len(AssignedPrefix)+len(ID(0))])
}
