package lasting_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestOnceThenCounted fails a problem in many iterations.
func TestOnceThenCounted(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	now := time.Unix(1000, 0)
	all := lasting.New(func() time.Time { return now })
	p := all.Add(zap.New(core), "remove", "snapshots are not removed", "removal")
	full, denied := errors.New("full"), errors.New("denied")
	p.Passed()
	for i := range 100 {
		p.Failed(fmt.Errorf("remove snapshot %d: %w", i, full))
		now = now.Add(time.Second)
	}
	if logs.Len() != 1 {
		t.Errorf("one cause is logged %d times", logs.Len())
	}
	for range 10 { // alternating causes
		p.Failed(errors.Join(fmt.Errorf("remove snapshot 7: %w", denied), full))
		p.Failed(full)
	}
	if logs.Len() != 2 {
		t.Errorf("two causes are logged %d times", logs.Len())
	}
	for i := range 1000 {
		p.Failed(fmt.Errorf("cause %c", rune('a'+i)))
	}
	if logs.Len() > 16 {
		t.Errorf("many causes are logged %d times", logs.Len())
	}
	s := all.States()[0]
	if s.Name != "remove" || s.Stops != "removal" || s.Error == "" || !s.Since.Equal(time.Unix(1000, 0)) ||
		s.Failed != 1120 {
		t.Errorf("failing: %+v", s)
	}
	logs.TakeAll()
	p.Note(nil)
	p.Passed()
	if over := logs.TakeAll(); len(over) != 1 || over[0].Level != zapcore.InfoLevel ||
		over[0].ContextMap()["failures"] != int64(1120) {
		t.Errorf("end: %v", over)
	}
	if s := all.States()[0]; s.Error != "" || !s.Since.IsZero() || s.Failed != 0 || s.Total != 1120 {
		t.Errorf("ended: %+v", s)
	}
	for range 50 { // an intermittent problem
		now = now.Add(time.Minute)
		p.Note(full)
		if s := all.States()[0]; s.Error == "" || s.Failed != 1 {
			t.Errorf("failing again: %+v", s)
		}
		now = now.Add(time.Minute)
		p.Note(nil)
	}
	if logs.Len() != 0 {
		t.Errorf("an intermittent problem is logged: %v", logs.All())
	}
	now = now.Add(time.Hour)
	p.Note(full)
	p.Note(nil)
	if logs.Len() != 2 {
		t.Errorf("failing again after an hour: %v", logs.All())
	}
}

// TestSettle ends a problem a minute after Settle, unless it fails or is stopped before.
func TestSettle(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		all := lasting.New(time.Now)
		p := all.Add(nil, "watch", "watch failed", "")
		failing := func(want bool) {
			t.Helper()
			virtual.Wait()
			if s := p.State(); (s.Error != "") != want || s.Since.IsZero() == want {
				t.Errorf("state %+v, want it failing: %v", s, want)
			}
		}
		p.Settle()
		p.Failed(errors.New("lost"))
		time.Sleep(time.Hour) // that Settle was of a problem without failures
		failing(true)
		stop := p.Settle()
		time.Sleep(time.Minute - 1)
		stop()
		time.Sleep(time.Hour)
		failing(true)
		p.Settle()
		time.Sleep(time.Minute - 1)
		p.Failed(errors.New("lost"))
		time.Sleep(time.Hour)
		failing(true)
		p.Settle()
		time.Sleep(time.Minute - 1)
		failing(true)
		time.Sleep(time.Nanosecond)
		failing(false)
		if s := p.State(); s.Total != 2 {
			t.Errorf("%d failures, want 2", s.Total)
		}
	})
}
