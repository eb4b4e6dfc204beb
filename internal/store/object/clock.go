package object

import (
	"fmt"
	"time"
)

// MaxSkew is how far the clocks of a replica and of a store may be apart before
// neither is believed.
const MaxSkew = 5 * time.Minute

// EarlierClock returns the earlier of a replica's time and that of the store of an
// alias: what is due by it is due by both. It is an error when the two are so far
// apart that one of them is wrong.
func EarlierClock(alias string, replica, store time.Time) (time.Time, error) {
	if replica.Sub(store).Abs() > MaxSkew {
		return time.Time{}, fmt.Errorf("this replica's clock says %s and the clock of store %s says %s; set them right",
			replica.UTC().Format(time.RFC3339), alias, store.UTC().Format(time.RFC3339))
	}
	if store.Before(replica) {
		return store, nil
	}
	return replica, nil
}
