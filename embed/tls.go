package embed

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
)

// serverTLS is the configuration of the gRPC listener, nil for plaintext.
func (c Config) serverTLS() (*tls.Config, error) {
	if c.TLS == (TLS{}) {
		return nil, nil //nolint:nilnil // plaintext
	}
	if c.TLS.Cert == "" || c.TLS.Key == "" || c.TLS.ClientCA == "" {
		return nil, errors.New("cert, key and client_ca belong together: set all three, for clients have to show a certificate")
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
	}, nil
}

// etcdTLS is the configuration of the connection to etcd, nil for plaintext.
func (c Config) etcdTLS() (*tls.Config, error) {
	if c.EtcdTLS == (EtcdTLS{}) {
		return nil, nil //nolint:nilnil // plaintext
	}
	if c.EtcdTLS.CA == "" {
		return nil, errors.New("ca is missing: without it nobody could tell etcd from another")
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
	cert, err := tls.LoadX509KeyPair(c.EtcdTLS.Cert, c.EtcdTLS.Key)
	if err != nil {
		return nil, err
	}
	config.Certificates = []tls.Certificate{cert}
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

// etcdPassword reads the password of the user at etcd. Nobody prints it.
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
