package copyjob

import (
	"fmt"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// State is the state of a job. Stored: append only.
type State int

// The states of a job.
const (
	Pending State = iota + 1
	Executing
	Completed
	Failed
	Canceled
)

func (s State) String() string {
	if s < Pending || s > Canceled {
		return "UNKNOWN"
	}
	return [...]string{"PENDING", "EXECUTING", "COMPLETED", "FAILED", "CANCELED"}[s-1]
}

// Ended reports whether the state is final.
func (s State) Ended() bool { return s == Completed || s == Failed || s == Canceled }

// Phase is the current work of a job. Stored: append only.
type Phase int

// The phases of a job.
const (
	Admit Phase = iota + 1
	Prepare
	Copy
	Publish
	RollBack
)

func (p Phase) String() string {
	if p < Admit || p > RollBack {
		return "UNKNOWN"
	}
	return [...]string{"admit", "prepare", "copy", "publish", "roll back"}[p-1]
}

// TaskSegments is the number of segments of a task.
const TaskSegments = 32

// Limits bound the use of the object stores by a job, over all workers. 0: no limit.
type Limits struct {
	Requests int64 // per second
	Bytes    int64 // per second
}

// Job is a restore.
type Job struct {
	ID           int64
	Snapshot     int64
	SnapshotName string
	Source       int64 // collection
	Target       int64 // collection
	DB, Name     string
	State        State
	Phase        Phase
	Outcome      State // final state after roll back
	Reason       string
	Message      string

	Partitions     []int64 // of the snapshot, ascending; empty: all
	PartitionNames []string
	SkipIndexes    bool
	Priority       int
	Labels         map[string]string
	Layout         layout.Layout

	FirstPartition, FirstIndex, FirstSegment, FirstBuild int64
	Segments, Builds                                     int64 // of the whole snapshot
	Parts                                                object.CopyParts
	Tasks, TaskSegments                                  int64
	Totals                                               segment.Totals // of the target
	Done                                                 segment.Totals // at give up
	Roots                                                []catalog.Root // of the target
	Copied                                               bool           // phase copy began: objects may exist
	Retries                                              int64          // set at the end

	CreateTime, StartTime, EndTime, Deadline time.Time
	RequestKey                               string
	Pin                                      int64
	PinStore                                 string // alias of the store with the pins; empty: the configured one

	Revision int64
}

func (j *Job) String() string { return fmt.Sprintf("%d (%s/%s)", j.ID, j.DB, j.Name) }

// unchanged is the compare in every write of the job.
func (j *Job) unchanged() meta.Cond { return meta.Unchanged(keys.Job(j.ID), j.Revision) }

// segmentRange returns the ordinals of a task's segments: from (inclusive) to to
// (exclusive).
func (j *Job) segmentRange(task int64) (from, to int64) {
	from = task * j.TaskSegments
	return from, min(from+j.TaskSegments, j.Segments)
}

// Mapping returns the mapping from the snapshot's files to the target's.
func (j *Job) Mapping(md *manifest.Metadata) (*layout.Mapping, error) {
	m := &layout.Mapping{
		Layout: j.Layout, Source: j.Source, Target: j.Target, Partitions: map[int64]int64{},
		FirstSegment: j.FirstSegment, Segments: j.Segments, FirstBuild: j.FirstBuild, Builds: j.Builds,
	}
	for _, r := range md.Roots {
		m.Roots = append(m.Roots, r.Prefix)
	}
	for i, p := range md.Partitions {
		if j.WantsPartition(p.ID) {
			m.Partitions[p.ID] = j.FirstPartition + int64(i)
		}
	}
	return m, m.Check()
}

// cleanupMapping returns the part of the mapping that gives the keys of the target's
// objects. It needs no metadata of the snapshot.
func (j *Job) cleanupMapping() *layout.Mapping {
	m := &layout.Mapping{
		Layout: j.Layout, Source: j.Source, Target: j.Target,
		FirstSegment: j.FirstSegment, Segments: j.Segments, FirstBuild: j.FirstBuild, Builds: j.Builds,
	}
	if j.SkipIndexes {
		m.FirstBuild, m.Builds = 0, 0
	}
	for _, r := range j.Roots {
		m.Roots = append(m.Roots, r.Prefix)
	}
	return m
}

// WantsPartition reports whether segments of the partition are restored. Segments without
// a partition (0) always are.
func (j *Job) WantsPartition(id int64) bool {
	if id == 0 || len(j.Partitions) == 0 {
		return true
	}
	_, found := slices.BinarySearch(j.Partitions, id)
	return found
}

// targetIndexes maps the snapshot's index ids to the target's.
func (j *Job) targetIndexes(md *manifest.Metadata) map[int64]int64 {
	m := map[int64]int64{}
	for i, x := range md.Indexes {
		m[x.ID] = j.FirstIndex + int64(i)
	}
	return m
}

// Encode returns the job's record, written by op.
func (j *Job) Encode(op string) []byte {
	var roots []*storagev1.Root
	for _, r := range j.Roots {
		roots = append(roots, &storagev1.Root{Store: r.Store, Prefix: r.Prefix})
	}
	return record.Encode(&storagev1.Job{
		Roots: roots, Copied: j.Copied,
		Format: record.Format, SnapshotId: j.Snapshot, SnapshotName: j.SnapshotName, SourceCollection: j.Source,
		CollectionId: j.Target, Db: j.DB, Name: j.Name,
		State: uint32(j.State), Phase: uint32(j.Phase), Outcome: uint32(j.Outcome),
		Reason: j.Reason, Message: j.Message, Partitions: record.Gaps(j.Partitions), PartitionNames: j.PartitionNames,
		SkipIndexes: j.SkipIndexes, Priority: int32(j.Priority), Labels: j.Labels, Layout: uint32(j.Layout),
		FirstPartition: j.FirstPartition, FirstIndex: j.FirstIndex, FirstSegment: j.FirstSegment, FirstBuild: j.FirstBuild,
		Segments: j.Segments, Builds: j.Builds, CopyThreshold: j.Parts.Threshold, CopyPartSize: j.Parts.PartSize,
		Tasks: j.Tasks, TaskSegments: j.TaskSegments, Totals: totalsRecord(j.Totals), Done: totalsRecord(j.Done),
		Retries:    j.Retries,
		CreateTime: record.Nanos(j.CreateTime), StartTime: record.Nanos(j.StartTime), EndTime: record.Nanos(j.EndTime),
		Deadline:   record.Nanos(j.Deadline),
		RequestKey: j.RequestKey, PinId: j.Pin, PinStore: j.PinStore, Op: op,
	})
}

// DecodeJob decodes a job's record.
func DecodeJob(kv meta.KeyValue) (*Job, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return nil, err
	}
	r := &storagev1.Job{}
	if err := record.Decode(kv, r); err != nil {
		return nil, err
	}
	var roots []catalog.Root
	for _, root := range r.GetRoots() {
		roots = append(roots, catalog.Root{Store: root.GetStore(), Prefix: root.GetPrefix()})
	}
	return &Job{
		Roots: roots, Copied: r.GetCopied(),
		ID: id, Snapshot: r.GetSnapshotId(), SnapshotName: r.GetSnapshotName(), Source: r.GetSourceCollection(),
		Target: r.GetCollectionId(), DB: r.GetDb(), Name: r.GetName(), State: State(r.GetState()), Phase: Phase(r.GetPhase()),
		Outcome: State(r.GetOutcome()), Reason: r.GetReason(), Message: r.GetMessage(),
		Partitions: record.Sums(r.GetPartitions()), PartitionNames: r.GetPartitionNames(), SkipIndexes: r.GetSkipIndexes(),
		Priority: int(r.GetPriority()), Labels: r.GetLabels(), Layout: layout.Layout(r.GetLayout()),
		FirstPartition: r.GetFirstPartition(), FirstIndex: r.GetFirstIndex(),
		FirstSegment: r.GetFirstSegment(), FirstBuild: r.GetFirstBuild(), Segments: r.GetSegments(), Builds: r.GetBuilds(),
		Parts: object.CopyParts{Threshold: r.GetCopyThreshold(), PartSize: r.GetCopyPartSize()},
		Tasks: r.GetTasks(), TaskSegments: r.GetTaskSegments(), Totals: totalsOf(r.GetTotals()), Done: totalsOf(r.GetDone()),
		Retries: r.GetRetries(), CreateTime: record.Time(r.GetCreateTime()), StartTime: record.Time(r.GetStartTime()),
		EndTime: record.Time(r.GetEndTime()), Deadline: record.Time(r.GetDeadline()),
		RequestKey: r.GetRequestKey(), Pin: r.GetPinId(), PinStore: r.GetPinStore(),
		Revision: kv.ModRevision,
	}, nil
}
