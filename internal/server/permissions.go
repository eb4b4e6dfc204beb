package server

import (
	"context"
	"crypto/x509"

	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// permission is the right that a method requires.
type permission int

const (
	public permission = iota + 1 // reveals no data
	read
	write
	administer
)

// permissions holds the right that each method requires. A method without a row cannot
// be called.
var permissions = map[string]permission{
	pb.SnapshotService_CreateSnapshot_FullMethodName:       write,
	pb.SnapshotService_GetSnapshot_FullMethodName:          read,
	pb.SnapshotService_DescribeSnapshot_FullMethodName:     read,
	pb.SnapshotService_ListSnapshotSegments_FullMethodName: read,
	pb.SnapshotService_ListSnapshots_FullMethodName:        read,
	pb.SnapshotService_UpdateSnapshot_FullMethodName:       write,
	pb.SnapshotService_DropSnapshot_FullMethodName:         write,
	pb.SnapshotService_PinSnapshot_FullMethodName:          write,
	pb.SnapshotService_RenewPin_FullMethodName:             write,
	pb.SnapshotService_UnpinSnapshot_FullMethodName:        write,
	pb.SnapshotService_ListPins_FullMethodName:             read,

	pb.CatalogService_AllocateIds_FullMethodName:      write,
	pb.CatalogService_CreateCollection_FullMethodName: write,
	pb.CatalogService_GetCollection_FullMethodName:    read,
	pb.CatalogService_ListCollections_FullMethodName:  read,
	pb.CatalogService_UpdateCollection_FullMethodName: write,
	pb.CatalogService_RenameCollection_FullMethodName: write,
	pb.CatalogService_DropCollection_FullMethodName:   write,
	pb.CatalogService_CreatePartition_FullMethodName:  write,
	pb.CatalogService_ListPartitions_FullMethodName:   read,
	pb.CatalogService_DropPartition_FullMethodName:    write,
	pb.CatalogService_CreateIndex_FullMethodName:      write,
	pb.CatalogService_ListIndexes_FullMethodName:      read,
	pb.CatalogService_DropIndex_FullMethodName:        write,
	pb.CatalogService_AddSegments_FullMethodName:      write,
	pb.CatalogService_GetSegment_FullMethodName:       read,
	pb.CatalogService_ExportSegments_FullMethodName:   read,
	pb.CatalogService_UpdateSegments_FullMethodName:   write,
	pb.CatalogService_CompactSegments_FullMethodName:  write,
	pb.CatalogService_DropSegments_FullMethodName:     write,
	pb.CatalogService_SetCheckpoints_FullMethodName:   write,
	pb.CatalogService_ListCheckpoints_FullMethodName:  read,

	pb.SnapshotService_RestoreSnapshot_FullMethodName: write,
	pb.SnapshotService_GetRestoreState_FullMethodName: read,
	pb.SnapshotService_WatchRestore_FullMethodName:    read,
	pb.SnapshotService_ListRestoreJobs_FullMethodName: read,
	pb.SnapshotService_UpdateRestore_FullMethodName:   write,
	pb.SnapshotService_CancelRestore_FullMethodName:   write,

	pb.ReclaimService_CheckReferences_FullMethodName:  read,
	pb.ReclaimService_Reclaim_FullMethodName:          write,
	pb.ReclaimService_ConfirmReclaimed_FullMethodName: write,
	pb.ReclaimService_ListTombstones_FullMethodName:   read,

	pb.CollectorService_Collect_FullMethodName:            administer,
	pb.CollectorService_GetCollectorStatus_FullMethodName: read,
	pb.CollectorService_ExplainObject_FullMethodName:      read,
	pb.CollectorService_ListOrphans_FullMethodName:        read,
	pb.CollectorService_DeleteOrphans_FullMethodName:      administer,
	pb.CollectorService_Recover_FullMethodName:            administer,

	pb.EventService_WatchEvents_FullMethodName: read,

	pb.AdminService_GetServerInfo_FullMethodName: read,
	pb.AdminService_GetKey_FullMethodName:        administer,
	pb.AdminService_ProbeStore_FullMethodName:    administer,

	healthpb.Health_Check_FullMethodName:                                   public,
	healthpb.Health_List_FullMethodName:                                    public,
	healthpb.Health_Watch_FullMethodName:                                   public,
	reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName:      public,
	reflectionv1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: public,
}

// authorize checks that a principal may call a method. Today every authenticated
// principal may call all methods with a row.
func authorize(_, method string) error {
	if permissions[method] == 0 {
		return errDenied
	}
	return nil
}

// localPrincipal is the principal of calls without a certificate: over a loopback
// address or from within the process.
const localPrincipal = "local"

// authenticate returns the principal of a call.
func authenticate(ctx context.Context) (string, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return localPrincipal, nil
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return localPrincipal, nil
	}
	if len(info.State.VerifiedChains) == 0 {
		return "", errUnauthenticated
	}
	return principalOf(info.State.VerifiedChains[0][0])
}

// principalOf returns the first URI, the first DNS name or the common name.
func principalOf(cert *x509.Certificate) (string, error) {
	switch {
	case len(cert.URIs) > 0:
		return cert.URIs[0].String(), nil
	case len(cert.DNSNames) > 0:
		return cert.DNSNames[0], nil
	case cert.Subject.CommonName != "":
		return cert.Subject.CommonName, nil
	}
	return "", errUnauthenticated
}
