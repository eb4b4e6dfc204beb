package catalog

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// marked is an allocator's record with one reserved range, from 10 on, and its mark.
func marked(next, count, unusedFrom int64) *storagev1.Allocator {
	return &storagev1.Allocator{Next: next, Reserved: []*storagev1.IdRange{{
		First: 10, Count: count,
		UnusedFrom: unusedFrom,
	}}}
}

func TestRelease(t *testing.T) {
	for _, c := range []struct {
		name string
		rec  *storagev1.Allocator
		want IDRange
		got  IDRange
		err  error
		into *storagev1.Allocator
	}{
		{"unused", marked(5, 20, 10), IDRange{10, 20}, IDRange{10, 20}, nil, allocator1(5)},
		{"partly used", marked(5, 20, 15), IDRange{10, 20}, IDRange{15, 15}, nil, marked(5, 5, 15)},
		{"used up", marked(5, 20, 30), IDRange{10, 20}, IDRange{30, 0}, nil, marked(5, 20, 30)},
		{"repeated", marked(5, 5, 15), IDRange{10, 20}, IDRange{15, 0}, nil, marked(5, 5, 15)},
		{"passed by the allocator", marked(100, 20, 15), IDRange{10, 20}, IDRange{30, 0}, nil, allocator1(100)},
		{"of an old record", marked(5, 20, 0), IDRange{10, 20}, IDRange{}, ErrIDRangeTaken, marked(5, 20, 0)},
		{"not reserved", marked(5, 20, 10), IDRange{11, 19}, IDRange{}, ErrInvalid, marked(5, 20, 10)},
		{"of a smaller range", marked(5, 20, 10), IDRange{10, 19}, IDRange{}, ErrInvalid, marked(5, 20, 10)},
		{"nothing reserved", allocator1(5), IDRange{10, 20}, IDRange{}, ErrInvalid, allocator1(5)},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := release(c.rec, c.want)
			if got != c.got || !errors.Is(err, c.err) {
				t.Errorf("got %v, %v, want %v, %v", got, err, c.got, c.err)
			}
			if diff := cmp.Diff(c.into, c.rec, protocmp.Transform()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestUse(t *testing.T) {
	for _, c := range []struct {
		name   string
		rec    *storagev1.Allocator
		ids    []int64
		unused int64
		raised bool
	}{
		{"the first", marked(5, 20, 10), []int64{10}, 11, true},
		{"some", marked(5, 20, 10), []int64{12, 17, 13}, 18, true},
		{"the last", marked(5, 20, 10), []int64{29}, 30, true},
		{"below the mark", marked(5, 20, 18), []int64{10, 17}, 18, false},
		{"outside", marked(5, 20, 10), []int64{9, 30}, 10, false},
		{"passed by the allocator", marked(100, 20, 10), []int64{12}, 10, false},
		{"of an old record", marked(5, 20, 0), []int64{12}, 0, false},
		{"a thousandth ahead", marked(5, 1<<20, 10), []int64{12}, 13 + 1<<10, true},
		{"not beyond the end", marked(5, 1<<20, 10), []int64{10 + 1<<20 - 5}, 10 + 1<<20, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if raised := use(c.rec, c.ids); raised != c.raised || c.rec.GetReserved()[0].GetUnusedFrom() != c.unused {
				t.Errorf("raised: %v, %v; want %v, unused from %d", raised, c.rec, c.raised, c.unused)
			}
		})
	}
}

// Whatever is reserved, used and released: no id that was registered is handed out
// or given back, and none is handed out twice.
func TestReleaseKeepsWhatIsUsed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rec := allocator1(1)
		used := map[int64]bool{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			first, count := rapid.Int64Range(1, 200).Draw(t, "first"), rapid.Int64Range(1, 40).Draw(t, "count")
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				got, err := take(rec, count)
				if err != nil {
					t.Fatal(err)
				}
				for id := got.First; id <= got.last(); id++ {
					if used[id] {
						t.Fatalf("%d was handed out and is used", id)
					}
					used[id] = true
				}
			case 1:
				_ = reserve(rec, IDRange{first, count})
			case 2:
				if first >= rec.GetNext() && isReserved(rec, first) {
					use(rec, []int64{first})
					used[first] = true
				}
			case 3:
				for _, r := range rec.GetReserved() {
					freed, err := release(rec, IDRange{r.GetFirst(), r.GetCount()})
					if err != nil {
						t.Fatal(err)
					}
					for id := freed.First; id <= freed.last(); id++ {
						if used[id] {
							t.Fatalf("%d is used and was given back", id)
						}
					}
					break // one is enough: the list has changed
				}
			}
		}
	})
}
