package api_test

import (
	"os"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// The baseline holds every RPC there is: the check of breaking changes does not guard
// one that is not in it.
func TestBaselineHoldsEveryRPC(t *testing.T) {
	data, err := os.ReadFile("baseline.binpb")
	if err != nil {
		t.Fatal(err)
	}
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(data, set); err != nil {
		t.Fatal(err)
	}
	baseline, err := protodesc.NewFiles(set)
	if err != nil {
		t.Fatal(err)
	}
	was, is := rpcs(baseline), rpcs(protoregistry.GlobalFiles)
	if len(is) == 0 || !slices.Contains(is, "snapshotd.v1.CollectorService.Collect") {
		t.Fatalf("the API has %v", is)
	}
	for _, name := range is {
		if !slices.Contains(was, name) {
			t.Errorf("%s is not in api/baseline.binpb; run `make baseline`", name)
		}
	}
	for _, name := range was {
		if !slices.Contains(is, name) {
			t.Errorf("%s of api/baseline.binpb is gone", name)
		}
	}
}

// rpcs are the full names of the API's methods in files, sorted.
func rpcs(files *protoregistry.Files) []string {
	var list []string
	files.RangeFilesByPackage(
		snapshotdv1.File_snapshotd_v1_snapshot_service_proto.Package(),
		func(f protoreflect.FileDescriptor) bool {
			for i := range f.Services().Len() {
				methods := f.Services().Get(i).Methods()
				for j := range methods.Len() {
					list = append(list, string(methods.Get(j).FullName()))
				}
			}
			return true
		},
	)
	slices.Sort(list)
	return list
}
