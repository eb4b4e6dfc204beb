package snapshot

import (
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Encode returns the record that the transaction op writes for s.
func Encode(s *Record, op string) []byte {
	rec := &storagev1.Snapshot{
		Format: record.Format, Name: s.Name, CollectionId: s.Collection, Db: s.DB, CollectionName: s.CollectionName,
		State: uint32(s.State), Description: s.Description, Labels: s.Labels,
		CreateTime: record.Nanos(s.CreateTime), CommitTime: record.Nanos(s.CommitTime),
		ExpireTime: record.Nanos(s.ExpireTime), Ttl: int64(s.TTL),
		CatalogRevision: s.CatalogRevision, Partitions: record.Gaps(s.Partitions),
		Totals: &storagev1.Totals{
			Segments: s.Totals.Segments, Rows: s.Totals.Rows, Files: s.Totals.Files, Bytes: s.Totals.Bytes,
			Builds: s.Totals.Builds, Straddling: s.Totals.Straddling,
		},
		MetadataLength: s.Metadata.Length, ManifestBytes: s.ManifestBytes,
		CommitRevision: s.CommitRevision, RequestKey: s.RequestKey, Op: op, Reason: s.Reason, Store: s.Store,
		History: s.History, BeginRevision: s.BeginRevision,
	}
	if s.Metadata.Length > 0 {
		rec.MetadataSha256 = s.Metadata.SHA256[:]
	}
	rec.References = record.References(&s.References)
	for _, c := range s.Cuts {
		rec.Cuts = append(rec.Cuts, &storagev1.Cut{
			Shard: uint32(c.Shard), Channel: c.Channel, Timestamp: uint64(c.Timestamp),
		})
	}
	return record.Encode(rec)
}

// Decode reads a snapshot's record.
func Decode(kv meta.KeyValue) (*Record, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return nil, err
	}
	rec := &storagev1.Snapshot{}
	if err := record.Decode(kv, rec); err != nil {
		return nil, err
	}
	t := rec.GetTotals()
	s := &Record{
		ID: id, Name: rec.GetName(), Collection: rec.GetCollectionId(), DB: rec.GetDb(),
		CollectionName: rec.GetCollectionName(), State: State(rec.GetState()), Description: rec.GetDescription(),
		Labels:     rec.GetLabels(),
		CreateTime: record.Time(rec.GetCreateTime()), CommitTime: record.Time(rec.GetCommitTime()),
		ExpireTime: record.Time(rec.GetExpireTime()), TTL: time.Duration(rec.GetTtl()),
		CatalogRevision: rec.GetCatalogRevision(), Partitions: record.Sums(rec.GetPartitions()),
		Totals: segment.Totals{
			Segments: t.GetSegments(), Rows: t.GetRows(), Files: t.GetFiles(), Bytes: t.GetBytes(),
			Builds: t.GetBuilds(), Straddling: t.GetStraddling(),
		},
		Metadata: manifest.Digest{Length: rec.GetMetadataLength()}, ManifestBytes: rec.GetManifestBytes(),
		Reason: rec.GetReason(), Store: rec.GetStore(),
		Revision: kv.ModRevision, Order: rec.GetCommitRevision(),
		RequestKey: rec.GetRequestKey(), Op: rec.GetOp(), CommitRevision: rec.GetCommitRevision(),
		History: rec.GetHistory(), BeginRevision: rec.GetBeginRevision(),
	}
	copy(s.Metadata.SHA256[:], rec.GetMetadataSha256())
	s.References = record.RefsFile(rec.GetReferences())
	for _, c := range rec.GetCuts() {
		s.Cuts = append(s.Cuts, Cut{
			Shard: int(c.GetShard()), Channel: c.GetChannel(), Timestamp: segment.Timestamp(c.GetTimestamp()),
		})
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
