//go:build !short && linux

package s3_test

import (
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
	"github.com/snapshotd/snapshotd/test/s3test"
)

func TestStore(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return s3test.Open(t, s3test.Bucket(t)) })
}

// Every object except an empty one is written in parts.
func TestStoreInParts(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store {
		o := s3test.Bucket(t)
		o.MultipartThreshold = 1
		return s3test.Open(t, o)
	})
}
