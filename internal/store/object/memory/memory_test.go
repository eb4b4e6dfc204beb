package memory_test

import (
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
)

func TestContract(t *testing.T) {
	objecttest.Run(t, func(*testing.T) object.Store { return memory.New(memory.Options{}) })
}

func TestClockAndETag(t *testing.T) {
	clock := time.Date(2026, 11, 2, 3, 4, 5, 6, time.UTC)
	s := memory.New(memory.Options{Now: func() time.Time { return clock }})
	info, err := s.Put(t.Context(), "a", []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "5d41402abc4b2a76b9719d911017c592"; info.ETag != want {
		t.Errorf("ETag %s, want the MD5 %s", info.ETag, want)
	}
	clock = clock.Add(time.Hour)
	if now, err := s.Now(t.Context()); err != nil || !now.Equal(clock) {
		t.Errorf("Now: %v, err = %v; want %v", now, err, clock)
	}
	if want := clock.Add(-time.Hour); !info.ModTime.Equal(want) {
		t.Errorf("written at %v, want %v", info.ModTime, want)
	}
}
