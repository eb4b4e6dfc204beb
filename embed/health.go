package embed

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

const (
	checkEvery = 2 * time.Second // interval of the checks of etcd
	checkBound = 2 * time.Second // time limit of a check
	// checkFailures is the number of consecutive failures after which etcd counts as
	// lost. A single one may be an election.
	checkFailures = 2
	// accessEvery is the number of ticks between two checks of snapshotd's rights at
	// etcd, each of which is an entry in etcd's log, and of etcd's space and history.
	accessEvery = 30
)

// unhealthy returns the reason for which the server does not serve; empty: it serves.
func (s *Server) unhealthy() string {
	if !s.serving.Load() {
		return "stopping"
	}
	if reason := s.etcdLost.Load(); reason != nil {
		return *reason
	}
	return ""
}

// Reasons for which a running replica does not serve, in addition to those of TooOld.
const (
	etcdSilent  = "etcd does not answer"
	etcdDenies  = "etcd denies access"
	etcdCorrupt = "etcd has found its data damaged"
)

// checkAccess checks that snapshotd may read and write all keys, with a transaction
// that does neither: its compare never holds, and etcd checks the rights for both
// branches first.
func checkAccess(ctx context.Context, kv meta.KV) error {
	from, to := keys.All()
	_, err := kv.Txn(ctx, meta.Txn{
		If:   []meta.Cond{{From: keys.Format, Target: meta.ModRevision, Op: meta.Less}}, // than 0
		Then: []meta.Op{meta.GetRange(from, to), meta.Delete("/health")},
		Else: []meta.Op{meta.Get(keys.Format)},
	})
	return err
}

// updateUsage updates etcd's space and history.
func (p *parts) updateUsage(ctx context.Context) {
	p.updateSpace(ctx)
	bounded, cancel := context.WithTimeout(ctx, checkBound)
	defer cancel()
	if p.history != nil {
		if err := p.history.update(bounded); err != nil && ctx.Err() == nil {
			p.log.Warn("reading the history of etcd failed, retrying", zap.Error(err))
		}
	}
}

func (p *parts) updateSpace(ctx context.Context) {
	bounded, cancel := context.WithTimeout(ctx, checkBound)
	defer cancel()
	p.space.update(bounded)
}

// check reads a key with a quorum, and at each accessEvery-th tick checks the rights
// and updates the usage.
func (p *parts) check(ctx context.Context, tick int) error {
	bounded, cancel := context.WithTimeout(ctx, checkBound)
	_, _, _, err := p.kv.Get(bounded, keys.Format)
	if err == nil && tick%accessEvery == 0 {
		err = checkAccess(bounded, p.kv)
	}
	cancel()
	switch {
	case err != nil:
	case tick%accessEvery == 0:
		p.updateUsage(ctx)
	case p.space.full(): // so that waiting writes continue soon after space is freed
		p.updateSpace(ctx)
	}
	return err
}

// watchEtcd checks etcd at each tick and sets the health checks accordingly.
// A balancer then sends no calls to a replica that can only refuse them.
//
//	at a tick                            | the replica
//	etcd answers, every server is new    | serves
//	no answer, once                      | keeps its state: it may be an election
//	no answer, twice in a row            | does not serve
//	an answer that denies access, or     | does not serve
//	that etcd's data are damaged         |
//	a server that is too old is met      | does not serve, even if other servers are new:
//	                                     | the client of etcd sends it no calls
//
// None of these ends the process: their causes are outside of it.
func (s *Server) watchEtcd(ctx context.Context, p *parts) {
	for tick, failures := 0, 0; ; tick++ {
		select {
		case <-ctx.Done():
			return
		case <-p.ticks:
		}
		err := p.check(ctx, tick)
		if ctx.Err() != nil {
			return
		}
		reason := p.tooOld()
		switch {
		case reason != "":
		case errors.Is(err, meta.ErrDenied):
			reason = etcdDenies
		case errors.Is(err, meta.ErrCorrupt):
			reason = etcdCorrupt
		case err != nil:
			if failures++; failures < checkFailures {
				continue
			}
			reason = etcdSilent
		default:
			failures = 0
		}
		before := s.etcdLost.Load()
		switch {
		case reason == "" && before != nil && tick%accessEvery != 0 && *before == etcdDenies:
			tick = -1 // the next tick checks the rights
		case reason == "" && before != nil:
			s.etcdLost.Store(nil)
			p.log.Info("etcd is usable again: serving", zap.String("was", *before))
			p.server.SetServing(true)
		case reason != "" && (before == nil || *before != reason):
			s.etcdLost.Store(&reason)
			p.log.Warn("not serving: "+reason, zap.Error(err))
			p.server.SetServing(false)
		}
	}
}
