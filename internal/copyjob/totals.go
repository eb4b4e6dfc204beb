package copyjob

import (
	"github.com/snapshotd/snapshotd/internal/segment"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func totalsRecord(t segment.Totals) *storagev1.Totals {
	if t == (segment.Totals{}) {
		return nil
	}
	return &storagev1.Totals{
		Segments: t.Segments, Rows: t.Rows, Files: t.Files, Bytes: t.Bytes, Builds: t.Builds, Straddling: t.Straddling,
	}
}

func totalsOf(t *storagev1.Totals) segment.Totals {
	return segment.Totals{
		Segments: t.GetSegments(), Rows: t.GetRows(), Files: t.GetFiles(), Bytes: t.GetBytes(), Builds: t.GetBuilds(),
		Straddling: t.GetStraddling(),
	}
}

// addTotals returns a plus b.
func addTotals(a, b segment.Totals) segment.Totals {
	return segment.Totals{
		Segments: a.Segments + b.Segments, Rows: a.Rows + b.Rows, Files: a.Files + b.Files, Bytes: a.Bytes + b.Bytes,
		Builds: a.Builds + b.Builds, Straddling: a.Straddling + b.Straddling,
	}
}

func subtractTotals(a, b segment.Totals) segment.Totals {
	return segment.Totals{
		Segments: a.Segments - b.Segments, Rows: a.Rows - b.Rows, Files: a.Files - b.Files, Bytes: a.Bytes - b.Bytes,
		Builds: a.Builds - b.Builds, Straddling: a.Straddling - b.Straddling,
	}
}

// maxTotals returns the larger of each number.
func maxTotals(a, b segment.Totals) segment.Totals {
	return segment.Totals{
		Segments: max(a.Segments, b.Segments), Rows: max(a.Rows, b.Rows), Files: max(a.Files, b.Files),
		Bytes: max(a.Bytes, b.Bytes), Builds: max(a.Builds, b.Builds), Straddling: max(a.Straddling, b.Straddling),
	}
}
