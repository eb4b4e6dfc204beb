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
	maxLineBytes  = 16 << 20 // of a segment as JSON; the server's limit is far lower
	maxBatch      = 1000     // segments per message
	maxBatchBytes = 1<<20 - 2048
	maxDropIDs    = 10_000 // per call
)

// segmentLines reads segments, one line of protobuf JSON each.
type segmentLines struct {
	name  string
	lines *bufio.Scanner
	n     int // number of the last line read, from 1
}

func newSegmentLines(name string, r io.Reader) *segmentLines {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLineBytes)
	return &segmentLines{name: name, lines: s}
}

// next returns the next segment, and io.EOF after the last. It skips empty lines.
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

// linePosition matches the position in protojson's errors; the input is one line.
var linePosition = regexp.MustCompile(`\(line \d+:(\d+)\): `)

// plainJSONError returns protojson's error without its prefix and line number. After
// "proto:" protojson varies the space on purpose.
func plainJSONError(err error) string {
	text := strings.TrimPrefix(err.Error(), "proto:")
	text = strings.TrimLeft(text, " \u00a0")
	return linePosition.ReplaceAllString(text, "column $1: ")
}

// sendBatches calls send with the segments, in batches that fit a message. A segment
// above that size is a batch by itself.
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
		Long: `Registers segments from FILE, or with -f - from standard input: one segment per
line, as protobuf JSON of the message Segment, the output of ` + "`catalog export`" + `.

A file is checked as a whole before anything is sent; standard input is checked line
by line. Segments that exist with the same content count as present, so after an error
the same file can be sent again.`,
		Example: `  snapshotctl catalog add-segments -f segments.jsonl --collection docs
  zcat segments.jsonl.gz | snapshotctl catalog add-segments -f - --collection docs`,
		Args: exactArgs(),
	}
	collection := addCollection(cmd)
	cmd.Flags().StringVarP(&file, "file", "f", "", "`file` of segments, one per line; - reads standard input (required)")
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
		ctx, cancel := a.withTimeout(ctx, 0) // also ends the stream after an invalid line
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
			fprintf(w, "added %s, %d already present\n", count(resp.GetAdded(), "segment"), resp.GetPresent())
		})
	})
	return cmd
}

func addSegments(
	stream grpc.ClientStreamingClient[snapshotdv1.AddSegmentsRequest, snapshotdv1.AddSegmentsResponse],
	ref *snapshotdv1.CollectionRef, from *segmentLines,
) (*snapshotdv1.AddSegmentsResponse, error) {
	// The collection has a separate message, so that the server checks it even if there
	// are no segments.
	err := stream.Send(&snapshotdv1.AddSegmentsRequest{Collection: ref})
	if err == nil {
		err = sendBatches(from.next, func(batch []*snapshotdv1.Segment) error {
			return stream.Send(&snapshotdv1.AddSegmentsRequest{Segments: batch})
		})
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return stream.CloseAndRecv() // after EOF it returns the server's error
}

// open opens the file of a flag; - is standard input.
func (a *app) open(file string) (name string, r io.Reader, closeFile func(), err error) {
	switch file {
	case "":
		return "", nil, nil, usageErrorf("-f is missing; - reads standard input")
	case "-":
		return "standard input", a.in, func() {}, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return "", nil, nil, err
	}
	return file, f, func() { _ = f.Close() }, nil // read only
}

// isRegular reports whether a file can be read twice, unlike a pipe.
func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

func (a *app) catalogExport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export --collection COLLECTION",
		Short: "Writes a collection's segments as lines of JSON",
		Long: `Writes the segments of a collection that are not dropped, all at one revision, one
per line, as protobuf JSON of the message Segment. ` + "`catalog add-segments`" + ` reads
them. -o has no effect. After an error the output is incomplete.`,
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
		Short: "Replaces segments atomically",
		Long: `Drops the input segments and adds those of FILE atomically, as a compaction does: no
snapshot sees both or neither. FILE has one segment per line, as for
` + "`catalog add-segments`" + `; without it the inputs are only dropped.`,
		Example: "  snapshotctl catalog compact --collection docs --input 101,102 --input 103 --output-file merged.jsonl",
		Args:    exactArgs(),
	}
	collection := addCollection(cmd)
	cmd.Flags().StringArrayVar(&inputs, "input", nil, "`id` of an input segment; may be repeated (required)")
	cmd.Flags().StringVar(&file, "output-file", "", "`file` of the output segments; - reads standard input")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		if len(inputs) == 0 {
			return usageErrorf("--input is missing")
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
					return usageErrorf("%s has more segments than a compaction may add", name)
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
			fprintf(
				w, "compacted %s into %d at catalog revision %d\n", count(len(req.GetInputs()), "segment"), len(req.GetOutputs()),
				resp.GetCatalogRevision(),
			)
		})
	})
	return cmd
}

func (a *app) catalogDropSegments() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drop-segments ID... --collection COLLECTION",
		Short: "Drops segments",
		Long: `Drops segments. Their files stay while a snapshot holds them. A segment that is
already dropped is not an error; one that never existed is, before any write.`,
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
			return usageErrorf("ID is missing")
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
			resp, err := unary(ctx, a, c.Catalog.DropSegments, &snapshotdv1.DropSegmentsRequest{
				Collection: ref, SegmentIds: part,
			})
			if err != nil {
				return err
			}
			sum.Dropped += resp.GetDropped()
		}
		return a.print(sum, func(w io.Writer) { fprintf(w, "dropped %s\n", count(sum.GetDropped(), "segment")) })
	})
	return cmd
}
