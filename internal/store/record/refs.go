package record

import (
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// References returns the record of a references file, nil for none.
func References(f *manifest.RefsFile) *storagev1.References {
	if f.Length == 0 {
		return nil
	}
	return &storagev1.References{
		Length: f.Length, Sha256: f.SHA256[:], Segments: f.Segments, Builds: f.Builds, Files: f.Files,
	}
}

// RefsFile returns the references file of a snapshot's record. It is zero for the record of
// a release that kept it only in the metadata.
func RefsFile(rec *storagev1.References) manifest.RefsFile {
	f := manifest.RefsFile{}
	if rec.GetLength() <= 0 || len(rec.GetSha256()) != len(f.SHA256) {
		return f
	}
	f.File, f.Length = manifest.RefsName, rec.GetLength()
	f.Segments, f.Builds, f.Files = rec.GetSegments(), rec.GetBuilds(), rec.GetFiles()
	copy(f.SHA256[:], rec.GetSha256())
	return f
}
