package embed_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/embed"
)

// TestS3FieldErrors returns an error for each invalid field of a store.
func TestS3FieldErrors(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good := embed.ObjectStore{Type: "s3", Bucket: "good-bucket"}
	cfg := embed.Config{SnapshotStore: "good", ObjectStores: map[string]embed.ObjectStore{
		"a": {
			Type: "s3", Path: "x", Bucket: "a/b", Prefix: "../x", Endpoint: "https://me:canary@host", Region: "x y",
			SSE: "rot13", KMSKeyID: "k",
			AccessKeyID: "id", AccessKeyFile: empty, CAFile: filepath.Join(dir, "none"),
			SessionTokenFile: filepath.Join(dir, "none"),
		},
		"b": {Type: "s3", Bucket: "bbb", SecretKeyFile: empty}, "c": {Bucket: "ccc"}, "good": good, "same": good,
	}}
	err := cfg.Validate()
	if err == nil {
		t.Fatal("no errors")
	}
	for _, want := range []string{
		"a.path: ", "a.bucket: ", "a.prefix: ", "a.endpoint: ", "a.region: ", "a.sse: ", "a.kms_key_id: ",
		"a.access_key_file: ", "a.secret_key_file: ",
		"a.ca_file: ", "a.session_token_file: ", "b.secret_key_file: ", "b.access_key_id: ", "c.type: ", "c.path: ",
		"same.prefix: ",
	} {
		if !strings.Contains("\n"+err.Error(), "\nobject_stores."+want) {
			t.Errorf("nothing about %s", want)
		}
	}
	if strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "object_stores.good") {
		t.Error(err)
	}
}

// TestObjectStoreFlag parses object stores from a text.
func TestObjectStoreFlag(t *testing.T) {
	for text, want := range map[string]map[string]embed.ObjectStore{
		"s3://bucket": {"default": {Type: "s3", Bucket: "bucket"}},
		"s3://bucket/a/b?endpoint=http://127.0.0.1:9000&region=eu-west-1&path_style=true&" +
			"access_key_id=me&secret_key_file=/run/s": {
			"default": {
				Type: "s3", Bucket: "bucket", Prefix: "a/b", Endpoint: "http://127.0.0.1:9000", Region: "eu-west-1",
				PathStyle: true, AccessKeyID: "me", SecretKeyFile: "/run/s",
			},
		},
		"default=/dir,cold=s3://bucket/a/?sse=AES256": {
			"default": {Type: "file", Path: "/dir"}, "cold": {Type: "s3", Bucket: "bucket", Prefix: "a/", SSE: "AES256"},
		},
	} {
		cfg, err := embed.LoadConfig("", environment(map[string]string{"SNAPSHOTD_OBJECT_STORE": text}), nil)
		if err != nil {
			t.Error(err)
			continue
		}
		if diff := cmp.Diff(want, cfg.ObjectStores); diff != "" {
			t.Errorf("%s:\n%s", text, diff)
		}
		data, err := cfg.YAML()
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if again, err := embed.LoadConfig(file, nil, nil); err != nil || !cmp.Equal(want, again.ObjectStores) {
			t.Errorf("%s\nloads as %v, %v", data, again.ObjectStores, err)
		}
	}
	for _, text := range []string{
		"s3://", "s3://me:canary@bucket", "s3://bucket?secret_key=canary", "s3://bucket?region=a&region=b",
		"s3://bucket?path_style=canary",
		"s3://bucket#canary", "s3://bucket?%zz=canary", "s3://bucket,default=/x", "S3://me:canary@bucket",
		"cold=S3://me:canary@bucket", "s3:/me:canary@bucket",
	} {
		_, err := embed.LoadConfig("", environment(map[string]string{"SNAPSHOTD_OBJECT_STORE": text}), nil)
		if err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: got %v", text, err)
		}
	}
}
