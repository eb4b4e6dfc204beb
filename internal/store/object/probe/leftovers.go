package probe

import (
	"context"
	"regexp"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// minLeftAge is the age, by the store's clock, of an object that belongs to an ended probe.
const minLeftAge = 24 * time.Hour

// RemoveLeft removes the leftovers of probes that died or failed to clean up, if they are
// older than a day at now, by the store's clock. It returns the numbers of removed objects
// and uploads, and the bytes of the objects, also with an error.
func RemoveLeft(ctx context.Context, store object.Store, now time.Time) (objects, bytes int64, uploads int, err error) {
	parent, before := Dir+"/", now.Add(-minLeftAge)
	var left []string
	for info, err := range store.List(ctx, parent) {
		if err != nil {
			return 0, 0, 0, err
		}
		if probeKey.MatchString(info.Key[len(parent):]) && info.ModTime.Before(before) {
			left, bytes = append(left, info.Key), bytes+info.Size
		}
		if len(left) == maxLeft {
			break
		}
	}
	if err := store.Delete(ctx, left...); err != nil {
		return 0, 0, 0, err
	}
	uploads, err = store.AbortUploads(ctx, parent, before)
	return int64(len(left)), bytes, uploads, err
}

// maxLeft bounds the objects that one call of RemoveLeft removes.
const maxLeft = 1000

// probeKey matches the keys of probes below Dir: a rand.Text in lower case. Probes on
// demand have an additional directory Dir.
var probeKey = regexp.MustCompile(`^(` + Dir + `/)?[a-z2-7]{26}/`)
