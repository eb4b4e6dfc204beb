//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The bucket and the etcd prefix of every benchmark.
const (
	Bucket   = "bench"
	EtcdRoot = "/snapshotd"
)

// Snapshotd is a running snapshotd.
type Snapshotd struct {
	*Process
	Listen  string // host:port of its API
	Metrics string // host:port
}

// StartSnapshotd starts snapshotd, the program at bin, on dir and an etcd, with
// additional settings in YAML. It returns before snapshotd serves.
func StartSnapshotd(ctx context.Context, bin, dir, etcd, root, settings string) (*Snapshotd, error) {
	s := &Snapshotd{}
	var err error
	for _, addr := range []*string{&s.Listen, &s.Metrics} {
		if *addr, err = FreeAddr(ctx); err != nil {
			return nil, err
		}
	}
	config := filepath.Join(dir, "snapshotd.yaml")
	text := fmt.Sprintf(`
data_dir: %s
listen: %s
metrics_listen: %s
etcd_endpoints: [%q]
etcd_root: %s
log_level: warn
%s`, filepath.Join(dir, "snapshotd"), s.Listen, s.Metrics, etcd, root, settings)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	s.Process, err = Start(ctx, Command{
		Name: "snapshotd", Args: []string{bin, "serve", "--config", config}, Log: filepath.Join(dir, "snapshotd.log"),
		Env: []string{"AWS_ACCESS_KEY_ID=" + AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + SecretAccessKey, "AWS_CA_BUNDLE="},
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// OnS3 returns the settings for the bucket of an S3 server at host:port.
func OnS3(addr string) string {
	return fmt.Sprintf(`object_stores:
  default:
    type: s3
    bucket: %s
    endpoint: http://%s
    path_style: true
`, Bucket, addr)
}

// WaitServing waits until snapshotd serves.
func (s *Snapshotd) WaitServing(ctx context.Context) error {
	return s.WaitHealthy(ctx, "http://"+s.Metrics+"/healthz")
}

// Heap returns the size of its heap, in bytes, garbage included.
func (s *Snapshotd) Heap(ctx context.Context) (float64, error) {
	const metric = "go_memstats_heap_alloc_bytes"
	text, err := Get(ctx, "http://"+s.Metrics+"/metrics")
	if err != nil {
		return 0, err
	}
	v, err := Sum(text, metric)
	if err == nil && v == 0 { // 0 would count as a small heap
		err = fmt.Errorf("no metric %s", metric)
	}
	return v, err
}

// PeakHeap returns the maximum of its heap while fn runs, in bytes, read once per
// interval. The readings slow fn down.
func (s *Snapshotd) PeakHeap(ctx context.Context, interval time.Duration, fn func() error) (float64, error) {
	highest, err := s.Heap(ctx)
	if err != nil {
		return 0, err
	}
	within, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed error
	var group sync.WaitGroup
	group.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-within.Done():
				return
			}
			v, err := s.Heap(within)
			if within.Err() != nil {
				return
			}
			if err != nil {
				failed = err
				return
			}
			highest = max(highest, v)
		}
	})
	err = fn()
	cancel()
	group.Wait()
	if err := errors.Join(err, failed); err != nil {
		return highest, err
	}
	last, err := s.Heap(ctx)
	return max(highest, last), err
}

// Profile writes a processor profile of the given seconds to a file in dir while
// fn runs. Fn may take another time.
func (s *Snapshotd) Profile(ctx context.Context, dir, name string, seconds int, fn func() error) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	data := make(chan []byte, 1)
	go func() {
		got, _ := Get(ctx, fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", s.Metrics, seconds))
		data <- got
	}()
	if err := fn(); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".pprof"), <-data, 0o600)
}
