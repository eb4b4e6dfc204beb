package s3

import (
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/test/virtual"
)

func TestPause(t *testing.T) {
	for attempts, bound := range map[int]time.Duration{1: 100, 2: 200, 4: 800, 7: 5000, 100: 5000} {
		longest := time.Duration(0)
		for range 1000 {
			longest = max(longest, pause(100*time.Millisecond, attempts))
		}
		if bound *= time.Millisecond; longest > bound || longest < bound/2 {
			t.Errorf("after %d attempts up to %v, want up to %v", attempts, longest, bound)
		}
	}
}

// A missing feature of a server is tried again after the flag expires.
func TestExpiringFlag(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		var l expiringFlag
		if l.isSet() {
			t.Error("set at first")
		}
		l.set()
		if time.Sleep(flagLifetime - time.Second); !l.isSet() {
			t.Error("expired too early")
		}
		if time.Sleep(2 * time.Second); l.isSet() {
			t.Error("never expires")
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
	const minSize = 16 << 20
	for _, size := range []int64{1, minSize, minSize*maxParts - 1, minSize * maxParts, minSize*maxParts + 1, 5 << 40} {
		part := partSize(size, minSize)
		if parts := (size + part - 1) / part; parts > maxParts || part < minSize {
			t.Errorf("%d bytes in %d parts of %d", size, parts, part)
		}
	}
}
