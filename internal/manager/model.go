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
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Errors that callers distinguish; each is wrapped with its subject.
var (
	ErrSnapshotNotFound  = errors.New("snapshot not found")
	ErrJobForgotten      = errors.New("no such restore job, or it ended too long ago")
	ErrJobNeverExisted   = errors.New("no restore job ever had this id")
	ErrSnapshotExists    = errors.New("snapshot exists")
	ErrSnapshotPending   = errors.New("snapshot is being created")
	ErrSnapshotPinned    = errors.New("snapshot is pinned")
	ErrSnapshotMismatch  = errors.New("another snapshot has this name")
	ErrRevisionChanged   = errors.New("snapshot changed")
	ErrCutNotReached     = errors.New("cut not reached")
	ErrChannelMismatch   = errors.New("another number of channels")
	ErrLayoutRefused     = errors.New("a file has no place in the target's layout")
	ErrPinOfRestore      = errors.New("the pin is of a restore")
	ErrStoreUnfit        = errors.New("the object store lacks a feature that a restore needs")
	ErrCheckpointMissing = errors.New("checkpoint missing")
	ErrNotExact          = errors.New("segments straddle the cut")
	ErrFileMissing       = errors.New("file missing or not as recorded")
	ErrCatalogCompacted  = errors.New("catalog revision compacted")
	ErrCreateAborted     = errors.New("create aborted")
	ErrStopping          = errors.New("this replica is stopping")
	ErrOverloaded        = errors.New("too many creates at once")
	ErrEventsCompacted   = errors.New("events compacted")
	ErrPinNotFound       = errors.New("pin not found")
	ErrPinHasNoTTL       = errors.New("pin has no ttl")
)

// Ref identifies a snapshot: by ID if that is positive, else by name. Collection, unless
// it is zero, must be the snapshot's. It is required with a name where names are unique
// per collection.
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

// maxExpiry is the maximum time until an expiry.
const maxExpiry = 100 * 365 * 24 * time.Hour

func checkExpiry(t, now time.Time) error {
	if t.IsZero() || t.After(now) && t.Before(now.Add(maxExpiry)) {
		return nil
	}
	return &catalog.InvalidError{
		Field: "expire_time",
		Problem: fmt.Sprintf("%s is not within the next 100 years; omit it for a snapshot that never expires",
			t.UTC().Format(time.RFC3339)),
	}
}

// Filter selects the snapshots of a list. Zero fields do not filter, except that no
// States means COMMITTED.
type Filter struct {
	Collection catalog.Ref // by id also a dropped collection
	DB         string
	Partition  int64
	Labels     map[string]string
	States     []snapshot.State
	NamePrefix string
}

// match reports whether s passes the filter, whose Collection must be an id.
func (f *Filter) match(s *snapshot.Record) bool {
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

// Place is a position in the order of snapshots, newest first. The zero Place is before
// the first.
type Place struct {
	Order, ID int64
}

// CreateSpec specifies a create.
type CreateSpec struct {
	Collection   catalog.Ref
	Name         string
	Description  string
	Labels       map[string]string
	TTL          time.Duration // from the commit; 0 and no ExpireTime: never expires
	ExpireTime   time.Time
	MinCut       []catalog.Checkpoint // checkpoints to wait for
	RequireExact bool
	Verify       bool
	NoWait       bool // return the PENDING record as soon as it is durable
}

// UpdateSpec specifies an update. Nil fields are not changed.
type UpdateSpec struct {
	Description *string
	Labels      *map[string]string
	ExpireTime  *time.Time     // the zero time: never
	TTL         *time.Duration // from now, in place of ExpireTime
	Revision    int64          // required revision of the snapshot; 0: any
}

// Description is the content of a snapshot without its segments.
type Description struct {
	Snapshot *snapshot.Record
	Metadata *manifest.Metadata
	Prefix   string // of the snapshot's own objects in its store
	// Damage describes own objects that are missing or have another length, at most
	// maxDamage of them. DamageErr is set if they could not be listed.
	Damage    []string
	DamageErr error
}

// ChangeType is the kind of change that an event reports.
type ChangeType int

// The kinds of change.
const (
	Created ChangeType = iota + 1
	Updated
	Deleted
)

// Event is a change of a collection, a snapshot, a pin, a tombstone or a restore job;
// one of them is set. A Deleted one holds only ids.
type Event struct {
	Type       ChangeType
	Revision   int64
	Collection *catalog.Collection
	Snapshot   *snapshot.Record
	Pin        *Pin
	Expired    bool // the pin is Deleted because it was not renewed in time
	Tombstone  *gc.Tombstone
	Restore    *copyjob.Job
}

// Pin keeps a snapshot from being dropped and from expiring.
type Pin struct {
	Snapshot   int64
	ID         int64
	Owner      string
	Reason     string
	TTL        time.Duration // from each renewal; 0: until removed
	CreateTime time.Time
	ExpireTime time.Time // zero: never
	Job        int64     // restore job that owns the pin; only its end removes the pin
	Revision   int64     // of the record

	lease meta.LeaseID
	op    string
}

// PinSpec specifies a pin.
type PinSpec struct {
	Owner, Reason string
	TTL           time.Duration // 0: until removed
}

// PinPlace is a position in the order of pins. The zero PinPlace is before the first.
type PinPlace struct {
	Snapshot, ID int64
}

func encodePin(p *Pin) []byte {
	return record.Encode(&storagev1.Pin{
		Format: record.Format, Owner: p.Owner, Reason: p.Reason, Ttl: int64(p.TTL),
		CreateTime: record.Nanos(p.CreateTime), ExpireTime: record.Nanos(p.ExpireTime), Op: p.op, JobId: p.Job,
	})
}

// decodePin reads a pin's record. If the record cannot be read, it returns an error and
// a pin with the ids of the key.
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
