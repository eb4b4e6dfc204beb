// Package inspect formats records for display. Nothing decides on its output.
package inspect

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// types has the record types by key prefix.
var types = []struct {
	prefix string
	make   func() record.Message
}{
	{keys.Format, func() record.Message { return &storagev1.Cluster{} }},
	{keys.IDs, func() record.Message { return &storagev1.Allocator{} }},
	{keys.Epoch, func() record.Message { return &storagev1.Epoch{} }},
	{keys.RolledBack, func() record.Message { return &storagev1.Behind{} }},
	{keys.VerdictPrefix, func() record.Message { return &storagev1.StoreVerdict{} }},
	{keys.Clock, func() record.Message { return &storagev1.Clock{} }},
	{keys.SnapshotPrefix, func() record.Message { return &storagev1.Snapshot{} }},
	{"/snapshot/name/", func() record.Message { return &storagev1.Name{} }},
	{"/snapshot/pending/", func() record.Message { return &storagev1.Pending{} }},
	{"/request/", func() record.Message { return &storagev1.Request{} }},
	{"/gc/gen/", func() record.Message { return &storagev1.Generation{} }},
	{keys.AllPinsPrefix, func() record.Message { return &storagev1.Pin{} }},
	{keys.Unpin, func() record.Message { return &storagev1.Unpin{} }},
	{keys.Cycle, func() record.Message { return &storagev1.Round{} }},
	{keys.AllTombstonesPrefix, func() record.Message { return &storagev1.Tombstone{} }},
	{keys.JobPrefix, func() record.Message { return &storagev1.Job{} }},
	{keys.AllTasksPrefix, func() record.Message { return &storagev1.Task{} }},
	{keys.AllProgressPrefix, func() record.Message { return &storagev1.TaskProgress{} }},
	{keys.LimitsPrefix, func() record.Message { return &storagev1.JobLimits{} }},
	{keys.WorkerPrefix, func() record.Message { return &storagev1.Worker{} }},
	{keys.AssignedPrefix, func() record.Message { return &storagev1.Assignment{} }},
	{"/catalog/name/", func() record.Message { return &storagev1.Name{} }},
	{keys.CollectionPrefix, func() record.Message { return &storagev1.Collection{} }},
	{"/catalog/partition/", func() record.Message { return &storagev1.Partition{} }},
	{"/catalog/partition-name/", func() record.Message { return &storagev1.Name{} }},
	{"/catalog/index/", func() record.Message { return &storagev1.Index{} }},
	{"/catalog/index-name/", func() record.Message { return &storagev1.Name{} }},
	{"/catalog/channel/", func() record.Message { return &storagev1.Channel{} }},
	{"/catalog/segment/", func() record.Message { return &storagev1.Segment{} }},
	{"/catalog/unit/", func() record.Message { return &storagev1.Unit{} }},
	{"/catalog/replaced/", func() record.Message { return &storagev1.Name{} }},
	{"/catalog/root/", func() record.Message { return &storagev1.Name{} }},
	{keys.OwnerRangePrefix, func() record.Message { return &storagev1.OwnerRange{} }},
	{"/catalog/owner/", func() record.Message { return &storagev1.Owner{} }},
	{keys.Owners, func() record.Message { return &storagev1.Owner{} }},
	{keys.GonePrefix, func() record.Message { return &storagev1.Gone{} }},
}

// Describe returns the type of a record and the record as JSON. For an unreadable record
// the type is empty, and the text has its bytes in base64. It omits secrets.
func Describe(kv meta.KeyValue) (typeName, text string) {
	if kv.Key == keys.Leader { // the only value that is a name, not a message
		if text, err := json.Marshal(map[string]string{"replica": string(kv.Value)}); err == nil {
			return "replica name", string(text)
		}
	}
	for _, t := range types {
		if !strings.HasPrefix(kv.Key, t.prefix) {
			continue
		}
		m := t.make()
		if record.Decode(kv, m) != nil {
			break
		}
		if c, ok := m.(*storagev1.Cluster); ok {
			c.TokenKey = nil
			// An unknown field may be a secret as well.
			c.ProtoReflect().SetUnknown(nil)
		}
		return describe(kv, m)
	}
	if strings.HasPrefix(kv.Key, keys.Format) {
		return "", "" // it may have the key of the tokens
	}
	return "", base64.StdEncoding.EncodeToString(kv.Value)
}

func describe(kv meta.KeyValue, m proto.Message) (typeName, text string) {
	data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	var out bytes.Buffer // protojson varies its spaces
	if err != nil || json.Compact(&out, data) != nil {
		return "", base64.StdEncoding.EncodeToString(kv.Value)
	}
	return string(m.ProtoReflect().Descriptor().FullName()), out.String()
}
