//go:build linux

package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"iter"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
)

// files is the number of files of a segment of the large job. The last buildFiles
// belong to an index build.
const (
	files      = 12
	buildFiles = 2
)

// newSegment returns a segment that its ids determine.
func newSegment(collection, partition, index, id, build int64) segment.Segment {
	s := segment.Segment{
		ID:             id,
		Partition:      partition,
		State:          segment.Flushed,
		Rows:           rows,
		StorageVersion: 2,
		Sorted:         true,
		Start: segment.Position{
			Timestamp: segment.Timestamp(firstTimestamp),
		},
		DML: segment.Position{Timestamp: segment.Timestamp(lastTimestamp)},
	}
	b := segment.Build{ID: build, Index: index, Field: firstField}
	for n := range files {
		kind, field := kindOf(n)
		f := segment.File{
			Path: fmt.Sprintf("%d/%d/%d/%s/%d/%d", collection, partition, id, kind, field, id*64+int64(n)),
			Kind: kind, Field: field, LogID: id*64 + int64(n), Size: sizeOf(id, n), ETag: etagOf(id, n),
		}
		if n >= files-buildFiles {
			b.Files = append(b.Files, f)
			continue
		}
		f.MinTimestamp, f.MaxTimestamp = segment.Timestamp(firstTimestamp), segment.Timestamp(lastTimestamp-1)
		f.Entries = rows
		s.Files = append(s.Files, f)
	}
	s.Builds = []segment.Build{b}
	return s
}

func kindOf(n int) (kind string, field int64) {
	if n >= files-buildFiles {
		return "index", firstField
	}
	return "insert", int64(firstField + n)
}

func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func sizeOf(id int64, n int) int64 { return 1<<16 + int64(mix(uint64(id*64+int64(n)))>>40) } //nolint:gosec // our own

func etagOf(id int64, n int) string {
	var sum [16]byte
	for i := range sum {
		sum[i] = byte(mix(uint64(id*64+int64(n))) >> (i % 8 * 8)) //nolint:gosec // our own
	}
	sum[15] = byte(n)
	return hex.EncodeToString(sum[:])
}

// virtual is an object store in memory. It has one bit per file of a segment, in a
// file that outlives the process; the ids determine the rest. Objects of snapshots
// are files.
type virtual struct {
	object.Store
	onCopy func(ordinal int64)

	first  int64 // source segment
	table  []uint32
	header *[2]int64 // the first target segment and build
}

const mostSegments = 1 << 20

func openVirtual(name string) (*virtual, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // the map stays
	const size = 16 + 4*mostSegments
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	data, err := syscall.Mmap(
		int(f.Fd()),
		0,
		size,
		syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_SHARED,
	) //nolint:gosec // a descriptor
	if err != nil {
		return nil, err
	}
	own, err := file.Open(name+"-objects", file.Options{})
	if err != nil {
		return nil, err
	}
	return &virtual{
		Store:  own,
		header: (*[2]int64)(unsafe.Pointer(&data[0])),                            //nolint:gosec // aligned by the page
		table:  unsafe.Slice((*uint32)(unsafe.Pointer(&data[16])), mostSegments), //nolint:gosec // likewise
	}, nil
}

// use sets the first source segment.
func (v *virtual) use(first int64, _ int) { v.first = first }

// forget removes all copies.
func (v *virtual) forget() {
	clear(v.table)
	*v.header = [2]int64{}
}

// Copy implements [object.Store].
func (v *virtual) Copy(_ context.Context, r object.CopyRequest) (object.Info, error) {
	log, err := strconv.ParseInt(r.From[strings.LastIndexByte(r.From, '/')+1:], 10, 64)
	if err != nil {
		return object.Info{}, err
	}
	id, n := log>>6, int(log&63)
	if n >= files || r.SourceETag != etagOf(id, n) || r.Size != sizeOf(id, n) {
		return object.Info{}, fmt.Errorf("copy %s: %w", r.From, object.ErrSourceChanged)
	}
	ordinal := id - v.first
	to := strings.Split(r.To, "/") // data, many, collection, partition, segment, kind, field or build, log
	if len(to) != 8 {
		return object.Info{}, fmt.Errorf("copy to %s: %w", r.To, object.ErrInvalidKey)
	}
	v.learn(&v.header[0], to[4], ordinal)
	if n >= files-buildFiles {
		v.learn(&v.header[1], to[6], ordinal)
	}
	v.onCopy(ordinal)
	atomic.OrUint32(&v.table[ordinal], 1<<n)
	return object.Info{Key: r.To, Size: r.Size, ETag: r.SourceETag}, nil
}

// learn records the id of ordinal 0.
func (*virtual) learn(first *int64, id string, ordinal int64) {
	if atomic.LoadInt64(first) == 0 {
		if n, err := strconv.ParseInt(id, 10, 64); err == nil {
			atomic.StoreInt64(first, n-ordinal)
		}
	}
}

// List implements [object.Store].
func (v *virtual) List(ctx context.Context, prefix string) iter.Seq2[object.Info, error] {
	parts := strings.Split(prefix, "/")
	if len(parts) != 6 || parts[0] != "data" {
		return v.Store.List(ctx, prefix)
	}
	return func(yield func(object.Info, error) bool) {
		target, err := strconv.ParseInt(parts[4], 10, 64)
		if err != nil {
			yield(object.Info{}, err)
			return
		}
		first := atomic.LoadInt64(&v.header[0])
		if first == 0 {
			return
		}
		ordinal := target - first
		id := v.first + ordinal
		var found []object.Info
		for mask := atomic.LoadUint32(&v.table[ordinal]); mask != 0; mask &= mask - 1 {
			n := bits.TrailingZeros32(mask)
			kind, field := kindOf(n)
			name := prefix + kind + "/" + strconv.FormatInt(field, 10) + "/" + strconv.FormatInt(id*64+int64(n), 10)
			if n >= files-buildFiles {
				name = fmt.Sprintf("%s%s/%d/%d-%d", prefix, kind, atomic.LoadInt64(&v.header[1])+ordinal, field, id*64+int64(n))
			}
			found = append(found, object.Info{Key: name, Size: sizeOf(id, n), ETag: etagOf(id, n)})
		}
		slices.SortFunc(found, func(a, b object.Info) int { return strings.Compare(a.Key, b.Key) })
		for _, info := range found {
			if !yield(info, nil) {
				return
			}
		}
	}
}

// Head implements [object.Store].
func (v *virtual) Head(ctx context.Context, key string) (object.Info, error) {
	if parts := strings.Split(key, "/"); len(parts) == 8 && parts[0] == "data" {
		return object.Info{}, fmt.Errorf("head %s: %w: listed stores get no HEAD", key, object.ErrNotFound)
	}
	return v.Store.Head(ctx, key)
}

// AbortUploads implements [object.Store].
func (v *virtual) AbortUploads(context.Context, string, time.Time) (int, error) { return 0, nil }

// OldestUpload implements [object.Store].
func (v *virtual) OldestUpload(context.Context, string) (time.Time, error) { return time.Time{}, nil }
