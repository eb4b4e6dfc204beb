package embed

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
)

const (
	checkEvery = 2 * time.Second // how often etcd is asked whether it is there
	checkBound = 2 * time.Second // and how long it may take to answer
	// checkFailures is after how many in a row it is gone. One may be an election.
	checkFailures = 2
)

// unhealthy says in a few words why the server does not serve; empty when it
// does.
func (s *Server) unhealthy() string {
	switch {
	case !s.serving.Load():
		return "stopping"
	case s.etcdGone.Load():
		return "etcd does not answer"
	}
	return ""
}

// watchEtcd asks etcd at each tick for something that needs a quorum, and tells
// health checks when it no longer answers and when it does again. Without it a
// balancer would send calls to a replica that can only refuse them.
func (s *Server) watchEtcd(ctx context.Context, p *parts) {
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-p.ticks:
		}
		bounded, cancel := context.WithTimeout(ctx, checkBound)
		_, _, _, err := p.kv.Get(bounded, keys.Format)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			failures = 0
			if s.etcdGone.CompareAndSwap(true, false) {
				p.log.Info("etcd answers again: serving")
				p.server.SetServing(true)
			}
		default:
			failures++
			if failures >= checkFailures && s.etcdGone.CompareAndSwap(false, true) {
				p.log.Warn("etcd does not answer: not serving until it does", zap.Error(err))
				p.server.SetServing(false)
			}
		}
	}
}
