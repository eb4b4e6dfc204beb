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
	// retention is the age from which on revisions of etcd are compacted. An oldest
	// revision that stays readable for longer is logged.
	retention = time.Hour
	// compactEvery is the interval of compactions.
	compactEvery = 5 * time.Minute
)

// history follows the oldest readable revision of an external etcd. An etcd without
// compaction grows with every write until it is full.
//
//	state at an update                          | action
//	the oldest readable revision is unknown     | search for it
//	or compacted                                |
//	it has not changed for an hour, and the     | log that, once until it changes
//	newest revision has                         |
//	compact is set, and the last compaction was | compact the revisions that are older
//	five minutes ago or more                    | than an hour
//
// All replicas compact; a revision that another replica has compacted is no error.
// A history is not safe for concurrent use.
type history struct {
	kv      meta.KV
	compact func(ctx context.Context, revision int64) error // nil: never compact
	log     *zap.Logger
	now     func() time.Time

	oldest int64 // readable revision; 0: unknown
	since  time.Time
	newest int64 // revision at since
	warned bool

	past      []revisionTime // newest revisions, oldest first
	compacted time.Time
}

// revisionTime is the newest revision at a time.
type revisionTime struct {
	at       time.Time
	revision int64
}

func (h *history) update(ctx context.Context) error {
	now := h.now()
	_, _, newest, err := h.kv.Get(ctx, keys.Format)
	if err != nil {
		return err
	}
	if h.compact != nil {
		if err := h.compactOld(ctx, now, newest); err != nil {
			h.log.Warn("compaction of etcd failed, retrying", zap.Error(err))
		}
	}
	known := false
	if h.oldest > 0 {
		if known, err = h.readable(ctx, h.oldest); err != nil {
			return err
		}
	}
	switch {
	case !known:
		oldest, err := h.search(ctx, newest)
		if err != nil {
			return err
		}
		if h.warned {
			h.log.Info("etcd is compacted again", zap.Int64("oldest_revision", oldest))
		}
		h.oldest, h.since, h.newest, h.warned = oldest, now, newest, false
	case !h.warned && now.Sub(h.since) >= retention && newest > h.newest:
		h.warned = true
		h.log.Warn("etcd has not been compacted for an hour, and grows with every write: "+
			"set --auto-compaction-mode=periodic --auto-compaction-retention=1h there, or etcd_compact: true here",
			zap.Int64("oldest_revision", h.oldest), zap.Int64("newest_revision", newest),
			zap.Duration("for", now.Sub(h.since)))
	}
	return nil
}

// compactOld compacts the revisions that are older than the retention.
func (h *history) compactOld(ctx context.Context, now time.Time, newest int64) error {
	if h.past = append(h.past, revisionTime{now, newest}); now.Sub(h.compacted) < compactEvery {
		return nil
	}
	var revision int64
	for len(h.past) > 0 && now.Sub(h.past[0].at) >= retention {
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

// readable reports whether etcd still has a revision.
func (h *history) readable(ctx context.Context, revision int64) (bool, error) {
	_, err := h.kv.Range(ctx, meta.Range{From: keys.Format, Revision: revision})
	if errors.Is(err, meta.ErrCompacted) {
		return false, nil
	}
	return err == nil, err
}

// search returns the oldest readable revision by a binary search up to newest.
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
