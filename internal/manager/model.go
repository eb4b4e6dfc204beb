package manager

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Errors that callers tell apart; each is wrapped with what it is about.
var (
	ErrSnapshotNotFound     = errors.New("snapshot not found")
	ErrNeverExisted         = errors.New("no snapshot ever had this id")
	ErrJobForgotten         = errors.New("no such restore job, or it ended too long ago")
	ErrJobNeverExisted      = errors.New("no restore job ever had this id")
	ErrExpiredOrDropped     = errors.New("snapshot expired or was dropped")
	ErrSnapshotExists       = errors.New("snapshot exists")
	ErrSnapshotPending      = errors.New("snapshot is being created")
	ErrSnapshotPinned       = errors.New("snapshot is pinned")
	ErrSnapshotMismatch     = errors.New("another snapshot has this name")
	ErrSnapshotNotCommitted = errors.New("snapshot not committed")
	ErrSnapshotCorrupt      = errors.New("snapshot corrupt")
	ErrRevisionChanged      = errors.New("snapshot changed")
	ErrCutNotReached        = errors.New("cut not reached")
	ErrChannelMismatch      = errors.New("another number of channels")
	ErrLayoutRefused        = errors.New("a file has no place in the target's layout")
	ErrPinOfRestore         = errors.New("the pin is of a restore")
	ErrStoreUnfit           = errors.New("the object store lacks what a restore needs")
	ErrCheckpointMissing    = errors.New("checkpoint missing")
	ErrNotExact             = errors.New("segments straddle the cut")
	ErrFileMissing          = errors.New("file missing or not as recorded")
	ErrCatalogCompacted     = errors.New("catalog revision compacted")
	ErrCreateAborted        = errors.New("create aborted")
	ErrStopping             = errors.New("this replica is stopping")
	ErrOverloaded           = errors.New("too many creates at once")
	ErrStoreNotFound        = collect.ErrStoreNotFound
	ErrEventsCompacted      = errors.New("events compacted")
	ErrPinNotFound          = errors.New("pin not found")
	ErrPinHasNoTTL          = errors.New("pin has no ttl")
)

// State is where a snapshot is in its life. Stored: append only.
type State int

// The states. See the package comment for the moves between them.
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

// moves holds every legal change of state. DELETING ends in the removal of the
// record.
var moves = map[State][]State{
	Pending:   {Committed, Deleting},
	Committed: {Deleting},
}

// Cut is where a snapshot cuts a channel: rows before Timestamp are in it.
type Cut struct {
	Shard     int
	Channel   string
	Timestamp segment.Timestamp
}

// Snapshot is a snapshot's record.
type Snapshot struct {
	ID              int64
	Name            string
	Collection      int64
	DB              string // of the collection, at the capture
	CollectionName  string // at the capture
	State           State
	Description     string
	Labels          map[string]string
	CreateTime      time.Time
	CommitTime      time.Time // zero before
	ExpireTime      time.Time // zero: never
	TTL             time.Duration
	Cuts            []Cut // in shard order, once committed
	CatalogRevision int64
	Partitions      []int64 // ascending
	Totals          segment.Totals
	Metadata        manifest.Digest // of metadata.json
	ManifestBytes   int64           // of all its own objects
	Reason          string          // why its creation was given up
	Store           string          // alias of the store of its own objects
	Revision        int64           // of the record
	// Order is the revision of the commit, or before it that of the first
	// transaction. With the id it orders all snapshots.
	Order int64

	requestKey string
	op         string
	commitRev  int64             // stored; 0: that of the record
	history    int64             // of the metadata store, that it began in; 0: not known
	beginRev   int64             // of the transaction that began it, once committed
	refs       manifest.RefsFile // zero in records of earlier releases
}

func (s *Snapshot) String() string { return fmt.Sprintf("%s (%d)", s.Name, s.ID) }

// Ref points at a snapshot: by ID if that is positive, else by name.
// Collection, unless it is zero, must be the snapshot's, and is needed with a
// name where names are unique per collection.
type Ref struct {
	ID         int64
	Name       string
	Collection catalog.Ref
}

func (r Ref) String() string {
	if r.Name != "" {
		return r.Name
	}
	return fmt.Sprintf("%d", r.ID)
}

func encode(s *Snapshot, op string) []byte {
	rec := &storagev1.Snapshot{
		Format: record.Format, Name: s.Name, CollectionId: s.Collection, Db: s.DB, CollectionName: s.CollectionName,
		State: uint32(s.State), Description: s.Description, Labels: s.Labels,
		CreateTime: record.Nanos(s.CreateTime), CommitTime: record.Nanos(s.CommitTime), ExpireTime: record.Nanos(s.ExpireTime),
		Ttl: int64(s.TTL), CatalogRevision: s.CatalogRevision, Partitions: record.Gaps(s.Partitions),
		Totals: &storagev1.Totals{
			Segments: s.Totals.Segments, Rows: s.Totals.Rows, Files: s.Totals.Files, Bytes: s.Totals.Bytes,
			Builds: s.Totals.Builds, Straddling: s.Totals.Straddling,
		},
		MetadataLength: s.Metadata.Length, ManifestBytes: s.ManifestBytes,
		CommitRevision: s.commitRev, RequestKey: s.requestKey, Op: op, Reason: s.Reason, Store: s.Store,
		History: s.history, BeginRevision: s.beginRev,
	}
	if s.Metadata.Length > 0 {
		rec.MetadataSha256 = s.Metadata.SHA256[:]
	}
	rec.References = record.References(&s.refs)
	for _, c := range s.Cuts {
		rec.Cuts = append(rec.Cuts, &storagev1.Cut{Shard: uint32(c.Shard), Channel: c.Channel, Timestamp: uint64(c.Timestamp)})
	}
	return record.Encode(rec)
}

// decode reads a snapshot's record.
func decode(kv meta.KeyValue) (*Snapshot, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return nil, err
	}
	rec := &storagev1.Snapshot{}
	if err := record.Decode(kv, rec); err != nil {
		return nil, err
	}
	t := rec.GetTotals()
	s := &Snapshot{
		ID: id, Name: rec.GetName(), Collection: rec.GetCollectionId(), DB: rec.GetDb(), CollectionName: rec.GetCollectionName(),
		State: State(rec.GetState()), Description: rec.GetDescription(), Labels: rec.GetLabels(),
		CreateTime: record.Time(rec.GetCreateTime()), CommitTime: record.Time(rec.GetCommitTime()), ExpireTime: record.Time(rec.GetExpireTime()),
		TTL: time.Duration(rec.GetTtl()), CatalogRevision: rec.GetCatalogRevision(), Partitions: record.Sums(rec.GetPartitions()),
		Totals: segment.Totals{
			Segments: t.GetSegments(), Rows: t.GetRows(), Files: t.GetFiles(), Bytes: t.GetBytes(),
			Builds: t.GetBuilds(), Straddling: t.GetStraddling(),
		},
		Metadata: manifest.Digest{Length: rec.GetMetadataLength()}, ManifestBytes: rec.GetManifestBytes(),
		Reason: rec.GetReason(), Store: rec.GetStore(),
		Revision: kv.ModRevision, Order: rec.GetCommitRevision(),
		requestKey: rec.GetRequestKey(), op: rec.GetOp(), commitRev: rec.GetCommitRevision(),
		history: rec.GetHistory(), beginRev: rec.GetBeginRevision(),
	}
	copy(s.Metadata.SHA256[:], rec.GetMetadataSha256())
	s.refs = record.RefsFile(rec.GetReferences())
	for _, c := range rec.GetCuts() {
		s.Cuts = append(s.Cuts, Cut{Shard: int(c.GetShard()), Channel: c.GetChannel(), Timestamp: segment.Timestamp(c.GetTimestamp())})
	}
	switch {
	case s.Order != 0:
	case s.State == Committed:
		s.Order = kv.ModRevision
	default:
		s.Order = kv.CreateRevision
	}
	return s, nil
}

// moved returns a copy of s in another state, as the transaction that moves it
// writes it. A move that is not legal is a mistake in this program.
func (s *Snapshot) moved(to State, reason string) *Snapshot {
	if !slices.Contains(moves[s.State], to) {
		panic(fmt.Sprintf("manager: snapshot %d cannot move from %v to %v", s.ID, s.State, to))
	}
	next := *s
	if s.State == Committed {
		next.commitRev = s.Order
	}
	next.State, next.Reason = to, reason
	return &next
}

// maxExpiry is how far ahead an expiry may lie.
const maxExpiry = 100 * 365 * 24 * time.Hour

func checkExpiry(t, now time.Time) error {
	if t.IsZero() || t.After(now) && t.Before(now.Add(maxExpiry)) {
		return nil
	}
	return &catalog.InvalidError{
		Field:   "expire_time",
		Problem: fmt.Sprintf("%s does not lie ahead by at most 100 years; leave it out for a snapshot that stays", t.UTC().Format(time.RFC3339)),
	}
}

// Filter says which snapshots to list. Zero fields do not filter, but no States
// means COMMITTED ones only.
type Filter struct {
	Collection catalog.Ref // an id may be that of a dropped collection
	DB         string
	Partition  int64
	Labels     map[string]string
	States     []State
	NamePrefix string
}

// match says whether s passes the filter, whose Collection is already an id.
func (f *Filter) match(s *Snapshot) bool {
	return (f.Collection.ID == 0 || s.Collection == f.Collection.ID) &&
		(f.DB == "" || s.DB == f.DB) &&
		(f.Partition == 0 || slices.Contains(s.Partitions, f.Partition)) &&
		strings.HasPrefix(s.Name, f.NamePrefix) &&
		slices.Contains(f.States, s.State) &&
		hasLabels(s.Labels, f.Labels)
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Place is a place in the order of snapshots, newest first. The zero Place is
// before the first.
type Place struct {
	Order, ID int64
}

// CreateSpec says what to create.
type CreateSpec struct {
	Collection   catalog.Ref
	Name         string
	Description  string
	Labels       map[string]string
	TTL          time.Duration // after the commit; 0 and no ExpireTime: never
	ExpireTime   time.Time
	MinCut       []catalog.Checkpoint // positions to wait for
	RequireExact bool
	Verify       bool
	NoWait       bool // return the PENDING record as soon as it is durable
}

// UpdateSpec says what to change: the fields that are not nil.
type UpdateSpec struct {
	Description *string
	Labels      *map[string]string
	ExpireTime  *time.Time     // the zero time: never
	TTL         *time.Duration // in place of ExpireTime: so long from now
	Revision    int64          // that the snapshot must have; 0: any
}

// Description is what a snapshot captured, but for its segments.
type Description struct {
	Snapshot *Snapshot
	Metadata *manifest.Metadata
	Prefix   string // of the snapshot's own objects in its store
	// Damage says which of its own objects are missing or have another length, at
	// most maxDamage of them. Nil, and DamageErr: they could not be listed.
	Damage    []string
	DamageErr error
}

// Segment is a segment as a snapshot holds it.
type Segment struct {
	Ordinal int64
	segment.Segment
}

// ChangeType says what kind of change an event is.
type ChangeType int

// The kinds of change.
const (
	Created ChangeType = iota + 1
	Updated
	Deleted
)

// Event is a change of a collection, a snapshot, a pin, a tombstone or a restore
// job; one of them is set. Of what is Deleted only the ids are known.
type Event struct {
	Type       ChangeType
	Revision   int64
	Collection *catalog.Collection
	Snapshot   *Snapshot
	Pin        *Pin
	Expired    bool // the pin is Deleted because nobody renewed it in time
	Tombstone  *gc.Tombstone
	Restore    *copyjob.Job
}

// Pin keeps a snapshot from being dropped and from expiring.
type Pin struct {
	Snapshot   int64
	ID         int64
	Owner      string
	Reason     string
	TTL        time.Duration // from each renewal; 0: until it is removed
	CreateTime time.Time
	ExpireTime time.Time // zero: never
	Job        int64     // the restore job that it is of, whose end alone removes it
	Revision   int64     // of the record

	lease meta.LeaseID
	op    string
}

// PinSpec says how to pin a snapshot.
type PinSpec struct {
	Owner, Reason string
	TTL           time.Duration // 0: until it is removed
}

// PinPlace is a place in the order of pins. The zero PinPlace is before the
// first.
type PinPlace struct {
	Snapshot, ID int64
}

func encodePin(p *Pin) []byte {
	return record.Encode(&storagev1.Pin{
		Format: record.Format, Owner: p.Owner, Reason: p.Reason, Ttl: int64(p.TTL),
		CreateTime: record.Nanos(p.CreateTime), ExpireTime: record.Nanos(p.ExpireTime), Op: p.op, JobId: p.Job,
	})
}

// decodePin reads a pin's record. When that cannot be read, the pin has the ids
// of its key all the same.
func decodePin(kv meta.KeyValue) (*Pin, error) {
	snapshot, id, err := keys.LastTwo(kv.Key)
	if err != nil {
		return nil, err
	}
	p := &Pin{Snapshot: snapshot, ID: id, Revision: kv.ModRevision, lease: kv.Lease}
	rec := &storagev1.Pin{}
	if err := record.Decode(kv, rec); err != nil {
		return p, err
	}
	p.Owner, p.Reason, p.TTL = rec.GetOwner(), rec.GetReason(), time.Duration(rec.GetTtl())
	p.CreateTime, p.ExpireTime = record.Time(rec.GetCreateTime()), record.Time(rec.GetExpireTime())
	p.op, p.Job = rec.GetOp(), rec.GetJobId()
	return p, nil
}
