// Package snapshot has the record of a snapshot: its states, its moves between them and
// its form in the metadata store. A Reader reads records, metadata and manifests.
//
// # States
//
//	none --> PENDING ----> COMMITTED --+
//	            |                      v
//	            +-----------------> DELETING --> none
//
// The transactions that move a record are in package manager.
package snapshot

import (
	"fmt"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// State is the state of a snapshot. Stored: append only.
type State int

// The states. The package comment has the transitions between them.
const (
	Pending State = iota + 1
	Committed
	Deleting
)

func (s State) String() string {
	switch s {
	case Pending:
		return "PENDING"
	case Committed:
		return "COMMITTED"
	case Deleting:
		return "DELETING"
	}
	return "UNKNOWN"
}

// transitions are the legal changes of state. DELETING ends with the removal of the
// record.
var transitions = map[State][]State{
	Pending:   {Committed, Deleting},
	Committed: {Deleting},
}

// Cut is the cut of a snapshot on one channel: rows before Timestamp are in the snapshot.
type Cut struct {
	Shard     int
	Channel   string
	Timestamp segment.Timestamp
}

// Record is a snapshot's record.
type Record struct {
	ID              int64
	Name            string
	Collection      int64
	DB              string // of the collection, at the capture
	CollectionName  string // at the capture
	State           State
	Description     string
	Labels          map[string]string
	CreateTime      time.Time
	CommitTime      time.Time // zero before the commit
	ExpireTime      time.Time // zero: never
	TTL             time.Duration
	Cuts            []Cut // in shard order, once committed
	CatalogRevision int64
	Partitions      []int64 // ascending
	Totals          segment.Totals
	Metadata        manifest.Digest // of metadata.json
	ManifestBytes   int64           // total size of its own objects
	Reason          string          // error for which the create was given up
	Store           string          // alias of the store of its own objects
	Revision        int64           // of the record
	// Order is the revision of the commit, and before the commit that of begin. With the
	// id it orders all snapshots.
	Order int64

	RequestKey     string            // key of the create's request token; empty: none
	Op             string            // of the transaction that wrote the record
	CommitRevision int64             // revision of the commit, stored; 0: that of the record
	History        int64             // history of the metadata store at begin; 0: not known
	BeginRevision  int64             // revision of begin, set by the commit
	References     manifest.RefsFile // zero in records of earlier releases
}

func (s *Record) String() string { return fmt.Sprintf("%s (%d)", s.Name, s.ID) }

// CheckCommitted returns ErrNotCommitted unless the snapshot is COMMITTED.
func (s *Record) CheckCommitted() error {
	if s.State != Committed {
		return fmt.Errorf("%w: %s is %v", ErrNotCommitted, s, s.State)
	}
	return nil
}

// WithState returns a copy of s in another state, for the record that the transaction
// writes. It panics on an illegal transition, which is a bug.
func (s *Record) WithState(to State, reason string) *Record {
	if !slices.Contains(transitions[s.State], to) {
		panic(fmt.Sprintf("snapshot %d cannot move from %v to %v", s.ID, s.State, to))
	}
	next := *s
	if s.State == Committed {
		next.CommitRevision = s.Order
	}
	next.State, next.Reason = to, reason
	return &next
}
