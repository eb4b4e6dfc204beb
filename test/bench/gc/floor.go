//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/bench"
)

// The floor only deletes objects, in a separate process like the subject. It reads
// one job per line and writes one result per line.

// perRequest is the number of objects per delete request.
const perRequest = 1000

type job struct {
	S3       string // host:port
	Set      set
	InFlight int
}

type result struct {
	Error   string
	Seconds float64
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

// delete deletes the objects of a set and returns the duration in seconds.
func (f *floor) delete(ctx context.Context, j job) (float64, error) {
	r := &result{}
	if err := f.process.Call(ctx, f.out, j, r); err != nil {
		return 0, err
	}
	if r.Error != "" {
		return 0, fmt.Errorf("floor: %s", r.Error)
	}
	return r.Seconds, nil
}

// floorChild is the child's side.
func floorChild(ctx context.Context, in io.Reader, out io.Writer) error {
	var store *s3.Store
	var at string
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var j job
		if err := json.Unmarshal(lines.Bytes(), &j); err != nil {
			return err
		}
		if store == nil || at != j.S3 {
			if store != nil {
				_ = store.Close()
			}
			var err error
			if store, err = s3.Open(ctx, s3.Options{
				Bucket: bench.Bucket, Endpoint: "http://" + j.S3, PathStyle: true,
				AccessKeyID: bench.AccessKeyID, SecretAccessKey: bench.SecretAccessKey,
			}); err != nil {
				return err
			}
			at = j.S3
		}
		r := &result{}
		var err error
		if r.Seconds, err = deleteSet(ctx, store, &j); err != nil {
			r.Error = err.Error()
		}
		if err := json.NewEncoder(out).Encode(r); err != nil {
			return err
		}
	}
	if store != nil {
		_ = store.Close()
	}
	return lines.Err()
}

// deleteSet deletes the objects of a set. It builds the keys before the timed part.
func deleteSet(ctx context.Context, store *s3.Store, j *job) (float64, error) {
	batches := [][]string{nil}
	for _, key := range j.Set.keys() {
		last := len(batches) - 1
		if len(batches[last]) == perRequest {
			batches, last = append(batches, make([]string, 0, perRequest)), last+1
		}
		batches[last] = append(batches[last], key)
	}
	runtime.GC() // no garbage of the last job
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(j.InFlight)
	begin := time.Now()
	for _, keys := range batches {
		group.Go(func() error { return store.Delete(ctx, keys...) })
	}
	err := group.Wait()
	return time.Since(begin).Seconds(), err
}
