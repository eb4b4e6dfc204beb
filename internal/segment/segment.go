// Package segment is the data model that catalog, manifests and jobs share: an
// immutable segment, its files and its index builds. It has types only; the catalog
// decides on changes.
package segment

import (
	"encoding/base64"
	"math"
)

// Timestamp is a data timestamp: the engine's logical time, ordered as an unsigned number
// and comparable within a collection. It is unrelated to wall-clock time.
type Timestamp uint64

// MaxTimestamp is later than every row.
const MaxTimestamp Timestamp = math.MaxUint64

// Position is a position in a channel: everything before Timestamp, exclusive. Opaque is
// the engine's handle for the position, kept byte for byte.
type Position struct {
	Timestamp Timestamp
	Opaque    []byte
}

// State is the state of a segment.
type State int

// The states. Stored: append only.
const (
	Growing   State = iota + 1 // takes rows; its files so far may be captured
	Sealed                     // takes no more rows; not all rows are in files
	Flushed                    // all rows are in files
	Importing                  // written by an import; never captured
	Dropped                    // waiting for the reclaim; final
)

func (s State) String() string {
	switch s {
	case Growing:
		return "GROWING"
	case Sealed:
		return "SEALED"
	case Flushed:
		return "FLUSHED"
	case Importing:
		return "IMPORTING"
	case Dropped:
		return "DROPPED"
	}
	return "UNKNOWN"
}

// The kinds of file that snapshotd knows. A kind is an open string: files of any other kind
// are captured, protected, copied and verified in the same way.
const (
	KindInsert = "insert" // rows
	KindDelta  = "delta"  // deletes
	KindStats  = "stats"
	KindBM25   = "bm25"
	KindIndex  = "index"
	KindText   = "text"
	KindJSON   = "json"
)

// Derived reports whether files of this kind can be rebuilt from others, so that a segment
// of such files only has no data. An unknown kind counts as data: omitting it could lose
// rows.
func Derived(kind string) bool {
	switch kind {
	case KindStats, KindBM25, KindIndex, KindText, KindJSON:
		return true
	}
	return false
}

// HoldsData reports whether files has a file of rows or deletes: snapshots omit a segment
// without one.
func HoldsData(files []File) bool {
	for i := range files {
		if !Derived(files[i].Kind) {
			return true
		}
	}
	return false
}

// LacksFiles reports whether the segment is FLUSHED with rows, and has no file of rows or
// deletes.
func (s *Segment) LacksFiles() bool { return s.State == Flushed && s.Rows > 0 && !HoldsData(s.Files) }

// Segment is a set of files that hold rows or deletes of one channel.
type Segment struct {
	ID              int64
	Partition       int64 // 0: belongs to all partitions (L0)
	Channel         int   // shard index of its virtual channel
	Level           int   // 0, 1 or 2
	State           State
	Rows            int64
	Start           Position // at or before the first row
	DML             Position // after all rows
	StorageVersion  int64    // of the engine
	Sorted          bool
	CommitTimestamp Timestamp // 0: rows count by their own timestamps
	// RowCeiling hides the rows at or after it; 0: none. A snapshot sets it on a segment
	// that straddles its cut, and a restored segment keeps it.
	RowCeiling Timestamp
	Files      []File
	Builds     []Build
	EngineData []byte // at most 16 KiB, kept byte for byte
	// Disputed means that another collection claims the id as well, or has a file at its
	// place: the segment owns no file. Only records of releases that claimed no ids are
	// disputed.
	Disputed   bool
	Attributes map[string]string
}

// File is one object.
type File struct {
	Root     int    // index into the collection's roots
	Path     string // relative to the root
	Kind     string
	Size     int64    // bytes
	ETag     string   // of the store, without quotes; empty: unknown
	Checksum Checksum // zero: unknown
	// MinTimestamp and MaxTimestamp are the timestamps of the first and the last row or
	// delete in the file, inclusive; both 0: unknown, or not a file of rows.
	MinTimestamp, MaxTimestamp Timestamp
	Entries                    int64 // rows or deletes in the file
	Field                      int64 // 0: of no single field
	LogID                      int64 // 0: none
	Attributes                 map[string]string
}

// Checksum is a full-object checksum. Type is an open string such as "SHA256",
// "CRC64NVME" or "CRC32C".
type Checksum struct {
	Type  string
	Value []byte
}

// Text returns a checksum in the form of object stores, "CRC64NVME:AAAAAAAAAAA=", or "" for
// an unknown one.
func (c Checksum) Text() string {
	if c.Type == "" {
		return ""
	}
	return c.Type + ":" + base64.StdEncoding.EncodeToString(c.Value)
}

// Build is one build of an index over one segment.
type Build struct {
	ID     int64
	Index  int64
	Field  int64
	Params map[string]string
	Files  []File
}

// Totals are sums over segments.
type Totals struct {
	Segments   int64
	Rows       int64
	Files      int64
	Bytes      int64
	Builds     int64
	Straddling int64 // segments on both sides of a cut; Add does not count them
}

// Add counts s.
func (t *Totals) Add(s *Segment) {
	t.Segments++
	t.Rows += s.Rows
	t.Builds += int64(len(s.Builds))
	for f := range s.AllFiles() {
		t.Files++
		t.Bytes += f.Size
	}
}

// AllFiles yields the files of the segment, then those of its builds.
func (s *Segment) AllFiles() func(yield func(*File) bool) {
	return func(yield func(*File) bool) {
		for i := range s.Files {
			if !yield(&s.Files[i]) {
				return
			}
		}
		for b := range s.Builds {
			for i := range s.Builds[b].Files {
				if !yield(&s.Builds[b].Files[i]) {
					return
				}
			}
		}
	}
}
