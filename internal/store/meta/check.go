package meta

import (
	"cmp"
	"fmt"
	"strings"
)

// Check returns ErrTooLarge or ErrInvalid if t violates a limit or a rule of this package. A
// [KV] calls it before anything else, so that both implementations refuse the same
// transactions.
func (t Txn) Check() error {
	if n := max(len(t.If), len(t.Then), len(t.Else)); n > MaxTxnOps {
		return fmt.Errorf("%w: %d in one list, at most %d", ErrTooLarge, n, MaxTxnOps)
	}
	size := 0
	for _, c := range t.If {
		if c.Target < CreateRevision || c.Target > ModRevision || c.Op < Equal || c.Op > Greater {
			return fmt.Errorf("%w: compare on %q without target or comparison", ErrInvalid, c.From)
		}
		if err := CheckRange(c.From, c.To); err != nil {
			return err
		}
		size += len(c.From) + len(c.To)
	}
	for _, ops := range [][]Op{t.Then, t.Else} {
		if err := checkOps(ops); err != nil {
			return err
		}
		for _, op := range ops {
			size += len(op.From) + len(op.To) + len(op.Value)
		}
	}
	if size > MaxTxnBytes {
		return fmt.Errorf("%w: %s has %d bytes, at most %d", ErrTooLarge, cmp.Or(t.Name, "it"), size, MaxTxnBytes)
	}
	return nil
}

func checkOps(ops []Op) error {
	puts := make(map[string]struct{}, len(ops))
	for _, op := range ops {
		if op.Kind < OpPut || op.Kind > OpGet {
			return fmt.Errorf("%w: operation on %q without a kind", ErrInvalid, op.From)
		}
		if err := CheckRange(op.From, op.To); err != nil {
			return err
		}
		if op.Kind != OpPut {
			continue
		}
		if op.To != "" {
			return fmt.Errorf("%w: put of the range %q to %q", ErrInvalid, op.From, op.To)
		}
		if _, twice := puts[op.From]; twice {
			return fmt.Errorf("%w: %q put twice", ErrInvalid, op.From)
		}
		puts[op.From] = struct{}{}
	}
	for _, op := range ops {
		if op.Kind != OpDelete {
			continue
		}
		for key := range puts {
			if InRange(key, op.From, op.To) {
				return fmt.Errorf("%w: %q put and deleted", ErrInvalid, key)
			}
		}
	}
	return nil
}

// CheckRange returns ErrTooLarge or ErrInvalid if [from, to) is not a valid range, or from
// is not a valid key if to is empty.
func CheckRange(from, to string) error {
	switch {
	case max(len(from), len(to)) > MaxKeyBytes:
		return fmt.Errorf("%w: key of %d bytes, at most %d", ErrTooLarge, max(len(from), len(to)), MaxKeyBytes)
	case !strings.HasPrefix(from, "/"):
		return fmt.Errorf("%w: key %q does not begin with a slash", ErrInvalid, from)
	case to != "" && (to <= from || to > endOfKeys):
		return fmt.Errorf("%w: range from %q to %q", ErrInvalid, from, to)
	}
	return nil
}

// endOfKeys is the end of the range of all keys, which begin with "/". A range beyond it
// would include foreign keys of the same etcd.
const endOfKeys = "0"

// InRange reports whether key is in [from, to), or equals from if to is empty.
func InRange(key, from, to string) bool {
	if to == "" {
		return key == from
	}
	return from <= key && key < to
}

// CheckSpan is [CheckRange] for a scan or a watch, which require an end.
func CheckSpan(from, to string) error {
	if to == "" {
		return fmt.Errorf("%w: range from %q without an end", ErrInvalid, from)
	}
	return CheckRange(from, to)
}
