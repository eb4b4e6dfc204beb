package embed

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

// rereadEvery is the minimum time between two reads of certificate files.
const rereadEvery = time.Second

// reread returns a function that returns the last value of read, and calls read when
// that value is older than rereadEvery: files are replaced while the server runs. When
// read fails, as between the writes of a certificate and of its key, the function
// returns the last value and logs the error once. It is safe for concurrent use.
func reread[T any](last T, read func() (T, error), log *zap.Logger, setting string) func() T {
	var mu sync.Mutex
	at, failed := time.Now(), false
	return func() T {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(at) < rereadEvery {
			return last
		}
		at = time.Now()
		value, err := read()
		if err == nil {
			last = value
		} else if !failed {
			log.Warn("reading replaced certificate files failed, using the previous ones",
				zap.String("of", setting), zap.Error(err))
		}
		failed = err != nil
		return last
	}
}

// serverTLS returns the configuration of the gRPC listener, nil for plaintext. Each new
// connection uses the current files.
func (c Config) serverTLS(log *zap.Logger) (*tls.Config, error) {
	config, err := c.readServerTLS()
	if config == nil || err != nil {
		return nil, err
	}
	current := reread(config, c.readServerTLS, log, "tls")
	config = config.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return current(), nil }
	return config, nil
}

func (c Config) readServerTLS() (*tls.Config, error) {
	if c.TLS == (TLS{}) {
		return nil, nil //nolint:nilnil // plaintext
	}
	if c.TLS.Cert == "" || c.TLS.Key == "" || c.TLS.ClientCA == "" {
		return nil, errors.New("cert, key and client_ca belong together: set all three, as clients need a certificate")
	}
	cert, certErr := tls.LoadX509KeyPair(c.TLS.Cert, c.TLS.Key)
	pool, poolErr := readPool(c.TLS.ClientCA)
	if err := errors.Join(certErr, poolErr); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		NextProtos:   []string{"h2"},
	}, nil
}

// etcdTLS returns the configuration of the connection to etcd, nil for plaintext. Each
// new connection uses the current certificate file.
func (c Config) etcdTLS(log *zap.Logger) (*tls.Config, error) {
	if c.EtcdTLS == (EtcdTLS{}) {
		return nil, nil //nolint:nilnil // plaintext
	}
	if c.EtcdTLS.CA == "" {
		return nil, errors.New("ca is missing: it is needed to verify the certificate of etcd")
	}
	pool, err := readPool(c.EtcdTLS.CA)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}
	if c.EtcdTLS.Cert == "" && c.EtcdTLS.Key == "" {
		return config, nil
	}
	if c.EtcdTLS.Cert == "" || c.EtcdTLS.Key == "" {
		return nil, errors.New("cert and key belong together")
	}
	read := func() (tls.Certificate, error) { return tls.LoadX509KeyPair(c.EtcdTLS.Cert, c.EtcdTLS.Key) }
	cert, err := read()
	if err != nil {
		return nil, err
	}
	current := reread(cert, read, log, "etcd_tls")
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert := current()
		return &cert, nil
	}
	return config, nil
}

func readPool(path string) (*x509.CertPool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return pool, nil
}

// etcdPassword reads the password of the user at etcd. It must not be printed.
func (c Config) etcdPassword() (string, error) {
	switch {
	case c.EtcdUsername == "" && c.EtcdPasswordFile == "":
		return "", nil
	case c.EtcdUsername == "":
		return "", errors.New("is of no use without etcd_username")
	case c.EtcdPasswordFile == "":
		return "", errors.New("is missing: etcd_username needs it")
	}
	data, err := os.ReadFile(c.EtcdPasswordFile)
	if err != nil {
		return "", err
	}
	password := strings.TrimRight(string(data), "\r\n")
	if password == "" {
		return "", fmt.Errorf("%s is empty", c.EtcdPasswordFile)
	}
	return password, nil
}
