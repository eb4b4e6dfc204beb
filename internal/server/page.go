package server

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// Answers are bounded in bytes, beneath the 4 MiB that a client of gRPC takes
// unless it asks for more:
//
//   - a list comes in pages, each of at most maxPageBytes or one element;
//   - a list that had no pages once is answered whole as long as it fits into
//     maxAnswerBytes, unless the caller asks for pages. Where it does not fit, the
//     rest is on further pages, and a note on the answer says so;
//   - an element is bounded where it is registered. See catalog.MaxShownBytes for
//     the largest of them, a segment with its files.
//
// Pages are filled from what is read one by one, so none is built that is not sent.
const (
	defaultPage = 100
	maxPage     = 1000

	maxPageBytes   = 2 << 20
	maxAnswerBytes = 4<<20 - 256<<10
)

func pageSize(asked int32) int {
	if asked <= 0 {
		return defaultPage
	}
	return min(int(asked), maxPage)
}

// page counts what one answer holds. Its zero value holds nothing; use newPage
// and wholePage.
type page struct {
	limit    int // elements; 0: any number
	bytes    int
	elements int
	size     int
}

// newPage returns the page that a caller gets who asks for so many elements.
func newPage(asked int32) *page { return &page{limit: pageSize(asked), bytes: maxPageBytes} }

// wholePage is newPage for a list that had no pages once: it is bounded by bytes
// alone unless the caller asks for a number of elements.
func wholePage(asked int32) *page {
	if asked <= 0 {
		return &page{bytes: maxAnswerBytes}
	}
	return newPage(asked)
}

// elementBytes is at most what a list takes for an element of a message besides
// the element.
const elementBytes = 6

// add reports whether m is on the page. The first element always is; after a false
// the page is full.
func (p *page) add(m proto.Message) bool {
	size := proto.Size(m) + elementBytes
	if p.elements > 0 && (p.limit > 0 && p.elements == p.limit || p.size+size > p.bytes) {
		return false
	}
	p.elements++
	p.size += size
	return true
}

// noteRest notes on the answer to a caller that asks for no pages that it is not the
// whole list: one that does not know of pages would take it for that.
func noteRest(ctx context.Context, asked int32, token, next, of string) {
	if asked > 0 || token != "" || next == "" {
		return
	}
	_ = grpc.SetHeader(ctx, metadata.Pairs(noteKey, fmt.Sprintf( // fails only when the call is over
		"the %s do not fit into one message: this is the first page; ask for the next with next_page_token", of)))
}
