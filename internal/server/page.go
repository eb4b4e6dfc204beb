package server

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// Responses are bounded in bytes, below the 4 MiB that a gRPC client accepts by
// default:
//
//   - a list has pages, each of at most maxPageBytes or one element;
//   - a list that had no pages in earlier releases is returned whole if it fits into
//     maxAnswerBytes, unless the caller asks for pages. Otherwise the rest is on
//     further pages, and a note on the response reports that;
//   - an element is bounded where it is registered. See catalog.MaxShownBytes for
//     the largest of them, a segment with its files.
//
// Segments, partitions and indexes are read and added one by one. The other lists read up
// to maxPage records and drop those that do not fit; the next page reads them again.
const (
	defaultPage = 100
	maxPage     = 1000

	maxPageBytes   = 2 << 20
	maxAnswerBytes = 4<<20 - 256<<10
)

func pageSize(requested int32) int {
	if requested <= 0 {
		return defaultPage
	}
	return min(int(requested), maxPage)
}

// page counts the elements and bytes of one response. Create it with newPage or
// wholePage.
type page struct {
	limit    int // elements; 0: unlimited
	bytes    int // limit of size
	elements int
	size     int
}

// newPage returns an empty page for a requested number of elements; 0 is the default.
func newPage(requested int32) *page { return &page{limit: pageSize(requested), bytes: maxPageBytes} }

// wholePage is newPage for a list that had no pages in earlier releases: without a
// requested number of elements only the bytes are bounded.
func wholePage(requested int32) *page {
	if requested <= 0 {
		return &page{bytes: maxAnswerBytes}
	}
	return newPage(requested)
}

// elementBytes is the maximum overhead of an element in a list: its tag and length.
const elementBytes = 6

// add counts m and reports whether it fits on the page. The first element always fits.
func (p *page) add(m proto.Message) bool {
	size := proto.Size(m) + elementBytes
	if p.elements > 0 && (p.limit > 0 && p.elements == p.limit || p.size+size > p.bytes) {
		return false
	}
	p.elements++
	p.size += size
	return true
}

// notePartialList adds a note to a partial list for a caller that has not asked for
// pages, and might take the list for the whole.
func notePartialList(ctx context.Context, requested int32, token, next, elements string) {
	if requested > 0 || token != "" || next == "" {
		return
	}
	_ = grpc.SetHeader(ctx, metadata.Pairs(noteKey, fmt.Sprintf( // fails only after the end of the call
		"the %s do not fit into one message: this is the first page; ask for the next with next_page_token",
		elements)))
}
