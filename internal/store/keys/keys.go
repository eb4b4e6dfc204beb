// Package keys has the layout of the metadata store: one key per thing, and no value
// that grows with the number of segments.
//
//	/format                                     the cluster
//	/ids                                        the id allocator
//	/epoch                                      newest mark of this store in the object store
//	/behind                                     this store is older than its mark: nothing is deleted
//	/clock                                      the leader's newest reading of the clock
//	/election/leader                            leader of the background loops
//	/store/<alias>                              id of the object store, in hex
//	/verdict/<alias>                            newest probe result of the object store
//	/snapshot/rec/<id>                          record
//	/snapshot/name/<scope>/<name>               -> id; scope 0 is the cluster
//	/snapshot/pending/<collection>/<id>         held by the creator's lease
//	/snapshot/pin/<id>/<pin>                    pin of a snapshot
//	/snapshot/unpin                             newest removed pin
//	/request/<principal>/<method>/<token>       idempotency
//	/job/rec/<id>                               restore job
//	/job/task/<job>/<task>                      range of its segments
//	/job/progress/<job>/<task>                  progress of its attempt
//	/job/limits/<job>                           limits of its resources
//	/worker/rec/<id>                            held by the worker's lease
//	/worker/task/<worker>/<job>/<task>          assignment, held likewise
//	/gc/gen/<collection>                        reference generation
//	/gc/tomb/<collection>/<unit>                granted deletes
//	/gc/round                                   result of the leader's last cycle
//	/catalog/name/<db>/<name>                   -> collection id
//	/catalog/collection/<id>                    record
//	/catalog/partition/<collection>/<id>        record
//	/catalog/partition-name/<collection>/<name> -> id
//	/catalog/index/<collection>/<id>            record
//	/catalog/index-name/<collection>/<name>     -> id
//	/catalog/channel/<collection>/<shard>       checkpoint
//	/catalog/segment/<collection>/<id>          record
//	/catalog/root/<store>/<prefix>/<collection> the collection has the root
//	/catalog/unit/<collection>/<unit>           dropped unit
//	/catalog/replaced/<collection>/<segment>/<unit>
//	                                            -> unit of a removed part of a segment
//	/catalog/owner/segment/<id>                 -> collection that claims the id for a segment
//	/catalog/owner/build/<id>                   -> collection that claims the id for a part of one
//	/catalog/owner/range/<last>                 range of ids that a restore claims, by its last id
//	/catalog/owners                             the upgrade has claimed the ids of all records
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

// Single keys, and prefixes of scans and watches.
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

// ID formats an id for a key.
func ID(id int64) string { return fmt.Sprintf("%019d", id) }

// Store returns the key of an alias, with the id of its object store.
func Store(alias string) string { return "/store/" + alias }

// VerdictPrefix is the prefix of all verdicts.
const VerdictPrefix = "/verdict/"

// Verdict returns the key of the probe's result for the object store of an alias.
func Verdict(alias string) string { return VerdictPrefix + alias }

// Snapshot returns the key of a snapshot's record.
func Snapshot(id int64) string { return SnapshotPrefix + ID(id) }

// SnapshotName returns the key of a snapshot's name. The scope is a collection id, or 0
// when names are unique in the cluster.
func SnapshotName(scope int64, name string) string {
	return "/snapshot/name/" + ID(scope) + "/" + name
}

// PendingPrefix returns the prefix of all pending keys of a collection.
func PendingPrefix(collection int64) string { return "/snapshot/pending/" + ID(collection) + "/" }

// Pending returns the pending key of a create.
func Pending(collection, snapshot int64) string { return PendingPrefix(collection) + ID(snapshot) }

// PinPrefix returns the prefix of all pins of a snapshot.
func PinPrefix(snapshot int64) string { return AllPinsPrefix + ID(snapshot) + "/" }

// Pin returns the key of a pin's record.
func Pin(snapshot, pin int64) string { return PinPrefix(snapshot) + ID(pin) }

// Request returns the key of the record of a request token.
func Request(principal, method, token string) string {
	h := sha256.Sum256([]byte(principal + "\x00" + token))
	return RequestPrefix + method + "/" + hex.EncodeToString(h[:])
}

// Job returns the key of a restore job's record.
func Job(id int64) string { return JobPrefix + ID(id) }

// JobLimits returns the key of a restore job's limits.
func JobLimits(id int64) string { return LimitsPrefix + ID(id) }

// TaskPrefix returns the prefix of all tasks of a job.
func TaskPrefix(job int64) string { return AllTasksPrefix + ID(job) + "/" }

// Task returns the key of a task's record.
func Task(job, task int64) string { return TaskPrefix(job) + ID(task) }

// ProgressPrefix returns the prefix of the progress of all tasks of a job.
func ProgressPrefix(job int64) string { return AllProgressPrefix + ID(job) + "/" }

// Progress returns the key of the progress of a task's attempt.
func Progress(job, task int64) string { return ProgressPrefix(job) + ID(task) }

// Worker returns the key of a worker's record.
func Worker(id int64) string { return WorkerPrefix + ID(id) }

// AssignmentPrefix returns the prefix of all assignments of a worker.
func AssignmentPrefix(worker int64) string { return AssignedPrefix + ID(worker) + "/" }

// Assignment returns the key of the assignment of a task to a worker.
func Assignment(worker, job, task int64) string {
	return AssignmentPrefix(worker) + ID(job) + "/" + ID(task)
}

// Generation returns the key of a collection's reference generation.
func Generation(collection int64) string { return "/gc/gen/" + ID(collection) }

// TombstonePrefix returns the prefix of all tombstones of a collection.
func TombstonePrefix(collection int64) string { return AllTombstonesPrefix + ID(collection) + "/" }

// Tombstone returns the key of the tombstone of a unit.
func Tombstone(collection, unit int64) string { return TombstonePrefix(collection) + ID(unit) }

// CollectionName returns the key of a collection's name.
func CollectionName(db, name string) string { return "/catalog/name/" + db + "/" + name }

// Collection returns the key of a collection's record.
func Collection(id int64) string { return CollectionPrefix + ID(id) }

// PartitionPrefix returns the prefix of all partitions of a collection.
func PartitionPrefix(collection int64) string { return AllPartitionsPrefix + ID(collection) + "/" }

// Partition returns the key of a partition's record.
func Partition(collection, id int64) string { return PartitionPrefix(collection) + ID(id) }

// PartitionName returns the key of a partition's name.
func PartitionName(collection int64, name string) string {
	return "/catalog/partition-name/" + ID(collection) + "/" + name
}

// IndexPrefix returns the prefix of all indexes of a collection.
func IndexPrefix(collection int64) string { return AllIndexesPrefix + ID(collection) + "/" }

// Index returns the key of an index's record.
func Index(collection, id int64) string { return IndexPrefix(collection) + ID(id) }

// IndexName returns the key of an index's name.
func IndexName(collection int64, name string) string {
	return "/catalog/index-name/" + ID(collection) + "/" + name
}

// ChannelPrefix returns the prefix of all checkpoints of a collection.
func ChannelPrefix(collection int64) string { return AllChannelsPrefix + ID(collection) + "/" }

// Channel returns the key of a channel's checkpoint.
func Channel(collection int64, shard int) string {
	return ChannelPrefix(collection) + ID(int64(shard))
}

// SegmentPrefix returns the prefix of all segments of a collection.
func SegmentPrefix(collection int64) string { return AllSegmentsPrefix + ID(collection) + "/" }

// Segment returns the key of a segment's record.
func Segment(collection, id int64) string { return SegmentPrefix(collection) + ID(id) }

// UnitPrefix returns the prefix of all dropped units of a collection.
func UnitPrefix(collection int64) string { return AllUnitsPrefix + ID(collection) + "/" }

// Unit returns the key of a dropped unit's record.
func Unit(collection, unit int64) string { return UnitPrefix(collection) + ID(unit) }

// ReplacedPrefix returns the prefix of the keys of a segment's removed parts: its replaced
// index builds and removed files.
func ReplacedPrefix(collection, segment int64) string {
	return AllReplacedPrefix(collection) + ID(segment) + "/"
}

// AllReplacedPrefix returns that prefix for all segments of a collection.
func AllReplacedPrefix(collection int64) string { return "/catalog/replaced/" + ID(collection) + "/" }

// Replaced returns the key from a segment to the unit of a removed part. It exists as long
// as the unit or its tombstone.
func Replaced(collection, segment, unit int64) string {
	return ReplacedPrefix(collection, segment) + ID(unit)
}

// OwnerSegment returns the key of the claim to an id for a segment.
func OwnerSegment(id int64) string { return ownerSegmentPrefix + ID(id) }

// OwnerSegments returns the range of the claims of the ids first to last for segments.
func OwnerSegments(first, last int64) (from, to string) { return Span(ownerSegmentPrefix, first, last) }

// OwnerBuild returns the key of the claim to an id for a part of a segment: an index build,
// or removed files.
func OwnerBuild(id int64) string { return ownerBuildPrefix + ID(id) }

// OwnerBuilds returns the range of the claims of the ids first to last for parts.
func OwnerBuilds(first, last int64) (from, to string) { return Span(ownerBuildPrefix, first, last) }

// OwnerRange returns the key of a restore's claim to a range of ids that ends with last.
func OwnerRange(last int64) string { return OwnerRangePrefix + ID(last) }

// RootPrefix returns the prefix of the keys of a root and of all roots below it.
func RootPrefix(store, prefix string) string { return "/catalog/root/" + store + "/" + prefix }

// Root returns the key of a collection's root. A prefix is empty or ends with a slash, so
// the second slash separates the root from roots below it.
func Root(store, prefix string, collection int64) string {
	return RootPrefix(store, prefix) + "/" + ID(collection)
}

// Gone returns the key of the gone ids of a block.
func Gone(block int64) string { return GonePrefix + ID(block) }

// Span returns the range of the ids first to last under prefix, both included.
func Span(prefix string, first, last int64) (from, to string) {
	return prefix + ID(first), prefix + ID(last) + "\x00"
}

// LastTwo returns the two ids at the end of key.
func LastTwo(key string) (first, second int64, err error) {
	if second, err = LastID(key); err != nil {
		return 0, 0, err
	}
	first, err = LastID(key[:max(strings.LastIndexByte(key, '/'), 0)])
	return first, second, err
}

// LastID returns the id at the end of key.
func LastID(key string) (int64, error) {
	id, err := strconv.ParseInt(key[strings.LastIndexByte(key, '/')+1:], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("key %s: %w", key, err)
	}
	return id, nil
}

// AssignedTo returns the worker of the key of an assignment.
func AssignedTo(key string) (int64, error) {
	if len(key) < len(AssignedPrefix)+len(ID(0)) {
		return 0, fmt.Errorf("key %s: not an assignment", key)
	}
	return LastID(key[:len(AssignedPrefix)+len(ID(0))])
}
