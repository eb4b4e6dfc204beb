// Package keys holds the layout of the metadata store: one key per thing, and
// no value that grows with the number of segments.
//
//	/format                                     the cluster
//	/ids                                        the id allocator
//	/election/leader                            leader of the background loops
//	/store/<alias>                              id of the object store, in hex
//	/snapshot/rec/<id>                          record
//	/snapshot/name/<scope>/<name>               -> id; scope 0 is the cluster
//	/snapshot/pending/<collection>/<id>         held by the creator's lease
//	/snapshot/pin/<id>/<pin>                    what keeps a snapshot
//	/request/<principal>/<method>/<token>       idempotency
//	/gc/gen/<collection>                        reference generation
//	/gc/tomb/<collection>/<unit>                granted deletes
//	/catalog/name/<db>/<name>                   -> collection id
//	/catalog/collection/<id>                    record
//	/catalog/partition/<collection>/<id>        record
//	/catalog/partition-name/<collection>/<name> -> id
//	/catalog/index/<collection>/<id>            record
//	/catalog/index-name/<collection>/<name>     -> id
//	/catalog/channel/<collection>/<shard>       checkpoint
//	/catalog/segment/<collection>/<id>          record
//	/catalog/unit/<collection>/<unit>           dropped, waits to be reclaimed
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
	Format           = "/format"
	IDs              = "/ids"
	Leader           = "/election/leader"
	SnapshotPrefix   = "/snapshot/rec/"
	CollectionPrefix = "/catalog/collection/"
)

// All returns the range of every key of the cluster.
func All() (from, to string) { return "/", "0" }

// ID writes an id the way keys hold it.
func ID(id int64) string { return fmt.Sprintf("%019d", id) }

// Store is the id of the object store that an alias stands for.
func Store(alias string) string { return "/store/" + alias }

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
func PinPrefix(snapshot int64) string { return "/snapshot/pin/" + ID(snapshot) + "/" }

// Request is the record of a request token.
func Request(principal, method, token string) string {
	h := sha256.Sum256([]byte(principal + "\x00" + token))
	return "/request/" + method + "/" + hex.EncodeToString(h[:])
}

// Generation is a collection's reference generation.
func Generation(collection int64) string { return "/gc/gen/" + ID(collection) }

// TombPrefix is what all tombstones of a collection begin with.
func TombPrefix(collection int64) string { return "/gc/tomb/" + ID(collection) + "/" }

// CollectionName is what a collection's name stands for.
func CollectionName(db, name string) string { return "/catalog/name/" + db + "/" + name }

// Collection is a collection's record.
func Collection(id int64) string { return CollectionPrefix + ID(id) }

// PartitionPrefix is what all partitions of a collection begin with.
func PartitionPrefix(collection int64) string { return "/catalog/partition/" + ID(collection) + "/" }

// Partition is a partition's record.
func Partition(collection, id int64) string { return PartitionPrefix(collection) + ID(id) }

// PartitionName is what a partition's name stands for.
func PartitionName(collection int64, name string) string {
	return "/catalog/partition-name/" + ID(collection) + "/" + name
}

// IndexPrefix is what all indexes of a collection begin with.
func IndexPrefix(collection int64) string { return "/catalog/index/" + ID(collection) + "/" }

// Index is an index's record.
func Index(collection, id int64) string { return IndexPrefix(collection) + ID(id) }

// IndexName is what an index's name stands for.
func IndexName(collection int64, name string) string {
	return "/catalog/index-name/" + ID(collection) + "/" + name
}

// ChannelPrefix is what all checkpoints of a collection begin with.
func ChannelPrefix(collection int64) string { return "/catalog/channel/" + ID(collection) + "/" }

// Channel is a channel's checkpoint.
func Channel(collection int64, shard int) string {
	return ChannelPrefix(collection) + ID(int64(shard))
}

// SegmentPrefix is what all segments of a collection begin with.
func SegmentPrefix(collection int64) string { return "/catalog/segment/" + ID(collection) + "/" }

// Segment is a segment's record.
func Segment(collection, id int64) string { return SegmentPrefix(collection) + ID(id) }

// UnitPrefix is what all dropped units of a collection begin with.
func UnitPrefix(collection int64) string { return "/catalog/unit/" + ID(collection) + "/" }

// Unit is a dropped unit's record.
func Unit(collection, unit int64) string { return UnitPrefix(collection) + ID(unit) }

// Span returns the range of the ids first to last under prefix, both included.
func Span(prefix string, first, last int64) (from, to string) {
	return prefix + ID(first), prefix + ID(last) + "\x00"
}

// LastID reads the id that key ends in.
func LastID(key string) (int64, error) {
	id, err := strconv.ParseInt(key[strings.LastIndexByte(key, '/')+1:], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("key %s: %w", key, err)
	}
	return id, nil
}
