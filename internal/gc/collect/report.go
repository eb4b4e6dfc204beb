package collect

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// ItemKind is the kind of a thing that a cycle examines.
type ItemKind int

// The kinds. Those of units have the numbers of catalog.UnitKind.
const (
	ItemSegment ItemKind = iota + 1
	ItemBuild
	ItemFiles
	ItemPartition
	ItemIndex
	ItemCollection
	ItemSnapshot
)

// Action is the decision on an item.
type Action int

// The actions.
const (
	Deletes Action = iota + 1 // it is deleted
	Keeps                     // it has a holder
	Waits                     // it was dropped too recently
	Stops                     // the cycle would delete too much of the collection
)

// Item is a thing that a cycle examined.
type Item struct {
	Kind       ItemKind
	Action     Action
	Collection int64
	ID         int64
	Name       string    // if it has one
	Reason     string    // for humans
	DropTime   time.Time // zero: unknown
	Files      int64
	Bytes      int64
	Objects    []Object // in a dry run the files to delete
}

// Object is a file in an object store.
type Object struct {
	Store string
	Key   string
	Size  int64
}

// Stop is a collection of which a cycle would delete too much.
type Stop struct {
	Collection int64
	Eligible   int64 // units that would be granted
	Total      int64 // segments and units of the collection
}

// Summary is the result of a cycle.
type Summary struct {
	Replica    string
	Start, End time.Time
	Granted    int64 // units that were granted; in a dry run, that would be
	Files      int64 // of those
	Bytes      int64 // of those
	Waiting    int64 // units that were dropped too recently
	Held       int64 // units with holders
	Spilled    int64 // of those, with records in the object store
	Removed    int64 // collections, partitions and indexes that were removed
	Stops      []Stop
	StopCount  int64
	Stopped    int64  // units that stops keep
	Error      string // empty: none
	Swept      int64  // objects without a record that were deleted, if the cycle was to sweep
	SweptBytes int64  // of those
}

// Halt is a part of expiry, removal or collection that stands still.
type Halt struct {
	Name     string
	What     string // the part that stands still
	Error    string
	Since    time.Time // zero: unknown
	Replica  string    // empty: all
	Failures int64     // since then; 0: unknown
}

// encodeSummary returns the record of the leader's last cycle, without halts.
func encodeSummary(s *Summary) *storagev1.Round {
	rec := &storagev1.Round{
		Format: record.Format, Replica: s.Replica, StartTime: record.Nanos(s.Start), EndTime: record.Nanos(s.End),
		Granted: s.Granted, Files: s.Files, Bytes: s.Bytes, Waiting: s.Waiting, Held: s.Held, Parked: s.Spilled,
		Removed: s.Removed, StopCount: s.StopCount, Error: s.Error,
	}
	for _, stop := range s.Stops {
		rec.Stops = append(rec.Stops, &storagev1.Stop{
			CollectionId: stop.Collection, Due: stop.Eligible, Total: stop.Total,
		})
	}
	return rec
}

// DecodeSummary returns the leader's last cycle from its record; nil: the record has
// only halts.
func DecodeSummary(rec *storagev1.Round) *Summary {
	if rec.GetEndTime() == 0 {
		return nil
	}
	s := &Summary{
		Replica: rec.GetReplica(), Start: record.Time(rec.GetStartTime()), End: record.Time(rec.GetEndTime()),
		Granted: rec.GetGranted(), Files: rec.GetFiles(), Bytes: rec.GetBytes(),
		Waiting: rec.GetWaiting(), Held: rec.GetHeld(), Spilled: rec.GetParked(), Removed: rec.GetRemoved(),
		StopCount: rec.GetStopCount(), Error: rec.GetError(),
	}
	for _, stop := range rec.GetStops() {
		s.Stops = append(s.Stops, Stop{
			Collection: stop.GetCollectionId(), Eligible: stop.GetDue(), Total: stop.GetTotal(),
		})
	}
	return s
}

// encodeHalts puts the halts of a replica into a record.
func encodeHalts(rec *storagev1.Round, halts []Halt, replica string) {
	rec.Halts, rec.HaltedReplica = nil, replica
	for _, h := range halts {
		rec.Halts = append(rec.Halts, &storagev1.Halt{
			Name: h.Name, What: h.What, Error: h.Error, Since: record.Nanos(h.Since),
		})
	}
}

// DecodeHalts returns the halts of the leader from its record, and the replica that
// wrote them.
func DecodeHalts(rec *storagev1.Round) (list []Halt, replica string) {
	for _, h := range rec.GetHalts() {
		list = append(list, Halt{
			Name: h.GetName(), What: h.GetWhat(), Error: h.GetError(), Since: record.Time(h.GetSince()),
			Replica: rec.GetHaltedReplica(),
		})
	}
	return list, rec.GetHaltedReplica()
}

// haltsKey is equal for lists of halts of which only one must be written.
func haltsKey(rec *storagev1.Round) string {
	names := []string{rec.GetHaltedReplica()}
	for _, h := range rec.GetHalts() {
		names = append(names, h.GetName())
	}
	if len(names) == 1 { // without halts the replica does not matter
		return ""
	}
	slices.Sort(names[1:])
	return strings.Join(names, "\x00")
}

// percent formats a fraction as a percentage with at most one decimal.
func percent(share float64) string {
	return strconv.FormatFloat(math.Round(share*1000)/10, 'f', -1, 64) + "%"
}

// heldReason is the reason of a unit with holders.
func heldReason(a *gc.Answer) string {
	var parts []string
	named := 0
	for _, s := range a.Snapshots {
		if named++; named > 3 {
			break
		}
		parts = append(parts, fmt.Sprintf("snapshot %s (%d)", s.Name, s.ID))
	}
	for _, s := range a.Creating {
		parts = append(parts, fmt.Sprintf("snapshot %d, which is being created", s.ID))
	}
	if rest := a.Holders - len(parts); rest > 0 && len(parts) > 0 {
		parts = append(parts, fmt.Sprintf("%d more", rest))
	}
	if len(parts) == 0 {
		return "held"
	}
	return "held by " + strings.Join(parts, ", ")
}
