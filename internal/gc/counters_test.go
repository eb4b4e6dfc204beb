package gc_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/gc"
)

func TestCounters(t *testing.T) {
	var c gc.Counters
	var group sync.WaitGroup
	for _, reason := range gc.Reasons() {
		for range 10 {
			group.Go(func() { c.Add(reason, 1, int64(reason)) })
		}
	}
	group.Wait()
	var got []string
	for _, reason := range gc.Reasons() {
		objects, bytes := c.Of(reason)
		got = append(got, fmt.Sprint(reason, " ", objects, " ", bytes))
	}
	if diff := cmp.Diff([]string{"unit 10 0", "orphan 10 10", "snapshot 10 20", "restore 10 30"}, got); diff != "" {
		t.Error(diff)
	}
}
