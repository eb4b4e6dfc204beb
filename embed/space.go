package embed

import (
	"context"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
)

// spaceAlarm is the fraction of etcd's quota at which the log warns, early enough to
// act before writes are refused.
const spaceAlarm = 0.6

// An external etcd counts as full for snapshotd when its file has reached fullFile of
// its quota and the space in use fullInUse: free pages are reused before the file
// grows. The rest is reserved for drops and deletes.
const (
	fullFile  = 0.9
	fullInUse = 0.8
)

var (
	etcdSizeDesc = prometheus.NewDesc("snapshotd_etcd_size_bytes",
		"Size of the database's file at each etcd.", []string{"endpoint"}, nil)
	etcdInUseDesc = prometheus.NewDesc("snapshotd_etcd_in_use_bytes",
		"Bytes of the database's file that are in use at each etcd.", []string{"endpoint"}, nil)
	etcdQuotaDesc = prometheus.NewDesc("snapshotd_etcd_quota_bytes",
		"The size at which each etcd refuses new data.", []string{"endpoint"}, nil)
	etcdFullDesc = prometheus.NewDesc("snapshotd_etcd_full",
		"1 while an etcd refuses new data.", []string{"endpoint"}, nil)
)

// space measures the space at etcd and warns when it gets short. It is safe for
// concurrent use.
type space struct {
	read func(ctx context.Context) ([]etcd.Usage, error)
	log  *zap.Logger

	mu    sync.Mutex
	last  []etcd.Usage // of the servers that answered
	known bool         // the last update succeeded
	short map[string]bool
}

// full reports whether an etcd was at its quota at the last update.
func (s *space) full() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.last, func(u etcd.Usage) bool { return u.Full })
}

// nearlyFull wraps read: an etcd that has reached fullFile and fullInUse counts as
// full.
func nearlyFull(
	read func(context.Context) ([]etcd.Usage, error),
) func(context.Context) ([]etcd.Usage, error) {
	return func(ctx context.Context) ([]etcd.Usage, error) {
		list, err := read(ctx)
		for i, u := range list {
			quota := float64(u.QuotaBytes)
			list[i].Full = u.Full ||
				quota > 0 && float64(u.SizeBytes) >= fullFile*quota && float64(u.InUseBytes) >= fullInUse*quota
		}
		return list, err
	}
}

// update reads the usage and logs the crossings of spaceAlarm.
func (s *space) update(ctx context.Context) {
	list, err := s.read(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known = err == nil; err != nil {
		return // watchEtcd logs an etcd that does not answer
	}
	before := s.short
	s.last, s.short = list, map[string]bool{}
	for _, u := range list {
		short := u.QuotaBytes > 0 && float64(u.CountedBytes) >= spaceAlarm*float64(u.QuotaBytes)
		s.short[u.Endpoint] = short
		fields := []zap.Field{
			zap.String("endpoint", u.Endpoint), zap.Int64("bytes", u.SizeBytes), zap.Int64("in_use", u.InUseBytes),
			zap.Int64("quota", u.QuotaBytes),
		}
		switch {
		case short && !before[u.Endpoint]:
			s.log.Warn("etcd is at 60 % of its quota or above: drop unneeded data, or raise the quota", fields...)
		case !short && before[u.Endpoint]:
			s.log.Info("etcd is below 60 % of its quota again", fields...)
		}
	}
}

// Describe implements prometheus.Collector.
func (*space) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{etcdSizeDesc, etcdInUseDesc, etcdQuotaDesc, etcdFullDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (s *space) Collect(ch chan<- prometheus.Metric) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.known { // an old number would look like a current one
		return
	}
	for _, u := range s.last {
		for d, v := range map[*prometheus.Desc]float64{
			etcdSizeDesc: float64(u.SizeBytes), etcdInUseDesc: float64(u.InUseBytes),
			etcdQuotaDesc: float64(u.QuotaBytes), etcdFullDesc: boolGauge(u.Full),
		} {
			if d == etcdQuotaDesc && u.QuotaBytes <= 0 { // unknown, or no quota
				continue
			}
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, u.Endpoint)
		}
	}
}
