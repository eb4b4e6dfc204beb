//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/hamba/avro/v2"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/bench"
)

// ways is the concurrency of the floor, equal to that of a create.
const ways = 2

// The worker measures the floor and the reference in a separate process, like the
// subject. It reads one job per line and writes one result per line.

type job struct {
	Op         string // load, decode, floor or reference
	Collection int64
	Manifests  []int // segments in each
	Prefix     string
}

type result struct {
	Error             string
	Read, Encode, Put float64 // seconds
	Bytes             int64
	Segments          int
	Digests           []string
}

func (r *result) total() float64 { return r.Read + r.Encode + r.Put }

// worker is the parent's side.
type worker struct {
	process *bench.Process
	out     *bufio.Reader
}

func startWorker(ctx context.Context, dir, etcd, s3 string) (*worker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p, err := bench.Start(ctx, bench.Command{
		Name: "floor", Args: []string{self, "worker", etcd, s3}, Log: filepath.Join(dir, "floor.log"), Pipes: true,
	})
	if err != nil {
		return nil, err
	}
	return &worker{p, bufio.NewReader(p.Stdout)}, nil
}

func (w *worker) do(ctx context.Context, j job) (*result, error) {
	defer context.AfterFunc(ctx, w.process.Kill)()
	if err := json.NewEncoder(w.process.Stdin).Encode(j); err != nil {
		return nil, err
	}
	line, err := w.out.ReadBytes('\n')
	if err != nil {
		return nil, errors.Join(err, w.process.ExitError())
	}
	r := &result{}
	if err := json.Unmarshal(line, r); err != nil {
		return nil, err
	}
	if r.Error != "" {
		return nil, fmt.Errorf("%s: %s", j.Op, r.Error)
	}
	return r, nil
}

// work is the child's side.
func work(ctx context.Context, endpoint, addr string, in io.Reader, out io.Writer) error {
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	defer func() { _ = cli.Close() }()
	store, err := s3.Open(ctx, s3.Options{
		Bucket: bucket, Endpoint: "http://" + addr, PathStyle: true,
		AccessKeyID: bench.AccessKeyID, SecretAccessKey: bench.SecretAccessKey,
	})
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()
	f := &floor{etcd: cli, store: store}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var j job
		if err := json.Unmarshal(lines.Bytes(), &j); err != nil {
			return err
		}
		r := &result{}
		if err := f.do(ctx, j, r); err != nil {
			r.Error = err.Error()
		}
		if err := json.NewEncoder(out).Encode(r); err != nil {
			return err
		}
	}
	return lines.Err()
}

type floor struct {
	etcd  *clientv3.Client
	store object.Store

	collection int64
	revision   int64
	segments   []segment.Segment
}

func (f *floor) do(ctx context.Context, j job, r *result) error {
	runtime.GC() // no garbage of the last job
	switch j.Op {
	case "load":
		return f.load(ctx, j.Collection, r)
	case "decode":
		return f.decode(ctx, r)
	case "floor":
		return f.floor(ctx, j, r)
	case "reference":
		return f.reference(ctx, j, r)
	}
	return fmt.Errorf("unknown job %q", j.Op)
}

// span is the range of the segments' keys, and a key in its middle.
func (f *floor) span() (from, middle, to string) {
	from, to = meta.Prefix(etcdRoot + keys.SegmentPrefix(f.collection))
	if len(f.segments) == 0 {
		return from, from, to
	}
	return from, etcdRoot + keys.Segment(f.collection, f.segments[len(f.segments)/2].ID), to
}

// stream reads a range.
func (f *floor) stream(ctx context.Context, from, to string, fn func(kvs []meta.KeyValue) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	chunks, err := f.etcd.GetStream(ctx, from, clientv3.WithRange(to), clientv3.WithRev(f.revision))
	if err != nil {
		return err
	}
	for chunk := range chunks {
		if err := chunk.Err(); err != nil {
			return err
		}
		kvs := make([]meta.KeyValue, len(chunk.Kvs))
		for i, kv := range chunk.Kvs {
			kvs[i] = meta.KeyValue{Key: string(kv.Key), Value: kv.Value, ModRevision: kv.ModRevision}
		}
		if err := fn(kvs); err != nil {
			return err
		}
	}
	return nil
}

// load reads and decodes the segments of a collection, for the other jobs.
func (f *floor) load(ctx context.Context, collection int64, r *result) error {
	now, err := f.etcd.Get(ctx, etcdRoot, clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	f.collection, f.revision, f.segments = collection, now.Header.Revision, nil
	from, _, to := f.span()
	err = f.stream(ctx, from, to, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			s, err := catalog.DecodeSegment(collection, kv)
			if err != nil {
				return err
			}
			f.segments = append(f.segments, s)
		}
		return nil
	})
	r.Segments = len(f.segments)
	return err
}

// halves runs fn for both halves of the segments' keys.
func (f *floor) halves(ctx context.Context, fn func(kvs []meta.KeyValue) error) error {
	from, middle, to := f.span()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return f.stream(ctx, from, middle, fn) })
	group.Go(func() error { return f.stream(ctx, middle, to, fn) })
	return group.Wait()
}

// decode reads and decodes, both halves at once: the part of a create that the
// floor leaves out.
func (f *floor) decode(ctx context.Context, r *result) error {
	begin := time.Now()
	err := f.halves(ctx, func(kvs []meta.KeyValue) error {
		var decoder catalog.Decoder
		for _, kv := range kvs {
			if _, err := decoder.Decode(f.collection, kv); err != nil {
				return err
			}
		}
		return nil
	})
	r.Read = time.Since(begin).Seconds()
	return err
}

// floor reads the segments' keys, encodes the segments into the manifests that
// the snapshot has, and puts these: one stage after the other, each two ways at
// once.
func (f *floor) floor(ctx context.Context, j job, r *result) error {
	begin := time.Now()
	if err := f.halves(ctx, func([]meta.KeyValue) error { return nil }); err != nil {
		return err
	}
	r.Read = time.Since(begin).Seconds()

	begin = time.Now()
	files := make([][]byte, len(j.Manifests))
	group := &errgroup.Group{}
	group.SetLimit(ways)
	rest := f.segments
	for i, n := range j.Manifests {
		if n > len(rest) {
			return errors.New("the snapshot has more segments than the collection")
		}
		part := rest[:n]
		rest = rest[n:]
		group.Go(func() (err error) {
			files[i], err = manifest.Encode(part)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	r.Encode = time.Since(begin).Seconds()

	begin = time.Now()
	group, putCtx := errgroup.WithContext(ctx)
	group.SetLimit(ways)
	for i, data := range files {
		group.Go(func() error {
			_, err := f.store.Create(putCtx, fmt.Sprintf("%s/%s", j.Prefix, manifest.ManifestName(i)), data)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	r.Put = time.Since(begin).Seconds()
	for _, data := range files {
		sum := sha256.Sum256(data)
		r.Digests = append(r.Digests, hex.EncodeToString(sum[:]))
		r.Bytes += int64(len(data))
	}
	return nil
}

// reference writes a datum and an object for each segment, one after another.
// What it spends on reading the catalog is not counted.
func (f *floor) reference(ctx context.Context, j job, r *result) error {
	schema, err := ourSchema()
	if err != nil {
		return err
	}
	begin := time.Now()
	for i := range f.segments {
		data, err := avro.Marshal(schema, datumOf(&f.segments[i]))
		if err != nil {
			return err
		}
		if _, err := f.store.Create(ctx, fmt.Sprintf("%s/%d.avro", j.Prefix, f.segments[i].ID), data); err != nil {
			return err
		}
		r.Bytes += int64(len(data))
	}
	r.Put = time.Since(begin).Seconds()
	return nil
}

// ourSchema is the schema of a manifest, as it stands in the header of one.
func ourSchema() (avro.Schema, error) {
	data, err := manifest.Encode(nil)
	if err != nil {
		return nil, err
	}
	const key = "avro.schema"
	_, rest, ok := strings.Cut(string(data), key)
	n, used := binary.Varint([]byte(rest))
	if !ok || used <= 0 || n <= 0 || int(n) > len(rest)-used {
		return nil, errors.New("a manifest without a schema")
	}
	return avro.Parse(rest[used : used+int(n)])
}

// The datum of a segment in the schema of manifests.

type datum struct {
	ID              int64       `avro:"id"`
	Partition       int64       `avro:"partition"`
	Channel         int32       `avro:"channel"`
	Level           int32       `avro:"level"`
	State           int32       `avro:"state"`
	Rows            int64       `avro:"rows"`
	Start           position    `avro:"start"`
	DML             position    `avro:"dml"`
	StorageVersion  int64       `avro:"storage_version"`
	Sorted          bool        `avro:"sorted"`
	CommitTimestamp int64       `avro:"commit_timestamp"`
	RowCeiling      int64       `avro:"row_ceiling_timestamp"`
	Files           []file      `avro:"files"`
	Builds          []build     `avro:"builds"`
	EngineData      []byte      `avro:"engine_data"`
	Attributes      []attribute `avro:"attributes"`
}

type position struct {
	Timestamp int64  `avro:"timestamp"`
	Opaque    []byte `avro:"opaque"`
}

type file struct {
	Root          int32       `avro:"root"`
	Path          string      `avro:"path"`
	Kind          string      `avro:"kind"`
	Size          int64       `avro:"size"`
	ETag          string      `avro:"etag"`
	ChecksumType  string      `avro:"checksum_type"`
	ChecksumValue []byte      `avro:"checksum_value"`
	MinTimestamp  int64       `avro:"min_timestamp"`
	MaxTimestamp  int64       `avro:"max_timestamp"`
	Entries       int64       `avro:"entries"`
	Field         int64       `avro:"field"`
	LogID         int64       `avro:"log_id"`
	Attributes    []attribute `avro:"attributes"`
}

type build struct {
	ID     int64       `avro:"id"`
	Index  int64       `avro:"index"`
	Field  int64       `avro:"field"`
	Params []attribute `avro:"params"`
	Files  []file      `avro:"files"`
}

type attribute struct {
	Key   string `avro:"key"`
	Value string `avro:"value"`
}

func datumOf(s *segment.Segment) *datum {
	d := &datum{
		ID:             s.ID,
		Partition:      s.Partition,
		Channel:        int32(s.Channel),
		Level:          int32(s.Level),
		State:          int32(s.State), //nolint:gosec // our own
		Rows:           s.Rows,
		Start:          position{Timestamp: int64(s.Start.Timestamp)},
		DML:            position{Timestamp: int64(s.DML.Timestamp)},
		StorageVersion: s.StorageVersion,
		Sorted:         s.Sorted,
		Files:          filesOf(s.Files),
	}
	for i := range s.Builds {
		b := &s.Builds[i]
		d.Builds = append(d.Builds, build{ID: b.ID, Index: b.Index, Field: b.Field, Files: filesOf(b.Files)})
	}
	return d
}

func filesOf(list []segment.File) []file {
	out := make([]file, len(list))
	for i := range list {
		f := &list[i]
		out[i] = file{
			Path: f.Path, Kind: f.Kind, Size: f.Size, ETag: f.ETag, MinTimestamp: int64(f.MinTimestamp),
			MaxTimestamp: int64(f.MaxTimestamp), Entries: f.Entries, Field: f.Field, LogID: f.LogID,
		}
	}
	return out
}
