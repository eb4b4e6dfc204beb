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

// sample is what there is at the end of a round, when nothing is under way.
type sample struct {
	round    int
	load     time.Duration // of the round
	idle     time.Duration // until it was idle
	failed   bool          // the leader, in this round
	stored   stored
	database int64 // bytes of etcd without history and free pages
	late     int   // restores that should have been forgotten
	objects  int
	uploads  int // unfinished
	replicas []*state
}

// stored is what etcd holds.
type stored struct {
	keys     int            // but those of jobs and request tokens, which are kept for a time
	bytes    int            // of these keys and their values
	jobs     int            // restores
	strays   int            // keys of restores that have no record any more
	tokens   int            // of requests
	unleased int            // tokens among them that no lease ends
	leases   int            // but those of request tokens, which last longest
	classes  map[string]int // keys by what they begin with
}

// state is how a replica is.
type state struct {
	series     string
	leads      bool
	age        int     // rounds that it lives
	heap       float64 // after the garbage was collected, less that of pooled connections
	rss, peak  float64 // now, and the highest of the round
	goroutines int     // but those of pooled connections and of what asks here
	files      int     // open ones, but such connections
	pooled     int     // connections to the object store that wait for use
	stacks     map[string]int
}

// take takes a sample of what is idle.
func (r *env) take(ctx context.Context, s *sample) (err error) {
	if s.database, err = bench.Defragment(ctx, r.etcdAt); err != nil {
		return err
	}
	if s.stored, err = r.count(ctx); err != nil {
		return err
	}
	if s.objects, s.uploads, err = r.countObjects(); err != nil {
		return err
	}
	if s.late, err = r.lateJobs(ctx); err != nil {
		return err
	}
	s.replicas = make([]*state, len(r.replicas))
	group, ctx := errgroup.WithContext(ctx)
	for i := range r.replicas {
		group.Go(func() (err error) {
			p := r.replicas[i].Load()
			s.replicas[i], err = p.look(ctx)
			if err == nil {
				s.replicas[i].age = s.round - p.born
			}
			return err
		})
	}
	return group.Wait()
}

const (
	// longLease is longer than any lease but that of request tokens.
	longLease = time.Hour
	// jobsGone is when a restore that has ended is forgotten at the latest: after
	// keep_restores, and when the leader looks next, which may be a new one.
	jobsGone = 3 * time.Minute
)

// count counts what etcd holds.
func (r *env) count(ctx context.Context) (n stored, err error) {
	n.classes = map[string]int{}
	from, to := keys.All()
	jobs := map[string]bool{}
	var ofJobs []string // their other keys
	_, err = r.kv.Scan(ctx, from, to, 0, func(kvs []meta.KeyValue) error {
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
			n.strays++
		}
	}
	err = bench.WithEtcd(r.etcdAt, func(cli *clientv3.Client) error {
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

// lateJobs counts the restores that are there although they ended long ago.
func (r *env) lateJobs(ctx context.Context) (n int, err error) {
	list, err := r.replicas[0].Load().client.Snapshots.ListRestoreJobs(ctx, &api.ListRestoreJobsRequest{PageSize: 1000})
	for _, job := range list.GetJobs() {
		if end := job.GetEndTime(); end != nil && time.Since(end.AsTime()) > jobsGone {
			n++
		}
	}
	return n, err
}

// uploadDir is where versitygw keeps uploads that are not complete.
const uploadDir = ".sgwtmp"

// countObjects counts the files that versitygw serves.
func (r *env) countObjects() (objects, uploads int, err error) {
	err = filepath.WalkDir(filepath.Join(r.store, "s3", bench.Bucket), func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // it went meanwhile
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
	looks    = 5 // at a replica, of which the least counts: short-lived work is over in one of them
	lookGap  = 200 * time.Millisecond
	peakEach = 2 * time.Second

	pooledBytes = 9 << 10 // of a pooled connection, most of it two buffers
)

// look returns how an idle replica is.
func (p *replica) look(ctx context.Context) (*state, error) {
	least := &state{peak: float64(p.peak.Swap(0))}
	for n := range looks {
		s, err := p.lookOnce(ctx)
		if err != nil {
			return nil, err
		}
		if n == 0 || s.goroutines < least.goroutines {
			least.goroutines, least.stacks = s.goroutines, s.stacks
		}
		if n == 0 {
			least.heap, least.files, least.rss, least.pooled = s.heap, s.files, s.rss, s.pooled
		}
		least.heap, least.files = min(least.heap, s.heap), min(least.files, s.files)
		least.leads = s.leads
		if err := bench.Wait(ctx, lookGap); err != nil {
			return nil, err
		}
	}
	least.peak = max(least.peak, least.rss)
	role := "follows"
	if least.leads {
		role = "leads"
	}
	least.series = p.name + " " + role
	return least, nil
}

func (p *replica) lookOnce(ctx context.Context) (*state, error) {
	var heap []byte
	var err error
	for range 2 { // what is pooled goes with the second
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
	// As it was before this profile was written, which takes more and more.
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
	if s.heap == 0 || s.rss == 0 || files == 0 { // they would pass for very little
		return nil, fmt.Errorf("%s has no metrics of its memory and files", p.name)
	}
	if s.stacks, err = stacks(dump); err != nil {
		return nil, err
	}
	s.pooled = takeStacks(s.stacks, pooledReader)
	s.heap -= float64(s.pooled) * pooledBytes
	_ = takeStacks(s.stacks, pooledWriter)
	s.files = int(files) - s.pooled - takeStacks(s.stacks, servesHTTP)
	_ = takeStacks(s.stacks, readsHTTP)
	for _, n := range s.stacks {
		s.goroutines += n
	}
	s.leads = leads > 0
	return s, nil
}

// watchMemory notes the highest memory of each replica, until ctx ends.
func (r *env) watchMemory(ctx context.Context) {
	for bench.Wait(ctx, peakEach) == nil {
		for i := range r.replicas {
			p := r.replicas[i].Load()
			text, err := bench.Get(ctx, "http://"+p.server.Metrics+"/metrics")
			if err != nil {
				continue // it was killed, or ctx is over
			}
			if rss, err := bench.Sum(text, "process_resident_memory_bytes"); err == nil {
				p.peak.Store(max(p.peak.Load(), int64(rss)))
			}
		}
	}
}

// workers counts the replicas that work on restores.
func (r *env) workers(ctx context.Context) (int64, error) {
	from, to := meta.Prefix(keys.WorkerPrefix)
	got, err := r.kv.Range(ctx, meta.Range{From: from, To: to, KeysOnly: true})
	return got.Count, err
}

// pointsOf makes a point of each sample.
func pointsOf(samples []*sample, value func(*sample) float64) []point {
	list := make([]point, len(samples))
	for i, s := range samples {
		list[i] = point{round: s.round, value: value(s)}
	}
	return list
}

// pointsOfReplicas makes a point of each replica in each sample.
func pointsOfReplicas(samples []*sample, value func(*state) float64) []point {
	var list []point
	for _, s := range samples {
		for _, p := range s.replicas {
			list = append(list, point{p.series, s.round, p.age, value(p)})
		}
	}
	return list
}

// grownIn returns which goroutines a replica has more of at the end of its longest
// series than in the second sample of it.
func grownIn(samples []*sample) []string {
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
