package copyjob

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// slowSource reads manifests slowly and counts the reads.
type slowSource struct {
	mu    sync.Mutex
	reads int
	fail  error
}

func (s *slowSource) Manifest(ctx context.Context, _ int64, number int) ([]segment.Segment, error) {
	s.mu.Lock()
	s.reads++
	err := s.fail
	s.mu.Unlock()
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-timer.C:
	}
	return []segment.Segment{
		{ID: int64(2*number + 1), Builds: make([]segment.Build, 2)},
		{ID: int64(2*number + 2), Builds: make([]segment.Build, 1)},
	}, err
}

// TestManifestCache checks that concurrent callers share one read of a manifest, and that
// the cancellation of one caller does not fail another.
func TestManifestCache(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		src := &slowSource{}
		s := newManifestCache(src.Manifest)
		md := &manifest.Metadata{}
		for n := range int64(6) {
			md.Manifests = append(md.Manifests, manifest.ManifestFile{
				FirstOrdinal: 2 * n, Segments: 2, FirstBuild: 3 * n, Builds: 3,
			})
		}
		first, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.segments(first, 1, md, 1, 3); !errors.Is(err, context.Canceled) {
				t.Errorf("err = %v", err)
			}
		})
		virtual.Wait()
		for range 5 {
			wg.Go(func() {
				items, err := s.segments(t.Context(), 1, md, 1, 3)
				if err != nil || len(items) != 2 || items[0].ID != 2 || items[0].ordinal != 1 || items[0].firstBuild != 2 ||
					items[1].ID != 3 || items[1].ordinal != 2 || items[1].firstBuild != 3 {
					t.Errorf("%+v, err = %v", items, err)
				}
			})
		}
		virtual.Wait()
		cancel()
		wg.Wait()
		if src.reads != 3 { // the canceled one, and both manifests
			t.Errorf("%d reads", src.reads)
		}
		all, err := s.segments(t.Context(), 1, md, 0, 12)
		if err != nil || len(all) != 12 || all[11].firstBuild != 17 {
			t.Errorf("%+v, err = %v", all, err)
		}
		if n := len(s.entries); n != maxManifests {
			t.Errorf("%d manifests are cached", n)
		}
		if _, err := s.segments(t.Context(), 1, md, 10, 13); !errors.Is(err, errMapping) {
			t.Errorf("err = %v", err)
		}
		src.fail = object.ErrUnavailable
		before := src.reads
		for range 2 { // an error is not cached
			if _, err := s.segments(t.Context(), 2, md, 0, 2); !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("err = %v", err)
			}
		}
		if src.reads != before+2 {
			t.Errorf("%d reads", src.reads-before)
		}
		src.fail = nil
		md.Manifests[0].Builds = 4
		if _, err := s.segments(t.Context(), 3, md, 0, 2); !errors.Is(err, errUnreadable) {
			t.Errorf("err = %v", err)
		}
	})
}
