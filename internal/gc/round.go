package gc

import (
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
)

// ItemKind says what a round looked at.
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

// Action says what becomes of an item.
type Action int

// The actions.
const (
	Deletes Action = iota + 1 // it goes
	Keeps                     // something holds it
	Waits                     // it was dropped too recently
	Stops                     // the round would delete too much of the collection
)

// Item is a thing that a round looked at.
type Item struct {
	Kind       ItemKind
	Action     Action
	Collection int64
	ID         int64
	Name       string    // if it has one
	Reason     string    // for people
	DropTime   time.Time // zero: not known
	Files      int64
	Bytes      int64
	Objects    []Object // its files, told of what a dry run would delete
}

// Object is a file in an object store.
type Object struct {
	Store string
	Key   string
	Size  int64
}

// Stop says that a round would have deleted too much of a collection.
type Stop struct {
	Collection int64
	Due        int64 // units that would have been granted
	Total      int64 // segments and units that there are
}

// Summary is what a round came to.
type Summary struct {
	Replica    string
	Start, End time.Time
	Granted    int64 // units that were granted, or would be
	Files      int64 // of those
	Bytes      int64 // of those
	Waiting    int64 // units that were dropped too recently
	Held       int64 // units that are held
	Parked     int64 // of those, whose records are in the object store
	Removed    int64 // collections, partitions and indexes that went for good
	Stops      []Stop
	StopCount  int64
	Stopped    int64  // units that stops keep
	Error      string // what went wrong; empty: nothing
	Swept      int64  // objects that nothing knew, if the round was to sweep
	SweptBytes int64  // of those
}

// CollectOptions say what a round is about.
type CollectOptions struct {
	Collection catalog.Ref    // zero: all
	DryRun     bool           // change nothing, and tell what would be done
	Tolerance  *time.Duration // nil: as configured
	Force      bool           // whatever share of the collection it deletes
	Sweep      bool           // sweep as well, see [GC.Sweep]
	// Emit is told of each thing that was looked at, one after another; of units
	// that wait, are held or that a stop keeps in a dry run only. Nil: nobody is.
	Emit func(Item) error
}
