//go:build linux

package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/segment"
)

func TestSet(t *testing.T) {
	s := &set{Prefix: "data/b1/", Collection: 7, Partition: 8, First: 100, Segments: 3, Each: 2}
	var fromKeys, fromSegments []string
	for i, key := range s.keys() {
		if i != len(fromKeys) {
			t.Errorf("key %d came as the %dth", i, len(fromKeys))
		}
		fromKeys = append(fromKeys, key)
	}
	for _, seg := range s.segments() {
		for _, f := range seg.GetFiles() {
			if !segment.Placed(f.GetPath(), s.Partition, seg.GetId()) {
				t.Errorf("%s is not where segment %d has its files", f.GetPath(), seg.GetId())
			}
			fromSegments = append(fromSegments, s.Prefix+f.GetPath())
		}
	}
	// The floor deletes the same keys as the collector.
	if diff := cmp.Diff(fromSegments, fromKeys); diff != "" {
		t.Error(diff)
	}
	if n := len(slices.Compact(slices.Sorted(slices.Values(fromKeys)))); n != 6 {
		t.Errorf("%d different keys, want 6", n)
	}
}

func TestWriteAndLeft(t *testing.T) {
	e := &env{store: t.TempDir()}
	s := &set{Prefix: "data/b1/", Collection: 7, Partition: 8, First: 100, Segments: 3, Each: 2}
	if err := e.left(s.Prefix); err != nil { // no directory
		t.Error(err)
	}
	if err := e.write(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := e.left(s.Prefix); err == nil || !strings.HasPrefix(err.Error(), "6 objects are left") {
		t.Errorf("got %v of 6 objects", err)
	}
	if err := e.forgetFiles(s.Prefix); err != nil {
		t.Fatal(err)
	}
	if err := e.left(s.Prefix); err != nil {
		t.Error(err)
	}
}
