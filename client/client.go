// Package client is the Go client of snapshotd: a connection with the six
// generated stubs, and helpers for retries, watches and pages.
//
//	c, err := client.Dial("127.0.0.1:7950", client.Options{})
//	if err != nil {
//		return err
//	}
//	defer c.Close()
//	resp, err := c.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
//		Collection:   collection,
//		Name:         "nightly",
//		RequestToken: client.NewRequestToken(),
//	})
//	if client.Reason(err) == "SNAPSHOT_EXISTS" {
//		…
//	}
//
// # Retries
//
// A call whose error may pass and whose repeat is safe is retried, with growing
// random pauses, until it succeeds, Options.MaxAttempts are used up, or the next
// pause would exceed the context's deadline. Then the last error is returned. These
// errors are retried:
//
//   - UNAVAILABLE, when the call only reads, has a request token, or is idempotent:
//     DropSegments, SetCheckpoints, Reclaim, ConfirmReclaimed, RenewPin,
//     UnpinSnapshot, UpdateRestore, CancelRestore and Recover. Any other write may
//     have taken effect, so it is never repeated.
//   - ABORTED with reason CONFLICT or CATALOG_COMPACTED and a
//     google.rpc.RetryInfo: nothing was written. CreateSnapshot is the exception:
//     the result of its token is final.
//   - ABORTED with reason CREATE_ABORTED: the create was abandoned and left
//     nothing. It starts over under another token, which is derived from the first
//     one. So a later repeat under the first token, also of another process,
//     returns the resulting snapshot.
//
// The delay of a google.rpc.RetryInfo is observed. Streams are not repeated, because
// only the caller knows its position in them; WatchEvents resumes events.
package client

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// Options are the settings of a client. The zero value connects in plaintext,
// to this machine only.
type Options struct {
	// TLS connects with TLS and trusts the system's certificate authorities. Any
	// of the files below implies it.
	TLS bool
	// CAFile is a PEM file of the certificate authorities to trust instead of
	// the system's.
	CAFile string
	// CertFile and KeyFile are the client's certificate and key in PEM, for
	// servers that require one. Both or none are set.
	CertFile, KeyFile string
	// Insecure allows plaintext to other machines. Hosts on the network path can
	// then read and change all messages.
	Insecure bool

	// MaxAttempts is the maximum number of attempts of a call. Default: 5; 1 disables
	// retries.
	MaxAttempts int
	// DialOptions follow the client's own gRPC options, for example interceptors for
	// tracing.
	DialOptions []grpc.DialOption
}

// Client is a connection to snapshotd. It is safe for concurrent use.
type Client struct {
	// Snapshots creates, reads, restores and drops snapshots.
	Snapshots snapshotdv1.SnapshotServiceClient
	// Catalog records the files of collections.
	Catalog snapshotdv1.CatalogServiceClient
	// Reclaim decides which files may be deleted.
	Reclaim snapshotdv1.ReclaimServiceClient
	// Collector deletes unneeded data, and explains kept objects.
	Collector snapshotdv1.CollectorServiceClient
	// Events streams changes.
	Events snapshotdv1.EventServiceClient
	// Admin is for the operators of the service.
	Admin snapshotdv1.AdminServiceClient

	conn *grpc.ClientConn
}

// Dial returns a client of the server at addr, which is host:port or another
// gRPC target. It reads the files that o names but does not connect; the first
// call connects, and returns the error of an unavailable server. Dial refuses
// plaintext to anything but a loopback address or a Unix socket unless o.Insecure
// is set.
func Dial(addr string, o Options) (*Client, error) {
	creds, err := transport(addr, o)
	if err != nil {
		return nil, err
	}
	attempts := o.MaxAttempts
	if attempts == 0 {
		attempts = 5
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithChainUnaryInterceptor(retry{attempts: attempts}.intercept),
		// A restart of a server takes less time than gRPC's default backoff of one
		// second.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2,
				MaxDelay: 5 * time.Second,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
		// Ends a watch whose peer has disappeared. The server allows a ping every ten
		// seconds.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	}
	conn, err := grpc.NewClient(addr, append(opts, o.DialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", addr, err)
	}
	return &Client{
		Snapshots: snapshotdv1.NewSnapshotServiceClient(conn),
		Catalog:   snapshotdv1.NewCatalogServiceClient(conn),
		Reclaim:   snapshotdv1.NewReclaimServiceClient(conn),
		Collector: snapshotdv1.NewCollectorServiceClient(conn),
		Events:    snapshotdv1.NewEventServiceClient(conn),
		Admin:     snapshotdv1.NewAdminServiceClient(conn),
		conn:      conn,
	}, nil
}

// Close closes the connection and ends its calls.
func (c *Client) Close() error { return c.conn.Close() }

// NewRequestToken returns a unique token. Use the same one for every repeat of a call,
// and a new one for every new call.
func NewRequestToken() string { return rand.Text() }

// transport returns the credentials of the connection to addr.
func transport(addr string, o Options) (credentials.TransportCredentials, error) {
	if !o.TLS && o.CAFile == "" && o.CertFile == "" && o.KeyFile == "" {
		if !o.Insecure && !local(addr) {
			return nil, fmt.Errorf("address %q is not on this machine: plaintext is refused there; connect with TLS, or "+
				"allow it explicitly", addr)
		}
		return insecure.NewCredentials(), nil
	}
	if o.Insecure {
		return nil, errors.New("TLS and insecure exclude each other")
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read certificate authorities: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate in PEM", o.CAFile)
		}
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return nil, errors.New("a client certificate needs its key, and a key its certificate")
	}
	if o.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read client certificate: %w", err)
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			// While the files are replaced they may not match: use the first pair.
			if current, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile); err == nil {
				return &current, nil
			}
			return &cert, nil
		}
	}
	return credentials.NewTLS(config), nil
}

// local reports whether a gRPC target is on this machine. It returns false for an
// unknown form.
func local(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	for _, scheme := range []string{"dns:///", "passthrough:///"} {
		target = strings.TrimPrefix(target, scheme)
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = strings.Trim(target, "[]")
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
