//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/test/bench"
)

// sample has the values at the end of a round, in idle state.
type sample struct {
	round    int
	load     time.Duration // duration of the load
	idle     time.Duration // from its end until idle state
	failed   bool          // the leader failed in this round
	stored   stored
	database int64 // bytes of etcd without history and free pages
	overdue  int   // restores past their removal time
	objects  int
	uploads  int // unfinished
	replicas []*state
}

// stored has the counts of etcd.
type stored struct {
	keys     int            // without those of jobs and request tokens, which expire
	bytes    int            // of these keys and their values
	jobs     int            // restores
	orphaned int            // keys of restores without a record
	tokens   int            // request tokens
	unleased int            // tokens without a lease
	leases   int            // without those of request tokens
	classes  map[string]int // keys by prefix
}

// state has the values of a replica.
type state struct {
	series     string
	leads      bool
	age        int     // in rounds
	heap       float64 // after a garbage collection, without pooled connections
	rss, peak  float64 // at the end, and the maximum of the round
	goroutines int     // without those of pooled connections and of the sampling
	files      int     // open files without such connections
	pooled     int     // idle connections to the object store
	stacks     map[string]int
}

// sample reads the values of a sample in idle state.
func (e *env) sample(ctx context.Context, s *sample) (err error) {
	if s.database, err = bench.Defragment(ctx, e.etcdAt); err != nil {
		return err
	}
	if s.stored, err = e.count(ctx); err != nil {
		return err
	}
	if s.objects, s.uploads, err = e.countObjects(); err != nil {
		return err
	}
	if s.overdue, err = e.overdueJobs(ctx); err != nil {
		return err
	}
	s.replicas = make([]*state, len(e.replicas))
	group, ctx := errgroup.WithContext(ctx)
	for i := range e.replicas {
		group.Go(func() (err error) {
			p := e.replicas[i].Load()
			s.replicas[i], err = p.read(ctx)
			if err == nil {
				s.replicas[i].age = s.round - p.born
			}
			return err
		})
	}
	return group.Wait()
}

const (
	// longLease is longer than any lease except those of request tokens.
	longLease = time.Hour
	// jobsGone is the maximum time from the end of a restore to its removal:
	// keep_restores, the leader's interval, and a change of the leader.
	jobsGone = 3 * time.Minute
)

// count counts the keys and leases in etcd.
func (e *env) count(ctx context.Context) (n stored, err error) {
	n.classes = map[string]int{}
	from, to := keys.All()
	jobs := map[string]bool{}
	var ofJobs []string // other keys of jobs
	_, err = e.kv.Scan(ctx, from, to, 0, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			switch {
			case strings.HasPrefix(kv.Key, "/request/"):
				n.tokens++
				if kv.Lease == 0 {
					n.unleased++
				}
			case strings.HasPrefix(kv.Key, keys.JobPrefix):
				n.jobs++
				jobs[strings.TrimPrefix(kv.Key, keys.JobPrefix)] = true
			case strings.HasPrefix(kv.Key, "/job/"):
				ofJobs = append(ofJobs, kv.Key)
			default:
				n.keys++
				parts := strings.SplitN(kv.Key, "/", 4)
				n.classes[strings.Join(parts[:min(len(parts), 3)], "/")]++
				n.bytes += len(kv.Key) + len(kv.Value)
			}
		}
		return nil
	})
	if err != nil {
		return n, err
	}
	for _, key := range ofJobs {
		if !jobs[strings.Split(key, "/")[3]] {
			n.orphaned++
		}
	}
	err = bench.WithEtcd(e.etcdAt, func(cli *clientv3.Client) error {
		list, err := cli.Leases(ctx)
		if err != nil {
			return err
		}
		for _, l := range list.Leases {
			ttl, err := cli.TimeToLive(ctx, l.ID)
			if err != nil {
				return err
			}
			if time.Duration(ttl.GrantedTTL)*time.Second <= longLease {
				n.leases++
			}
		}
		return nil
	})
	return n, err
}

// overdueJobs counts the restores past their removal time.
func (e *env) overdueJobs(ctx context.Context) (n int, err error) {
	list, err := e.replicas[0].Load().client.Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{PageSize: 1000})
	for _, job := range list.GetJobs() {
		if end := job.GetEndTime(); end != nil && time.Since(end.AsTime()) > jobsGone {
			n++
		}
	}
	return n, err
}

// uploadDir is versitygw's directory of unfinished uploads.
const uploadDir = ".sgwtmp"

// countObjects counts the files that versitygw serves.
func (e *env) countObjects() (objects, uploads int, err error) {
	err = filepath.WalkDir(filepath.Join(e.store, "s3", bench.Bucket), func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // deleted meanwhile
			return nil
		case err != nil:
		case !e.Type().IsRegular():
		case strings.Contains(path, uploadDir):
			uploads++
		default:
			objects++
		}
		return err
	})
	return objects, uploads, err
}

const (
	readings     = 5 // per replica; the minimum counts, without short-lived work
	readingGap   = 200 * time.Millisecond
	peakInterval = 2 * time.Second

	pooledBytes = 9 << 10 // memory of a pooled connection, mostly two buffers
)

// read returns the values of an idle replica.
func (p *replica) read(ctx context.Context) (*state, error) {
	lowest := &state{peak: float64(p.peak.Swap(0))}
	for n := range readings {
		s, err := p.readOnce(ctx)
		if err != nil {
			return nil, err
		}
		if n == 0 || s.goroutines < lowest.goroutines {
			lowest.goroutines, lowest.stacks = s.goroutines, s.stacks
		}
		if n == 0 {
			lowest.heap, lowest.files, lowest.rss, lowest.pooled = s.heap, s.files, s.rss, s.pooled
		}
		lowest.heap, lowest.files = min(lowest.heap, s.heap), min(lowest.files, s.files)
		lowest.leads = s.leads
		if err := bench.Wait(ctx, readingGap); err != nil {
			return nil, err
		}
	}
	lowest.peak = max(lowest.peak, lowest.rss)
	role := "follows"
	if lowest.leads {
		role = "leads"
	}
	lowest.series = p.name + " " + role
	return lowest, nil
}

func (p *replica) readOnce(ctx context.Context) (*state, error) {
	var heap []byte
	var err error
	for range 2 { // the second collection clears the pools
		if heap, err = bench.Get(ctx, "http://"+p.server.Metrics+"/debug/pprof/heap?gc=1&debug=1"); err != nil {
			return nil, err
		}
	}
	text, err := bench.Get(ctx, "http://"+p.server.Metrics+"/metrics")
	if err != nil {
		return nil, err
	}
	dump, err := bench.Get(ctx, "http://"+p.server.Metrics+"/debug/pprof/goroutine?debug=1")
	if err != nil {
		return nil, err
	}
	s := &state{}
	// The profile has the heap before its own growing memory.
	if s.heap, err = bench.Sum(heap, "# HeapAlloc"); err != nil {
		return nil, err
	}
	var files, leads float64
	for _, m := range []struct {
		name string
		to   *float64
	}{
		{"process_resident_memory_bytes", &s.rss},
		{"process_open_fds", &files},
		{"snapshotd_leader", &leads},
	} {
		if *m.to, err = bench.Sum(text, m.name); err != nil {
			return nil, err
		}
	}
	if s.heap == 0 || s.rss == 0 || files == 0 { // 0 would count as a low value
		return nil, fmt.Errorf("%s has no metrics of its memory and files", p.name)
	}
	if s.stacks, err = stacks(dump); err != nil {
		return nil, err
	}
	s.pooled = removeStacks(s.stacks, pooledReader)
	s.heap -= float64(s.pooled) * pooledBytes
	_ = removeStacks(s.stacks, pooledWriter)
	s.files = int(files) - s.pooled - removeStacks(s.stacks, servesHTTP)
	_ = removeStacks(s.stacks, readsHTTP)
	for _, n := range s.stacks {
		s.goroutines += n
	}
	s.leads = leads > 0
	return s, nil
}

// watchMemory records the maximum memory of each replica until ctx ends.
func (e *env) watchMemory(ctx context.Context) {
	for bench.Wait(ctx, peakInterval) == nil {
		for i := range e.replicas {
			p := e.replicas[i].Load()
			text, err := bench.Get(ctx, "http://"+p.server.Metrics+"/metrics")
			if err != nil {
				continue // the replica was killed, or ctx has ended
			}
			if rss, err := bench.Sum(text, "process_resident_memory_bytes"); err == nil {
				p.peak.Store(max(p.peak.Load(), int64(rss)))
			}
		}
	}
}

// workers counts the replicas that work on restores.
func (e *env) workers(ctx context.Context) (int64, error) {
	from, to := meta.Prefix(keys.WorkerPrefix)
	got, err := e.kv.Range(ctx, meta.Range{From: from, To: to, KeysOnly: true})
	return got.Count, err
}

// pointsOf returns a point per sample.
func pointsOf(samples []*sample, value func(*sample) float64) []point {
	list := make([]point, len(samples))
	for i, s := range samples {
		list[i] = point{round: s.round, value: value(s)}
	}
	return list
}

// pointsOfReplicas returns a point per replica and sample.
func pointsOfReplicas(samples []*sample, value func(*state) float64) []point {
	var list []point
	for _, s := range samples {
		for _, p := range s.replicas {
			list = append(list, point{p.series, s.round, p.age, value(p)})
		}
	}
	return list
}

// grownGoroutines returns the stacks whose number has grown from the second to the
// last sample of the longest series.
func grownGoroutines(samples []*sample) []string {
	lives := map[string][]*state{}
	longest := ""
	for _, s := range samples {
		for _, p := range s.replicas {
			lives[p.series] = append(lives[p.series], p)
			if len(lives[p.series]) > len(lives[longest]) {
				longest = p.series
			}
		}
	}
	life := lives[longest]
	if len(life) < 2 {
		return nil
	}
	return grownStacks(life[1].stacks, life[len(life)-1].stacks)
}
