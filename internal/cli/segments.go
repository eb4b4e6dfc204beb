package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

const (
	maxLineBytes  = 16 << 20 // of a segment as JSON; the server's own bound is far below
	maxBatch      = 1000     // segments in a message
	maxBatchBytes = 1<<20 - 2048
	maxDropIDs    = 10_000 // in a call
)

// segmentLines reads segments, each a line of protobuf JSON.
type segmentLines struct {
	name  string
	lines *bufio.Scanner
	n     int // of the line last read, from 1
}

func newSegmentLines(name string, r io.Reader) *segmentLines {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLineBytes)
	return &segmentLines{name: name, lines: s}
}

// next returns the next segment, and io.EOF after the last. Empty lines do not
// count.
func (l *segmentLines) next() (*snapshotdv1.Segment, error) {
	for l.lines.Scan() {
		l.n++
		line := bytes.TrimSpace(l.lines.Bytes())
		if len(line) == 0 {
			continue
		}
		s := new(snapshotdv1.Segment)
		if err := protojson.Unmarshal(line, s); err != nil {
			return nil, usageErrorf("%s, line %d: %s", l.name, l.n, plainJSONError(err))
		}
		if s.GetId() <= 0 {
			return nil, usageErrorf("%s, line %d: the segment has no id", l.name, l.n)
		}
		return s, nil
	}
	switch err := l.lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, usageErrorf("%s, line %d: longer than %s", l.name, l.n+1, size(maxLineBytes))
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", l.name, err)
	}
	return nil, io.EOF
}

// linePosition is how protojson says where in its input, here one line, it is.
var linePosition = regexp.MustCompile(`\(line \d+:(\d+)\): `)

// plainJSONError returns protojson's error without what is not for users. After
// "proto:" it writes one kind of space or another, on purpose.
func plainJSONError(err error) string {
	text := strings.TrimPrefix(err.Error(), "proto:")
	text = strings.TrimLeft(text, " \u00a0")
	return linePosition.ReplaceAllString(text, "column $1: ")
}

// batches hands segments on in lists that fit in a message. A segment that is
// larger than any message should be is one of its own.
func sendBatches(next func() (*snapshotdv1.Segment, error), send func([]*snapshotdv1.Segment) error) error {
	var (
		batch []*snapshotdv1.Segment
		bytes int
	)
	for {
		s, err := next()
		end := errors.Is(err, io.EOF)
		if err != nil && !end {
			return err
		}
		n := 0
		if !end {
			n = proto.Size(s) + 6 // with tag and length
		}
		if len(batch) > 0 && (end || len(batch) == maxBatch || bytes+n > maxBatchBytes) {
			if err := send(batch); err != nil {
				return err
			}
			batch, bytes = nil, 0
		}
		if end {
			return nil
		}
		batch, bytes = append(batch, s), bytes+n
	}
}

func (a *app) catalogAddSegments() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "add-segments -f FILE --collection COLLECTION",
		Short: "Registers segments",
		Long: `Registers segments from FILE, or with -f - from standard input: one segment a
line, as protobuf JSON of the message Segment, as ` + "`catalog export`" + ` writes them.

A file is checked as a whole before anything is sent; standard input line by
line as it comes. Segments that are there already with the same content are
counted as present, so after an error the same file is sent again.`,
		Example: `  snapshotctl catalog add-segments -f segments.jsonl --collection docs
  zcat segments.jsonl.gz | snapshotctl catalog add-segments -f - --collection docs`,
		Args: exactArgs(),
	}
	collection := addCollection(cmd)
	cmd.Flags().StringVarP(&file, "file", "f", "", "`file` of segments, one a line; - is standard input (required)")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		name, r, closeFile, err := a.open(file)
		if err != nil {
			return err
		}
		defer closeFile()
		if f, ok := r.(*os.File); ok && file != "-" && isRegular(f) {
			check := newSegmentLines(name, f)
			if err := sendBatches(check.next, func([]*snapshotdv1.Segment) error { return ctx.Err() }); err != nil {
				return err
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				return fmt.Errorf("read %s: %w", name, err)
			}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		ctx, cancel := a.withTimeout(ctx, 0) // also ends the stream when a line is bad
		defer cancel()
		stream, err := c.Catalog.AddSegments(ctx)
		if err != nil {
			return err
		}
		resp, err := addSegments(stream, ref, newSegmentLines(name, r))
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) {
			fprintf(w, "added %s, %d were there already\n", count(resp.GetAdded(), "segment"), resp.GetPresent())
		})
	})
	return cmd
}

func addSegments(
	stream grpc.ClientStreamingClient[snapshotdv1.AddSegmentsRequest, snapshotdv1.AddSegmentsResponse],
	ref *snapshotdv1.CollectionRef, from *segmentLines,
) (*snapshotdv1.AddSegmentsResponse, error) {
	// The collection has a message of its own, so that it is looked up even when
	// there are no segments.
	err := stream.Send(&snapshotdv1.AddSegmentsRequest{Collection: ref})
	if err == nil {
		err = sendBatches(from.next, func(batch []*snapshotdv1.Segment) error {
			return stream.Send(&snapshotdv1.AddSegmentsRequest{Segments: batch})
		})
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return stream.CloseAndRecv() // after EOF it has the server's reason
}

// open opens a file that a flag names; - is standard input.
func (a *app) open(file string) (name string, r io.Reader, closeFile func(), err error) {
	switch file {
	case "":
		return "", nil, nil, usageErrorf("-f is missing: which file? - is standard input")
	case "-":
		return "standard input", a.in, func() {}, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return "", nil, nil, err
	}
	return file, f, func() { _ = f.Close() }, nil // it was only read
}

// regular says whether a file can be read twice, unlike a pipe.
func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

func (a *app) catalogExport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export --collection COLLECTION",
		Short: "Writes a collection's segments as lines of JSON",
		Long: `Writes a collection's segments that are not dropped, all as of one revision,
one a line, as protobuf JSON of the message Segment. ` + "`catalog add-segments`" + ` reads
them. -o has no effect. After an error the output is not complete.`,
		Example: "  snapshotctl catalog export --collection docs > segments.jsonl",
		Args:    exactArgs(),
	}
	collection := addCollection(cmd)
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		ctx, cancel := a.withTimeout(ctx, 0)
		defer cancel()
		stream, err := c.Catalog.ExportSegments(ctx, &snapshotdv1.ExportSegmentsRequest{Collection: ref})
		if err != nil {
			return err
		}
		out := bufio.NewWriter(a.out)
		for {
			msg, err := stream.Recv()
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = nil
				}
				return errors.Join(err, out.Flush())
			}
			for _, s := range msg.GetSegments() {
				line, err := compactJSON(s)
				if err != nil {
					return err
				}
				if _, err := out.Write(append(line, '\n')); err != nil {
					return err
				}
			}
		}
	})
	return cmd
}

func (a *app) catalogCompact() *cobra.Command {
	var (
		inputs []string
		file   string
	)
	cmd := &cobra.Command{
		Use:   "compact --collection COLLECTION --input ID... --output-file FILE",
		Short: "Puts segments in the place of others, in one step",
		Long: `Drops the input segments and adds those of FILE in one atomic step, as a
compaction does: no snapshot sees both or neither. FILE has one segment a line,
as for ` + "`catalog add-segments`" + `; without it the inputs just go.`,
		Example: "  snapshotctl catalog compact --collection docs --input 101,102 --input 103 --output-file merged.jsonl",
		Args:    exactArgs(),
	}
	collection := addCollection(cmd)
	cmd.Flags().StringArrayVar(&inputs, "input", nil, "`id` of a segment that goes; may be repeated (required)")
	cmd.Flags().StringVar(&file, "output-file", "", "`file` with the segments that come; - is standard input")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		if len(inputs) == 0 {
			return usageErrorf("--input is missing: which segments go?")
		}
		req := &snapshotdv1.CompactSegmentsRequest{Collection: ref, RequestToken: client.NewRequestToken()}
		if req.Inputs, err = parseIDs(inputs); err != nil {
			return err
		}
		if file != "" {
			name, r, closeFile, err := a.open(file)
			if err != nil {
				return err
			}
			defer closeFile()
			err = sendBatches(newSegmentLines(name, r).next, func(batch []*snapshotdv1.Segment) error {
				if req.Outputs = append(req.Outputs, batch...); len(req.GetOutputs()) > maxBatch {
					return usageErrorf("%s holds more segments than one compaction takes", name)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Catalog.CompactSegments, req)
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) {
			fprintf(w, "compacted %s into %d at catalog revision %d\n", count(len(req.GetInputs()), "segment"), len(req.GetOutputs()), resp.GetCatalogRevision())
		})
	})
	return cmd
}

func (a *app) catalogDropSegments() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drop-segments ID... --collection COLLECTION",
		Short: "Drops segments",
		Long: `Drops segments. Their files stay as long as a snapshot needs them. One that is
dropped already is no error; one that never was is, before anything is written.`,
		Example: "  snapshotctl catalog drop-segments --collection docs 101 102",
		Args:    cobra.ArbitraryArgs,
	}
	collection := addCollection(cmd)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		if len(args) == 0 {
			return usageErrorf("ID is missing: which segments?")
		}
		ids, err := parseIDs(args)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		sum := new(snapshotdv1.DropSegmentsResponse)
		for part := range slices.Chunk(ids, maxDropIDs) {
			resp, err := unary(ctx, a, c.Catalog.DropSegments, &snapshotdv1.DropSegmentsRequest{Collection: ref, SegmentIds: part})
			if err != nil {
				return err
			}
			sum.Dropped += resp.GetDropped()
		}
		return a.print(sum, func(w io.Writer) { fprintf(w, "dropped %s\n", count(sum.GetDropped(), "segment")) })
	})
	return cmd
}
