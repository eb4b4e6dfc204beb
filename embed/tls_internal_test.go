package embed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// writeCertificate writes cert.pem and key.pem, and returns the certificate.
func writeCertificate(t *testing.T, dir string, serial int64) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", der)
	writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", keyDER)
	return der
}

func writePEM(t *testing.T, name, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestReplacedCertificates replaces certificate files while the server runs: new
// connections use them, and a certificate without its key changes nothing.
func TestReplacedCertificates(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
		first := writeCertificate(t, dir, 1)
		core, logs := observer.New(zapcore.WarnLevel)
		cfg := Config{TLS: TLS{Cert: cert, Key: key, ClientCA: cert}, EtcdTLS: EtcdTLS{CA: cert, Cert: cert, Key: key}}
		server, err := cfg.serverTLS(zap.New(core))
		if err != nil {
			t.Fatal(err)
		}
		etcd, err := cfg.etcdTLS(zap.New(core))
		if err != nil {
			t.Fatal(err)
		}
		want := func(when string, want []byte) {
			t.Helper()
			time.Sleep(rereadEvery)
			now, err := server.GetConfigForClient(&tls.ClientHelloInfo{})
			if err != nil || string(now.Certificates[0].Certificate[0]) != string(want) {
				t.Errorf("%s: the server has another certificate, %v", when, err)
			}
			if now.ClientAuth != tls.RequireAndVerifyClientCert || now.MinVersion != tls.VersionTLS13 || now.ClientCAs == nil {
				t.Errorf("%s: the server requires less of clients", when)
			}
			used, err := etcd.GetClientCertificate(&tls.CertificateRequestInfo{})
			if err != nil || string(used.Certificate[0]) != string(want) {
				t.Errorf("%s: etcd gets another certificate, %v", when, err)
			}
		}
		want("at first", first)
		second := writeCertificate(t, dir, 2)
		want("replaced", second)
		writePEM(t, cert, "CERTIFICATE", first)
		want("without its key", second)
		want("still", second)
		if logs.Len() != 2 {
			t.Errorf("%d lines of log, not one per setting: %v", logs.Len(), logs.All())
		}
	})
}

// TestReplacedKeys replaces the files of an access key.
func TestReplacedKeys(t *testing.T) {
	dir := t.TempDir()
	id, secret, token := filepath.Join(dir, "id"), filepath.Join(dir, "secret"), filepath.Join(dir, "token")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(id, "a\n")
	write(secret, "b\n")
	write(token, "c\n")
	o, err := ObjectStore{
		Type: typeS3, Bucket: "shop", AccessKeyFile: id, SecretKeyFile: secret,
		SessionTokenFile: token,
	}.s3Options()
	if err != nil || o.ReadKeys == nil {
		t.Fatal("no function to read the keys again", err)
	}
	write(id, "d")
	write(secret, "e")
	write(token, "f")
	if got, err := o.ReadKeys(); err != nil ||
		got != (s3.Keys{AccessKeyID: "d", SecretAccessKey: "e", SessionToken: "f"}) {
		t.Errorf("got %+v, %v", got, err)
	}
	write(secret, "")
	if _, err := o.ReadKeys(); err == nil {
		t.Error("no error for an empty secret")
	}
}
