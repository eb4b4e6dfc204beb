package embed

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
)

// roomAlarm is the share of the quota from which on room at etcd is short: there is
// time to see to it before writes are refused.
const roomAlarm = 0.6

// An etcd of others is at its quota for snapshotd when its file is at the first share
// of it and what is in use at the second: what lies between the two is free, and
// written to before the file grows. What is left is kept for drops and deletes.
const (
	fullFile  = 0.9
	fullInUse = 0.8
)

var (
	etcdSizeDesc  = prometheus.NewDesc("snapshotd_etcd_size_bytes", "Size of the database's file at each etcd.", []string{"endpoint"}, nil)
	etcdInUseDesc = prometheus.NewDesc("snapshotd_etcd_in_use_bytes", "How much of the database's file is in use at each etcd.", []string{"endpoint"}, nil)
	etcdQuotaDesc = prometheus.NewDesc("snapshotd_etcd_quota_bytes", "The size at which each etcd takes nothing new.", []string{"endpoint"}, nil)
	etcdFullDesc  = prometheus.NewDesc("snapshotd_etcd_full", "1 while an etcd takes nothing new.", []string{"endpoint"}, nil)
)

// room follows how much room there is at etcd, and says when it gets short.
type room struct {
	read func(ctx context.Context) ([]etcd.Usage, error)
	log  *zap.Logger

	mu    sync.Mutex
	last  []etcd.Usage // of those that answered
	known bool         // by the last look
	short map[string]bool
}

// full says whether some etcd was at its quota at the last look.
func (r *room) full() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.last, func(u etcd.Usage) bool { return u.Full })
}

// nearlyFull reads usage, and calls full as well what is nearly so.
func nearlyFull(read func(context.Context) ([]etcd.Usage, error)) func(context.Context) ([]etcd.Usage, error) {
	return func(ctx context.Context) ([]etcd.Usage, error) {
		list, err := read(ctx)
		for i, u := range list {
			quota := float64(u.QuotaBytes)
			list[i].Full = u.Full || quota > 0 && float64(u.SizeBytes) >= fullFile*quota && float64(u.InUseBytes) >= fullInUse*quota
		}
		return list, err
	}
}

// look reads how much there is.
func (r *room) look(ctx context.Context) {
	list, err := r.read(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known = err == nil; err != nil {
		return // that etcd does not answer is said elsewhere
	}
	was := r.short
	r.last, r.short = list, map[string]bool{}
	for _, u := range list {
		short := u.QuotaBytes > 0 && float64(u.CountedBytes) >= roomAlarm*float64(u.QuotaBytes)
		r.short[u.Endpoint] = short
		fields := []zap.Field{
			zap.String("endpoint", u.Endpoint), zap.Int64("bytes", u.SizeBytes), zap.Int64("in_use", u.InUseBytes), zap.Int64("quota", u.QuotaBytes),
		}
		switch {
		case short && !was[u.Endpoint]:
			r.log.Warn("etcd is at 60 % of its quota or above: drop what is not needed, or raise it", fields...)
		case !short && was[u.Endpoint]:
			r.log.Info("etcd is below 60 % of its quota again", fields...)
		}
	}
}

// Describe implements prometheus.Collector.
func (*room) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{etcdSizeDesc, etcdInUseDesc, etcdQuotaDesc, etcdFullDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (r *room) Collect(ch chan<- prometheus.Metric) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known { // a number of an earlier look would pass for one of today
		return
	}
	for _, u := range r.last {
		full := 0.
		if u.Full {
			full = 1
		}
		for d, v := range map[*prometheus.Desc]float64{
			etcdSizeDesc: float64(u.SizeBytes), etcdInUseDesc: float64(u.InUseBytes), etcdQuotaDesc: float64(u.QuotaBytes), etcdFullDesc: full,
		} {
			if d == etcdQuotaDesc && u.QuotaBytes <= 0 { // not known, or none
				continue
			}
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, u.Endpoint)
		}
	}
}

const (
	// stuckAfter is how long the oldest revision of an etcd stays readable before
	// that is said, and what is kept of it where snapshotd compacts.
	stuckAfter = time.Hour
	// forgetEvery is how often it compacts.
	forgetEvery = 5 * time.Minute
)

// history follows how far back an etcd of others can be read. One that nothing
// compacts grows with every write, until it is full.
//
//	at a look                                   | what is done
//	the oldest readable revision is not known,  | it is searched for
//	or readable no more                         |
//	it is the same as an hour ago, and the      | that is said, once until it moves
//	newest is not                               |
//	compact is set, and five minutes have gone  | what is older than an hour is compacted
//
// All replicas compact, for that another did it before is no error.
type history struct {
	kv      meta.KV
	compact func(ctx context.Context, revision int64) error // nil: only look
	log     *zap.Logger
	now     func() time.Time

	oldest int64 // 0: not known
	since  time.Time
	newest int64 // at since
	said   bool

	past      []moment // newest revisions, oldest first
	compacted time.Time
}

// moment is a revision that was the newest at a time.
type moment struct {
	at       time.Time
	revision int64
}

func (h *history) look(ctx context.Context) error {
	now := h.now()
	_, _, newest, err := h.kv.Get(ctx, keys.Format)
	if err != nil {
		return err
	}
	if h.compact != nil {
		if err := h.forget(ctx, now, newest); err != nil {
			h.log.Warn("etcd could not be compacted; it is tried again", zap.Error(err))
		}
	}
	there := false
	if h.oldest > 0 {
		if there, err = h.readable(ctx, h.oldest); err != nil {
			return err
		}
	}
	switch {
	case !there:
		oldest, err := h.search(ctx, newest)
		if err != nil {
			return err
		}
		if h.said {
			h.log.Info("etcd is compacted again", zap.Int64("oldest_revision", oldest))
		}
		h.oldest, h.since, h.newest, h.said = oldest, now, newest, false
	case !h.said && now.Sub(h.since) >= stuckAfter && newest > h.newest:
		h.said = true
		h.log.Warn("etcd has not been compacted for an hour, and grows with every write: set --auto-compaction-mode=periodic "+
			"--auto-compaction-retention=1h there, or etcd_compact: true here",
			zap.Int64("oldest_revision", h.oldest), zap.Int64("newest_revision", newest), zap.Duration("for", now.Sub(h.since)))
	}
	return nil
}

// forget compacts what is older than an hour.
func (h *history) forget(ctx context.Context, now time.Time, newest int64) error {
	if h.past = append(h.past, moment{now, newest}); now.Sub(h.compacted) < forgetEvery {
		return nil
	}
	var revision int64
	for len(h.past) > 0 && now.Sub(h.past[0].at) >= stuckAfter {
		revision, h.past = h.past[0].revision, h.past[1:]
	}
	if revision == 0 {
		return nil
	}
	h.compacted = now
	if err := h.compact(ctx, revision); !errors.Is(err, meta.ErrCompacted) {
		return err
	}
	return nil
}

// readable says whether etcd still has a revision.
func (h *history) readable(ctx context.Context, revision int64) (bool, error) {
	_, err := h.kv.Range(ctx, meta.Range{From: keys.Format, Revision: revision})
	if errors.Is(err, meta.ErrCompacted) {
		return false, nil
	}
	return err == nil, err
}

// search returns the oldest revision that is readable, in about as many reads as the
// newest has binary digits.
func (h *history) search(ctx context.Context, newest int64) (int64, error) {
	low, high := int64(1), newest // high is readable
	for low < high {
		middle := low + (high-low)/2
		ok, err := h.readable(ctx, middle)
		if err != nil {
			return 0, err
		}
		if ok {
			high = middle
		} else {
			low = middle + 1
		}
	}
	return low, nil
}
