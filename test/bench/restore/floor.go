//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/bench"
)

// The floor only copies objects, in a separate process like the subject. It reads
// one job per line and writes one result per line.

type job struct {
	Op       string // put, or copy
	S3       string // host:port
	Set      string // of objects
	Prefix   string // of the objects to put; of the copies to make
	Keys     []string
	Size     int64
	InFlight int
}

type result struct {
	Error   string
	Seconds float64
	ETags   []string
}

// floor is the parent's side.
type floor struct {
	process *bench.Process
	out     *bufio.Reader
}

func startFloor(ctx context.Context, dir string) (*floor, error) {
	p, err := bench.StartSelf(ctx, dir, "floor")
	if err != nil {
		return nil, err
	}
	return &floor{p, bufio.NewReader(p.Stdout)}, nil
}

func (f *floor) do(ctx context.Context, j job) (*result, error) {
	r := &result{}
	if err := f.process.Call(ctx, f.out, j, r); err != nil {
		return nil, err
	}
	if r.Error != "" {
		return nil, fmt.Errorf("%s: %s", j.Op, r.Error)
	}
	return r, nil
}

// floorChild is the child's side.
func floorChild(ctx context.Context, in io.Reader, out io.Writer) error {
	f := &copier{stores: map[string]*s3.Store{}, sets: map[string][]object.Info{}, prefixes: map[string]string{}}
	defer func() {
		for _, s := range f.stores {
			_ = s.Close()
		}
	}()
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 64<<20)
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

type copier struct {
	stores   map[string]*s3.Store
	sets     map[string][]object.Info
	prefixes map[string]string // of sets
}

func (f *copier) do(ctx context.Context, j job, r *result) error {
	store := f.stores[j.S3]
	if store == nil {
		var err error
		if store, err = s3.Open(ctx, s3.Options{
			Bucket: bucket, Endpoint: "http://" + j.S3, PathStyle: true,
			AccessKeyID: bench.AccessKeyID, SecretAccessKey: bench.SecretAccessKey,
		}); err != nil {
			return err
		}
		f.stores[j.S3] = store
	}
	runtime.GC() // no garbage of the last job
	switch j.Op {
	case "put":
		return f.put(ctx, store, j, r)
	case "copy":
		return f.copy(ctx, store, j, r)
	}
	return fmt.Errorf("unknown job %q", j.Op)
}

// put writes objects with different contents.
func (f *copier) put(ctx context.Context, store object.Store, j job, r *result) error {
	const inFlight = 8
	body := make([]byte, j.Size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(body) // never an error
	infos := make([]object.Info, len(j.Keys))
	r.ETags = make([]string, len(j.Keys))
	bodies := make(chan []byte, inFlight)
	for range min(inFlight, len(j.Keys)) {
		bodies <- append([]byte(nil), body...)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(inFlight)
	for i, key := range j.Keys {
		group.Go(func() (err error) {
			own := <-bodies
			defer func() { bodies <- own }()
			copy(own, fmt.Sprintf("%32d", i))
			infos[i], err = store.Put(ctx, j.Prefix+key, own)
			r.ETags[i] = infos[i].ETag
			return err
		})
	}
	f.sets[j.Set], f.prefixes[j.Set] = infos, j.Prefix
	return group.Wait()
}

// copy copies a set, each object in one request.
func (f *copier) copy(ctx context.Context, store object.Store, j job, r *result) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(j.InFlight)
	begin := time.Now()
	for _, info := range f.sets[j.Set] {
		to := j.Prefix + strings.TrimPrefix(info.Key, f.prefixes[j.Set])
		group.Go(func() error {
			_, err := store.Copy(ctx, object.CopyRequest{
				From:       info.Key,
				To:         to,
				SourceETag: info.ETag,
				Size:       info.Size,
				Parts:      object.CopyParts{Threshold: object.MaxCopySize},
			})
			return err
		})
	}
	err := group.Wait()
	r.Seconds = time.Since(begin).Seconds()
	return err
}
