//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/test/bench"
)

// hugeSize is the size of an object that is copied in three parts: two, and a byte.
const hugeSize = object.DefaultCopyThreshold + 1

// serverDir holds the files of the S3 server in a bucket's directory.
const serverDir = ".sgwtmp"

// buckets is an S3 server whose buckets are directories and whose objects are files.
// So a bucket is copied and read as a directory store is.
type buckets struct {
	server *bench.Process
	addr   string
	dir    string // holds the buckets
	secret string // file
	client *awss3.Client
}

// startBuckets starts the program at bin on a directory.
func startBuckets(ctx context.Context, bin, dir string) (*buckets, error) {
	b := &buckets{dir: filepath.Join(dir, "s3"), secret: filepath.Join(dir, "secret")}
	if err := os.WriteFile(b.secret, []byte(bench.SecretAccessKey), 0o600); err != nil {
		return nil, err
	}
	var err error
	if b.server, b.addr, err = bench.StartS3(ctx, bin, dir, "first"); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, "s3-metadata")); err == nil {
		b.server.Stop()
		return nil, fmt.Errorf("the file system of %s has no extended attributes: set TMPDIR to one that has", dir)
	}
	b.client = awss3.New(awss3.Options{
		Region: "us-east-1", BaseEndpoint: aws.String("http://" + b.addr), UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(bench.AccessKeyID, bench.SecretAccessKey, ""),
	})
	return b, nil
}

// settings returns the settings of snapshotd for a bucket.
func (b *buckets) settings(bucket string) string {
	return fmt.Sprintf(`object_stores:
  default:
    type: s3
    bucket: %s
    endpoint: http://%s
    path_style: true
    access_key_id: %s
    secret_key_file: %s
`, bucket, b.addr, bench.AccessKeyID, b.secret)
}

// put writes an object.
func (e *env) put(ctx context.Context, key string, content []byte) error {
	if e.buckets != nil {
		_, err := e.buckets.client.PutObject(
			ctx,
			&awss3.PutObjectInput{Bucket: &e.bucket, Key: &key, Body: bytes.NewReader(content)},
		)
		return err
	}
	name := e.objects(key)
	if err := os.MkdirAll(filepath.Dir(name), 0o750); err != nil {
		return err
	}
	return os.WriteFile(name, content, 0o600)
}

// uploads returns the keys of the uploads that are open.
func (e *env) uploads(ctx context.Context) (keys []string, err error) {
	if e.buckets == nil {
		return nil, nil
	}
	list, err := e.buckets.client.ListMultipartUploads(ctx, &awss3.ListMultipartUploadsInput{Bucket: &e.bucket})
	if err != nil {
		return nil, err
	}
	if aws.ToBool(list.IsTruncated) {
		return nil, errors.New("one answer does not list all uploads")
	}
	for _, u := range list.Uploads {
		if key := aws.ToString(u.Key); !e.ofProbe(key) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// ofProbe reports whether a key may be left by the probe of a start that was killed.
func (e *env) ofProbe(key string) bool {
	return strings.HasPrefix(key, probe.Dir+"/") &&
		(len(e.crashes) > 1 || len(e.crashes) == 1 && countsFromStart(e.crashes[0]))
}

// ageUploads sets the start of all open uploads to long ago.
func (e *env) ageUploads() error {
	dirs, err := filepath.Glob(e.objects(serverDir, "multipart", "*", "*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := os.Chtimes(dir, longAgo(), longAgo()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// longAgo returns a time before every grace period.
func longAgo() time.Time { return time.Now().Add(-3 * time.Hour) }

// filled returns content without equal parts.
func filled(size int) []byte {
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(content) // never fails
	return content
}

// makeHuge adds to the base of buckets a collection with an object that is copied in
// parts, and a snapshot of it.
func (e *env) makeHuge(ctx context.Context) error {
	if err := e.start(ctx, start{}); err != nil {
		return err
	}
	err := e.collection(ctx, huge, 3, 0)
	if err == nil {
		e.Snapshots[huge] = e.Collections[huge]
		err = e.take(ctx, huge, huge, token)
	}
	if err == nil {
		err = eventually(ctx, func(ctx context.Context) error { return e.audit(ctx, false) })
	}
	return errors.Join(err, e.s.stop())
}
