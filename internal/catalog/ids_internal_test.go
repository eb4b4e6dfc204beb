package catalog

import (
	"errors"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func allocator1(next int64, reserved ...IDRange) *storagev1.Allocator {
	rec := &storagev1.Allocator{Next: next}
	for _, r := range reserved {
		rec.Reserved = append(rec.Reserved, &storagev1.IdRange{First: r.First, Count: r.Count, UnusedFrom: r.First})
	}
	return rec
}

func TestTake(t *testing.T) {
	for _, c := range []struct {
		name  string
		rec   *storagev1.Allocator
		count int64
		want  IDRange
		next  int64
		err   error
	}{
		{"first", allocator1(0), 5, IDRange{1, 5}, 6, nil},
		{"next", allocator1(6), 1, IDRange{6, 1}, 7, nil},
		{"up to a reserved range", allocator1(6, IDRange{10, 5}), 4, IDRange{6, 4}, 10, nil},
		{"no room before it", allocator1(6, IDRange{10, 5}), 5, IDRange{15, 5}, 20, nil},
		{"no room between two", allocator1(6, IDRange{10, 5}, IDRange{18, 2}), 5, IDRange{20, 5}, 25, nil},
		{"room between two", allocator1(6, IDRange{10, 5}, IDRange{18, 2}), 3, IDRange{6, 3}, 9, nil},
		{"right after one", allocator1(10, IDRange{10, 5}), 1, IDRange{15, 1}, 16, nil},
		{"past ones do not count", allocator1(100, IDRange{10, 5}), 1, IDRange{100, 1}, 101, nil},
		{"the last ids", allocator1(math.MaxInt64 - 5), 5, IDRange{math.MaxInt64 - 5, 5}, math.MaxInt64, nil},
		{"one too many", allocator1(math.MaxInt64 - 5), 6, IDRange{}, math.MaxInt64 - 5, ErrLimitExceeded},
		{"used up", allocator1(math.MaxInt64), 1, IDRange{}, math.MaxInt64, ErrLimitExceeded},
		{"reserved to the end", allocator1(5, IDRange{6, math.MaxInt64 - 6}), 2, IDRange{}, 5, ErrLimitExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := take(c.rec, c.count)
			if got != c.want || !errors.Is(err, c.err) || c.rec.GetNext() != c.next {
				t.Errorf("got %v, %v, next %d; want %v, %v, next %d", got, err, c.rec.GetNext(), c.want, c.err, c.next)
			}
		})
	}
}

func TestReserve(t *testing.T) {
	for _, c := range []struct {
		name string
		rec  *storagev1.Allocator
		want IDRange
		err  error
		into *storagev1.Allocator // nil: unchanged
	}{
		{"first", allocator1(1), IDRange{1, 5}, nil, allocator1(1, IDRange{1, 5})},
		{"before", allocator1(1, IDRange{10, 5}), IDRange{5, 5}, nil, allocator1(1, IDRange{5, 5}, IDRange{10, 5})},
		{"after", allocator1(1, IDRange{10, 5}), IDRange{15, 5}, nil, allocator1(1, IDRange{10, 5}, IDRange{15, 5})},
		{
			"between", allocator1(1, IDRange{10, 5}, IDRange{20, 5}),
			IDRange{15, 5},
			nil,
			allocator1(1, IDRange{10, 5}, IDRange{15, 5}, IDRange{20, 5}),
		},
		{"again", allocator1(1, IDRange{10, 5}), IDRange{10, 5}, nil, nil},
		{"again when ids have passed it", allocator1(100, IDRange{10, 5}), IDRange{10, 5}, nil, nil},
		{"overlaps the start", allocator1(1, IDRange{10, 5}), IDRange{5, 6}, ErrIDRangeTaken, nil},
		{"overlaps the end", allocator1(1, IDRange{10, 5}), IDRange{14, 6}, ErrIDRangeTaken, nil},
		{"inside", allocator1(1, IDRange{10, 5}), IDRange{11, 1}, ErrIDRangeTaken, nil},
		{"around", allocator1(1, IDRange{10, 5}), IDRange{1, 50}, ErrIDRangeTaken, nil},
		{"overlaps the second", allocator1(1, IDRange{10, 5}, IDRange{20, 5}), IDRange{15, 6}, ErrIDRangeTaken, nil},
		{"handed out", allocator1(100), IDRange{99, 5}, ErrIDRangeTaken, nil},
		{"all of half", allocator1(100), IDRange{100, 1<<62 - 100}, nil, allocator1(100, IDRange{100, 1<<62 - 100})},
		{"beyond half", allocator1(100), IDRange{100, 1<<62 - 99}, ErrInvalid, nil},
		{"all there are", allocator1(1), IDRange{2, math.MaxInt64 - 1}, ErrInvalid, nil},
		{"in the other half", allocator1(1), IDRange{1 << 62, 1}, ErrInvalid, nil},
		{"the last id", allocator1(1), IDRange{math.MaxInt64, 1}, ErrInvalid, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			into := c.into
			if into == nil {
				into = allocator1(c.rec.GetNext())
				into.Reserved = append(into.Reserved, c.rec.GetReserved()...)
			}
			if err := reserve(c.rec, c.want); !errors.Is(err, c.err) {
				t.Errorf("err = %v, want %v", err, c.err)
			}
			if diff := cmp.Diff(into, c.rec, protocmp.Transform()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	full := allocator1(1)
	for i := range maxReservedIDs {
		if err := reserve(full, IDRange{int64(10 + 10*i), 5}); err != nil {
			t.Fatal(err)
		}
	}
	if err := reserve(full, IDRange{1, 1}); !errors.Is(err, ErrLimitExceeded) {
		t.Errorf("one range too many: err = %v, want %v", err, ErrLimitExceeded)
	}
	if err := reserve(full, IDRange{10, 5}); err != nil {
		t.Errorf("a known range when there are many: %v", err)
	}
}

// No id is handed out twice, and none of a range that was reserved.
func TestTakeAndReserve(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rec := allocator1(1)
		var out, reserved []IDRange
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "take") {
				got, err := take(rec, rapid.Int64Range(1, 20).Draw(t, "count"))
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, got)
			} else {
				want := IDRange{rapid.Int64Range(1, 300).Draw(t, "first"), rapid.Int64Range(1, 20).Draw(t, "count")}
				if reserve(rec, want) == nil {
					reserved = append(reserved, want)
				}
			}
		}
		for i, a := range out {
			for _, b := range out[:i] {
				if a.overlaps(b) {
					t.Fatalf("%v and %v were handed out", a, b)
				}
			}
			for _, b := range reserved {
				if a.overlaps(b) {
					t.Fatalf("%v was handed out, %v reserved", a, b)
				}
			}
		}
		last := int64(0)
		for _, r := range rec.GetReserved() {
			if r.GetFirst() <= last {
				t.Fatalf("reserved ranges out of order: %v", rec)
			}
			last = r.GetFirst() + r.GetCount() - 1
		}
	})
}
