package record

import (
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// References returns a references file as the record of its snapshot holds it; nil:
// there is none.
func References(f *manifest.RefsFile) *storagev1.References {
	if f.Length == 0 {
		return nil
	}
	return &storagev1.References{Length: f.Length, Sha256: f.SHA256[:], Segments: f.Segments, Builds: f.Builds, Files: f.Files}
}

// RefsFile returns the references file that a snapshot's record describes. It is
// zero when the record is of a release that kept it in the metadata alone.
func RefsFile(rec *storagev1.References) manifest.RefsFile {
	f := manifest.RefsFile{}
	if rec.GetLength() <= 0 || len(rec.GetSha256()) != len(f.SHA256) {
		return f
	}
	f.File, f.Length, f.Segments, f.Builds, f.Files = manifest.RefsName, rec.GetLength(), rec.GetSegments(), rec.GetBuilds(), rec.GetFiles()
	copy(f.SHA256[:], rec.GetSha256())
	return f
}
