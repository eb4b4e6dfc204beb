// Package client is the Go client of snapshotd: a connection with the six
// generated stubs on it, and the few things that every caller would otherwise
// write again.
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
// # What is tried again
//
// An answer that a repeat may cure and cannot harm is not shown to the caller;
// the call is made again, with pauses that grow and vary, until it succeeds,
// Options.MaxAttempts are used up, or the next pause would outlast the context's
// deadline. The last answer is then returned. That is so for
//
//   - UNAVAILABLE, when the call only reads, carries a request token, or is one
//     that finds what it did before: DropSegments, SetCheckpoints, Reclaim,
//     ConfirmReclaimed, RenewPin, UnpinSnapshot and Recover. Any other write may have
//     happened already, so it is never repeated.
//   - ABORTED with reason CONFLICT or CATALOG_COMPACTED and a
//     google.rpc.RetryInfo: nothing was written. CreateSnapshot is the exception:
//     what a token ended with is final.
//   - ABORTED with reason CREATE_ABORTED: the create was given up, and left
//     nothing. It begins again under another token, which follows from the first
//     one. So a later repeat under the first token, also of another process,
//     returns the snapshot that was made in the end.
//
// A google.rpc.RetryInfo is obeyed in both cases. Streams are not repeated, for
// only the caller knows what it has seen of them; WatchEvents does it for events.
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
// and only to this machine.
type Options struct {
	// TLS connects with TLS and trusts the system's certificate authorities. Any
	// of the files below implies it.
	TLS bool
	// CAFile is a PEM file of the certificate authorities to trust instead of
	// the system's.
	CAFile string
	// CertFile and KeyFile are the client's own certificate and key in PEM, for
	// servers that ask for one. Both or none.
	CertFile, KeyFile string
	// Insecure allows plaintext to other machines. Whoever is on the way can then
	// read and change everything.
	Insecure bool

	// MaxAttempts is how often a call is made at most. Default 5; 1 never tries
	// again.
	MaxAttempts int
	// DialOptions are given to gRPC after the client's own, for example
	// interceptors for tracing.
	DialOptions []grpc.DialOption
}

// Client is a connection to snapshotd. It is safe for concurrent use.
type Client struct {
	// Snapshots takes, shows and drops snapshots.
	Snapshots snapshotdv1.SnapshotServiceClient
	// Catalog says which files a collection consists of.
	Catalog snapshotdv1.CatalogServiceClient
	// Reclaim says what may be deleted.
	Reclaim snapshotdv1.ReclaimServiceClient
	// Collector deletes what nothing needs any more, and says why something stays.
	Collector snapshotdv1.CollectorServiceClient
	// Events tells what happens.
	Events snapshotdv1.EventServiceClient
	// Admin is for the people who run the service.
	Admin snapshotdv1.AdminServiceClient

	conn *grpc.ClientConn
}

// Dial returns a client of the server at addr, which is host:port or another
// gRPC target. It reads the files that o names but does not connect: the first
// call does, so a server that is away shows there. It refuses plaintext to
// anything but a loopback address or a Unix socket unless o.Insecure is set.
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
		// A server that restarts is back sooner than gRPC's default backoff of
		// one second supposes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// Finds out that a peer vanished, so that a watch does not wait for it for
		// ever. The server allows a ping every ten seconds.
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

// Close ends the connection, and calls in flight with it.
func (c *Client) Close() error { return c.conn.Close() }

// NewRequestToken returns a token that nobody else has. Give the same one to
// every repeat of a call, and a new one to every new call.
func NewRequestToken() string { return rand.Text() }

// transport returns how the connection to addr is secured.
func transport(addr string, o Options) (credentials.TransportCredentials, error) {
	if !o.TLS && o.CAFile == "" && o.CertFile == "" && o.KeyFile == "" {
		if !o.Insecure && !local(addr) {
			return nil, fmt.Errorf("address %q is not on this machine: plaintext is refused there; connect with TLS, or allow it explicitly", addr)
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
			// The files are replaced when the certificate is, and may not match meanwhile.
			if again, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile); err == nil {
				return &again, nil
			}
			return &cert, nil
		}
	}
	return credentials.NewTLS(config), nil
}

// local says whether what is sent to a gRPC target stays on this machine. A
// target that it does not understand does not.
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
