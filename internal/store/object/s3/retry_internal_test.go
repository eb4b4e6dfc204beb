package s3

import (
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/test/virtual"
)

func TestPause(t *testing.T) {
	for attempts, most := range map[int]time.Duration{1: 100, 2: 200, 4: 800, 7: 5000, 100: 5000} {
		longest := time.Duration(0)
		for range 1000 {
			longest = max(longest, pause(100*time.Millisecond, attempts))
		}
		if most *= time.Millisecond; longest > most || longest < most/2 {
			t.Errorf("after %d attempts up to %v, want up to %v", attempts, longest, most)
		}
	}
}

// What a server was found not to know is asked of it again.
func TestLapsing(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		var l lapsing
		if l.holds() {
			t.Error("it holds at first")
		}
		l.set()
		if time.Sleep(verdictFor - time.Second); !l.holds() {
			t.Error("it has lapsed too early")
		}
		if time.Sleep(2 * time.Second); l.holds() {
			t.Error("it holds for ever")
		}
	})
}

func TestBudgetRefills(t *testing.T) {
	now := time.Unix(1, 0)
	b := newBudget(3, func() time.Time { return now })
	spend := func() (n int) {
		for b.spend() {
			n++
		}
		return n
	}
	if n := spend(); n != 3 {
		t.Errorf("spent %d of 3", n)
	}
	now = now.Add(2 * time.Second)
	for range 10 {
		b.earn()
	}
	if n := spend(); n != 3 {
		t.Errorf("spent %d, want 2 of time and 1 of success", n)
	}
	now = now.Add(time.Hour)
	if n := spend(); n != 3 {
		t.Errorf("spent %d after an hour, want no more than 3", n)
	}
}

func TestPartSize(t *testing.T) {
	const least = 16 << 20
	for _, size := range []int64{1, least, least*maxParts - 1, least * maxParts, least*maxParts + 1, 5 << 40} {
		part := partSize(size, least)
		if parts := (size + part - 1) / part; parts > maxParts || part < least {
			t.Errorf("%d bytes in %d parts of %d", size, parts, part)
		}
	}
}
