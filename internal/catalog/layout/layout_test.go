package layout_test

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// mapping maps collection 111 with its partition 222 to 444 and 555.
func mapping(l layout.Layout) *layout.Mapping {
	return &layout.Mapping{
		Layout: l, Roots: []string{"files/", "more/"}, Source: 111, Target: 444, Partitions: map[int64]int64{222: 555},
		FirstSegment: 600, Segments: 100, FirstBuild: 800, Builds: 3,
	}
}

// path returns where one file of segment 333 goes, the 66th of the snapshot. It
// is of the segment itself, or else of build 1002, the 2nd of the snapshot.
func path(m *layout.Mapping, partition, build int64, f segment.File) (string, error) {
	s := &segment.Segment{ID: 333, Partition: partition}
	if build == 0 {
		s.Files = []segment.File{f}
	} else {
		s.Builds = []segment.Build{{ID: build, Files: []segment.File{f}}}
	}
	paths, err := m.Paths(s, 66, 1)
	if err != nil {
		return "", err
	}
	return paths[0], nil
}

func TestMilvus(t *testing.T) {
	for _, c := range []struct {
		name      string
		partition int64
		build     int64
		from, to  string
	}{
		{"rows", 222, 0, "insert_log/111/222/333/100/449454516553626768", "insert_log/444/555/666/100/449454516553626768"},
		{"row ids", 222, 0, "insert_log/111/222/333/0/1", "insert_log/444/555/666/0/1"},
		{"column group", 222, 0, "insert_log/111/222/333/0/460", "insert_log/444/555/666/0/460"},
		{"deletes", 222, 0, "delta_log/111/222/333/460", "delta_log/444/555/666/460"},
		{"deletes of a partition's L0 segment", 222, 0, "delta_log/111/222/333/461", "delta_log/444/555/666/461"},
		{"deletes of all partitions", 0, 0, "delta_log/111/-1/333/460", "delta_log/444/-1/666/460"},
		{"statistics", 222, 0, "stats_log/111/222/333/100/460", "stats_log/444/555/666/100/460"},
		{"compound statistics", 222, 0, "stats_log/111/222/333/100/1", "stats_log/444/555/666/100/1"},
		{"bm25", 222, 0, "bm25_stats/111/222/333/102/460", "bm25_stats/444/555/666/102/460"},
		{"compound bm25", 222, 0, "bm25_stats/111/222/333/102/1", "bm25_stats/444/555/666/102/1"},
		{"vector index", 222, 1002, "index_files/1002/1/222/333/HNSW_0", "index_files/801/1/555/666/HNSW_0"},
		{
			"index in directories", 222, 1002, "index_files/1002/2/222/333/idx/extra/file-99",
			"index_files/801/2/555/666/idx/extra/file-99",
		},
		{
			"index of path version 1", 222, 1002, "index_v1/111/222/333/1002/1/SLICE_META",
			"index_v1/444/555/666/801/1/SLICE_META",
		},
		{
			"text", 222, 1002, "text_log/1002/1/111/222/333/101/.managed.json_0",
			"text_log/801/1/444/555/666/101/.managed.json_0",
		},
		{
			"JSON key", 222, 1002, "json_key_index_log/1002/1/111/222/333/101/meta.json_0",
			"json_key_index_log/801/1/444/555/666/101/meta.json_0",
		},
		{
			"JSON, shared keys", 222, 1002, "json_stats/2/1002/1/111/222/333/101/shared_key_index/inverted_index_0",
			"json_stats/2/801/1/444/555/666/101/shared_key_index/inverted_index_0",
		},
		{
			"JSON, shredded", 222, 1002, "json_stats/3/1002/1/111/222/333/101/shredding_data/0/17",
			"json_stats/3/801/1/444/555/666/101/shredding_data/0/17",
		},
		{
			"JSON, metadata", 222, 1002, "json_stats/4/1002/1/111/222/333/101/meta.json",
			"json_stats/4/801/1/444/555/666/101/meta.json",
		},
		{"ids in other places are kept", 222, 1002, "index_files/1002/333/222/333/111", "index_files/801/333/555/666/111"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := path(mapping(layout.Milvus), c.partition, c.build, segment.File{Path: c.from, Root: 1})
			if err != nil || got != c.to {
				t.Errorf("%s goes to %q, %v; want %s", c.from, got, err, c.to)
			}
		})
	}
}

func TestMilvusRefuses(t *testing.T) {
	for _, c := range []struct {
		name      string
		partition int64
		build     int64
		from, why string
	}{
		{"an unknown folder", 222, 0, "part_stats/111/222/v/1", `"part_stats" is not a folder`},
		{"an arbitrary path", 222, 0, "shared.bin", `"shared.bin" is not a folder`},
		{"Milvus' own root path", 222, 0, "files/insert_log/111/222/333/100/1", `"files" is not a folder`},
		{"a path of the native layout", 222, 0, "111/222/333/insert/100/1", `"111" is not a folder`},
		{
			"a folder", 222, 0, "insert_log",
			"ends where <collection> of insert_log/<collection>/<partition>/<segment>/<field>/<log> should be",
		},
		{"too few elements", 222, 0, "insert_log/111/222/333/100", "ends where <log>"},
		{"too many elements", 222, 0, "insert_log/111/222/333/100/1/2", `"1/2" is not the <log>`},
		{"a field in a delta log", 222, 0, "delta_log/111/222/333/100/1", `"100/1" is not the <log>`},
		{"no file", 222, 1002, "index_files/1002/1/222/333", "ends where <file>"},
		{"an empty file name", 222, 1002, "index_files/1002/1/222/333/", "ends where <file>"},
		{"a name for a log", 222, 0, "insert_log/111/222/333/100/log1.log", `"log1.log" is not the <log>`},
		{"a name for a segment", 222, 0, "insert_log/111/222/x/100/1", `"x" is not the <segment>`},
		{"a zero in front", 222, 0, "insert_log/111/222/0333/100/1", `"0333" is not the <segment>`},
		{"a sign", 222, 0, "insert_log/111/222/333/+100/1", `"+100" is not the <field>`},
		{"a negative log", 222, 0, "insert_log/111/222/333/100/-1", `"-1" is not the <log>`},
		{"too large a number", 222, 0, "insert_log/111/222/333/100/9223372036854775808", "is not the <log>"},
		{"another collection", 222, 0, "insert_log/112/222/333/100/1", "<collection> is 112, in the snapshot it is 111"},
		{"another partition", 222, 0, "insert_log/111/223/333/100/1", "<partition> is 223, in the snapshot it is 222"},
		{"another segment", 222, 0, "insert_log/111/222/334/100/1", "<segment> is 334, in the snapshot it is 333"},
		{"another build", 222, 1002, "index_files/1003/1/222/333/a", "<build> is 1003, in the snapshot it is 1002"},
		{"another segment's index", 222, 1002, "index_files/1002/1/222/334/a", "<segment> is 334"},
		{"another collection's index", 222, 1002, "index_v1/112/222/333/1002/1/a", "<collection> is 112"},
		{"a path version 1 in the old folder", 222, 1002, "index_files/111/222/333/1002/1/a", "<build> is 111"},
		{
			"all partitions, but not in the snapshot", 222, 0, "delta_log/111/-1/333/460",
			"<partition> is -1, in the snapshot it is 222",
		},
		{
			"all partitions only in the snapshot", 0, 0, "delta_log/111/222/333/460",
			"<partition> is 222, in the snapshot it is -1",
		},
		{"our number for all partitions", 0, 0, "delta_log/111/0/333/460", "<partition> is 0, in the snapshot it is -1"},
		{"another negative partition", 0, 0, "delta_log/111/-2/333/460", `"-2" is not the <partition>`},
		{"an index without a build", 222, 0, "index_files/1002/1/222/333/a", "the snapshot has it in no index build"},
		{"text without a build", 222, 0, "text_log/1002/1/111/222/333/101/a", "the snapshot has it in no index build"},
		{"a log in a build", 222, 1002, "insert_log/111/222/333/100/1", "the snapshot has it in index build 1002"},
		{
			"a JSON format before the first", 222, 1002, "json_stats/1/1002/1/111/222/333/101/meta.json",
			"<format> 1 is not known",
		},
		{
			"a JSON format after the last", 222, 1002, "json_stats/5/1002/1/111/222/333/101/meta.json",
			"<format> 5 is not known, only 2 to 4",
		},
		{"data of storage version 3", 222, 0, "insert_log/111/222/333/_data/0_1.parquet", `"_data" is of storage version 3`},
		{"a manifest", 222, 0, "insert_log/111/222/333/_metadata/manifest-3.avro", `"_metadata" is of storage version 3`},
		{"deletes of storage version 3", 222, 0, "insert_log/111/222/333/_delta/460", `"_delta" is of storage version 3`},
		{
			"statistics of storage version 3", 222, 0, "insert_log/111/222/333/_stats/json_stats.103/meta.json",
			`"_stats" is of storage version 3`,
		},
		{"large objects", 222, 0, "insert_log/111/222/lobs/101/_data/a.vx", `"lobs" is of storage version 3`},
		{"a step up", 222, 1002, "index_files/1002/1/222/333/../../a", object.ErrInvalidKey.Error()},
		{"an empty path", 222, 0, "", `"" is not a folder`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := path(mapping(layout.Milvus), c.partition, c.build, segment.File{Path: c.from, Root: 1})
			var refused *layout.RefusedError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.why) {
				t.Fatalf("%s goes to %q, error %v; want a refusal with %q", c.from, got, err, c.why)
			}
			want := layout.RefusedError{Layout: layout.Milvus, Segment: 333, Root: 1, Path: c.from, Reason: refused.Reason}
			if *refused != want {
				t.Errorf("got %+v, want %+v", *refused, want)
			}
		})
	}
}

func TestRefusalSaysWhat(t *testing.T) {
	_, err := path(mapping(layout.Milvus), 222, 0, segment.File{Path: "a/b"})
	want := `file "a/b" of segment 333 has no place in the milvus layout: ` +
		`"a" is not a folder in which Milvus keeps files of segments`
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestNative(t *testing.T) {
	s := &segment.Segment{
		ID: 333, Partition: 222,
		Files: []segment.File{
			{Path: "111/222/333/insert/100/7", Kind: segment.KindInsert, Field: 100, LogID: 7},
			{Path: "insert_log/111/222/333/101/7", Kind: segment.KindInsert, Field: 101, LogID: 7},
			{Path: "shared/of/many", Kind: "lance", Field: 100},
			{Path: "delta/1", Kind: segment.KindDelta, LogID: 9},
			{Path: "delta/2", Kind: segment.KindDelta, LogID: 9},
			{Path: "delta/2", Kind: segment.KindDelta, LogID: 9, Root: 1},
			{Path: "delta/3", Kind: segment.KindDelta, LogID: 9},
			{Path: "a", Kind: "../x"},
			{Path: "b", Kind: ""},
			{Path: "c", Kind: "index", Field: 800, LogID: 100},
		},
		Builds: []segment.Build{
			{ID: 1001, Files: []segment.File{
				{Path: "index/1001/0", Kind: "index", Field: 100, LogID: 1},
				{Path: "index/1001/1", Kind: "index", Field: 100, LogID: 1},
			}},
			{ID: 1002, Files: []segment.File{
				{Path: "foreign", Kind: "index", Field: 100, LogID: 1},
				{Path: "text", Kind: "text", Field: 101},
			}},
		},
	}
	want := []string{
		"444/555/666/insert/100/7",
		"444/555/666/insert/101/7",
		"444/555/666/lance/100/0",
		"444/555/666/delta/0/9",
		"444/555/666/delta/0/9.4",
		"444/555/666/delta/0/9", // in another root
		"444/555/666/delta/0/9.6",
		"444/555/666/kind-d6b96a97d147daaa/0/0",
		"444/555/666/kind-e3b0c44298fc1c14/0/0",
		"444/555/666/index/800/100",
		"444/555/666/index/801/100-1",
		"444/555/666/index/801/100-1.11",
		"444/555/666/index/802/100-1",
		"444/555/666/text/802/101-0",
	}
	got, err := mapping(layout.Native).Paths(s, 66, 1)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("paths (-want +got):\n%s", diff)
	}

	s.Partition = 0
	got, err = mapping(layout.Native).Paths(s, 0, 0)
	if err != nil || got[0] != "444/0/600/insert/100/7" || got[10] != "444/0/600/index/800/100-1" {
		t.Errorf("a segment of all partitions: %q, %v", got, err)
	}
}

func TestPathsRefuses(t *testing.T) {
	long := "insert_log/111/222/333/100/1"
	for name, c := range map[string]struct {
		layout layout.Layout
		edit   func(*layout.Mapping, *segment.File)
		why    string
	}{
		"native, no such root": {
			layout.Native, func(_ *layout.Mapping, f *segment.File) { f.Root = 2 },
			"root 2, the target has 2",
		},
		"milvus, a negative root": {layout.Milvus, func(_ *layout.Mapping, f *segment.File) { f.Root = -1 }, "root -1"},
		"native, too long": {layout.Native, func(m *layout.Mapping, _ *segment.File) {
			m.Roots[0] = strings.Repeat("r", 1010) + "/"
		}, "at most 1024"},
		"milvus, too long": {layout.Milvus, func(m *layout.Mapping, _ *segment.File) {
			m.Roots[0] = strings.Repeat("r", 1010) + "/"
		}, "at most 1024"},
		"milvus, longer than the source": {
			layout.Milvus,
			func(m *layout.Mapping, _ *segment.File) {
				m.Roots[0], m.Target = strings.Repeat("r", 1023-len(long))+"/", 1444
			}, "1025 bytes, at most 1024",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, f := mapping(c.layout), segment.File{Path: long, Kind: segment.KindInsert, Field: 100, LogID: 1}
			if got, err := path(m, 222, 0, f); err != nil {
				t.Fatalf("before the change: %q, %v", got, err)
			}
			c.edit(m, &f)
			got, err := path(m, 222, 0, f)
			var refused *layout.RefusedError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.why) {
				t.Errorf("got %q, %v; want a refusal with %q", got, err, c.why)
			}
		})
	}

	twice := segment.File{Path: long}
	_, err := mapping(layout.Milvus).Paths(&segment.Segment{ID: 333, Partition: 222, Files: []segment.File{twice, twice}},
		66, 0)
	var refused *layout.RefusedError
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "two files") {
		t.Errorf("a file that is listed twice: %v", err)
	}
}

func TestPathsOfAnotherMapping(t *testing.T) {
	two := segment.Segment{ID: 333, Partition: 222, Builds: []segment.Build{{ID: 1}, {ID: 2}}}
	other := two
	other.Partition = 223
	for name, c := range map[string]struct {
		segment        *segment.Segment
		ordinal, build int64
	}{
		"a partition that is not mapped": {&other, 0, 0},
		"a negative ordinal":             {&two, -1, 0},
		"an ordinal past the end":        {&two, 100, 0},
		"a negative build":               {&two, 0, -1},
		"a build past the end":           {&two, 0, 2},
		"builds without end":             {&two, 0, math.MaxInt64},
	} {
		paths, err := mapping(layout.Native).Paths(c.segment, c.ordinal, c.build)
		var refused *layout.RefusedError
		if err == nil || errors.As(err, &refused) {
			t.Errorf("%s: %q, %v; want an error that is no refusal", name, paths, err)
		}
	}
	if paths, err := mapping(layout.Native).Paths(&two, 99, 1); err != nil || len(paths) != 0 {
		t.Errorf("the last segment: %q, %v", paths, err)
	}
}

func TestCheck(t *testing.T) {
	for _, l := range []layout.Layout{layout.Native, layout.Milvus} {
		if err := mapping(l).Check(); err != nil {
			t.Errorf("%v: %v", l, err)
		}
		empty := &layout.Mapping{Layout: l, Roots: []string{""}, Source: 1, Target: 2}
		if err := empty.Check(); err != nil {
			t.Errorf("%v without segments: %v", l, err)
		}
	}
	for name, edit := range map[string]func(*layout.Mapping){
		"zero":                        func(m *layout.Mapping) { *m = layout.Mapping{} },
		"no layout":                   func(m *layout.Mapping) { m.Layout = 0 },
		"an unknown layout":           func(m *layout.Mapping) { m.Layout = 3 },
		"no roots":                    func(m *layout.Mapping) { m.Roots = nil },
		"a root without a slash":      func(m *layout.Mapping) { m.Roots[1] = "more" },
		"a root that climbs":          func(m *layout.Mapping) { m.Roots[1] = "../" },
		"no source":                   func(m *layout.Mapping) { m.Source = 0 },
		"no target":                   func(m *layout.Mapping) { m.Target = 0 },
		"a negative target":           func(m *layout.Mapping) { m.Target = -1 },
		"a target that is the source": func(m *layout.Mapping) { m.Target = m.Source },
		"the partition of all":        func(m *layout.Mapping) { m.Partitions[0] = 556 },
		"a partition without target":  func(m *layout.Mapping) { m.Partitions[223] = 0 },
		"two partitions of one":       func(m *layout.Mapping) { m.Partitions[223] = 555 },
		"segments below zero":         func(m *layout.Mapping) { m.Segments = -1 },
		"segments from zero on":       func(m *layout.Mapping) { m.FirstSegment = 0 },
		"builds below zero":           func(m *layout.Mapping) { m.Builds = -1 },
		"builds from zero on":         func(m *layout.Mapping) { m.FirstBuild = 0 },
		"builds past the last id":     func(m *layout.Mapping) { m.FirstBuild = math.MaxInt64 - m.Builds + 1 },
	} {
		m := mapping(layout.Milvus)
		edit(m)
		if m.Check() == nil {
			t.Errorf("%s: no error", name)
		}
		if got := slices.Collect(m.Prefixes()); got != nil {
			t.Errorf("%s: prefixes %q", name, got)
		}
	}
}

func TestPrefixes(t *testing.T) {
	if got, want := slices.Collect(mapping(layout.Native).Prefixes()), []string{"444/"}; !slices.Equal(got, want) {
		t.Errorf("native: got %q, want %q", got, want)
	}
	want := []string{
		"insert_log/444/", "stats_log/444/", "bm25_stats/444/", "delta_log/444/",
		"index_files/800/", "index_files/801/", "index_files/802/",
		"index_v1/444/",
		"text_log/800/", "text_log/801/", "text_log/802/",
		"json_key_index_log/800/", "json_key_index_log/801/", "json_key_index_log/802/",
		"json_stats/2/800/", "json_stats/2/801/", "json_stats/2/802/",
		"json_stats/3/800/", "json_stats/3/801/", "json_stats/3/802/",
		"json_stats/4/800/", "json_stats/4/801/", "json_stats/4/802/",
	}
	m := mapping(layout.Milvus)
	if diff := cmp.Diff(want, slices.Collect(m.Prefixes())); diff != "" {
		t.Errorf("milvus (-want +got):\n%s", diff)
	}
	for stop := range want {
		n := 0
		for range m.Prefixes() {
			if n++; n > stop {
				break
			}
		}
		if n != stop+1 {
			t.Errorf("%d prefixes before %d", n, stop+1)
		}
	}
}

func TestLayoutNames(t *testing.T) {
	got := fmt.Sprint(layout.Native, layout.Milvus, layout.Layout(0), int(layout.Native), int(layout.Milvus))
	if want := "native milvus unknown 1 2"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// job is a snapshot and what a restore maps it to.
type job struct {
	layout.Mapping
	segments []segment.Segment
}

// genIDs makes n different ids from a small space, so that those of different
// things look alike.
func genIDs(t *rapid.T, n int, what string) []int64 {
	return rapid.SliceOfNDistinct(rapid.Int64Range(1, 60), n, n, rapid.ID[int64]).Draw(t, what)
}

// genJob makes a job of a layout. The source of a native one lies anywhere; of a
// Milvus one where Milvus puts it. No two source files are the same.
func genJob(t *rapid.T, l layout.Layout) *job {
	n := rapid.IntRange(0, 5).Draw(t, "segments")
	first := rapid.OneOf(rapid.Int64Range(1, 60), rapid.Just[int64](math.MaxInt64-60))
	ids := genIDs(t, 4, "partitions")
	collections := genIDs(t, 2, "collections")
	j := &job{Mapping: layout.Mapping{
		Layout: l, Roots: []string{"", "r/", "s/t/"}, Source: collections[0], Target: collections[1],
		Partitions:   map[int64]int64{ids[0]: ids[1], ids[2]: ids[3]},
		FirstSegment: first.Draw(t, "first segment"), Segments: int64(n), FirstBuild: first.Draw(t, "first build"),
	}}
	segmentIDs, buildIDs := genIDs(t, n, "segment ids"), genIDs(t, 3*n, "build ids")
	used := map[string]bool{}
	for i := range n {
		s := segment.Segment{ID: segmentIDs[i], Partition: rapid.SampledFrom([]int64{0, ids[0], ids[2]}).Draw(t, "partition")}
		s.Files = genFiles(t, j, used, &s, 0)
		for range rapid.IntRange(0, 3).Draw(t, "builds") {
			b := segment.Build{ID: buildIDs[j.Builds]}
			j.Builds++
			b.Files = genFiles(t, j, used, &s, b.ID)
			s.Builds = append(s.Builds, b)
		}
		j.segments = append(j.segments, s)
	}
	return j
}

func genFiles(t *rapid.T, j *job, used map[string]bool, s *segment.Segment, build int64) []segment.File {
	small := rapid.Int64Range(0, 3)
	any60 := rapid.Int64Range(0, 60)
	var files []segment.File
	for range rapid.IntRange(0, 6).Draw(t, "files") {
		f := segment.File{
			Root: rapid.IntRange(0, 2).Draw(t, "root"),
			Kind: rapid.OneOf(rapid.SampledFrom([]string{
				"insert", "delta", "index", "1", "2", "..", "a/b", "",
				"kind-e3b0c44298fc1c14",
			}), rapid.String()).Draw(t, "kind"),
			Field: rapid.OneOf(small, any60).Draw(t, "field"), LogID: rapid.OneOf(small, any60).Draw(t, "log"),
		}
		if j.Layout == layout.Milvus {
			partition := s.Partition
			if partition == 0 {
				partition = -1
			}
			forms := []string{"insert_log/C/P/S/N/N", "stats_log/C/P/S/N/N", "bm25_stats/C/P/S/N/N", "delta_log/C/P/S/N"}
			if build != 0 {
				forms = []string{
					"index_files/B/N/P/S/F", "index_v1/C/P/S/B/N/F", "text_log/B/N/C/P/S/N/F",
					"json_key_index_log/B/N/C/P/S/N/F", "json_stats/J/B/N/C/P/S/N/F",
				}
			}
			parts := strings.Split(rapid.SampledFrom(forms).Draw(t, "form"), "/")
			for i, part := range parts {
				var n int64
				switch part {
				case "C":
					n = j.Source
				case "P":
					n = partition
				case "S":
					n = s.ID
				case "B":
					n = build
				case "J":
					n = rapid.Int64Range(2, 4).Draw(t, "format")
				case "N":
					n = rapid.OneOf(small, any60).Draw(t, "number")
				case "F":
					parts[i] = rapid.StringMatching(`[a-z0-9]{1,2}`).Draw(t, "file")
					continue
				default:
					continue
				}
				parts[i] = strconv.FormatInt(n, 10)
			}
			f.Path = strings.Join(parts, "/")
		} else {
			f.Path = rapid.StringMatching(`[a-z0-9]{1,3}(/[0-9]{1,2}){0,2}`).Draw(t, "path")
		}
		if key := j.Roots[f.Root] + f.Path; !used[key] {
			used[key] = true
			files = append(files, f)
		}
	}
	return files
}

// target is a file of the target and what it belongs to.
type target struct {
	root int
	path string
	unit int64
}

// targets restores all segments of a job.
func (j *job) targets(t *rapid.T) []target {
	var out []target
	var builds int64
	for i := range j.segments {
		s := &j.segments[i]
		paths, err := j.Paths(s, int64(i), builds)
		if err != nil {
			t.Fatalf("segment %d: %v", s.ID, err)
		}
		again, err := j.Paths(s, int64(i), builds)
		if err != nil || !slices.Equal(paths, again) {
			t.Fatalf("segment %d: %q, then %q, %v", s.ID, paths, again, err)
		}
		n := 0
		for f := range s.AllFiles() {
			unit := j.Segment(int64(i))
			rest := n - len(s.Files)
			for b := 0; b < len(s.Builds) && rest >= 0; b++ {
				unit = j.Build(builds + int64(b))
				rest -= len(s.Builds[b].Files)
			}
			out = append(out, target{f.Root, paths[n], unit})
			n++
		}
		if n != len(paths) {
			t.Fatalf("segment %d: %d files, %d paths", s.ID, n, len(paths))
		}
		builds += int64(len(s.Builds))
	}
	return out
}

func TestEveryFileHasItsOwnPlace(t *testing.T) {
	for _, l := range []layout.Layout{layout.Native, layout.Milvus} {
		t.Run(l.String(), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				j := genJob(t, l)
				if err := j.Check(); err != nil {
					t.Fatal(err)
				}
				prefixes := slices.Collect(j.Prefixes())
				keys := map[string]bool{}
				for _, to := range j.targets(t) {
					key := j.Roots[to.root] + to.path
					if err := object.CheckKey(key); err != nil {
						t.Errorf("%v", err)
					}
					if keys[key] {
						t.Errorf("%s is the place of two files", key)
					}
					keys[key] = true
					if !slices.Contains(strings.Split(to.path, "/"), strconv.FormatInt(to.unit, 10)) {
						t.Errorf("%s does not carry %d, whose it is", to.path, to.unit)
					}
					if holders := under(prefixes, to.path); holders != 1 {
						t.Errorf("%s is under %d of the prefixes %q", to.path, holders, prefixes)
					}
					if id, build, ok := j.Makes(to.path); !ok || build == 0 && id != to.unit || build != 0 && build != to.unit {
						t.Errorf("%s of %d is of segment %d and build %d, %v", to.path, to.unit, id, build, ok)
					}
				}
				for key := range keys {
					for dir := range directories(key) {
						if keys[dir] {
							t.Errorf("%s is a file and the directory of %s", dir, key)
						}
					}
				}
			})
		})
	}
}

func TestPrefixesHoldNothingElse(t *testing.T) {
	for _, l := range []layout.Layout{layout.Native, layout.Milvus} {
		t.Run(l.String(), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				mine, other := genJob(t, l), genJob(t, rapid.SampledFrom([]layout.Layout{layout.Native, layout.Milvus}).Draw(t,
					"other layout"))
				// An allocated id has one owner.
				other.Target += 1000
				other.FirstSegment = other.FirstSegment%1000 + 2000
				other.FirstBuild = other.FirstBuild%1000 + 4000
				prefixes := slices.Collect(mine.Prefixes())
				for i, p := range prefixes {
					if !strings.HasSuffix(p, "/") || object.CheckPrefix(p) != nil || under(prefixes, p) != 1 {
						t.Errorf("prefix %d of %q", i, prefixes)
					}
				}
				for _, to := range other.targets(t) {
					if under(prefixes, to.path) != 0 {
						t.Errorf("%s of another restore is under one of %q", to.path, prefixes)
					}
				}
				for i := range mine.segments {
					for f := range mine.segments[i].AllFiles() {
						if l == layout.Milvus && mine.FirstBuild > 60 && under(prefixes, f.Path) != 0 {
							t.Errorf("%s of the source is under one of %q", f.Path, prefixes)
						}
					}
				}
			})
		})
	}
}

// TestMilvusKeepsWhatIsNoID restores a restored collection back under the ids that
// it had, which must give the paths that it began with.
func TestMilvusKeepsWhatIsNoID(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		j := genJob(t, layout.Milvus)
		var builds int64
		for i := range j.segments {
			s := &j.segments[i]
			paths, err := j.Paths(s, int64(i), builds)
			if err != nil {
				t.Fatal(err)
			}
			copied := segment.Segment{ID: j.Segment(int64(i))}
			copied.Partition, _ = j.Partition(s.Partition)
			var want []string
			n := 0
			restored := func(files []segment.File) []segment.File {
				files = slices.Clone(files)
				for k := range files {
					want = append(want, files[k].Path)
					files[k].Path = paths[n]
					n++
				}
				return files
			}
			// One build of a mapping back, because the source's are in no order.
			build, first := segment.Build{}, int64(1)
			copied.Files = restored(s.Files)
			if len(s.Builds) > 0 {
				build.ID, build.Files = j.Build(builds), restored(s.Builds[0].Files)
				first = s.Builds[0].ID
				copied.Builds = []segment.Build{build}
			}
			back := layout.Mapping{
				Layout: layout.Milvus, Roots: j.Roots, Source: j.Target, Target: j.Source, Partitions: map[int64]int64{},
				FirstSegment: s.ID, Segments: 1, FirstBuild: first, Builds: 1,
			}
			for from, to := range maps.All(j.Partitions) {
				back.Partitions[to] = from
			}
			got, err := back.Paths(&copied, 0, 0)
			if err != nil || !slices.Equal(got, want) {
				t.Fatalf("segment %d: %q, then back to %q, %v; want %q", s.ID, paths, got, err, want)
			}
			builds += int64(len(s.Builds))
		}
	})
}

// under says how many of the prefixes hold the path.
func under(prefixes []string, path string) int {
	n := 0
	for _, p := range prefixes {
		if strings.HasPrefix(path, p) {
			n++
		}
	}
	return n
}

// directories yields the directories of a key.
func directories(key string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for i := range key {
			if key[i] == '/' && !yield(key[:i]) {
				return
			}
		}
	}
}

// TestMakes knows what a mapping makes from what else lies beside it.
func TestMakes(t *testing.T) {
	type made struct {
		Segment, Build int64
		OK             bool
	}
	native := layout.Mapping{
		Layout: layout.Native, Roots: []string{""}, Source: 1, Target: 9, FirstSegment: 100,
		Segments: 10, FirstBuild: 200, Builds: 5,
	}
	milvus := native
	milvus.Layout = layout.Milvus
	bare := native
	bare.FirstBuild, bare.Builds = 0, 0
	for _, c := range []struct {
		m    layout.Mapping
		path string
		want made
	}{
		{native, "9/3/100/insert/101/7", made{100, 0, true}},
		{native, "9/0/109/delta/0/7", made{109, 0, true}},
		{native, "9/3/100/insert/101/7.2", made{100, 0, true}},
		{native, "9/3/100/index/204/101-7", made{100, 204, true}},
		{native, "9/3/100/index/204/101-7.3", made{100, 204, true}},
		{native, "9/3/100/index/205/101-7", made{}}, // no build of ours
		{native, "9/3/110/insert/101/7", made{}},    // no segment of ours
		{native, "9/3/99/insert/101/7", made{}},
		{native, "8/3/100/insert/101/7", made{}}, // another collection
		{native, "9/3/100/insert/101/README", made{}},
		{native, "9/3/100/insert/7", made{}},
		{native, "9/3/100/insert/101/7/8", made{}},
		{native, "9/3/100/insert/x/7", made{}},
		{native, "9/3/0100/insert/101/7", made{}},
		{native, "9/README", made{}},
		{bare, "9/3/100/index/204/101-7", made{}},
		{milvus, "insert_log/9/3/100/101/7", made{100, 0, true}},
		{milvus, "insert_log/9/-1/100/101/7", made{100, 0, true}},
		{milvus, "index_files/204/1/3/100/file", made{100, 204, true}},
		{milvus, "index_files/205/1/3/100/file", made{}},
		{milvus, "index_files/204/1/3/99/file", made{}},
		{milvus, "insert_log/8/3/100/101/7", made{}},
		{milvus, "insert_log/9/3/100/101/README", made{}},
		{milvus, "9/3/100/insert/101/7", made{}},
	} {
		segment, build, ok := c.m.Makes(c.path)
		if got := (made{segment, build, ok}); got != c.want {
			t.Errorf("%v %s: got %+v, want %+v", c.m.Layout, c.path, got, c.want)
		}
	}
}
