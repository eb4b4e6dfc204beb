// Package manifest implements the format of a snapshot in the object store. Its functions
// encode values into the bytes of a file and decode them; they do no I/O.
//
// A snapshot is a directory:
//
//	snapshots/<collection>/<snapshot>/metadata.json      the captured collection, and the list of the other files
//	snapshots/<collection>/<snapshot>/manifest-<n>.avro  segments with their files, ascending by id
//	snapshots/<collection>/<snapshot>/refs.avro          all referenced ids, quick to load
//
// Manifests and references are zstd-compressed Avro object container files that any Avro
// reader can read; the schemas, segment.avsc and refs.avsc, are in the files. The metadata is
// JSON.
//
// No file has a bucket, an endpoint or an absolute key: a path is relative to a root, which
// the metadata maps to a store alias and a prefix. Each file is identified by its [Digest]:
// that of the metadata is in the commit record, those of the others are in the metadata.
// Equal values encode to equal bytes.
//
// # Reading
//
// Check the digest of a file before any other use of its bytes. The decoders nevertheless
// validate all input: each length is bounded by the remaining bytes, each block by 64 MiB
// after decompression, a schema in size and depth, and every count must match exactly. A
// violation is an error that wraps [ErrCorrupt].
//
// # Evolution
//
// [FormatVersion] is the version of all files of a snapshot. A newer version is refused with
// [ErrNewerFormat]; every older version stays readable, which the files in testdata verify.
// Within a version fields may be added only with a default: readers use the schema in the
// file, and skip unknown fields.
package manifest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// FormatVersion is the newest format that this package reads and the one that
// it writes.
const FormatVersion = 1

// ErrCorrupt means that the bytes were not written by snapshotd, or were altered.
var ErrCorrupt = errors.New("corrupt snapshot file")

// NewerFormatError means that a file has a newer format than this program supports. It wraps
// [ErrNewerFormat].
type NewerFormatError struct {
	Found, Supported int
}

// ErrNewerFormat is wrapped by every [NewerFormatError].
var ErrNewerFormat = errors.New("newer snapshot format")

func (e *NewerFormatError) Error() string {
	return fmt.Sprintf("snapshot has format version %d, this program reads up to %d: upgrade it", e.Found, e.Supported)
}

// Unwrap returns ErrNewerFormat.
func (e *NewerFormatError) Unwrap() error { return ErrNewerFormat }

// checkFormat returns an error unless this program supports the format version v.
func checkFormat(v int) error {
	switch {
	case v <= 0:
		return fmt.Errorf("%w: format version %d", ErrCorrupt, v)
	case v > FormatVersion:
		return &NewerFormatError{Found: v, Supported: FormatVersion}
	}
	return nil
}

// Names of a snapshot's files other than [ManifestName].
const (
	MetadataName = "metadata.json"
	RefsName     = "refs.avro"
)

// ManifestName returns the name of the manifest with number n, counted from 0.
func ManifestName(n int) string { //nolint:revive // like its siblings
	return fmt.Sprintf("manifest-%d.avro", n)
}

// Dir returns the prefix of all keys of a snapshot, with a final slash.
func Dir(collection, snapshot int64) string {
	return fmt.Sprintf("snapshots/%d/%d/", collection, snapshot)
}

// MetadataKey returns the key of a snapshot's metadata.
func MetadataKey(collection, snapshot int64) string {
	return Dir(collection, snapshot) + MetadataName
}

// ManifestKey returns the key of a snapshot's manifest with number n.
func ManifestKey(collection, snapshot int64, n int) string { //nolint:revive // like its siblings
	return Dir(collection, snapshot) + ManifestName(n)
}

// RefsKey returns the key of a snapshot's references.
func RefsKey(collection, snapshot int64) string {
	return Dir(collection, snapshot) + RefsName
}

// IsFileName reports whether name is that of a snapshot's file. All other files in a
// snapshot's directory are foreign.
func IsFileName(name string) bool {
	if name == MetadataName || name == RefsName {
		return true
	}
	number, ok := strings.CutPrefix(name, "manifest-")
	if !ok {
		return false
	}
	n, err := strconv.Atoi(strings.TrimSuffix(number, ".avro"))
	return err == nil && n >= 0 && name == ManifestName(n)
}

// ParseKey parses the key of a snapshot's file. It returns false for any other key, also for
// a non-canonical form of such a key.
func ParseKey(key string) (collection, snapshot int64, ok bool) {
	parts := strings.Split(key, "/")
	if len(parts) != 4 || !IsFileName(parts[3]) {
		return 0, 0, false
	}
	collection, err := strconv.ParseInt(parts[1], 10, 64)
	if err != nil || collection <= 0 {
		return 0, 0, false
	}
	snapshot, err = strconv.ParseInt(parts[2], 10, 64)
	if err != nil || snapshot <= 0 || key != Dir(collection, snapshot)+parts[3] {
		return 0, 0, false
	}
	return collection, snapshot, true
}

// WrittenAs reports whether data proves that a release of snapshotd wrote it under the key of
// a snapshot's file: metadata has the ids of the snapshot, and the sync marker of an Avro
// file is the hash of the preceding bytes and of the first block. The data of an Avro file
// may end after the first block.
func WrittenAs(key string, data []byte) bool {
	collection, snapshot, ok := ParseKey(key)
	switch {
	case !ok:
		return false
	case strings.HasSuffix(key, "/"+MetadataName):
		var md struct {
			FormatVersion int `json:"format_version"`
			Snapshot      struct {
				ID int64 `json:"id,string"`
			} `json:"snapshot"`
			Collection struct {
				ID int64 `json:"id,string"`
			} `json:"collection"`
		}
		return json.Unmarshal(data, &md) == nil && md.FormatVersion > 0 &&
			md.Snapshot.ID == snapshot && md.Collection.ID == collection
	}
	return isMarked(data)
}

// SHA256 is a SHA-256 sum. As text it is hexadecimal.
type SHA256 [sha256.Size]byte

func (h SHA256) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (h SHA256) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (h *SHA256) UnmarshalText(text []byte) error {
	if len(text) != 2*len(h) {
		return fmt.Errorf("SHA-256 of %d digits", len(text))
	}
	_, err := hex.Decode(h[:], text)
	return err
}

// Digest identifies the content of a file.
type Digest struct {
	Length int64  `json:"length"` // bytes
	SHA256 SHA256 `json:"sha256"`
}

// Sum returns the digest of data.
func Sum(data []byte) Digest {
	return Digest{Length: int64(len(data)), SHA256: sha256.Sum256(data)}
}

// Check returns an error that wraps ErrCorrupt unless d is the digest of data.
func (d Digest) Check(data []byte) error {
	if int64(len(data)) != d.Length {
		return fmt.Errorf("%w: %d bytes, want %d", ErrCorrupt, len(data), d.Length)
	}
	if sum := Sum(data).SHA256; sum != d.SHA256 {
		return fmt.Errorf("%w: SHA-256 is %v, want %v", ErrCorrupt, sum, d.SHA256)
	}
	return nil
}
