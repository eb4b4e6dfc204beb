// Package segment is the data model that catalog, manifests and jobs share: an
// immutable segment, the files it consists of and the index builds over it.
// It holds shapes only; who may change what is the catalog's affair.
package segment

import (
	"encoding/base64"
	"math"
)

// Timestamp is a data timestamp: the engine's own logical time, ordered as an
// unsigned number and comparable within a collection. It says nothing about
// wall-clock time.
type Timestamp uint64

// MaxTimestamp is later than every row.
const MaxTimestamp Timestamp = math.MaxUint64

// Position is a place in a channel: everything before Timestamp, not
// including it. Opaque is the engine's own handle for the place, kept byte for
// byte.
type Position struct {
	Timestamp Timestamp
	Opaque    []byte
}

// State is where a segment is in its life.
type State int

// The states. Stored: append only.
const (
	Growing   State = iota + 1 // takes rows; its files so far may be captured
	Sealed                     // takes no more rows, not all of them in files yet
	Flushed                    // all rows are in files
	Importing                  // being written by an import; never captured
	Dropped                    // waits to be reclaimed; final
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

// The kinds of file that snapshotd has heard of. A kind is an open string: any
// other is captured, protected, copied and verified just the same.
const (
	KindInsert = "insert" // rows
	KindDelta  = "delta"  // deletes
	KindStats  = "stats"
	KindBM25   = "bm25"
	KindIndex  = "index"
	KindText   = "text"
	KindJSON   = "json"
)

// Derived says whether files of this kind can be made again from others, so
// that a segment with nothing else holds no data. An unknown kind is taken for
// data: leaving it out could lose rows.
func Derived(kind string) bool {
	switch kind {
	case KindStats, KindBM25, KindIndex, KindText, KindJSON:
		return true
	}
	return false
}

// HoldsData says whether there is a file of rows or deletes among files: what has none
// is in no snapshot.
func HoldsData(files []File) bool {
	for i := range files {
		if !Derived(files[i].Kind) {
			return true
		}
	}
	return false
}

// LacksFiles says whether all rows of the segment are said to be in files, and there is
// none that may hold them.
func (s *Segment) LacksFiles() bool { return s.State == Flushed && s.Rows > 0 && !HoldsData(s.Files) }

// Segment is a set of files that hold rows or deletes of one channel.
type Segment struct {
	ID              int64
	Partition       int64 // 0: belongs to all partitions (L0)
	Channel         int   // shard index of its virtual channel
	Level           int   // 0, 1 or 2
	State           State
	Rows            int64
	Start           Position // the first row is at or after this
	DML             Position // all rows are before this
	StorageVersion  int64    // the engine's own
	Sorted          bool
	CommitTimestamp Timestamp // 0: rows count by their own timestamps
	// RowCeiling hides the rows at or after it, 0 none. A snapshot sets it on a
	// segment that straddles its cut; a restored segment keeps it.
	RowCeiling Timestamp
	Files      []File
	Builds     []Build
	EngineData []byte // at most 16 KiB, kept byte for byte
	// Disputed means that another collection claims the id as well, or has a file
	// at its place: no file of the segment is owned. Only records from before ids
	// were claimed are.
	Disputed   bool
	Attributes map[string]string
}

// File is one object.
type File struct {
	Root     int    // index into the collection's roots
	Path     string // relative to the root
	Kind     string
	Size     int64    // bytes
	ETag     string   // as the store gave it, without quotes; empty: unknown
	Checksum Checksum // zero: unknown
	// MinTimestamp and MaxTimestamp are those of the first and the last row or
	// delete in the file, both inclusive; both 0: unknown, or not a file of rows.
	MinTimestamp, MaxTimestamp Timestamp
	Entries                    int64 // rows or deletes in the file
	Field                      int64 // 0: not of one field
	LogID                      int64 // 0: none
	Attributes                 map[string]string
}

// Checksum is a full-object checksum. Type is an open string such as "SHA256",
// "CRC64NVME" or "CRC32C".
type Checksum struct {
	Type  string
	Value []byte
}

// Text writes a checksum as object stores do, as "CRC64NVME:AAAAAAAAAAA=". That of
// none is empty.
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
	Straddling int64 // segments on both sides of a cut, which Add cannot tell
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

// AllFiles yields the segment's own files, then those of its builds.
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
