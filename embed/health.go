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
	checkEvery = 2 * time.Second // how often etcd is asked whether it is there
	checkBound = 2 * time.Second // and how long it may take to answer
	// checkFailures is after how many in a row it is gone. One may be an election.
	checkFailures = 2
	// accessEvery is how many ticks pass between two looks at the rights that
	// snapshotd has at etcd, each of which is an entry in etcd's log, and at what
	// room there is.
	accessEvery = 30
)

// unhealthy says in a few words why the server does not serve; empty when it
// does.
func (s *Server) unhealthy() string {
	switch {
	case !s.serving.Load():
		return "stopping"
	}
	if why := s.etcdLost.Load(); why != nil {
		return *why
	}
	return ""
}

// Why a replica does not serve although it runs; or what TooOld says.
const (
	etcdSilent  = "etcd does not answer"
	etcdDenies  = "etcd denies access"
	etcdCorrupt = "etcd has found its data damaged"
)

// checkAccess makes sure that snapshotd may read and write all keys, with a
// transaction that does neither: its compare never holds, and etcd looks at the
// rights for both branches before it looks at that.
func checkAccess(ctx context.Context, kv meta.KV) error {
	from, to := keys.All()
	_, err := kv.Txn(ctx, meta.Txn{
		If:   []meta.Cond{{From: keys.Format, Target: meta.ModRevision, Op: meta.Less}}, // than 0
		Then: []meta.Op{meta.GetRange(from, to), meta.Delete("/health")},
		Else: []meta.Op{meta.Get(keys.Format)},
	})
	return err
}

// lookAround looks at etcd's size and history, for those who run it.
func lookAround(ctx context.Context, p *parts) {
	p.lookAtRoom(ctx)
	bounded, cancel := context.WithTimeout(ctx, checkBound)
	defer cancel()
	if p.history != nil {
		if err := p.history.look(bounded); err != nil && ctx.Err() == nil {
			p.log.Warn("how far back etcd can be read is not known; it is tried again", zap.Error(err))
		}
	}
}

func (p *parts) lookAtRoom(ctx context.Context) {
	bounded, cancel := context.WithTimeout(ctx, checkBound)
	defer cancel()
	p.room.look(bounded)
}

// watchEtcd asks etcd at each tick for something that needs a quorum, and makes
// health checks say when it no longer answers, denies access or has a server that is
// too old, and when all is well again. Without it a balancer would send calls to a
// replica that can only refuse them.
//
//	at a tick                            | the replica
//	etcd answers, every server is new    | serves
//	no answer, once                      | goes on as it was: it may be an election
//	no answer, twice in a row            | does not serve
//	an answer that denies access, or     | does not serve
//	that etcd's data are damaged         |
//	a server that is too old is met      | does not serve, though others may be fine: the
//	                                     | gate in front of it keeps calls away from it
//
// The process does not end for any of it: what is wrong is mended elsewhere.
func (s *Server) watchEtcd(ctx context.Context, p *parts) {
	for tick, failures := 0, 0; ; tick++ {
		select {
		case <-ctx.Done():
			return
		case <-p.ticks:
		}
		bounded, cancel := context.WithTimeout(ctx, checkBound)
		_, _, _, err := p.kv.Get(bounded, keys.Format)
		if err == nil && tick%accessEvery == 0 {
			err = checkAccess(bounded, p.kv)
		}
		cancel()
		switch {
		case err != nil:
		case tick%accessEvery == 0:
			lookAround(ctx, p)
		case p.room.full(): // what waits for room need not wait longer
			p.lookAtRoom(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		why := p.tooOld()
		switch {
		case why != "":
		case errors.Is(err, meta.ErrDenied):
			why = etcdDenies
		case errors.Is(err, meta.ErrCorrupt):
			why = etcdCorrupt
		case err != nil:
			if failures++; failures < checkFailures {
				continue
			}
			why = etcdSilent
		default:
			failures = 0
		}
		was := s.etcdLost.Load()
		switch {
		case why == "" && was != nil && tick%accessEvery != 0 && *was == etcdDenies:
			tick = -1 // what was denied is asked for again, by the next tick
		case why == "" && was != nil:
			s.etcdLost.Store(nil)
			p.log.Info("etcd is well again: serving", zap.String("was", *was))
			p.server.SetServing(true)
		case why != "" && (was == nil || *was != why):
			s.etcdLost.Store(&why)
			p.log.Warn("not serving until that is over: "+why, zap.Error(err))
			p.server.SetServing(false)
		}
	}
}
