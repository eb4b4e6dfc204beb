package s3_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
)

func TestValidate(t *testing.T) {
	if err := (s3.Options{Bucket: "a-bucket"}).Validate(); err != nil {
		t.Error(err)
	}
	err := s3.Options{
		Bucket: "arn:aws:s3:::x", Prefix: "a/../b/", Endpoint: "https://me:canary@host", Region: "a b",
		SecretAccessKey: "canary", SSE: "x", KMSKeyID: "k",
		MaxAttempts: -1, PartSize: 1,
	}.Validate()
	if err == nil {
		t.Fatal("no errors")
	}
	for _, want := range []string{
		"bucket: ", "prefix: ", "endpoint: ", "region: ", "access key id: ", "sse: ",
		"kms_key_id: ", "timeouts", "part size: ",
	} {
		if !strings.Contains("\n"+err.Error(), "\n"+want) {
			t.Errorf("no error for %s", want)
		}
	}
	if strings.Contains(err.Error(), "canary") {
		t.Error(err)
	}
	for _, o := range []s3.Options{
		{Bucket: "abc", Prefix: "no-slash"},
		{Bucket: "abc", Prefix: "/"},
		{Bucket: "abc", Prefix: strings.Repeat("x/", 300)},
		{Bucket: "abc", Endpoint: "host:9000"},
		{Bucket: "abc", Endpoint: "http://h?x"},
		{Bucket: "abc", Endpoint: "file:///x"},
		{Bucket: ""},
		{Bucket: "a/b"},
		{Bucket: "abc", AccessKeyID: "x"},
		{Bucket: "abc", SessionToken: "x"},
	} {
		if _, err := s3.Open(t.Context(), o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

func TestOpenFindsNoCredentials(t *testing.T) {
	for _, name := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE",
		"AWS_WEB_IDENTITY_TOKEN_FILE",
	} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(t.TempDir(), "none"))
	if _, err := s3.Open(t.Context(), s3.Options{Bucket: "abc"}); !errors.Is(err, object.ErrDenied) {
		t.Errorf("err = %v, want ErrDenied", err)
	}
}

func TestOpenReadsTheCA(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.pem")
	o := s3.Options{Bucket: "abc", AccessKeyID: "id", SecretAccessKey: "s", CAFile: file}
	if _, err := s3.Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), "ca file") {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(file, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s3.Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("no certificate: %v", err)
	}
}
