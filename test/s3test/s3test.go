//go:build linux

// Package s3test gives tests a real S3 server, versitygw, in a process of its
// own.
package s3test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/snapshotd/snapshotd/internal/store/object/s3"
)

const (
	// AccessKeyID is every server's. It looks like nothing else, so that a test
	// finds where it is printed.
	AccessKeyID = "canaryaccesskeyid"
	// SecretAccessKey is the secret of AccessKeyID.
	SecretAccessKey = "canarysecretaccesskey"

	// module holds the version of the server.
	module   = "tools/versitygw"
	program  = "github.com/versity/versitygw/cmd/versitygw"
	lockFile = "lock"
	patience = 30 * time.Second
)

// Server is a running server.
type Server struct {
	endpoint string
	dir      string
	held     *os.File // the lock of a shared server, which lasts only as long as its file is open
}

// Start starts a server of tb's own, which ends with it.
func Start(tb testing.TB) *Server {
	tb.Helper()
	dir, err := os.MkdirTemp("", "s3test-") //nolint:usetesting // removed after the server has ended
	if err != nil {
		tb.Fatal(err)
	}
	s, stop, err := start(dir)
	if err != nil {
		_ = os.RemoveAll(dir)
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		stop()
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// Shared returns the one server of this process. It ends with the process; what
// it leaves on disk the next process removes.
func Shared(tb testing.TB) *Server {
	tb.Helper()
	s, err := shared()
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

var shared = sync.OnceValues(func() (*Server, error) {
	parent := filepath.Join(os.TempDir(), "s3test-shared")
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, err
	}
	sweep(parent)
	dir, err := os.MkdirTemp(parent, "")
	if err != nil {
		return nil, err
	}
	held, err := lock(filepath.Join(dir, lockFile))
	if err != nil {
		return nil, err
	}
	s, _, err := start(dir)
	if err != nil {
		return nil, err
	}
	s.held = held
	return s, nil
})

// Endpoint returns the server's address.
func (s *Server) Endpoint() string { return s.endpoint }

// Bucket makes a new bucket on the shared server.
func Bucket(tb testing.TB) s3.Options {
	tb.Helper()
	return Shared(tb).Bucket(tb)
}

// Bucket makes a new bucket and returns the options that open it.
func (s *Server) Bucket(tb testing.TB) s3.Options {
	tb.Helper()
	name := "test-" + strings.ToLower(rand.Text())
	if _, err := s.Client().CreateBucket(tb.Context(), &awss3.CreateBucketInput{Bucket: &name}); err != nil {
		tb.Fatal(err)
	}
	return s3.Options{
		Bucket: name, Endpoint: s.endpoint, PathStyle: true, AccessKeyID: AccessKeyID, SecretAccessKey: SecretAccessKey,
		Backoff: time.Millisecond,
	}
}

// Client returns a client of the server, for what no store does.
func (s *Server) Client() *awss3.Client {
	return awss3.New(awss3.Options{
		Region: "us-east-1", BaseEndpoint: &s.endpoint, UsePathStyle: true,
		Credentials:                credentials.NewStaticCredentialsProvider(AccessKeyID, SecretAccessKey, ""),
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenSupported,
	})
}

// PutTagged writes an object with tags, in the form of a query.
func (s *Server) PutTagged(tb testing.TB, bucket, key, body, tags string) {
	tb.Helper()
	if _, err := s.Client().PutObject(tb.Context(), &awss3.PutObjectInput{
		Bucket: &bucket, Key: &key, Body: strings.NewReader(body), Tagging: &tags,
	}); err != nil {
		tb.Fatal(err)
	}
}

// BeginUpload begins an upload in parts that is not completed.
func (s *Server) BeginUpload(tb testing.TB, bucket, key string) {
	tb.Helper()
	if _, err := s.Client().CreateMultipartUpload(
		tb.Context(),
		&awss3.CreateMultipartUploadInput{Bucket: &bucket, Key: &key},
	); err != nil {
		tb.Fatal(err)
	}
}

// Open opens the store and closes it with the test.
func Open(tb testing.TB, o s3.Options) *s3.Store {
	tb.Helper()
	s, err := s3.Open(tb.Context(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// start starts a server on dir.
func start(dir string) (*Server, func(), error) {
	bin, err := build()
	if err != nil {
		return nil, nil, err
	}
	data := filepath.Join(dir, "data")
	if err := os.MkdirAll(data, 0o700); err != nil {
		return nil, nil, err
	}
	args := []string{"--health", "/health", "--keep-alive", "--quiet"}
	var last error
	for range 5 { // another process may take the port first
		addr, err := freeAddr()
		if err != nil {
			return nil, nil, err
		}
		backend, err := backend(dir)
		if err != nil {
			return nil, nil, err
		}
		stop, err := run(
			bin,
			append(append(args, "--port", addr), append(backend, data)...),
			filepath.Join(dir, "log"),
			"http://"+addr+"/health",
		)
		if err == nil {
			return &Server{endpoint: "http://" + addr, dir: dir}, stop, nil
		}
		last = err
	}
	return nil, nil, fmt.Errorf("start versitygw: %w", last)
}

// backend keeps an object's metadata in attributes of its file, or beside it
// where the file system has none.
func backend(dir string) ([]string, error) {
	probe := filepath.Join(dir, "attributes")
	if err := os.WriteFile(probe, nil, 0o600); err != nil {
		return nil, err
	}
	if unix.Setxattr(probe, "user.probe", []byte("x"), 0) == nil {
		return []string{"posix"}, nil
	}
	side := filepath.Join(dir, "sidecar")
	return []string{"posix", "--sidecar", side}, os.MkdirAll(side, 0o700)
}

// run runs the program until stop is called or this process ends, and returns
// when it answers.
func run(bin string, args []string, log, health string) (stop func(), err error) {
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(context.Background(), bin, args...)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+AccessKeyID, "ROOT_SECRET_ACCESS_KEY="+SecretAccessKey)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		// The signal comes when the thread that started the process ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(ended)
		defer func() { _ = out.Close() }()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		<-ended
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if answers(ctx, health) {
			return stop, nil
		}
		select {
		case <-tick.C:
		case <-ended:
			text, _ := os.ReadFile(log)
			return nil, fmt.Errorf("it ended: %s", text)
		case <-ctx.Done():
			stop()
			return nil, errors.New("it does not answer")
		}
	}
}

func answers(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.Body.Close() == nil && resp.StatusCode == http.StatusOK
}

func freeAddr() (string, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// build returns the program, which it builds when it is not there or older than
// its version. One process builds at a time.
func build() (string, error) {
	root, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(root, module, "go.mod")); err == nil {
			break
		}
		up := filepath.Dir(root)
		if up == root {
			return "", fmt.Errorf("no %s above the test's directory", module)
		}
		root = up
	}
	bin := filepath.Join(root, ".bin", "versitygw")
	if err := os.MkdirAll(filepath.Dir(bin), 0o750); err != nil {
		return "", err
	}
	held, err := lock(bin + ".lock")
	if err != nil {
		return "", err
	}
	defer func() { _ = held.Close() }()
	if isNewer(bin, filepath.Join(root, module, "go.mod"), filepath.Join(root, module, "go.sum")) {
		return bin, nil
	}
	cmd := exec.CommandContext(context.Background(), "go", "build", "-o", bin, program)
	cmd.Dir = filepath.Join(root, module)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build versitygw: %w: %s", err, out)
	}
	now := time.Now()
	return bin, os.Chtimes(bin, now, now) // the time of a build from the cache is not to be relied on
}

func isNewer(name string, than ...string) bool {
	info, err := os.Stat(name)
	if err != nil {
		return false
	}
	for _, other := range than {
		o, err := os.Stat(other)
		if err != nil || o.ModTime().After(info.ModTime()) {
			return false
		}
	}
	return true
}

// lock waits for the lock on a file, which goes with the file or the process.
func lock(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// sweep removes the directories of processes that have ended. It lets the new
// ones be, which may not have come to lock theirs.
func sweep(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, "*"))
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.RemoveAll(dir) // another process may be at it too
		}
		_ = f.Close()
	}
}
