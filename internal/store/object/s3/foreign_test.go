//go:build s3foreign

package s3_test

import (
	"cmp"
	"context"
	"crypto/rand"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
)

// TestForeignServer runs all checks of the probe and the conformance suite on the server at
// S3_ENDPOINT, with the access key S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY, in S3_REGION.
// Each test creates and removes its own bucket. `make s3-conformance` runs it; S3_BROKEN
// names subtests to skip.
func TestForeignServer(t *testing.T) {
	o := s3.Options{
		Endpoint: os.Getenv("S3_ENDPOINT"), Region: cmp.Or(os.Getenv("S3_REGION"), "us-east-1"), PathStyle: true,
		AccessKeyID: os.Getenv("S3_ACCESS_KEY_ID"), SecretAccessKey: s3.Secret(os.Getenv("S3_SECRET_ACCESS_KEY")),
	}
	if o.Endpoint == "" || o.AccessKeyID == "" || o.SecretAccessKey == "" {
		t.Fatal("S3_ENDPOINT, S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY are not all set")
	}
	client := awss3.New(awss3.Options{
		Region: o.Region, BaseEndpoint: &o.Endpoint, UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(o.AccessKeyID, string(o.SecretAccessKey), ""),
	})
	open := func(t *testing.T) object.Store {
		t.Helper()
		o := o
		o.Bucket = "snapshotd-" + strings.ToLower(rand.Text())
		if _, err := client.CreateBucket(t.Context(), &awss3.CreateBucketInput{Bucket: &o.Bucket}); err != nil {
			t.Fatal(err)
		}
		store, err := s3.Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := object.DeletePrefix(ctx, store, ""); err != nil {
				t.Error(err)
			}
			if err := store.Close(); err != nil {
				t.Error(err)
			}
			if _, err := client.DeleteBucket(ctx, &awss3.DeleteBucketInput{Bucket: aws.String(o.Bucket)}); err != nil {
				t.Error(err)
			}
		})
		return store
	}
	t.Run("Probe", func(t *testing.T) {
		report, err := probe.Run(t.Context(), open(t), "")
		for _, c := range report.Checks {
			t.Logf("%-28s required %-5v honoured %-5v %s", c.Name, c.Required, c.OK, c.Detail)
		}
		if err != nil {
			t.Error(err)
		}
	})
	objecttest.RunExcept(t, open, strings.Fields(os.Getenv("S3_BROKEN"))...)
}
