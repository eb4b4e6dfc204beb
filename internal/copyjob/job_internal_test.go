package copyjob

import (
	"fmt"
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestRecords checks that records are decoded as they were encoded.
func TestRecords(t *testing.T) {
	job := &Job{
		ID: 1, Snapshot: 2, SnapshotName: "s", Source: 3, Target: 4, DB: "d", Name: "n",
		State: Executing, Phase: Copy, Outcome: Failed,
		Reason: "R", Message: "M", Partitions: []int64{3, 9}, PartitionNames: []string{"b", "a"}, SkipIndexes: true,
		Priority: -7,
		Labels:   map[string]string{"a": "b"}, Layout: layout.Milvus,
		FirstPartition: 5, FirstIndex: 6, FirstSegment: 7, FirstBuild: 8,
		Segments: 9, Builds: 10, Parts: object.CopyParts{Threshold: 11, PartSize: 12}, Tasks: 13, TaskSegments: 14,
		Totals: segment.Totals{Segments: 1, Rows: 2, Files: 3, Bytes: 4, Builds: 5, Straddling: 6},
		Done:   segment.Totals{Segments: 1}, Retries: 15, CreateTime: start, StartTime: start.Add(1), EndTime: start.Add(2),
		Deadline: start.Add(3), RequestKey: "/request/x", Pin: 16,
		Revision: 17,
	}
	got, err := DecodeJob(meta.KeyValue{Key: keys.Job(1), Value: job.Encode("op"), ModRevision: 17})
	if err != nil || fmt.Sprintf("%+v", *got) != fmt.Sprintf("%+v", *job) {
		t.Errorf("%+v is decoded as %+v, err = %v", *job, got, err)
	}
	tk := &task{
		job: 1, number: 2, state: TaskFailed, attempt: 3, failures: 4, worker: 5, notBefore: start, reason: "R", message: "M",
		totals: segment.Totals{Files: 1}, revision: 9,
	}
	gotTask, err := decodeTask(meta.KeyValue{Key: tk.key(), Value: tk.encode("op"), ModRevision: 9})
	if err != nil || *gotTask != *tk {
		t.Errorf("%+v is decoded as %+v, err = %v", tk, gotTask, err)
	}
}
