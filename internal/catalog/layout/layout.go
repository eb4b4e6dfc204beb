// Package layout computes the paths of restored files: a pure function of the layout, the
// source file and the ids that the restore maps.
//
// A restore creates a collection with new ids. The ids of its segments and builds are two
// ranges, in the order of the snapshot's ordinals: no list of pairs is stored, and any
// process computes the same paths at any time. This also makes a failed restore easy to
// clean: [Mapping.Prefixes] covers everything that it may have written, and nothing else.
//
// It also has the other direction: [PlaceOf] returns the ids in the path of a file, which
// decide who owns it, see package catalog.
package layout

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Layout is the rule for the paths of a collection's files. The numbers are those that the
// catalog stores.
type Layout int

// The layouts.
const (
	// Native makes a path of the file's ids and kind, whatever its source path:
	//
	//	<collection>/<partition>/<segment>/<kind>/<field>/<log>
	//	<collection>/<partition>/<segment>/<kind>/<build>/<field>-<log>
	//
	// The second form is for files of an index build, whose paths carry its id. When
	// paths of a segment collide, all but the first get a suffix with the file's number
	// in the segment: "<log>.<number>".
	Native Layout = iota + 1
	// Milvus keeps the path and replaces the ids in it, for the forms in milvus.go. It
	// refuses any other path.
	Milvus
)

func (l Layout) String() string {
	switch l {
	case Native:
		return "native"
	case Milvus:
		return "milvus"
	}
	return "unknown"
}

// Mapping maps the ids and roots of a snapshot to those of a restore. The zero value is
// invalid; see [Mapping.Check].
type Mapping struct {
	Layout Layout
	Roots  []string // prefixes of the target's roots; a file keeps the number of its root
	Source int64    // the captured collection
	Target int64    // the new collection
	// Partitions has the target of each partition of the snapshot, without 0, which means
	// all partitions and maps to 0.
	Partitions             map[int64]int64
	FirstSegment, Segments int64 // the target segments: the first id, and how many
	FirstBuild, Builds     int64 // the target index builds, likewise
}

// Check returns an error unless m has a known layout, valid roots, positive ids, and a
// target other than the source. The caller checks a mapping once, when it is created or
// read.
func (m *Mapping) Check() error {
	switch {
	case m.Layout != Native && m.Layout != Milvus:
		return fmt.Errorf("unknown layout %d", m.Layout)
	case len(m.Roots) == 0:
		return errors.New("no roots")
	case m.Source <= 0 || m.Target <= 0 || m.Source == m.Target:
		return fmt.Errorf("collection %d is to become %d", m.Source, m.Target)
	}
	for i, prefix := range m.Roots {
		if err := object.CheckPrefix(prefix); err != nil {
			return fmt.Errorf("root %d: %w", i, err)
		}
	}
	taken := map[int64]bool{}
	for _, from := range slices.Sorted(maps.Keys(m.Partitions)) {
		to := m.Partitions[from]
		if from <= 0 || to <= 0 || taken[to] {
			return fmt.Errorf("partition %d is to become %d", from, to)
		}
		taken[to] = true
	}
	if err := checkRange("segments", m.FirstSegment, m.Segments); err != nil {
		return err
	}
	return checkRange("builds", m.FirstBuild, m.Builds)
}

func checkRange(what string, first, count int64) error {
	if count < 0 || count > 0 && (first <= 0 || first > math.MaxInt64-count) {
		return fmt.Errorf("%d %s from id %d on", count, what, first)
	}
	return nil
}

// RefusedError means that a file cannot be restored into a layout, whatever the ids. The
// job must not start.
type RefusedError struct {
	Layout  Layout
	Segment int64 // of the source
	Root    int
	Path    string // of the source, relative to its root
	Reason  error
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("file %q of segment %d has no place in the %v layout: %v", e.Path, e.Segment, e.Layout, e.Reason)
}

// Unwrap returns the reason.
func (e *RefusedError) Unwrap() error { return e.Reason }

// Segment returns the target id of the snapshot's segment with this ordinal.
func (m *Mapping) Segment(ordinal int64) int64 { return m.FirstSegment + ordinal }

// Build returns the target id of the snapshot's build with this number.
func (m *Mapping) Build(number int64) int64 { return m.FirstBuild + number }

// Partition returns the target of a partition, 0 for 0. ok is false when the mapping has
// none.
func (m *Mapping) Partition(id int64) (int64, bool) {
	if id == 0 {
		return 0, true
	}
	to, ok := m.Partitions[id]
	return to, ok
}

// Paths returns the target paths of a segment's files, in the order of its AllFiles,
// relative to roots of the same number. The segment has that ordinal, and its builds have
// the numbers from firstBuild on.
//
// No two paths of a mapping are equal in one root, none is another's directory,
// all are under one of its Prefixes, and root and path together are a valid key.
// Each carries, as one of its elements, the id of the file's owner: of the target build,
// or else of the target segment.
//
// The first file without a target path is a [*RefusedError]. Any other error means that
// the segment does not belong to this mapping.
func (m *Mapping) Paths(s *segment.Segment, ordinal, firstBuild int64) ([]string, error) {
	partition, ok := m.Partition(s.Partition)
	switch {
	case !ok:
		return nil, fmt.Errorf("segment %d: partition %d is not mapped", s.ID, s.Partition)
	case ordinal < 0 || ordinal >= m.Segments:
		return nil, fmt.Errorf("segment %d: ordinal %d of %d segments", s.ID, ordinal, m.Segments)
	case firstBuild < 0 || firstBuild > m.Builds-int64(len(s.Builds)):
		return nil, fmt.Errorf("segment %d: %d builds from number %d on, of %d", s.ID, len(s.Builds), firstBuild, m.Builds)
	}
	to := ids{collection: m.Target, partition: partition, segment: m.Segment(ordinal)}
	from := ids{collection: m.Source, partition: s.Partition, segment: s.ID}
	n := len(s.Files)
	for i := range s.Builds {
		n += len(s.Builds[i].Files)
	}
	p := placement{mapping: m, used: make(map[target]bool, n), paths: make([]string, 0, n)}
	for i := range s.Files {
		if err := p.add(&s.Files[i], from, to); err != nil {
			return nil, err
		}
	}
	for b := range s.Builds {
		from.build, to.build = s.Builds[b].ID, m.Build(firstBuild+int64(b))
		for i := range s.Builds[b].Files {
			if err := p.add(&s.Builds[b].Files[i], from, to); err != nil {
				return nil, err
			}
		}
	}
	return p.paths, nil
}

// ids are the ids in a path. A build of 0 means none, a partition of 0 all.
type ids struct {
	collection, partition, segment, build int64
}

// target is the path of a restored file.
type target struct {
	root int
	path string
}

// placement computes the target paths of one segment's files, one after another.
type placement struct {
	mapping *Mapping
	used    map[target]bool
	paths   []string
}

func (p *placement) add(f *segment.File, from, to ids) error {
	path, err := p.find(f, from, to)
	if err != nil {
		return &RefusedError{Layout: p.mapping.Layout, Segment: from.segment, Root: f.Root, Path: f.Path, Reason: err}
	}
	p.used[target{f.Root, path}] = true
	p.paths = append(p.paths, path)
	return nil
}

// find returns an unused target path of f.
func (p *placement) find(f *segment.File, from, to ids) (string, error) {
	if f.Root < 0 || f.Root >= len(p.mapping.Roots) {
		return "", fmt.Errorf("root %d, the target has %d", f.Root, len(p.mapping.Roots))
	}
	var path string
	if p.mapping.Layout == Native {
		path = native(f, to)
		if p.used[target{f.Root, path}] {
			path += "." + strconv.Itoa(len(p.paths))
		}
	} else {
		k, err := parse(f.Path)
		if err != nil {
			return "", err
		}
		if path, err = k.replace(from, to); err != nil {
			return "", err
		}
	}
	if p.used[target{f.Root, path}] {
		return "", errors.New("two files of the segment have it")
	}
	if err := object.CheckKey(p.mapping.Roots[f.Root] + path); err != nil {
		return "", fmt.Errorf("its target path: %w", err)
	}
	return path, nil
}

// native makes a path of always six elements, so that none is another's
// directory. Digits, dash and dot keep the three kinds of last element apart.
func native(f *segment.File, to ids) string {
	b := make([]byte, 0, 96)
	for _, id := range []int64{to.collection, to.partition, to.segment} {
		b = strconv.AppendInt(b, id, 10)
		b = append(b, '/')
	}
	b = append(b, kindElement(f.Kind)...)
	b = append(b, '/')
	if to.build != 0 {
		b = strconv.AppendInt(b, to.build, 10)
		b = append(b, '/')
		b = strconv.AppendInt(b, f.Field, 10)
		b = append(b, '-')
	} else {
		b = strconv.AppendInt(b, f.Field, 10)
		b = append(b, '/')
	}
	return string(strconv.AppendInt(b, f.LogID, 10))
}

// plainKind matches the kinds that the API accepts.
var plainKind = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

// kindElement returns the path element of a kind. An embedding program may register any
// text, which must not become several elements.
func kindElement(kind string) string {
	if plainKind.MatchString(kind) {
		return kind
	}
	sum := sha256.Sum256([]byte(kind))
	return "kind-" + hex.EncodeToString(sum[:8])
}

// Prefixes yields the prefixes of all objects that the mapping's paths may have created, in
// each of its roots, and of no others: ids are never reused. Each ends in "/", and none
// contains another. Milvus has several per build. A mapping that Check refuses has none,
// so that a wrong id deletes nothing.
func (m *Mapping) Prefixes() iter.Seq[string] {
	return func(yield func(string) bool) {
		if m.Check() != nil {
			return
		}
		if m.Layout == Native {
			yield(strconv.FormatInt(m.Target, 10) + "/")
			return
		}
		for _, f := range forms {
			if !m.expand("", f, yield) {
				return
			}
		}
	}
}

// Makes reports whether the mapping may create path, relative to a root, for a segment or
// build of its ranges, whatever the partition, and returns the segment and the build (0:
// none). Other objects under its Prefixes were written by another program.
func (m *Mapping) Makes(path string) (id, build int64, ok bool) {
	if m.Layout == Native {
		id, build, ok = m.parseNative(path)
	} else {
		id, build, ok = m.parseMilvus(path)
	}
	if !ok || id < m.FirstSegment || id-m.FirstSegment >= m.Segments {
		return 0, 0, false
	}
	if build != 0 && (build < m.FirstBuild || build-m.FirstBuild >= m.Builds) {
		return 0, 0, false
	}
	return id, build, true
}

// The last elements of a native path: of a file of a segment, and of a build.
var (
	nativeLog   = regexp.MustCompile(`^-?[0-9]+(\.[0-9]+)?$`)
	nativeBuild = regexp.MustCompile(`^-?[0-9]+--?[0-9]+(\.[0-9]+)?$`)
)

func (m *Mapping) parseNative(path string) (id, build int64, ok bool) {
	collection, _, id, ok := segment.NativePlace(path)
	parts := strings.Split(path, "/")
	if !ok || collection != m.Target || len(parts) != 6 || !plainKind.MatchString(parts[3]) {
		return 0, 0, false
	}
	n, isNumber := number(parts[4])
	switch {
	case !isNumber:
		return 0, 0, false
	case nativeLog.MatchString(parts[5]):
		return id, 0, true
	case nativeBuild.MatchString(parts[5]) && n > 0:
		return id, n, true
	}
	return 0, 0, false
}

func (m *Mapping) parseMilvus(path string) (id, build int64, ok bool) {
	k, err := parse(path)
	if err != nil {
		return 0, 0, false
	}
	for i, name := range k.form {
		n, _ := number(k.parts[i])
		switch {
		case name == collectionID && n != m.Target:
			return 0, 0, false
		case name == segmentID:
			id = n
		case name == buildID:
			if build = n; build == 0 {
				return 0, 0, false
			}
		}
	}
	return id, build, true
}
