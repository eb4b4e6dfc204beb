package layout

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// form is the form of a Milvus path: its folder, then the names of its elements in angle
// brackets. <file> is the rest, of one or more elements; every other element is a number.
type form []string

// The elements that a restore interprets. It keeps other numbers.
const (
	collectionID = "<collection>"
	partitionID  = "<partition>"
	segmentID    = "<segment>"
	buildID      = "<build>"
	formatNumber = "<format>"
	fileName     = "<file>"
)

// forms are the paths that Milvus 2.4 to 3.0 gives to the files of segments,
// without its root path, which is the prefix of the root here. Each has a segment
// and a collection or a build, so that the target path and the prefixes to clean
// follow from ids.
//
// The folders are constants in pkg/common/common.go. The paths are built in
// pkg/util/metautil (pkg/v2 up to Milvus 2.6, pkg/v3 from 3.0 on):
//
//   - insert_log: BuildInsertLogPath in binlog.go. In storage version 2 the
//     fourth number is that of a column group.
//   - stats_log: BuildStatsLogPath; the log 1 is the compound one.
//   - bm25_stats: BuildBm25LogPath.
//   - delta_log: BuildDeltaLogPath, without a field. Those of L0 segments are
//     under the partition of the deletes, which may be all of them:
//     getL0SegmentID in internal/flushcommon/writebuffer/l0_write_buffer.go.
//   - index_files: BuildSegmentIndexFilePath in segment_index.go; later
//     IndexPathBuilder with path version 0. The number is the index version.
//   - index_v1: IndexPathBuilder with path version 1.
//   - text_log: BuildTextIndexPrefix, before that BuildTextLogPaths.
//   - json_key_index_log: the first kind of index for JSON, laid out like text_log;
//     generateTargetIndexPath in internal/datanode/importv2/copy_segment_utils.go
//     has it, and all the other forms with a build.
//   - json_stats: BuildJSONKeyStatsPrefix. The files are meta.json and those in
//     shared_key_index and shredding_data: DiskFileManagerImpl.cpp in
//     internal/core/src/storage.
//
// Storage version 3 has a directory of a segment instead, with a manifest that
// names its files (_data, _delta, _stats and _metadata in
// insert_log/<collection>/<partition>/<segment>), and files that segments share
// (lobs beside it). Those are refused.
var forms = []form{
	{"insert_log", collectionID, partitionID, segmentID, "<field>", "<log>"},
	{"stats_log", collectionID, partitionID, segmentID, "<field>", "<log>"},
	{"bm25_stats", collectionID, partitionID, segmentID, "<field>", "<log>"},
	{"delta_log", collectionID, partitionID, segmentID, "<log>"},
	{"index_files", buildID, "<version>", partitionID, segmentID, fileName},
	{"index_v1", collectionID, partitionID, segmentID, buildID, "<version>", fileName},
	{"text_log", buildID, "<version>", collectionID, partitionID, segmentID, "<field>", fileName},
	{"json_key_index_log", buildID, "<version>", collectionID, partitionID, segmentID, "<field>", fileName},
	{"json_stats", formatNumber, buildID, "<version>", collectionID, partitionID, segmentID, "<field>", fileName},
}

// The first and the last data format of json_stats. The format precedes the build in a
// path, so that the prefixes to clean need all of them: other formats are refused.
const (
	firstFormat = 2
	lastFormat  = 4
)

// allPartitions is the id of Milvus for all partitions, AllPartitionsID
// in pkg/common/common.go. Ours is 0.
const allPartitions = -1

func (f form) String() string { return strings.Join(f, "/") }

// key is a parsed path: parts[i] is the element form[i].
type key struct {
	form  form
	parts []string
}

// parse parses a path, and returns an error when it has no known form. It does not check
// the ids.
func parse(path string) (key, error) {
	folder, _, _ := strings.Cut(path, "/")
	for _, f := range forms {
		if f[0] != folder {
			continue
		}
		k := key{form: f, parts: strings.SplitN(path, "/", len(f))}
		for i, part := range k.parts {
			if err := checkPart(f, i, part); err != nil {
				return key{}, err
			}
		}
		if len(k.parts) < len(f) {
			return key{}, fmt.Errorf("it ends where %s of %s should be", f[len(k.parts)], f)
		}
		return k, nil
	}
	return key{}, fmt.Errorf("%q is not a folder in which Milvus keeps files of segments", folder)
}

func checkPart(f form, i int, part string) error {
	if i == 0 {
		return nil
	}
	if f[i] == fileName {
		if part == "" {
			return fmt.Errorf("it ends where %s of %s should be", fileName, f)
		}
		return nil
	}
	if n, ok := number(part); ok {
		switch {
		case f[i] == formatNumber && (n < firstFormat || n > lastFormat):
			return fmt.Errorf("%s %d is not known, only %d to %d", formatNumber, n, firstFormat, lastFormat)
		case n >= 0, f[i] == partitionID && n == allPartitions:
			return nil
		}
	}
	if element, _, _ := strings.Cut(part, "/"); strings.HasPrefix(element, "_") || element == "lobs" {
		return fmt.Errorf("%q is of storage version 3, whose manifests name their files", element)
	}
	return fmt.Errorf("%q is not the %s of %s", part, f[i], f)
}

// number parses a number in the format of Milvus.
func number(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && strconv.FormatInt(n, 10) == s
}

// replace returns the path with the ids from replaced by those of to. It returns an error
// for other ids, and for a path with a build id when the file has no build, or without it
// when the file has one.
func (k key) replace(from, to ids) (string, error) {
	switch has := slices.Contains(k.form, buildID); {
	case has && from.build == 0:
		return "", fmt.Errorf("it is %s, but the snapshot has it in no index build", k.form)
	case !has && from.build != 0:
		return "", fmt.Errorf("it is %s, but the snapshot has it in index build %d", k.form, from.build)
	}
	parts := make([]string, len(k.parts))
	for i, part := range k.parts {
		was, is, isID := from.of(k.form[i], to)
		if !isID {
			parts[i] = part
			continue
		}
		if was != part {
			return "", fmt.Errorf("its %s is %s, in the snapshot it is %s", k.form[i], part, was)
		}
		parts[i] = is
	}
	return strings.Join(parts, "/"), nil
}

// of returns the text of an element in a source path and in its target path. isID is false
// when the element is no id.
func (from ids) of(name string, to ids) (was, is string, isID bool) {
	var a, b int64
	switch name {
	case collectionID:
		a, b = from.collection, to.collection
	case partitionID:
		a, b = from.partition, to.partition
		if a == 0 {
			a, b = allPartitions, allPartitions
		}
	case segmentID:
		a, b = from.segment, to.segment
	case buildID:
		a, b = from.build, to.build
	default:
		return "", "", false
	}
	return strconv.FormatInt(a, 10), strconv.FormatInt(b, 10), true
}

// expand yields the prefixes of all paths of a form, which end at the first unique id: a
// collection or a build. It returns false when yield does.
func (m *Mapping) expand(prefix string, f form, yield func(string) bool) bool {
	switch f[0] {
	case collectionID:
		return yield(prefix + strconv.FormatInt(m.Target, 10) + "/")
	case buildID:
		for number := range m.Builds {
			if !yield(prefix + strconv.FormatInt(m.Build(number), 10) + "/") {
				return false
			}
		}
		return true
	case formatNumber:
		for format := firstFormat; format <= lastFormat; format++ {
			if !m.expand(prefix+strconv.Itoa(format)+"/", f[1:], yield) {
				return false
			}
		}
		return true
	}
	return m.expand(prefix+f[0]+"/", f[1:], yield)
}
