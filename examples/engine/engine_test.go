package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// ids is a catalog that only allocates ids.
type ids struct {
	api.CatalogServiceClient
	next int64
}

//nolint:revive // the name in the generated interface
func (c *ids) AllocateIds(
	_ context.Context, req *api.AllocateIdsRequest, _ ...grpc.CallOption,
) (*api.AllocateIdsResponse, error) {
	first := c.next + 1
	c.next += req.GetCount()
	return &api.AllocateIdsResponse{Ids: &api.IdRange{First: first, Count: req.GetCount()}}, nil
}

// segmentsOf writes rows 1 to 10, of times 1 to 10, and deletes of 3 and 9, at 11
// and 12.
func segmentsOf(t *testing.T) (dir string, rows []Row, segments []*api.Segment) {
	t.Helper()
	dir = t.TempDir()
	s := &Store{
		c: &client.Client{Catalog: &ids{}}, collection: &api.CollectionRef{Ref: &api.CollectionRef_Id{Id: 7}}, dir: dir,
	}
	for i := range 10 {
		r := random(5, int64(i+1))
		r.Time = uint64(i + 1)
		rows = append(rows, r)
	}
	for what, batch := range map[api.Segment_Level][]Row{inserts: rows, deletes: {{ID: 3, Time: 11}, {ID: 9, Time: 12}}} {
		seg, err := s.write(t.Context(), 0, what, batch)
		if err != nil {
			t.Fatal(err)
		}
		segments = append(segments, seg)
	}
	slices.SortFunc(segments, func(a, b *api.Segment) int { return int(b.GetLevel() - a.GetLevel()) }) // rows first
	return dir, rows, segments
}

func idsOf(rows []Row) (list []int64) {
	for _, r := range rows {
		list = append(list, r.ID)
	}
	slices.Sort(list)
	return list
}

func TestLive(t *testing.T) {
	dir, _, segments := segmentsOf(t)
	for _, test := range []struct {
		name                 string
		rowCeiling, deletion uint64 // ceilings
		want                 []int64
	}{
		{"whole", 0, 0, []int64{1, 2, 4, 5, 6, 7, 8, 10}},
		{"rows cut", 6, 0, []int64{1, 2, 4, 5}},
		{"deletes cut", 0, 12, []int64{1, 2, 4, 5, 6, 7, 8, 9, 10}},
		{"both cut", 4, 11, []int64{1, 2, 3}},
	} {
		t.Run(test.name, func(t *testing.T) {
			segments[0].RowCeiling, segments[1].RowCeiling = test.rowCeiling, test.deletion
			for range 2 { // in either order
				got, err := live(dir, segments)
				if err != nil || !slices.Equal(idsOf(got), test.want) {
					t.Errorf("got rows %v, error %v; want %v", idsOf(got), err, test.want)
				}
				segments[0], segments[1] = segments[1], segments[0]
			}
		})
	}
}

func TestWrite(t *testing.T) {
	dir, rows, segments := segmentsOf(t)
	got, err := live(dir, segments[:1])
	if err != nil || !slices.Equal(got, rows) {
		t.Errorf("the rows read differ from those written: %v", err)
	}
	for _, f := range segments[0].GetFiles() {
		info, err := os.Stat(filepath.Join(dir, root, f.GetPath()))
		if err != nil || info.Size() != f.GetSizeBytes() {
			t.Errorf("%s: got %v, error %v; want %d bytes", f.GetPath(), info, err, f.GetSizeBytes())
		}
		if f.GetMinTimestamp() != 1 || f.GetMaxTimestamp() != 10 || f.GetEntries() != 10 ||
			!strings.HasPrefix(f.GetPath(), "7/0/") {
			t.Errorf("got %v", f)
		}
	}
	altered := filepath.Join(dir, root, segments[0].GetFiles()[0].GetPath())
	if err := os.WriteFile(altered, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := live(dir, segments); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("altered file: got error %v", err)
	}
	if err := os.Remove(altered); err != nil {
		t.Fatal(err)
	}
	if _, err := live(dir, segments); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: got error %v", err)
	}
}

func TestDigest(t *testing.T) {
	_, rows, _ := segmentsOf(t)
	want := digest(rows)
	rand.Shuffle(len(rows), func(i, j int) { rows[i], rows[j] = rows[j], rows[i] })
	if got := digest(rows); got != want {
		t.Errorf("in another order: got %x, want %x", got, want)
	}
	if digest(rows[1:]) == want || digest(append(rows, rows[0])) == want {
		t.Error("a row less or twice makes no difference")
	}
}
