package etcdserver

import (
	"testing"
	"time"
)

func TestPlan(t *testing.T) {
	k := &keeper{quota: 1000, limit: 1200}
	for _, c := range []struct {
		name        string
		size, inUse int64
		alarm       bool
		want        plan
	}{
		{"empty", 10, 10, false, plan{}},
		{"below", 799, 100, false, plan{}},
		{"short, all in use", 800, 790, false, plan{compact: true}},
		{"short, free pages", 800, 700, false, plan{compact: true, defragment: true}},
		{"at the quota", 1000, 1000, false, plan{compact: true, full: true}},
		{"file above, in use below", 1050, 500, false, plan{compact: true, defragment: true}},
		{"at half of the reserve", 1100, 500, false, plan{compact: true, defragment: true, full: true}},
		{"alarm", 1200, 1200, true, plan{compact: true, full: true}},
		{"alarm, space free", 500, 490, true, plan{compact: true, disarm: true, full: true}},
	} {
		if got := k.plan(c.size, c.inUse, c.alarm); got != c.want {
			t.Errorf("%s: got %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestCompactTo(t *testing.T) {
	began := time.Now()
	k := &keeper{history: time.Minute, points: []point{{began, 5}}}
	for _, c := range []struct {
		after        time.Duration
		newest, want int64
	}{
		{10 * time.Second, 10, 5},
		{50 * time.Second, 50, 5},
		{70 * time.Second, 70, 10},
		{3 * time.Minute, 180, 70},
		{5 * time.Minute, 300, 180},
	} {
		if got := k.compactTo(began.Add(c.after), c.newest); got != c.want {
			t.Errorf("after %v: got %d, want %d", c.after, got, c.want)
		}
	}
	if len(k.points) > 3 {
		t.Errorf("%d points remain", len(k.points))
	}
}
