//go:build unix && !linux

package file

import (
	"errors"
	"os"
)

// clone makes target share the blocks of source, here never.
func clone(_, _ *os.File) error { return errors.ErrUnsupported }
