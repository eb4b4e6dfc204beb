package layout

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// FuzzParse takes any path apart. What is taken for a path of Milvus must become,
// under other ids, one of the same form that differs in the ids alone and is
// under the prefixes of those ids.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"", "/", "insert_log", "insert_log/", "insert_log/1/2/3/100/4", "insert_log/1/2/3/100/4/", "insert_log//2/3/100/4",
		"insert_log/1/2/3/_data/0.parquet", "insert_log/1/2/lobs/100/_data/a.vx", "delta_log/1/-1/3/4", "delta_log/1/-2/3/4",
		"stats_log/1/2/3/100/1", "bm25_stats/1/2/3/102/1", "index_files/5/1/2/3/HNSW_0", "index_files/5/1/2/3/a/b/c",
		"index_v1/1/2/3/5/1/HNSW_0", "text_log/5/1/1/2/3/101/a_0", "json_key_index_log/5/1/1/2/3/101/a_0",
		"json_stats/2/5/1/1/2/3/101/shared_key_index/a_0", "json_stats/9/5/1/1/2/3/101/meta.json",
		"insert_log/01/2/3/100/4", "insert_log/1/2/3/100/9223372036854775808", "insert_log/1/2/3/100/4\x00",
		"../insert_log/1/2/3/100/4",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		k, err := parse(path)
		if err != nil {
			return
		}
		if got := strings.Join(k.parts, "/"); got != path || len(k.parts) != len(k.form) {
			t.Fatalf("%q became %q of %s", path, k.parts, k.form)
		}
		none := false // an id that is 0, which no id is
		from, to := ids{}, ids{collection: math.MaxInt64 - 1, partition: math.MaxInt64 - 2, segment: math.MaxInt64 - 3}
		for i, name := range k.form {
			n, err := strconv.ParseInt(k.parts[i], 10, 64)
			if i == 0 || name == fileName {
				continue
			}
			if err != nil {
				t.Fatalf("%s of %q: %v", name, path, err)
			}
			if _, _, isID := from.of(name, to); isID && n == 0 {
				none = true
			}
			switch name {
			case collectionID:
				from.collection = n
			case partitionID:
				if n != allPartitions {
					from.partition = n
				}
			case segmentID:
				from.segment = n
			case buildID:
				from.build, to.build = n, math.MaxInt64-4
			}
		}
		if none {
			return
		}
		if same, err := k.replace(from, from); err != nil || same != path {
			t.Fatalf("%q under its own ids: %q, %v", path, same, err)
		}
		copied, err := k.replace(from, to)
		if err != nil {
			t.Fatalf("%q: %v", path, err)
		}
		again, err := parse(copied)
		if err != nil || again.form[0] != k.form[0] {
			t.Fatalf("%q became %q: %v", path, copied, err)
		}
		for i, name := range k.form {
			if _, _, isID := from.of(name, to); !isID && again.parts[i] != k.parts[i] {
				t.Fatalf("%q became %q, which differs in %s", path, copied, name)
			}
		}
		if object.CheckKey(path) == nil && len(copied) <= object.MaxKeyBytes && object.CheckKey(copied) != nil {
			t.Fatalf("%q became %q", path, copied)
		}
		m := Mapping{
			Layout: Milvus, Roots: []string{""}, Source: 1, Target: to.collection, FirstSegment: to.segment, Segments: 1,
			FirstBuild: math.MaxInt64 - 4, Builds: 1,
		}
		if !slices.ContainsFunc(slices.Collect(m.Prefixes()), func(p string) bool { return strings.HasPrefix(copied, p) }) {
			t.Fatalf("%q is under no prefix", copied)
		}
	})
}
