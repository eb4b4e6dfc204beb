package cli_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/cli"
)

// server is a fake server: it returns the answers of a test and keeps the requests.
type server struct {
	snapshotdv1.UnimplementedSnapshotServiceServer
	snapshotdv1.UnimplementedCatalogServiceServer
	snapshotdv1.UnimplementedEventServiceServer
	snapshotdv1.UnimplementedReclaimServiceServer
	snapshotdv1.UnimplementedCollectorServiceServer
	snapshotdv1.UnimplementedAdminServiceServer

	// Answers per method, messages or errors; the last one repeats.
	answers map[string][]any
	notes   []string // sent with each answer
	// The result of each message of AddSegments; nil continues.
	added func(*snapshotdv1.AddSegmentsRequest) error

	mu       sync.Mutex
	requests []proto.Message
}

func method(full string) string { return full[strings.LastIndexByte(full, '/')+1:] }

// next returns the next answer to a method.
func (s *server) next(name string, req proto.Message) (proto.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if req != nil {
		s.requests = append(s.requests, proto.Clone(req))
	}
	as := s.answers[name]
	if len(as) == 0 {
		return nil, status.Errorf(codes.Unimplemented, "the test has no answer for %s", name)
	}
	if len(as) > 1 {
		s.answers[name] = as[1:]
	}
	if err, ok := as[0].(error); ok {
		return nil, err
	}
	return as[0].(proto.Message), nil
}

// start runs the server and returns its address.
func (s *server) start(t *testing.T) string {
	t.Helper()
	g := grpc.NewServer(grpc.UnaryInterceptor(func(
		ctx context.Context, req any, info *grpc.UnaryServerInfo, _ grpc.UnaryHandler,
	) (any, error) {
		for _, text := range s.notes {
			_ = grpc.SetHeader(ctx, metadata.Pairs("snapshotd-note", text))
		}
		return s.next(method(info.FullMethod), req.(proto.Message))
	}))
	snapshotdv1.RegisterSnapshotServiceServer(g, s)
	snapshotdv1.RegisterCatalogServiceServer(g, s)
	snapshotdv1.RegisterEventServiceServer(g, s)
	snapshotdv1.RegisterReclaimServiceServer(g, s)
	snapshotdv1.RegisterCollectorServiceServer(g, s)
	snapshotdv1.RegisterAdminServiceServer(g, s)
	var config net.ListenConfig
	l, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	return l.Addr().String()
}

func (s *server) AddSegments(
	stream grpc.ClientStreamingServer[snapshotdv1.AddSegmentsRequest, snapshotdv1.AddSegmentsResponse],
) error {
	resp := new(snapshotdv1.AddSegmentsResponse)
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(resp)
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.requests = append(s.requests, req)
		s.mu.Unlock()
		if s.added != nil {
			if err := s.added(req); err != nil {
				return err
			}
		}
		resp.Added += int64(len(req.GetSegments()))
	}
}

func (s *server) ExportSegments(
	_ *snapshotdv1.ExportSegmentsRequest, stream grpc.ServerStreamingServer[snapshotdv1.ExportSegmentsResponse],
) error {
	for range len(s.answers["ExportSegments"]) {
		msg, err := s.next("ExportSegments", nil)
		if err != nil {
			return err
		}
		if err := stream.Send(msg.(*snapshotdv1.ExportSegmentsResponse)); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) WatchEvents(
	req *snapshotdv1.WatchEventsRequest, stream grpc.ServerStreamingServer[snapshotdv1.WatchEventsResponse],
) error {
	for _, a := range s.answers["WatchEvents "+req.GetResumeToken()] {
		if err, ok := a.(error); ok {
			return err
		}
		if err := stream.Send(a.(*snapshotdv1.WatchEventsResponse)); err != nil {
			return err
		}
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// result is the outcome of one run of the program.
type result struct {
	code        int
	out, errOut string
}

// now is the time of the test data.
var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// run runs the program against s.
func run(t *testing.T, s *server, stdin string, args ...string) result {
	t.Helper()
	addr := s.start(t)
	var out, errOut bytes.Buffer
	p := cli.Program{
		Version: "v1",
		Getenv: func(name string) string {
			if name == "SNAPSHOTCTL_ADDR" {
				return addr
			}
			return ""
		},
	}
	code := p.Run(t.Context(), args, strings.NewReader(stdin), &out, &errOut)
	return result{code, out.String(), strings.ReplaceAll(errOut.String(), addr, "ADDR")}
}

// TestNotes checks that server notes are printed once each, to standard error.
func TestNotes(t *testing.T) {
	page := func(token string) *snapshotdv1.ListSnapshotsResponse {
		return &snapshotdv1.ListSnapshotsResponse{
			Snapshots: []*snapshotdv1.Snapshot{{Name: "s", Id: 4}}, NextPageToken: token,
		}
	}
	s := &server{
		answers: map[string][]any{"ListSnapshots": {page("next"), page("")}},
		notes:   []string{"2 collections had the name default/c", "another"},
	}
	got := run(t, s, "", "snapshot", "list", "--collection", "c", "-o", "json")
	if got.code != 0 || strings.Count(got.errOut, "note: ") != 2 || !strings.Contains(
		got.errOut, "note: 2 collections had the name default/c\n",
	) ||
		strings.Contains(got.out, "note") {
		t.Errorf("%+v", got)
	}
}

// answer returns an error in the form that snapshotd sends.
func answer(t *testing.T, code codes.Code, reason, message string, more ...protoadapt.MessageV1) error {
	t.Helper()
	details := append([]protoadapt.MessageV1{&errdetails.ErrorInfo{Domain: "snapshotd", Reason: reason}}, more...)
	st, err := status.New(code, message).WithDetails(details...)
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func snapshot() *snapshotdv1.Snapshot {
	return &snapshotdv1.Snapshot{
		Id: 42, Name: "nightly",
		Collection: &snapshotdv1.CollectionInfo{Id: 7, Db: "default", Name: "docs"},
		Labels:     map[string]string{"b": "2", "a": "1"},
		State:      snapshotdv1.Snapshot_STATE_COMMITTED,
		CreateTime: timestamppb.New(now), CommitTime: timestamppb.New(now.Add(1234567 * time.Microsecond)),
		ExpireTime: timestamppb.New(now.AddDate(0, 0, 1)),
		Cuts: []*snapshotdv1.ChannelPosition{
			{Shard: 0, Channel: "docs-0", Position: &snapshotdv1.Position{Timestamp: 100}},
			{Shard: 1, Channel: "docs-1", Position: &snapshotdv1.Position{Timestamp: 120}},
		},
		CatalogRevision: 900,
		Totals: &snapshotdv1.Totals{
			Segments: 3, Rows: 1000, Files: 12, Bytes: 5 << 20, Builds: 2, StraddlingSegments: 1,
		},
		Revision: 901, ManifestBytes: 2048,
	}
}

func pin() *snapshotdv1.Pin {
	return &snapshotdv1.Pin{
		Id: 65, SnapshotId: 42, Owner: "backup-job", Reason: "nightly export", Ttl: durationpb.New(90 * time.Minute),
		CreateTime: timestamppb.New(now), ExpireTime: timestamppb.New(now.Add(90 * time.Minute)),
	}
}

func pending() *snapshotdv1.Snapshot {
	return &snapshotdv1.Snapshot{
		Id: 43, Name: "next",
		Collection: &snapshotdv1.CollectionInfo{Id: 7, Db: "default", Name: "docs"},
		State:      snapshotdv1.Snapshot_STATE_PENDING,
		CreateTime: timestamppb.New(now),
	}
}

func collection() *snapshotdv1.Collection {
	return &snapshotdv1.Collection{
		Id: 7, Db: "default", Name: "docs", State: snapshotdv1.Collection_STATE_ACTIVE,
		Schema: &snapshotdv1.Schema{Fields: []*snapshotdv1.Field{
			{Id: 100, Name: "pk", DataType: "Int64", PrimaryKey: true},
			{Id: 101, Name: "vec", DataType: "FloatVector", TypeParams: map[string]string{"dim": "128"}},
		}},
		Channels: []string{"docs-0", "docs-1"},
		Roots:    []*snapshotdv1.Root{{Store: "default", Prefix: "engine/"}},
		Layout:   snapshotdv1.Layout_LAYOUT_NATIVE, ConsistencyLevel: "Bounded",
		Properties: map[string]string{"ttl": "3600"},
		CreateTime: timestamppb.New(now), Revision: 5,
	}
}

var (
	partitions = &snapshotdv1.ListPartitionsResponse{Partitions: []*snapshotdv1.Partition{
		{Id: 8, Name: "p1", State: snapshotdv1.Partition_STATE_ACTIVE, Attributes: map[string]string{"tier": "hot"}},
	}}
	indexes = &snapshotdv1.ListIndexesResponse{Indexes: []*snapshotdv1.Index{
		{
			Id: 9, Name: "vec_idx", FieldId: 101, State: snapshotdv1.Index_STATE_ACTIVE,
			IndexParams: map[string]string{"index_type": "HNSW"},
		},
	}}
	checkpoints = &snapshotdv1.ListCheckpointsResponse{Checkpoints: []*snapshotdv1.ChannelPosition{
		{Shard: 0, Channel: "docs-0", Position: &snapshotdv1.Position{Timestamp: 100}},
	}}
)

func TestOutput(t *testing.T) {
	description := &snapshotdv1.DescribeSnapshotResponse{
		Snapshot: snapshot(), Collection: collection(),
		Partitions: partitions.GetPartitions(), Indexes: indexes.GetIndexes(),
		Store: "default", Prefix: "snapshots/7/42/", FormatVersion: 1,
		Manifests: []*snapshotdv1.Manifest{{
			File: "manifest-0.avro", SizeBytes: 1500, Sha256: []byte{0xab, 0xcd}, Segments: 3,
		}},
	}
	segments := &snapshotdv1.ListSnapshotSegmentsResponse{Segments: []*snapshotdv1.SnapshotSegment{
		{
			Ordinal: 0, Files: 2, Bytes: 2048,
			Segment: &snapshotdv1.Segment{
				Id: 101, PartitionId: 8, Level: snapshotdv1.Segment_LEVEL_L1, State: snapshotdv1.Segment_STATE_FLUSHED, Rows: 10,
				RowCeiling: 100,
				Files:      []*snapshotdv1.File{{Path: "7/8/101/insert/100/1", Kind: "insert", SizeBytes: 1024}},
				IndexBuilds: []*snapshotdv1.IndexBuild{{
					Id: 201, IndexId: 9, Files: []*snapshotdv1.File{{Path: "index/201/a\tb", Kind: "index", SizeBytes: 1024}},
				}},
			},
		},
	}}
	for _, tc := range []struct {
		name    string
		answers map[string][]any
		args    string
		want    string
	}{
		{
			"create",
			map[string][]any{"CreateSnapshot": {&snapshotdv1.CreateSnapshotResponse{Snapshot: snapshot()}}},
			"snapshot create nightly --collection docs",
			`
NAME     ID  STATE      COLLECTION    SEGMENTS  ROWS  FILES  SIZE     CUT          TOOK
nightly  42  COMMITTED  default/docs  3         1000  12     5.0 MiB  0=100,1=120  1.235s
manifest size: 2.0 KiB; data files stay in place
`,
		},
		{
			"create without waiting",
			map[string][]any{"CreateSnapshot": {&snapshotdv1.CreateSnapshotResponse{Snapshot: pending()}}},
			"snapshot create next --collection docs --no-wait",
			`
NAME  ID  STATE    COLLECTION    SEGMENTS  ROWS  FILES  SIZE  CUT  TOOK
next  43  PENDING  default/docs  0         0     0      0 B   -    -
`,
		},
		{
			"get",
			map[string][]any{"GetSnapshot": {&snapshotdv1.GetSnapshotResponse{Snapshot: snapshot()}}},
			"snapshot get nightly",
			`
NAME     ID  STATE      COLLECTION    SEGMENTS  ROWS  FILES  SIZE     CREATED               EXPIRES               LABELS
nightly  42  COMMITTED  default/docs  3         1000  12     5.0 MiB  2026-03-01T12:00:00Z  ` +
				`2026-03-02T12:00:00Z  a=1,b=2
`,
		},
		{
			"get as JSON",
			map[string][]any{"GetSnapshot": {&snapshotdv1.GetSnapshotResponse{Snapshot: pending()}}},
			"snapshot get next -o json",
			`
{
  "snapshot": {
    "id": "43",
    "name": "next",
    "collection": {
      "id": "7",
      "db": "default",
      "name": "docs"
    },
    "state": "STATE_PENDING",
    "createTime": "2026-03-01T12:00:00Z"
  }
}
`,
		},
		{
			"get as YAML",
			map[string][]any{"GetSnapshot": {&snapshotdv1.GetSnapshotResponse{Snapshot: pending()}}},
			"snapshot get next -o yaml",
			`
snapshot:
  collection:
    db: default
    id: "7"
    name: docs
  createTime: "2026-03-01T12:00:00Z"
  id: "43"
  name: next
  state: STATE_PENDING
`,
		},
		{
			"describe",
			map[string][]any{"DescribeSnapshot": {description}},
			"snapshot describe nightly",
			`
Snapshot
  name:                    nightly
  id:                      42
  state:                   COMMITTED
  description:             -
  labels:                  a=1,b=2
  created:                 2026-03-01T12:00:00Z
  committed:               2026-03-01T12:00:01Z
  expires:                 2026-03-02T12:00:00Z
  catalog revision:        900
  segments:                3
  rows:                    1000
  index builds:            2
  segments across the cut: 1

Cut
  SHARD  CHANNEL  ROWS BEFORE
  0      docs-0   100
  1      docs-1   120

Collection
  name:              default/docs
  id:                7
  layout:            native
  consistency level: Bounded
  properties:        ttl=3600
  attributes:        -

Roots
  ROOT  STORE    PREFIX
  0     default  engine/

Schema
  FIELD  NAME  TYPE         KEY      NULLABLE  PARAMETERS
  100    pk    Int64        primary  false     -
  101    vec   FloatVector  -        false     dim=128

Partitions
  NAME  ID  STATE   ATTRIBUTES
  p1    8   ACTIVE  tier=hot

Indexes
  NAME     ID  FIELD  STATE   PARAMETERS
  vec_idx  9   101    ACTIVE  index_type=HNSW

Manifests (default:snapshots/7/42/, format 1, 2.0 KiB)
  FILE             SIZE     SEGMENTS  FROM  SHA256
  manifest-0.avro  1.5 KiB  3         0     abcd

holds: 12 files, 5.0 MiB
to undo: snapshotctl snapshot drop nightly
`,
		},
		{
			"segments",
			map[string][]any{"ListSnapshotSegments": {segments}},
			"snapshot segments nightly",
			`
SEGMENT  PARTITION  SHARD  LEVEL  STATE    ROWS  CEILING  FILES  SIZE
101      8          0      L1     FLUSHED  10    100      2      2.0 KiB
`,
		},
		{
			"files of segments",
			map[string][]any{"ListSnapshotSegments": {segments}},
			"snapshot segments nightly --files",
			`
SEGMENT  BUILD  KIND    SIZE     ROOT  PATH
101      -      insert  1.0 KiB  0     7/8/101/insert/100/1
101      201    index   1.0 KiB  0     "index/201/a\tb"
`,
		},
		{
			"list",
			map[string][]any{"ListSnapshots": {
				&snapshotdv1.ListSnapshotsResponse{Snapshots: []*snapshotdv1.Snapshot{snapshot()}, NextPageToken: "2"},
				&snapshotdv1.ListSnapshotsResponse{Snapshots: []*snapshotdv1.Snapshot{pending()}},
			}},
			"snapshot list",
			`
NAME     ID  STATE      COLLECTION    SEGMENTS  ROWS  FILES  SIZE     CREATED               EXPIRES               LABELS
nightly  42  COMMITTED  default/docs  3         1000  12     5.0 MiB  2026-03-01T12:00:00Z  ` +
				`2026-03-02T12:00:00Z  a=1,b=2
next     43  PENDING    default/docs  0         0     0      0 B      2026-03-01T12:00:00Z  never                 -
`,
		},
		{
			"list as JSON",
			map[string][]any{"ListSnapshots": {
				&snapshotdv1.ListSnapshotsResponse{
					Snapshots: []*snapshotdv1.Snapshot{{Id: 1, Labels: map[string]string{"a": "<1>"}}}, NextPageToken: "2",
				},
				&snapshotdv1.ListSnapshotsResponse{Snapshots: []*snapshotdv1.Snapshot{{Id: 2}}},
			}},
			"snapshot list -o json",
			`
{
  "snapshots": [
    {
      "id": "1",
      "labels": {
        "a": "<1>"
      }
    },
    {
      "id": "2"
    }
  ]
}
`,
		},
		{
			"list as YAML",
			map[string][]any{"ListSnapshots": {
				&snapshotdv1.ListSnapshotsResponse{
					Snapshots: []*snapshotdv1.Snapshot{{Id: 1, Labels: map[string]string{"a": "1"}}}, NextPageToken: "2",
				},
				&snapshotdv1.ListSnapshotsResponse{Snapshots: []*snapshotdv1.Snapshot{{Id: 2}}},
			}},
			"snapshot list -o yaml",
			`
snapshots:
- id: "1"
  labels:
    a: "1"
- id: "2"
`,
		},
		{
			"an empty list",
			map[string][]any{"ListSnapshots": {&snapshotdv1.ListSnapshotsResponse{}}},
			"snapshot list -o json",
			"\n{}\n",
		},
		{
			"drop",
			map[string][]any{"DropSnapshot": {&snapshotdv1.DropSnapshotResponse{SnapshotId: 42}}},
			"snapshot drop nightly",
			"\ndropped snapshot nightly (id 42)\n",
		},
		{
			"drop without a snapshot",
			map[string][]any{"DropSnapshot": {&snapshotdv1.DropSnapshotResponse{}}},
			"snapshot drop nightly",
			"\nno such snapshot\n",
		},
		{
			"pin",
			map[string][]any{"PinSnapshot": {&snapshotdv1.PinSnapshotResponse{Pin: pin()}}},
			"pin create nightly --owner backup-job --ttl 90m",
			`
SNAPSHOT  PIN  OWNER       REASON          TTL      CREATED               EXPIRES
#42       65   backup-job  nightly export  1h30m0s  2026-03-01T12:00:00Z  2026-03-01T13:30:00Z
to renew: snapshotctl pin renew '#42' 65
to undo: snapshotctl pin remove '#42' 65
`,
		},
		{
			"pin without a ttl",
			map[string][]any{"PinSnapshot": {&snapshotdv1.PinSnapshotResponse{Pin: &snapshotdv1.Pin{
				Id: 66, SnapshotId: 42, Owner: "a\x1bb",
			}}}},
			"pin create --id 42 --owner a",
			`
SNAPSHOT  PIN  OWNER     REASON  TTL  CREATED  EXPIRES
#42       66   "a\x1bb"  -       -    -        never
to undo: snapshotctl pin remove '#42' 66
`,
		},
		{
			"pin as JSON",
			map[string][]any{"RenewPin": {&snapshotdv1.RenewPinResponse{Pin: pin()}}},
			"pin renew nightly 65 -o json",
			`
{
  "pin": {
    "id": "65",
    "snapshotId": "42",
    "owner": "backup-job",
    "reason": "nightly export",
    "ttl": "5400s",
    "createTime": "2026-03-01T12:00:00Z",
    "expireTime": "2026-03-01T13:30:00Z"
  }
}
`,
		},
		{
			"pin removed",
			map[string][]any{"UnpinSnapshot": {&snapshotdv1.UnpinSnapshotResponse{}}},
			"pin remove nightly 65",
			"\nremoved pin 65 of snapshot nightly\n",
		},
		{
			"pin removed, as YAML",
			map[string][]any{"UnpinSnapshot": {&snapshotdv1.UnpinSnapshotResponse{}}},
			"pin unpin nightly 65 -o yaml",
			"\n{}\n",
		},
		{
			"pins",
			map[string][]any{"ListPins": {
				&snapshotdv1.ListPinsResponse{Pins: []*snapshotdv1.Pin{pin()}, NextPageToken: "2"},
				&snapshotdv1.ListPinsResponse{Pins: []*snapshotdv1.Pin{{
					Id: 66, SnapshotId: 43, Owner: "o", CreateTime: timestamppb.New(now),
				}}},
			}},
			"pin list",
			`
SNAPSHOT  PIN  OWNER       REASON          TTL      CREATED               EXPIRES
#42       65   backup-job  nightly export  1h30m0s  2026-03-01T12:00:00Z  2026-03-01T13:30:00Z
#43       66   o           -               -        2026-03-01T12:00:00Z  never
`,
		},
		{
			"pins as YAML",
			map[string][]any{"ListPins": {&snapshotdv1.ListPinsResponse{Pins: []*snapshotdv1.Pin{{Id: 66, SnapshotId: 43}}}}},
			"pin list nightly -o yaml",
			`
pins:
- id: "66"
  snapshotId: "43"
`,
		},
		{
			"collections",
			map[string][]any{"ListCollections": {&snapshotdv1.ListCollectionsResponse{Collections: []*snapshotdv1.Collection{
				collection(),
			}}}},
			"catalog collections",
			`
NAME          ID  STATE   SHARDS  FIELDS  CREATED
default/docs  7   ACTIVE  2       2       2026-03-01T12:00:00Z
`,
		},
		{
			"a collection",
			map[string][]any{
				"GetCollection":   {&snapshotdv1.GetCollectionResponse{Collection: collection()}},
				"ListCheckpoints": {checkpoints}, "ListPartitions": {partitions}, "ListIndexes": {indexes},
			},
			"catalog get docs",
			`
Collection
  name:              default/docs
  id:                7
  state:             ACTIVE
  created:           2026-03-01T12:00:00Z
  layout:            native
  consistency level: Bounded
  properties:        ttl=3600
  attributes:        -
  revision:          5

Channels
  SHARD  CHANNEL  CHECKPOINT
  0      docs-0   100
  1      docs-1   -

Roots
  ROOT  STORE    PREFIX
  0     default  engine/

Schema
  FIELD  NAME  TYPE         KEY      NULLABLE  PARAMETERS
  100    pk    Int64        primary  false     -
  101    vec   FloatVector  -        false     dim=128

Partitions
  NAME  ID  STATE   ATTRIBUTES
  p1    8   ACTIVE  tier=hot

Indexes
  NAME     ID  FIELD  STATE   PARAMETERS
  vec_idx  9   101    ACTIVE  index_type=HNSW
`,
		},
		{
			"a collection as JSON",
			map[string][]any{
				"GetCollection":   {&snapshotdv1.GetCollectionResponse{Collection: &snapshotdv1.Collection{Id: 7}}},
				"ListCheckpoints": {checkpoints}, "ListPartitions": {&snapshotdv1.ListPartitionsResponse{}},
				"ListIndexes": {&snapshotdv1.ListIndexesResponse{}},
			},
			"catalog get docs -o json",
			`
{
  "checkpoints": [
    {
      "channel": "docs-0",
      "position": {
        "timestamp": "100"
      }
    }
  ],
  "collection": {
    "id": "7"
  }
}
`,
		},
		{
			"allocated ids",
			map[string][]any{"AllocateIds": {&snapshotdv1.AllocateIdsResponse{Ids: &snapshotdv1.IdRange{
				First: 100, Count: 10,
			}}}},
			"catalog allocate-ids 10",
			`
FIRST  LAST  COUNT
100    109   10
`,
		},
		{
			"checkpoints set",
			map[string][]any{"SetCheckpoints": {&snapshotdv1.SetCheckpointsResponse{CatalogRevision: 12}}},
			"catalog set-checkpoint --collection docs 0=1 1=2",
			"\nset 2 checkpoints at catalog revision 12\n",
		},
		{
			"segments dropped",
			map[string][]any{"DropSegments": {&snapshotdv1.DropSegmentsResponse{Dropped: 1}}},
			"catalog drop-segments --collection docs 1",
			"\ndropped 1 segment\n",
		},
		{
			"compaction",
			map[string][]any{"CompactSegments": {&snapshotdv1.CompactSegmentsResponse{CatalogRevision: 12}}},
			"catalog compact --collection docs --input 1,2 --input 3",
			"\ncompacted 3 segments into 0 at catalog revision 12\n",
		},
		{
			"export",
			map[string][]any{"ExportSegments": {
				&snapshotdv1.ExportSegmentsResponse{Segments: []*snapshotdv1.Segment{
					{Id: 1, Rows: 5}, {Id: 2, Attributes: map[string]string{"a": "<>"}},
				}},
				&snapshotdv1.ExportSegmentsResponse{Segments: []*snapshotdv1.Segment{{Id: 3}}},
			}},
			"catalog export --collection docs -o yaml",
			`
{"id":"1","rows":"5"}
{"id":"2","attributes":{"a":"<>"}}
{"id":"3"}
`,
		},
		{
			"a key",
			map[string][]any{"GetKey": {&snapshotdv1.GetKeyResponse{
				Key: "/snapshot/rec/00042", CreateRevision: 3, ModRevision: 4, Type: "snapshotd.storage.v1.Snapshot",
				Json: `{"id":"42","name":"a\u001bb"}`,
			}}},
			"debug get /snapshot/rec/42",
			`
key:             /snapshot/rec/00042
create revision: 3
mod revision:    4
leased:          false
type:            snapshotd.storage.v1.Snapshot
{
  "id": "42",
  "name": "a\u001bb"
}
`,
		},
		{
			"info",
			map[string][]any{"GetServerInfo": {&snapshotdv1.GetServerInfoResponse{
				Version: "v1.2.3", ClusterId: "c", NameScope: snapshotdv1.GetServerInfoResponse_NAME_SCOPE_CLUSTER,
				Replica: "r1", Stores: []string{"a", "b"}, SnapshotStore: "a",
			}}},
			"info",
			`
version:        v1.2.3
cluster:        c
replica:        r1
leader:         none elected
snapshot names: unique per cluster
stores:         a, b
snapshot store: a
`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := run(t, &server{answers: tc.answers}, "", strings.Fields(tc.args)...)
			if diff := cmp.Diff(result{out: tc.want[1:]}, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestRequests checks the requests built from flags and arguments. Tokens are random.
func TestRequests(t *testing.T) {
	byName := func(db, name string) *snapshotdv1.CollectionRef {
		return &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Name{Name: &snapshotdv1.CollectionName{
			Db: db, Name: name,
		}}}
	}
	byID := &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: 7}}
	named := func(name string) *snapshotdv1.SnapshotRef {
		return &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Name{Name: name}}
	}
	id42 := &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Id{Id: 42}}
	inDocs := named("nightly")
	inDocs.Collection = byName("prod", "docs")
	for _, tc := range []struct {
		args []string
		want proto.Message
	}{
		{[]string{"snapshot", "get", "42"}, &snapshotdv1.GetSnapshotRequest{Snapshot: named("42")}},
		{[]string{"snapshot", "get", "#42"}, &snapshotdv1.GetSnapshotRequest{Snapshot: id42}},
		{[]string{"snapshot", "get", "--id", "42"}, &snapshotdv1.GetSnapshotRequest{Snapshot: id42}},
		{
			[]string{"snapshot", "get", "nightly", "--collection", "prod/docs"},
			&snapshotdv1.GetSnapshotRequest{Snapshot: inDocs},
		},
		{
			[]string{
				"snapshot", "create", "n", "--collection", "#7", "--description", "d", "--label", "a=1", "--label", "b=x=y,z",
				"--ttl", "2d",
				"--min-cut", "1=5,0=4", "--require-exact", "--verify", "--no-wait",
			},
			&snapshotdv1.CreateSnapshotRequest{
				Collection: byID, Name: "n", Description: "d", Labels: map[string]string{"a": "1", "b": "x=y,z"},
				Expiry: &snapshotdv1.CreateSnapshotRequest_Ttl{Ttl: durationpb.New(48 * time.Hour)},
				MinCut: []*snapshotdv1.ChannelPosition{
					{Shard: 1, Position: &snapshotdv1.Position{Timestamp: 5}},
					{Shard: 0, Position: &snapshotdv1.Position{Timestamp: 4}},
				},
				RequireExact: true, Verify: true, Wait: new(bool),
			},
		},
		{
			[]string{"snapshot", "update", "nightly", "--description", "", "--no-labels", "--ttl", "1h"},
			&snapshotdv1.UpdateSnapshotRequest{
				Snapshot: named("nightly"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"description", "labels", "ttl"}},
				Ttl: durationpb.New(time.Hour),
			},
		},
		{
			[]string{"snapshot", "update", "nightly", "--no-expiry", "--expected-revision", "5"},
			&snapshotdv1.UpdateSnapshotRequest{
				Snapshot: named("nightly"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"expire_time"}}, ExpectedRevision: 5,
			},
		},
		{
			[]string{
				"snapshot", "list", "--db", "prod", "--partition", "8", "--label", "a=1", "--state", "pending,DELETING", "--prefix",
				"n", "--limit", "5",
			},
			&snapshotdv1.ListSnapshotsRequest{
				Db: "prod", PartitionId: 8, Labels: map[string]string{"a": "1"}, NamePrefix: "n", PageSize: 5,
				States: []snapshotdv1.Snapshot_State{snapshotdv1.Snapshot_STATE_PENDING, snapshotdv1.Snapshot_STATE_DELETING},
			},
		},
		{
			[]string{"snapshot", "drop", "nightly", "--expected-id", "42"},
			&snapshotdv1.DropSnapshotRequest{Snapshot: named("nightly"), ExpectedId: 42},
		},
		{
			[]string{"pin", "create", "nightly", "--collection", "prod/docs", "--owner", "o", "--reason", "r", "--ttl", "7d"},
			&snapshotdv1.PinSnapshotRequest{Snapshot: inDocs, Owner: "o", Reason: "r", Ttl: durationpb.New(7 * 24 * time.Hour)},
		},
		{[]string{"pin", "create", "#42", "--owner", "o"}, &snapshotdv1.PinSnapshotRequest{Snapshot: id42, Owner: "o"}},
		{[]string{"pin", "renew", "nightly", "65"}, &snapshotdv1.RenewPinRequest{Snapshot: named("nightly"), PinId: 65}},
		{
			[]string{"pin", "renew", "--id", "42", "65", "--ttl", "1m"},
			&snapshotdv1.RenewPinRequest{Snapshot: id42, PinId: 65, Ttl: durationpb.New(time.Minute)},
		},
		{[]string{"pin", "remove", "42", "65"}, &snapshotdv1.UnpinSnapshotRequest{Snapshot: named("42"), PinId: 65}},
		{[]string{"pin", "delete", "--id", "42", "65"}, &snapshotdv1.UnpinSnapshotRequest{Snapshot: id42, PinId: 65}},
		{[]string{"pin", "list", "--limit", "5"}, &snapshotdv1.ListPinsRequest{PageSize: 5}},
		{[]string{"pin", "list", "--id", "42"}, &snapshotdv1.ListPinsRequest{Snapshot: id42, PageSize: 1000}},
		{
			[]string{"catalog", "allocate-ids", "10", "--reserve", "100"},
			&snapshotdv1.AllocateIdsRequest{Want: &snapshotdv1.AllocateIdsRequest_Reserve{Reserve: &snapshotdv1.IdRange{
				First: 100, Count: 10,
			}}},
		},
		{
			[]string{"catalog", "allocate-ids", "10", "--release", "100"},
			&snapshotdv1.AllocateIdsRequest{Want: &snapshotdv1.AllocateIdsRequest_Release{Release: &snapshotdv1.IdRange{
				First: 100, Count: 10,
			}}},
		},
		{
			[]string{"catalog", "drop-segments", "--collection", "docs", "1", "2"},
			&snapshotdv1.DropSegmentsRequest{Collection: byName("", "docs"), SegmentIds: []int64{1, 2}},
		},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			// Any answer without an error.
			s := &server{answers: map[string][]any{
				"GetSnapshot": {&snapshotdv1.GetSnapshotResponse{}}, "CreateSnapshot": {&snapshotdv1.CreateSnapshotResponse{}},
				"UpdateSnapshot": {&snapshotdv1.UpdateSnapshotResponse{}}, "ListSnapshots": {&snapshotdv1.ListSnapshotsResponse{}},
				"DropSnapshot": {&snapshotdv1.DropSnapshotResponse{}}, "AllocateIds": {&snapshotdv1.AllocateIdsResponse{}},
				"DropSegments": {&snapshotdv1.DropSegmentsResponse{}}, "PinSnapshot": {&snapshotdv1.PinSnapshotResponse{}},
				"RenewPin": {&snapshotdv1.RenewPinResponse{}}, "UnpinSnapshot": {&snapshotdv1.UnpinSnapshotResponse{}},
				"ListPins": {&snapshotdv1.ListPinsResponse{}},
			}}
			if got := run(t, s, "", tc.args...); got.code != 0 {
				t.Fatal(got.errOut)
			}
			got := s.requests[0].ProtoReflect()
			if f := got.Descriptor().Fields().ByName("request_token"); f != nil {
				if got.Get(f).String() == "" {
					t.Error("no request token")
				}
				got.Clear(f)
			}
			if diff := cmp.Diff(tc.want, s.requests[0], protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestLimitAcrossPages(t *testing.T) {
	page := &snapshotdv1.ListSnapshotsResponse{NextPageToken: "more"}
	for i := range int64(1000) {
		page.Snapshots = append(page.Snapshots, &snapshotdv1.Snapshot{Id: i + 1})
	}
	s := &server{answers: map[string][]any{"ListSnapshots": {page}}}
	if got := run(t, s, "", "snapshot", "list", "--limit", "2000"); got.code != 0 || strings.Count(got.out, "\n") != 2001 {
		t.Errorf("code %d, %d lines: %s", got.code, strings.Count(got.out, "\n"), got.errOut)
	}
	if len(s.requests) != 2 || s.requests[1].(*snapshotdv1.ListSnapshotsRequest).GetPageToken() != "more" {
		t.Errorf("got %v", s.requests)
	}
}

func TestErrors(t *testing.T) {
	violation := func(field, description string) *errdetails.BadRequest {
		return &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{
			Field: field, Description: description,
		}}}
	}
	fields := &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
		{Field: "name", Description: "must match the pattern"}, {Field: "labels", Description: "at most 64"},
	}}
	for _, tc := range []struct {
		name string
		err  error
		args string
		want result
	}{
		{
			"violations", answer(t, codes.InvalidArgument, "INVALID_REQUEST", "the request breaks its rules", fields),
			"snapshot get x",
			result{
				code: 2,
				errOut: "error: the request breaks its rules\n  name: must match the pattern\n  labels: at most 64\n" +
					"reason: INVALID_REQUEST\n",
			},
		},
		{
			"one violation, without a field",
			answer(t, codes.InvalidArgument, "INVALID_REQUEST", "no", violation("", "either a or b")),
			"snapshot get x",
			result{code: 2, errOut: "error: no\n  either a or b\nreason: INVALID_REQUEST\n"},
		},
		{
			"one violation, already in the message",
			answer(t, codes.InvalidArgument, "INVALID_REQUEST", "name: too long", violation("name", "too long")),
			"snapshot get x",
			result{code: 2, errOut: "error: name: too long\nreason: INVALID_REQUEST\n"},
		},
		{
			"an invalid token", answer(t, codes.InvalidArgument, "INVALID_RESUME_TOKEN", "no such token"),
			"events --resume-token xx -f",
			result{
				code: 2,
				errOut: "error: no such token\nreason: INVALID_RESUME_TOKEN\n" +
					"hint: a token is valid for the cluster and the --collection that it was issued for; continue without " +
					"--resume-token\n",
			},
		},
		{
			"a compacted token", answer(t, codes.OutOfRange, "EVENTS_COMPACTED", "gone"),
			"events --resume-token xx -f",
			result{
				code: 1,
				errOut: "error: gone\nreason: EVENTS_COMPACTED\n" +
					"hint: list the current state with `snapshotctl snapshot list` and `snapshotctl catalog collections`, and " +
					"continue without --resume-token\n",
			},
		},
		{
			"plaintext to TLS", status.Error(codes.Unavailable, `connection error: desc = "error reading server preface: EOF"`),
			"info --timeout 50ms",
			result{
				code: 6,
				errOut: "error: error reading server preface: EOF\n" +
					"hint: the server may want TLS: see --tls-ca, --tls-cert, --tls-key\n",
			},
		},
		{
			"no client certificate",
			status.Error(
				codes.Unavailable,
				`connection error: desc = "transport: authentication handshake failed: remote error: tls: certificate required"`,
			),
			"info --timeout 50ms",
			result{
				code: 6,
				errOut: "error: authentication handshake failed: remote error: tls: certificate required\n" +
					"hint: the server may want TLS: see --tls-ca, --tls-cert, --tls-key\n",
			},
		},
		{
			"not found", answer(t, codes.NotFound, "SNAPSHOT_NOT_FOUND", "there is no snapshot \"x\""),
			"snapshot get x",
			result{
				code: 3,
				errOut: "error: there is no snapshot \"x\"\nreason: SNAPSHOT_NOT_FOUND\n" +
					"hint: list the snapshots with `snapshotctl snapshot list`; '#42' and --id 42 mean an id, 42 a name\n",
			},
		},
		{
			"exists", answer(t, codes.AlreadyExists, "SNAPSHOT_EXISTS", "snapshot \"x\" exists"),
			"snapshot create x --collection docs",
			result{
				code: 4,
				errOut: "error: snapshot \"x\" exists\nreason: SNAPSHOT_EXISTS\n" +
					"hint: choose another name, or see the existing one with `snapshotctl snapshot get x`\n",
			},
		},
		{
			"precondition", answer(t, codes.FailedPrecondition, "COLLECTION_NOT_ACTIVE", "no"),
			"snapshot create x --collection #7",
			result{
				code:   5,
				errOut: "error: no\nreason: COLLECTION_NOT_ACTIVE\nhint: see its state with `snapshotctl catalog get '#7'`\n",
			},
		},
		{
			"pinned", answer(t, codes.FailedPrecondition, "SNAPSHOT_PINNED", "pinned by 65 (a)"),
			"snapshot drop x",
			result{
				code: 5,
				errOut: "error: pinned by 65 (a)\nreason: SNAPSHOT_PINNED\n" +
					"hint: list its pins with `snapshotctl pin list x`; remove a pin no longer needed with `snapshotctl pin " +
					"remove x PIN_ID`\n",
			},
		},
		{
			"no such pin", answer(t, codes.NotFound, "PIN_NOT_FOUND", "gone"),
			"pin renew x 65",
			result{
				code: 3,
				errOut: "error: gone\nreason: PIN_NOT_FOUND\nhint: list the pins with `snapshotctl pin list x`, and check that " +
					"the snapshot still exists with `snapshotctl snapshot get x`\n",
			},
		},
		{
			"too many pins", answer(t, codes.FailedPrecondition, "LIMIT_EXCEEDED", "1000 pins"),
			"pin create #42 --owner o",
			result{
				code: 5,
				errOut: "error: 1000 pins\nreason: LIMIT_EXCEEDED\n" +
					"hint: list its pins with `snapshotctl pin list '#42'` and remove those no longer needed\n",
			},
		},
		{
			"a pin without an owner", nil, "pin create x",
			result{
				code: 2,
				errOut: "error: --owner is missing; it is shown to users who try to drop the snapshot\n" +
					"hint: see `snapshotctl pin create --help`\n",
			},
		},
		{
			"a ttl that is too long", nil, "pin create x --owner o --ttl 31d",
			result{
				code: 2,
				errOut: "error: --ttl \"31d\": use a time span such as 10m or 7d, 1s to 30d; omit it for a pin that lasts " +
					"until it is removed\nhint: see `snapshotctl pin create --help`\n",
			},
		},
		{
			"a ttl that is too short", nil, "pin renew x 65 --ttl 500ms",
			result{
				code: 2,
				errOut: "error: --ttl \"500ms\": use a time span such as 10m or 7d, 1s to 30d; omit it to keep the ttl\n" +
					"hint: see `snapshotctl pin renew --help`\n",
			},
		},
		{
			"a pin without its id", nil, "pin remove x",
			result{code: 2, errOut: "error: PIN_ID is missing\nhint: see `snapshotctl pin remove --help`\n"},
		},
		{
			"an invalid pin id", nil, "pin remove x y",
			result{
				code: 2, errOut: "error: \"y\" is not an id: ids are positive numbers\nhint: see `snapshotctl pin remove --help`\n",
			},
		},
		{
			"pins of a snapshot without its name", nil, "pin list --collection docs",
			result{
				code: 2,
				errOut: "error: SNAPSHOT is missing: --collection alone does not select one\n" +
					"hint: see `snapshotctl pin list --help`\n",
			},
		},
		{
			"aborted", answer(t, codes.Aborted, "CREATE_ABORTED", "no"),
			"snapshot create x --collection docs",
			result{
				code: 7,
				errOut: "error: no\nreason: CREATE_ABORTED\nhint: run the command again, without --request-token or with a new " +
					"one\n",
			},
		},
		{
			"full", answer(t, codes.ResourceExhausted, "STORE_FULL", "object store full: bucket b: QuotaExceeded (HTTP 403)"),
			"snapshot create x --collection docs",
			result{code: 8, errOut: "error: object store full: bucket b: QuotaExceeded (HTTP 403)\nreason: STORE_FULL\n" +
				"hint: the message names the full store; enlarge it, or drop snapshots that are not needed: see `snapshotctl " +
				"snapshot list`\n"},
		},
		{
			"no reason", status.Error(codes.Internal, "a\nb\x1b[2J"),
			"info",
			result{code: 1, errOut: "error: \"a\\nb\\x1b[2J\"\n"},
		},
		{
			"deadline", status.Error(codes.DeadlineExceeded, "context deadline exceeded"),
			"snapshot create x --collection docs --request-token t",
			result{
				code: 6,
				errOut: "error: no response in time\nhint: the server continues; see `snapshotctl snapshot get x`, or wait " +
					"again by adding --request-token t\n",
			},
		},
		{
			"unavailable", status.Error(codes.Unavailable, "gone"),
			"info --timeout 50ms",
			result{
				code:   6,
				errOut: "error: gone\nhint: is snapshotd running at ADDR? --addr or SNAPSHOTCTL_ADDR names another server\n",
			},
		},
		{
			"an unknown command", nil, "snapshot lisst",
			result{
				code: 2, errOut: "error: unknown command \"lisst\"; did you mean list?\nhint: see `snapshotctl snapshot --help`\n",
			},
		},
		{
			"an unknown flag", nil, "snapshot list --bogus",
			result{code: 2, errOut: "error: unknown flag: --bogus\nhint: see `snapshotctl snapshot list --help`\n"},
		},
		{
			"a missing argument", nil, "snapshot get",
			result{
				code: 2,
				errOut: "error: SNAPSHOT is missing (quote an ID, as in '#42': an unquoted # starts a shell comment)\n" +
					"hint: see `snapshotctl snapshot get --help`\n",
			},
		},
		{
			"both id and name", nil, "snapshot get x --id 1",
			result{code: 2, errOut: "error: --id and \"x\" exclude each other\nhint: see `snapshotctl snapshot get --help`\n"},
		},
		{
			"a bad label", nil, "snapshot create x --collection docs --label a",
			result{code: 2, errOut: "error: label \"a\": use KEY=VALUE\nhint: see `snapshotctl snapshot create --help`\n"},
		},
		{
			"a bad format", nil, "info -o xml",
			result{code: 2, errOut: "error: -o xml: the formats are table, json, yaml\nhint: see `snapshotctl info --help`\n"},
		},
		{
			"nothing to update", nil, "snapshot update x",
			result{
				code: 2,
				errOut: "error: nothing to change: use a flag such as --description or --label\n" +
					"hint: see `snapshotctl snapshot update --help`\n",
			},
		},
		{
			"plaintext", nil, "info --addr 192.0.2.1:7950",
			result{
				code: 2,
				errOut: "error: address \"192.0.2.1:7950\" is not on this machine: plaintext is refused there; connect with " +
					"TLS, or allow it explicitly\nhint: --tls or --tls-ca connects with TLS; --insecure allows plaintext to other " +
					"machines\n",
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &server{answers: map[string][]any{}}
			for _, m := range []string{
				"GetSnapshot", "CreateSnapshot", "DropSnapshot", "PinSnapshot", "RenewPin", "GetServerInfo", "WatchEvents xx",
			} {
				if tc.err != nil {
					s.answers[m] = []any{tc.err}
				}
			}
			got := run(t, s, "", strings.Fields(tc.args)...)
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestConnectionRefused(t *testing.T) {
	var out, errOut bytes.Buffer
	// Port 1 is reserved: no process listens.
	code := cli.Run(
		t.Context(), []string{"info", "--addr", "127.0.0.1:1", "--timeout", "50ms"}, strings.NewReader(""), &out, &errOut,
	)
	want := "error: dial tcp 127.0.0.1:1: connect: connection refused\n" +
		"hint: is snapshotd running at 127.0.0.1:1? --addr or SNAPSHOTCTL_ADDR names another server\n"
	if code != 6 || errOut.String() != want {
		t.Errorf("code %d: %s", code, cmp.Diff(want, errOut.String()))
	}
}

// TestPlaintextAndTLS connects in plaintext to a TLS server, and the reverse.
func TestPlaintextAndTLS(t *testing.T) {
	for _, tc := range []struct {
		name string
		addr string
		args []string
		hint string
	}{
		{"a server that wants TLS", tlsAddr(t), nil, "hint: the server may want TLS: see --tls-ca, --tls-cert, --tls-key\n"},
		{"a server in plaintext", new(server).start(t), []string{"--tls"}, "may speak plaintext: omit --tls,"},
	} {
		var out, errOut bytes.Buffer
		code := cli.Run(
			t.Context(), append([]string{"info", "--addr", tc.addr, "--timeout", "500ms"}, tc.args...), strings.NewReader(""),
			&out, &errOut,
		)
		if code != 6 || !strings.Contains(errOut.String(), tc.hint) {
			t.Errorf("%s: code %d: %s", tc.name, code, errOut.String())
		}
	}
}

// TestInfoWaits checks that info --wait waits for the server and for a leader, and
// fails on a timeout.
func TestInfoWaits(t *testing.T) {
	var answers []any
	for range 12 { // more than the attempts of one call
		answers = append(answers, answer(t, codes.Unavailable, "STORE_UNAVAILABLE", "the metadata store did not answer"))
	}
	answers = append(answers, &snapshotdv1.GetServerInfoResponse{Replica: "r1"}, &snapshotdv1.GetServerInfoResponse{
		Replica: "r1", Leader: "r1",
	})
	got := run(t, &server{answers: map[string][]any{"GetServerInfo": answers}}, "", "info", "--wait", "--timeout", "1m")
	if got.code != 0 || !strings.Contains(got.out, "leader:         r1") {
		t.Errorf("got %+v", got)
	}
	for want, last := range map[string]any{
		"no leader is elected yet":          &snapshotdv1.GetServerInfoResponse{Replica: "r1"},
		"the metadata store did not answer": answers[0],
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			// The attempts of one call take up to two seconds.
			got := run(t, &server{answers: map[string][]any{"GetServerInfo": {last}}}, "", "info", "--wait", "--timeout", "8s")
			if got.code != 6 || !strings.Contains(got.errOut, want) {
				t.Errorf("got %+v", got)
			}
		})
	}
}

// tlsAddr returns the address of a server that speaks TLS only.
func tlsAddr(t *testing.T) string {
	t.Helper()
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ErrorLog = zap.NewStdLog(zap.NewNop()) // it logs the errors under test
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errOut bytes.Buffer
	code := cli.Run(ctx, []string{"info", "--addr", "127.0.0.1:1"}, strings.NewReader(""), &out, &errOut)
	if code != 1 || errOut.String() != "error: interrupted\n" {
		t.Errorf("code %d: %s", code, errOut.String())
	}
}

func TestAddSegments(t *testing.T) {
	lines := "{\"id\":\"1\"}\n\n{\"id\":\"2\", \"rows\": 5}\n"
	file := filepath.Join(t.TempDir(), "segments.jsonl")
	bad := filepath.Join(t.TempDir(), "bad.jsonl")
	for name, text := range map[string]string{file: lines, bad: lines + "{\"id\":\"3\",\"bogus\":1}\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	added := "added 2 segments, 0 already present\n"
	for _, tc := range []struct {
		name, stdin string
		file        string
		requests    int
		want        result
	}{
		{"a file", "", file, 2, result{out: added}},
		{"standard input", lines, "-", 2, result{out: added}},
		{"nothing", "\n", "-", 1, result{out: "added 0 segments, 0 already present\n"}},
		{
			"a bad file", "", bad, 0,
			result{
				code: 2,
				errOut: "error: BAD, line 4: column 11: unknown field \"bogus\"\n" +
					"hint: see `snapshotctl catalog add-segments --help`\n",
			},
		},
		{
			"no id", "{}", "-", -1,
			result{
				code: 2,
				errOut: "error: standard input, line 1: the segment has no id\n" +
					"hint: see `snapshotctl catalog add-segments --help`\n",
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := new(server)
			got := run(t, s, tc.stdin, "catalog", "add-segments", "--collection", "docs", "-f", tc.file)
			got.errOut = strings.ReplaceAll(got.errOut, bad, "BAD")
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
			if tc.requests >= 0 && len(s.requests) != tc.requests {
				t.Errorf("got %d messages, want %d", len(s.requests), tc.requests)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		s := &server{added: func(*snapshotdv1.AddSegmentsRequest) error {
			return answer(t, codes.AlreadyExists, "SEGMENT_EXISTS", "segment 1 was dropped")
		}}
		got := run(t, s, lines, "catalog", "add-segments", "--collection", "docs", "-f", "-")
		if got.code != 4 || !strings.HasPrefix(got.errOut, "error: segment 1 was dropped\nreason: SEGMENT_EXISTS\n") {
			t.Errorf("got %+v", got)
		}
	})
}

func TestApply(t *testing.T) {
	doc := `
name: docs
roots: [{prefix: engine/}]
properties: {ttl: 7200}
partitions: [{name: p1}, {name: p2}]
indexes: [{name: vec_idx, field: 101}]
---
---
db: prod
name: fresh
roots: [{prefix: fresh/}]
partitions: [{name: p1}]
`
	answers := func() map[string][]any {
		return map[string][]any{
			"GetCollection": {
				&snapshotdv1.GetCollectionResponse{Collection: collection()},
				answer(t, codes.NotFound, "COLLECTION_NOT_FOUND", "no"),
			},
			"ListPartitions": {partitions}, "ListIndexes": {indexes},
			"UpdateCollection": {&snapshotdv1.UpdateCollectionResponse{}},
			"CreatePartition":  {&snapshotdv1.CreatePartitionResponse{}},
			"CreateCollection": {&snapshotdv1.CreateCollectionResponse{Collection: &snapshotdv1.Collection{Id: 70}}},
		}
	}
	table := `ACTION     THING       NAME                  CHANGED
updated    collection  default/docs          properties
unchanged  partition   default/docs/p1       -
created    partition   default/docs/p2       -
unchanged  index       default/docs/vec_idx  -
created    collection  prod/fresh            -
created    partition   prod/fresh/p1         -
`
	s := &server{answers: answers()}
	got := run(t, s, doc, "catalog", "apply", "-f", "-")
	if diff := cmp.Diff(result{out: table}, got, cmp.AllowUnexported(result{})); diff != "" {
		t.Error(diff)
	}
	var writes []string
	for _, r := range s.requests {
		if name := string(r.ProtoReflect().Descriptor().Name()); !strings.HasPrefix(name, "Get") &&
			!strings.HasPrefix(name, "List") {
			writes = append(writes, name)
		}
	}
	if diff := cmp.Diff(
		[]string{"UpdateCollectionRequest", "CreatePartitionRequest", "CreateCollectionRequest", "CreatePartitionRequest"},
		writes,
	); diff != "" {
		t.Error(diff)
	}
	if last := s.requests[len(s.requests)-1].(*snapshotdv1.CreatePartitionRequest); last.GetCollection().GetId() != 70 {
		t.Errorf("the partition was created in %v, not in the new collection", last.GetCollection())
	}

	t.Run("dry run", func(t *testing.T) {
		s := &server{answers: answers()}
		got := run(t, s, doc, "catalog", "apply", "-f", "-", "--dry-run")
		if diff := cmp.Diff(
			result{out: table + "dry run: nothing was written\n"}, got, cmp.AllowUnexported(result{}),
		); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("the first step fails", func(t *testing.T) {
		s := &server{answers: answers()}
		s.answers["UpdateCollection"] = []any{answer(t, codes.FailedPrecondition, "", "no")}
		if got := run(t, s, doc, "catalog", "apply", "-f", "-"); got.code != 5 || got.out != "" {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("a later step fails", func(t *testing.T) {
		s := &server{answers: answers()}
		s.answers["CreatePartition"] = []any{answer(t, codes.FailedPrecondition, "LIMIT_EXCEEDED", "too many")}
		got := run(t, s, doc, "catalog", "apply", "-f", "-")
		want := result{
			5,
			"ACTION     THING       NAME             CHANGED\n" +
				"updated    collection  default/docs     properties\n" +
				"unchanged  partition   default/docs/p1  -\n",
			"error: partition default/docs/p2: too many\nreason: LIMIT_EXCEEDED\n" +
				"hint: see the current contents with `snapshotctl catalog get default/docs`\n",
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(result{})); diff != "" {
			t.Error(diff)
		}
	})
}

func TestEvents(t *testing.T) {
	bookmark := func(token string, revision int64) *snapshotdv1.WatchEventsResponse {
		return &snapshotdv1.WatchEventsResponse{
			ResumeToken: token, Revision: revision,
			Event: &snapshotdv1.WatchEventsResponse_Bookmark{Bookmark: &snapshotdv1.Bookmark{}},
		}
	}
	type response = snapshotdv1.WatchEventsResponse
	happened := &response{ResumeToken: "b", Revision: 7, Event: &snapshotdv1.WatchEventsResponse_Snapshot{
		Snapshot: &snapshotdv1.SnapshotEvent{Type: snapshotdv1.ChangeType_CHANGE_TYPE_UPDATED, Snapshot: snapshot()},
	}}
	gone := &response{ResumeToken: "c", Revision: 8, Event: &snapshotdv1.WatchEventsResponse_Collection{
		Collection: &snapshotdv1.CollectionEvent{
			Type: snapshotdv1.ChangeType_CHANGE_TYPE_DELETED, Collection: &snapshotdv1.Collection{Id: 7},
		},
	}}
	pinned := func(
		token string, change snapshotdv1.ChangeType, p *snapshotdv1.Pin, expired bool,
	) *snapshotdv1.WatchEventsResponse {
		return &snapshotdv1.WatchEventsResponse{ResumeToken: token, Revision: 10, Event: &snapshotdv1.WatchEventsResponse_Pin{
			Pin: &snapshotdv1.PinEvent{Type: change, Pin: p, Expired: expired},
		}}
	}
	gonePin := &snapshotdv1.Pin{Id: 65, SnapshotId: 42}
	answers := func() map[string][]any {
		return map[string][]any{
			"WatchEvents p": {
				pinned("q", snapshotdv1.ChangeType_CHANGE_TYPE_CREATED, pin(), false),
				pinned(
					"r", snapshotdv1.ChangeType_CHANGE_TYPE_UPDATED,
					&snapshotdv1.Pin{Id: 65, SnapshotId: 42, Owner: "o", Reason: "a\nb"}, false,
				),
				pinned("s", snapshotdv1.ChangeType_CHANGE_TYPE_DELETED, gonePin, false),
				pinned("t", snapshotdv1.ChangeType_CHANGE_TYPE_DELETED, gonePin, true), bookmark("u", 11),
			},
			"WatchEvents ":  {bookmark("z", 9)},
			"WatchEvents a": {bookmark("a", 6), happened, status.Error(codes.Unavailable, "restart")},
			"WatchEvents b": {gone, bookmark("d", 9), happened},
		}
	}
	for _, tc := range []struct {
		name, args string
		want       result
	}{
		{"from now on", "events", result{errOut: "to resume: snapshotctl events --resume-token z\n"}},
		{
			"since a token", "events --resume-token a",
			result{
				out: "7           updated  snapshot    42            COMMITTED  nightly of default/docs\n" +
					"8           deleted  collection  7             -          -\n",
				errOut: "to resume: snapshotctl events --resume-token d\n",
			},
		},
		{
			"of pins", "events --resume-token p",
			result{
				out: "10          created  pin         65            -          backup-job on snapshot #42: nightly export\n" +
					"10          updated  pin         65            -          o \"on snapshot #42: a\\nb\"\n" +
					"10          deleted  pin         65            REMOVED    - on snapshot #42\n" +
					"10          deleted  pin         65            EXPIRED    - on snapshot #42\n",
				errOut: "to resume: snapshotctl events --resume-token u\n",
			},
		},
		{
			"of a collection", "events --resume-token b --collection #7",
			result{
				out:    "8           deleted  collection  7             -          -\n",
				errOut: "to resume: snapshotctl events --resume-token d --collection '#7'\n",
			},
		},
		{
			"as JSON", "events --resume-token b -o json",
			result{out: `{"resumeToken":"c","revision":"8",` +
				`"collection":{"type":"CHANGE_TYPE_DELETED","collection":{"id":"7"}}}` + "\n" +
				`{"resumeToken":"d","revision":"9","bookmark":{}}` + "\n"},
		},
		{
			"following", "events -f --resume-token b --timeout 200ms",
			result{
				out: "8           deleted  collection  7             -          -\n" +
					"7           updated  snapshot    42            COMMITTED  nightly of default/docs\n",
				errOut: "to resume: snapshotctl events --resume-token b\n",
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := run(t, &server{answers: answers()}, "", strings.Fields(tc.args)...)
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	for _, arg := range []string{"version", "--version"} {
		if got := run(t, new(server), "", arg); !strings.HasPrefix(
			got.out, "snapshotctl v1 (go1.",
		) || !strings.HasSuffix(got.out, ")\n") {
			t.Errorf("%s: got %+v", arg, got)
		}
	}
}
