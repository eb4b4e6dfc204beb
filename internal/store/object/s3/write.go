package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// writerName is the metadata entry with the id of the write that made the object.
// Stored: never rename.
const writerName = "snapshotd-write"

// write is one call of Put or Create.
type write struct {
	op   string
	key  string
	body []byte
	id   string // unique
	cond *string
	info object.Info // the result
	// uncertain is set if an attempt with an unknown result may have taken effect.
	uncertain bool
}

// Put implements [object.Store].
func (s *Store) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	return s.write(ctx, &write{op: "put", key: key, body: body})
}

// Create implements [object.Store]. It succeeds if any attempt of this call made the
// object.
func (s *Store) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	return s.write(ctx, &write{op: "create", key: key, body: body, cond: aws.String("*")})
}

func (s *Store) write(ctx context.Context, w *write) (object.Info, error) {
	if err := s.check(ctx, w.key); err != nil {
		return object.Info{}, err
	}
	w.id = rand.Text()
	do := s.putWhole
	if int64(len(w.body)) >= s.o.MultipartThreshold {
		do = s.putParts
	}
	f := do(ctx, w)
	if f != nil && w.uncertain && !errors.Is(f.kind, object.ErrExists) && contextEnd(ctx) == nil {
		switch o, _ := s.resolve(ctx, w); {
		case o == ownedByWrite:
			f = nil
		case o == foreign && w.cond != nil:
			f = &failure{kind: object.ErrExists}
		}
	}
	if f != nil {
		if w.uncertain && errors.Is(f.kind, object.ErrUnavailable) {
			f.detail += "; the object may have been written"
		}
		return object.Info{}, s.error(w.op, w.key, f)
	}
	return w.info, nil
}

func (s *Store) putWhole(ctx context.Context, w *write) *failure {
	sum := checksum(w.body)
	return s.retry(ctx, w.op, w.key, func() *failure {
		out, f := attempt(ctx, s, int64(len(w.body)), func(ctx context.Context) (*s3.PutObjectOutput, error) {
			return s.client.PutObject(ctx, &s3.PutObjectInput{
				Bucket: &s.o.Bucket, Key: s.key(w.key), Body: bytes.NewReader(w.body), ContentLength: aws.Int64(int64(len(w.body))),
				ChecksumCRC32: &sum, IfNoneMatch: w.cond, Metadata: map[string]string{writerName: w.id},
				ServerSideEncryption: s.sse(), SSEKMSKeyId: s.kmsKey(), ExpectedBucketOwner: s.owner,
			})
		})
		var etag, storedSum *string
		var md middleware.Metadata
		if f == nil {
			etag, storedSum, md = out.ETag, out.ChecksumCRC32, out.ResultMetadata
		}
		return s.conclude(ctx, w, f, etag, storedSum, &sum, md)
	})
}

// conclude determines the result of an attempt that makes the object visible. An earlier
// attempt may have taken effect.
func (s *Store) conclude(
	ctx context.Context, w *write, f *failure, etag, storedSum, sum *string, md middleware.Metadata,
) *failure {
	switch {
	case f == nil && storedSum != nil && sum != nil && *storedSum != *sum:
		w.uncertain = true
		return unusable("checksum %s, sent %s", clip(*storedSum), *sum)
	case f == nil && unquote(etag) != "":
		w.info = object.Info{Key: w.key, Size: int64(len(w.body)), ETag: unquote(etag)}
		var ok bool
		if w.info.ModTime, ok = awsmiddleware.GetServerTime(md); !ok {
			w.info.ModTime = time.Now() // approximate
		}
		return nil
	case f == nil:
		w.uncertain = true
		f = unusable("no ETag")
	case errors.Is(f.kind, object.ErrExists) && w.cond == nil:
		return unusable("a precondition failed for a request without one")
	case errors.Is(f.kind, object.ErrExists) && !w.uncertain:
		return f
	case errors.Is(f.kind, object.ErrExists), f.code == "NoSuchUpload" && w.uncertain: // perhaps by this call
	default:
		w.uncertain = w.uncertain || !f.definite()
		return f
	}
	switch o, unknown := s.resolve(ctx, w); {
	case unknown != nil:
		return unknown
	case o == ownedByWrite:
		return nil
	}
	return f
}

// ownership is the origin of an object.
type ownership int

const (
	absent       ownership = iota
	ownedByWrite           // made by this write
	foreign                // made by another writer
)

// resolve determines whether this write made the object, and then sets its result. A
// failure means that the origin is unknown.
func (s *Store) resolve(ctx context.Context, w *write) (ownership, *failure) {
	h, f := s.head(ctx, w.key)
	switch {
	case f != nil && errors.Is(f.kind, object.ErrNotFound):
		return absent, nil
	case f != nil:
		return absent, f
	case h.Size != int64(len(w.body)):
		return foreign, nil
	case h.writer == "": // a store without metadata
		if same, f := s.contentEquals(ctx, w); f != nil || !same {
			return foreign, f
		}
	case h.writer != w.id:
		return foreign, nil
	}
	w.info = h.Info
	return ownedByWrite, nil
}

// contentEquals compares the object's content with that of the write.
func (s *Store) contentEquals(ctx context.Context, w *write) (bool, *failure) {
	r, _, f := s.get(ctx, w.key, 0, -1)
	if f != nil {
		return false, f
	}
	defer func() { _ = r.Close() }()
	buf := make([]byte, 64<<10)
	rest := w.body
	for {
		n, err := r.Read(buf)
		if n > len(rest) || !bytes.Equal(buf[:n], rest[:n]) {
			return false, nil
		}
		rest = rest[n:]
		switch {
		case errors.Is(err, io.EOF):
			return len(rest) == 0, nil
		case err != nil:
			return false, unusable("%s", clip(err.Error()))
		}
	}
}

// putParts writes the object in parts, some of them in parallel.
func (s *Store) putParts(ctx context.Context, w *write) *failure {
	id, f := s.createUpload(ctx, w)
	if f != nil {
		return f
	}
	f = s.uploadParts(ctx, w, id)
	if f != nil {
		// The abort of a completed upload has no effect.
		s.abortAfter(ctx, w.key, id)
	}
	return f
}

func (s *Store) createUpload(ctx context.Context, w *write) (id string, f *failure) {
	f = s.retry(ctx, w.op, w.key, func() *failure {
		out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.CreateMultipartUploadOutput, error) {
			return s.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
				Bucket: &s.o.Bucket, Key: s.key(w.key), Metadata: map[string]string{writerName: w.id},
				ChecksumAlgorithm: types.ChecksumAlgorithmCrc32, ChecksumType: types.ChecksumTypeComposite,
				ServerSideEncryption: s.sse(), SSEKMSKeyId: s.kmsKey(), ExpectedBucketOwner: s.owner,
			})
		})
		if f == nil {
			if id = aws.ToString(out.UploadId); id == "" {
				f = unusable("no upload id")
			}
		}
		return f
	})
	return id, f
}

// partError carries a failure through an errgroup.
type partError struct{ *failure }

func (partError) Error() string { return "part failed" }

// uploadParts uploads the parts and completes the upload.
func (s *Store) uploadParts(ctx context.Context, w *write, id string) *failure {
	size := partSize(int64(len(w.body)), s.o.PartSize)
	parts := make([]types.CompletedPart, 0, int64(len(w.body))/size+1)
	for rest := w.body; len(rest) > 0; {
		parts = append(parts, types.CompletedPart{PartNumber: aws.Int32(int32(len(parts) + 1))})
		rest = rest[min(size, int64(len(rest))):]
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(partsInFlight)
	for i := range parts {
		body := w.body[int64(i)*size:]
		body = body[:min(size, int64(len(body)))]
		group.Go(func() error {
			if f := s.uploadPart(groupCtx, w, id, &parts[i], body); f != nil {
				return partError{f}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		if end := contextEnd(ctx); end != nil {
			return end
		}
		if p, ok := errors.AsType[partError](err); ok {
			return p.failure
		}
	}
	return s.retry(ctx, w.op, w.key, func() *failure {
		out, f := attempt(ctx, s, int64(len(w.body)), func(ctx context.Context) (*s3.CompleteMultipartUploadOutput, error) {
			return s.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
				Bucket: &s.o.Bucket, Key: s.key(w.key), UploadId: &id, IfNoneMatch: w.cond, ExpectedBucketOwner: s.owner,
				MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}, ChecksumType: types.ChecksumTypeComposite,
			})
		})
		var etag *string
		var md middleware.Metadata
		if f == nil {
			etag, md = out.ETag, out.ResultMetadata
		}
		return s.conclude(ctx, w, f, etag, nil, nil, md)
	})
}

func (s *Store) uploadPart(
	ctx context.Context, w *write, id string, p *types.CompletedPart, body []byte,
) *failure {
	sum := checksum(body)
	return s.retry(ctx, w.op, w.key, func() *failure {
		out, f := attempt(ctx, s, int64(len(body)), func(ctx context.Context) (*s3.UploadPartOutput, error) {
			return s.client.UploadPart(ctx, &s3.UploadPartInput{
				Bucket: &s.o.Bucket, Key: s.key(w.key), UploadId: &id, PartNumber: p.PartNumber, Body: bytes.NewReader(body),
				ContentLength: aws.Int64(int64(len(body))), ChecksumCRC32: &sum, ExpectedBucketOwner: s.owner,
			})
		})
		switch {
		case f != nil && f.status == http.StatusNotFound && f.code == "NoSuchUpload":
			return lostUpload(f, p)
		case f != nil:
			f.detail = fmt.Sprintf("part %d: %s", *p.PartNumber, f.detail)
			return f
		case unquote(out.ETag) == "":
			return unusable("part %d has no ETag", *p.PartNumber)
		case out.ChecksumCRC32 != nil && *out.ChecksumCRC32 != sum:
			return unusable("part %d: checksum %s, sent %s", *p.PartNumber, clip(*out.ChecksumCRC32), sum)
		}
		p.ETag, p.ChecksumCRC32 = out.ETag, &sum
		return nil
	})
}

// lostUpload is the failure of a part whose upload the server does not know.
func lostUpload(f *failure, p *types.CompletedPart) *failure {
	return &failure{
		kind: object.ErrUnavailable, status: f.status, code: f.code,
		detail: fmt.Sprintf("part %d: upload not found", *p.PartNumber),
	}
}

// partSize returns the smallest size of at least minSize that needs at most maxParts parts.
func partSize(size, minSize int64) int64 {
	return max(minSize, (size+maxParts-1)/maxParts)
}

// checksum returns the CRC-32 of body in the encoding of S3.
func checksum(body []byte) string {
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE(body)))
}
