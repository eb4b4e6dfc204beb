package server

import (
	"errors"
	"strings"
	"testing"
	"time"

	"buf.build/go/protovalidate"
	"go.uber.org/zap"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// TestLongListIsRefusedByItsLength refuses a list beyond maxListLength without checking
// its elements.
func TestLongListIsRefusedByItsLength(t *testing.T) {
	validator, err := newValidator()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{log: zap.NewNop(), validator: validator}
	unit := &pb.Unit{Unit: &pb.Unit_SegmentId{SegmentId: -1}}
	req := &pb.ReclaimRequest{
		Collection: &pb.CollectionRef{Ref: &pb.CollectionRef_Id{Id: 1}}, Deleter: pb.Deleter_DELETER_CALLER,
	}
	for range 300_000 {
		req.Units = append(req.Units, unit)
	}
	began := time.Now()
	err = s.validate(req)
	var broken *protovalidate.ValidationError
	if !errors.As(err, &broken) || len(broken.Violations) != 1 || !strings.Contains(err.Error(), "no more than 10000") {
		t.Errorf("%v", err)
	}
	t.Logf("refused after %v", time.Since(began))
}
