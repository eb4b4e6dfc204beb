package s3

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// sourceName is the metadata entry with the ETag of the source of a copy in parts. Stored:
// never rename.
const sourceName = "snapshotd-source-etag"

// maxDigest is the maximum size in bytes of a source that is read to compare its MD5 with
// its ETag.
const maxDigest = 8 << 20

// copyCall is one call of Copy.
type copyCall struct {
	object.CopyRequest
	source, etag *string // as header values
	info         object.Info

	// For copies in parts.
	parts    int
	partSize int64
	meta     *s3.HeadObjectOutput // of the source
	tags     *string
	// uncertain is set if an attempt with an unknown result may have made the object.
	uncertain bool
	// unknownUpload is set if an upload with an unknown id may be open, latePart if a
	// part may still arrive.
	unknownUpload bool
	latePart      atomic.Bool
}

// Copy implements [object.Store]. The server copies in one request, or in parallel parts.
// ACL, storage class and lock of From are not copied; the target is encrypted according to
// the options, like any other write.
//
// A copy in parts sends a HEAD, a read of the tags, and the begin and end of the upload in
// addition to the parts. It omits the tags if the store has no tags or denies access to
// them.
func (s *Store) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if err := r.Check(); err != nil {
		return object.Info{}, err
	}
	for _, key := range []string{r.From, r.To} {
		if err := s.check(ctx, key); err != nil {
			return object.Info{}, err
		}
	}
	c := &copyCall{CopyRequest: r, source: s.copySource(r.From), etag: aws.String(`"` + r.SourceETag + `"`)}
	do := s.copyWhole
	if c.parts, c.partSize = r.Parts.Split(r.Size); c.parts > 0 {
		do = s.copyParts
	}
	if f := do(ctx, c); f != nil {
		if c.uncertain && errors.Is(f.kind, object.ErrUnavailable) {
			f.detail += "; the object may have been copied"
		}
		return object.Info{}, s.error("copy", r.From+" to "+r.To, f)
	}
	return c.info, nil
}

func (s *Store) copyWhole(ctx context.Context, c *copyCall) *failure {
	timeout := s.copyTimeout(c.Size)
	return s.retry(ctx, "copy", c.To, func() *failure {
		// The server continues a copy whose connection is closed, so an attempt outlives
		// ctx by the timeout of any other request: most copies have ended by then. It
		// does not wait minutes for a large copy, which would delay the shutdown of the
		// process; a later end of that copy writes the same bytes under the same key.
		longer, cancel := s.outlive(ctx)
		defer cancel()
		out, f := attemptFor(longer, timeout, func(ctx context.Context) (*s3.CopyObjectOutput, error) {
			return s.client.CopyObject(ctx, &s3.CopyObjectInput{
				Bucket: &s.o.Bucket, Key: s.key(c.To), CopySource: c.source, CopySourceIfMatch: c.etag,
				ServerSideEncryption: s.sse(), SSEKMSKeyId: s.kmsKey(),
				ExpectedBucketOwner: s.owner, ExpectedSourceBucketOwner: s.owner,
			})
		})
		if f != nil {
			c.uncertain = c.uncertain || !f.definite()
			return sourceFailure(f)
		}
		result := out.CopyObjectResult
		if result == nil {
			result = &types.CopyObjectResult{}
		}
		if unquote(result.ETag) == "" {
			c.uncertain = true
			return unusable("no ETag")
		}
		c.setInfo(result.ETag, result.LastModified, out.ResultMetadata)
		if opaque(out.ServerSideEncryption, nil) {
			return nil
		}
		return s.verifyETag(ctx, c)
	})
}

// verifyETag compares the ETag of a copy in one request with that of the source. Most
// ETags are MD5s, so a difference detects a copy of another version even if the server has
// stopped to honour the condition since the probe. Different ETags prove nothing if either
// object is encrypted, or if the source's ETag is not its MD5.
func (s *Store) verifyETag(ctx context.Context, c *copyCall) *failure {
	if s.noMD5.Load() {
		return nil
	}
	source := object.Info{Size: c.Size, ETag: c.SourceETag}
	if likeness, _ := object.Compare(source, c.info); likeness != object.Altered {
		return nil
	}
	for _, key := range []string{c.From, c.To} {
		switch out, f := s.headOutput(ctx, key); {
		case f != nil:
			c.uncertain = true
			return f
		case opaque(out.ServerSideEncryption, out.SSECustomerAlgorithm):
			return nil
		case key == c.From && unquote(out.ETag) != c.SourceETag:
			return ignoredCondition(unquote(out.ETag), c)
		}
	}
	switch is, f := s.isMD5(ctx, c); {
	case f != nil:
		c.uncertain = true
		return f
	case !is:
		return nil
	}
	c.uncertain = true
	return unusable("the copy has ETag %s, its source %s", clip(c.info.ETag), c.SourceETag)
}

// isMD5 reports whether the source's ETag is known to be its MD5. It reads a source of up
// to maxDigest bytes, and sets noMD5 if the ETag is not its MD5.
func (s *Store) isMD5(ctx context.Context, c *copyCall) (bool, *failure) {
	if c.Size > maxDigest {
		return false, nil
	}
	r, info, f := s.get(ctx, c.From, 0, -1)
	if f != nil {
		return false, f
	}
	if info.ETag != c.SourceETag {
		_ = r.Close() // unread
		return false, ignoredCondition(info.ETag, c)
	}
	sum := md5.New() // for ETags, not for security
	_, err := io.Copy(sum, r)
	if err := errors.Join(err, r.Close()); err != nil {
		return false, unusable("%s", clip(err.Error()))
	}
	if hex.EncodeToString(sum.Sum(nil)) == c.SourceETag {
		return true, nil
	}
	s.noMD5.Store(true)
	return false, nil
}

// opaque reports whether the encryption makes an ETag other than the MD5.
func opaque(sse types.ServerSideEncryption, customer *string) bool {
	return strings.HasPrefix(string(sse), "aws:kms") || aws.ToString(customer) != ""
}

// setInfo sets the target's Info from a response.
func (c *copyCall) setInfo(etag *string, at *time.Time, md middleware.Metadata) {
	c.info = object.Info{Key: c.To, Size: c.Size, ETag: unquote(etag)}
	if at != nil {
		c.info.ModTime = *at
	} else if now, ok := awsmiddleware.GetServerTime(md); ok {
		c.info.ModTime = now
	} else {
		c.info.ModTime = time.Now() // approximate
	}
}

// sourceFailure classifies a failure of a request that reads the source: a failed
// condition concerns the source.
func sourceFailure(f *failure) *failure {
	if errors.Is(f.kind, object.ErrExists) {
		f.kind, f.retry = object.ErrSourceChanged, false
	}
	return f
}

// rangeFailure is sourceFailure for a range. Servers check the range before the condition,
// and return different codes for a range outside the source.
func (s *Store) rangeFailure(ctx context.Context, c *copyCall, f *failure) *failure {
	if f.code != "InvalidArgument" && f.code != "InvalidRange" && f.status != http.StatusRequestedRangeNotSatisfiable {
		return sourceFailure(f)
	}
	switch out, missing := s.headOutput(ctx, c.From); {
	case missing != nil && errors.Is(missing.kind, object.ErrNotFound):
		return missing
	case missing == nil && (unquote(out.ETag) != c.SourceETag || *out.ContentLength != c.Size):
		f.kind = object.ErrSourceChanged
	}
	return f
}

// copyParts copies the object in parts. It restarts once if the upload or a part is lost.
func (s *Store) copyParts(ctx context.Context, c *copyCall) *failure {
	if f := s.readSourceMetadata(ctx, c); f != nil {
		return f
	}
	f := s.copyUpload(ctx, c)
	if f != nil && isLost(f) && contextEnd(ctx) == nil {
		f = s.copyUpload(ctx, c)
	}
	if c.unknownUpload {
		s.abortUnknown(ctx, c)
	}
	if f == nil && unquote(c.meta.ETag) != c.SourceETag {
		return s.verifyListedSource(ctx, c)
	}
	return f
}

// verifyListedSource checks the source's ETag by a list. The HEAD returned another version
// than the requested one although the parts were copied: either the HEAD was wrong, or the
// server ignores the condition.
func (s *Store) verifyListedSource(ctx context.Context, c *copyCall) *failure {
	var p page
	f := s.retry(ctx, "list", c.From, func() (f *failure) {
		p, f = s.page(ctx, c.From, nil, "", 1)
		return f
	})
	switch {
	case f != nil:
		c.uncertain = true
		return f
	case len(p.objects) == 0 || p.objects[0].Key != *s.key(c.From):
		return &failure{kind: object.ErrSourceChanged, detail: "the source is no longer listed"}
	case p.objects[0].ETag != c.SourceETag:
		return ignoredCondition(p.objects[0].ETag, c)
	}
	return nil
}

// ignoredCondition is the failure of a copy of another version than the requested one.
func ignoredCondition(etag string, c *copyCall) *failure {
	return &failure{kind: object.ErrSourceChanged, detail: fmt.Sprintf(
		"the store ignored the condition and copied ETag %s, not %s", clip(etag), c.SourceETag)}
}

// isLost reports whether the upload cannot be completed, but a new one may succeed.
func isLost(f *failure) bool {
	return f.code == "NoSuchUpload" || f.code == "InvalidPart" || f.code == "InvalidPartOrder"
}

// readSourceMetadata reads the metadata and the tags for the target.
func (s *Store) readSourceMetadata(ctx context.Context, c *copyCall) *failure {
	f := s.retry(ctx, "head", c.From, func() (f *failure) {
		c.meta, f = s.headOutput(ctx, c.From)
		return f
	})
	if f != nil {
		return f
	}
	if *c.meta.ContentLength != c.Size {
		return &failure{
			kind:   object.ErrSourceChanged,
			detail: fmt.Sprintf("the source has %d bytes, not %d", *c.meta.ContentLength, c.Size),
		}
	}
	f = s.retry(ctx, "read tags of", c.From, func() *failure {
		out, f := attempt(ctx, s, 0, func(ctx context.Context) (*s3.GetObjectTaggingOutput, error) {
			return s.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{
				Bucket: &s.o.Bucket, Key: s.key(c.From), ExpectedBucketOwner: s.owner,
			})
		})
		switch {
		case f != nil && (unsupported(f) || noTags[f.code]):
			return nil
		case f != nil:
			return f
		case out.TagSet == nil:
			return unusable("no TagSet")
		}
		tags := url.Values{}
		for _, tag := range out.TagSet {
			tags.Add(aws.ToString(tag.Key), aws.ToString(tag.Value))
		}
		if len(tags) > 0 {
			c.tags = aws.String(strings.ReplaceAll(tags.Encode(), "+", "%20"))
		}
		return nil
	})
	return f
}

// noTags are the error codes of a source without readable tags.
var noTags = map[string]bool{"AccessDenied": true, "NoSuchTagSet": true, "NoSuchTagSetError": true}

// copyUpload makes the object by one upload, and aborts the upload on failure.
func (s *Store) copyUpload(ctx context.Context, c *copyCall) *failure {
	id, f := s.createCopyUpload(ctx, c)
	if f != nil {
		return f
	}
	parts, f := s.copyAllParts(ctx, c, id)
	if f == nil {
		f = s.completeCopy(ctx, c, id, parts)
	}
	if f != nil {
		// The abort of a completed upload has no effect.
		s.abortAfter(ctx, c.To, id)
		c.unknownUpload = c.unknownUpload || c.latePart.Load() // a late part may recreate the upload
	}
	return f
}

// outlive returns a context for copies and requests of an upload. It ends later than ctx
// by the timeout of a request: a server may execute a canceled request, and do so after
// the abort of its upload.
func (s *Store) outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	return outliveBy(ctx, s.o.RequestTimeout)
}

// outliveBy returns a context that ends later than ctx by the duration.
func outliveBy(ctx context.Context, by time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(by, cancel) })
	return longer, func() {
		stop()
		cancel()
	}
}

func (s *Store) createCopyUpload(ctx context.Context, c *copyCall) (id string, f *failure) {
	in := &s3.CreateMultipartUploadInput{
		Bucket: &s.o.Bucket, Key: s.key(c.To), Metadata: maps.Clone(c.meta.Metadata), Tagging: c.tags,
		ContentType: c.meta.ContentType, ContentEncoding: c.meta.ContentEncoding, ContentLanguage: c.meta.ContentLanguage,
		ContentDisposition: c.meta.ContentDisposition, CacheControl: c.meta.CacheControl,
		ServerSideEncryption: s.sse(), SSEKMSKeyId: s.kmsKey(), ExpectedBucketOwner: s.owner,
		// No checksum: some servers compare that of the whole source with each part.
	}
	if in.Metadata == nil {
		in.Metadata = make(map[string]string, 1)
	}
	in.Metadata[sourceName] = c.SourceETag
	if at, err := http.ParseTime(aws.ToString(c.meta.ExpiresString)); err == nil {
		in.Expires = &at
	}
	longer, cancel := s.outlive(ctx)
	defer cancel()
	f = s.retry(ctx, "copy", c.To, func() *failure {
		out, f := attempt(longer, s, 0, func(ctx context.Context) (*s3.CreateMultipartUploadOutput, error) {
			return s.client.CreateMultipartUpload(ctx, in)
		})
		if f != nil && in.Tagging != nil && refusesTags(f) {
			in.Tagging = nil
			f.retry = true
		}
		if f == nil {
			if id = aws.ToString(out.UploadId); id == "" {
				f = unusable("no upload id")
			}
		}
		c.unknownUpload = c.unknownUpload || f != nil && !f.definite()
		return f
	})
	return id, f
}

// refusesTags reports whether a request may have been refused because of its tags: the
// server has no tags, or the credentials may not write them.
func refusesTags(f *failure) bool {
	return unsupported(f) || f.definite() && (f.status == http.StatusBadRequest || f.status == http.StatusForbidden)
}

func (s *Store) copyAllParts(ctx context.Context, c *copyCall, id string) ([]types.CompletedPart, *failure) {
	parts := make([]types.CompletedPart, c.parts)
	longer, cancel := s.outlive(ctx)
	defer cancel()
	// After the failure of a part no further part starts, and those under way complete.
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(partsInFlight)
	if c.InFlight > 0 {
		group.SetLimit(c.InFlight)
	}
	for i := range parts {
		parts[i].PartNumber = aws.Int32(int32(i + 1))
		group.Go(func() error {
			if f := s.copyPart(groupCtx, longer, c, id, &parts[i], int64(i)*c.partSize); f != nil {
				return partError{f}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		if end := contextEnd(ctx); end != nil {
			return nil, end
		}
		if p, ok := errors.AsType[partError](err); ok {
			return nil, p.failure
		}
	}
	return parts, nil
}

// copyPart copies a part. It starts no attempt after the end of ctx; attempts under way end
// with longer.
func (s *Store) copyPart(
	ctx, longer context.Context, c *copyCall, id string, p *types.CompletedPart, offset int64,
) *failure {
	size := min(c.partSize, c.Size-offset)
	in := &s3.UploadPartCopyInput{
		Bucket: &s.o.Bucket, Key: s.key(c.To), UploadId: &id, PartNumber: p.PartNumber,
		CopySource: c.source, CopySourceIfMatch: c.etag,
		ExpectedBucketOwner: s.owner, ExpectedSourceBucketOwner: s.owner,
	}
	if c.parts > 1 { // S3 copies no ranges of small sources
		in.CopySourceRange = aws.String(fmt.Sprintf("bytes=%d-%d", offset, offset+size-1))
	}
	timeout := s.copyTimeout(size)
	return s.retry(ctx, "copy", c.To, func() *failure {
		out, f := attemptFor(longer, timeout, func(ctx context.Context) (*s3.UploadPartCopyOutput, error) {
			return s.client.UploadPartCopy(ctx, in)
		})
		if f != nil && f.status == 0 {
			c.latePart.Store(true)
		}
		switch {
		case f != nil && f.code == "NoSuchUpload":
			return lostUpload(f, p)
		case f != nil:
			f.detail = fmt.Sprintf("part %d: %s", *p.PartNumber, f.detail)
			return s.rangeFailure(ctx, c, f)
		case out.CopyPartResult == nil || unquote(out.CopyPartResult.ETag) == "":
			return unusable("part %d has no ETag", *p.PartNumber)
		}
		p.ETag = out.CopyPartResult.ETag
		return nil
	})
}

// completeCopy completes the upload. If the result is unknown, it checks the target: a
// copy of the source in parts is correct regardless of the attempt that made it.
func (s *Store) completeCopy(ctx context.Context, c *copyCall, id string, parts []types.CompletedPart) *failure {
	timeout := s.copyTimeout(c.Size)
	longer, cancel := s.outlive(ctx)
	defer cancel()
	f := s.retry(ctx, "copy", c.To, func() *failure {
		out, f := attemptFor(longer, timeout, func(ctx context.Context) (*s3.CompleteMultipartUploadOutput, error) {
			return s.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
				Bucket: &s.o.Bucket, Key: s.key(c.To), UploadId: &id, ExpectedBucketOwner: s.owner,
				MultipartUpload: &types.CompletedMultipartUpload{Parts: parts},
			})
		})
		switch {
		case f == nil && unquote(out.ETag) != "":
			c.setInfo(out.ETag, nil, out.ResultMetadata)
			return checkSums(objectChecksum(c.meta), uploadChecksum(out))
		case f == nil:
			f = unusable("no ETag")
		case errors.Is(f.kind, object.ErrExists):
			return unusable("a precondition failed for a request without one")
		}
		c.uncertain = c.uncertain || !f.definite() // NoSuchUpload: perhaps completed before
		return f
	})
	if f != nil && c.uncertain && contextEnd(ctx) == nil && errors.Is(f.kind, object.ErrUnavailable) &&
		s.targetIsCopy(ctx, c) {
		return nil
	}
	return f
}

// targetIsCopy reports whether the target is a correct copy, and then sets its Info.
func (s *Store) targetIsCopy(ctx context.Context, c *copyCall) bool {
	out, f := s.headOutput(ctx, c.To)
	if f != nil || *out.ContentLength != c.Size || out.Metadata[sourceName] != c.SourceETag ||
		checkSums(objectChecksum(c.meta), objectChecksum(out)) != nil {
		return false
	}
	c.setInfo(out.ETag, out.LastModified, out.ResultMetadata)
	return true
}

// checkSums compares the checksums of a source and of its copy if both have one type.
func checkSums(source, target string) *failure {
	kind, _, _ := strings.Cut(source, ":")
	if other, _, _ := strings.Cut(target, ":"); source == "" || kind != other || source == target {
		return nil
	}
	return &failure{
		kind:   object.ErrUnavailable,
		detail: fmt.Sprintf("the copy has checksum %s, its source %s", clip(target), clip(source)),
	}
}

// objectChecksum returns the checksum of an object's whole content in the form of
// [object.Info], empty if the store has none.
func objectChecksum(out *s3.HeadObjectOutput) string {
	return wholeChecksum(out.ChecksumType, []algorithmSum{
		{types.ChecksumAlgorithmCrc64nvme, out.ChecksumCRC64NVME},
		{types.ChecksumAlgorithmSha256, out.ChecksumSHA256},
		{types.ChecksumAlgorithmSha1, out.ChecksumSHA1},
		{types.ChecksumAlgorithmCrc32c, out.ChecksumCRC32C},
		{types.ChecksumAlgorithmCrc32, out.ChecksumCRC32},
	})
}

// uploadChecksum is objectChecksum for the response that completes an upload.
func uploadChecksum(out *s3.CompleteMultipartUploadOutput) string {
	return wholeChecksum(out.ChecksumType, []algorithmSum{
		{types.ChecksumAlgorithmCrc64nvme, out.ChecksumCRC64NVME},
		{types.ChecksumAlgorithmCrc32c, out.ChecksumCRC32C},
		{types.ChecksumAlgorithmCrc32, out.ChecksumCRC32},
	})
}

type algorithmSum struct {
	algorithm types.ChecksumAlgorithm
	text      *string
}

func wholeChecksum(kind types.ChecksumType, sums []algorithmSum) string {
	if kind == types.ChecksumTypeComposite {
		return ""
	}
	for _, s := range sums {
		// A checksum of parts ends in a dash and their number, regardless of the type.
		if text := aws.ToString(s.text); text != "" && !strings.Contains(text, "-") {
			return string(s.algorithm) + ":" + text
		}
	}
	return ""
}

// copyTimeout returns the timeout of an attempt to copy size bytes on the server.
func (s *Store) copyTimeout(size int64) time.Duration {
	return copyPatience*s.o.RequestTimeout + time.Duration(size/copiedPerSec)*time.Second
}

// copySource returns the header value that names the source of a copy. It escapes all
// special bytes, in particular "+", which some servers decode as a space.
func (s *Store) copySource(key string) *string {
	const hex = "0123456789ABCDEF"
	name := s.o.Bucket + "/" + s.o.Prefix + key
	var b strings.Builder
	b.Grow(len(name) + 16)
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~/", c) >= 0:
			b.WriteByte(c)
		default:
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
	return aws.String(b.String())
}

// abortUnknown aborts all uploads to the target, for the one with an unknown id. It also
// aborts concurrent uploads to the same key.
func (s *Store) abortUnknown(ctx context.Context, c *copyCall) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
	defer cancel()
	if _, err := s.abortUploads(ctx, c.To, func(u upload) bool { return u.key == c.To }); err != nil {
		s.o.Log.Warn("upload may be left open", zap.String("key", c.To), zap.Error(err))
	}
}
