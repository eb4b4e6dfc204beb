package gc

import (
	"errors"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// errNoStore means that no object store of an alias is configured in this process.
var errNoStore = errors.New("object store is not configured here")

// errEnough ends a scan.
var errEnough = errors.New("enough")

// FirstError returns the first of errs with the number of the others: a store without
// an answer causes one error per batch. It is nil without errors.
func FirstError(errs []error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return fmt.Errorf("%w; and %d errors more", errs[0], len(errs)-1)
}

// FailedKeys returns the errors of single keys in an error of object.Store's Delete.
// It is empty when the error is about all of them.
func FailedKeys(err error) map[string]error {
	failed := map[string]error{}
	var walk func(error)
	walk = func(err error) {
		if e, ok := err.(*object.DeleteError); ok { //nolint:errorlint // the walk unwraps
			failed[e.Key] = e
			return
		}
		switch e := err.(type) { //nolint:errorlint // the walk unwraps
		case interface{ Unwrap() []error }:
			for _, err := range e.Unwrap() {
				walk(err)
			}
		case interface{ Unwrap() error }:
			if err := e.Unwrap(); err != nil {
				walk(err)
			}
		}
	}
	walk(err)
	return failed
}
