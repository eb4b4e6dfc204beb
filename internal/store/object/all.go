package object

import (
	"context"
	"fmt"
	"io"
)

// deleteBatch is the number of objects per Delete of DeletePrefix.
const deleteBatch = 500

// ReadAll reads a whole object. If it is longer than limit, ReadAll returns limit+1 bytes,
// so that the caller can detect it. The error is that of [Store.Get], or of the read, which
// names the key; the content is then nil.
func ReadAll(ctx context.Context, s Store, key string, limit int64) ([]byte, error) {
	r, _, err := s.Get(ctx, key, 0, limit+1)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(r)
	if closeErr := r.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", key, err)
	}
	return data, nil
}

// ReadVerified reads a whole object and returns its content if check returns nil, which
// compares the length and the digest. A rejected content is read once more, for it may have
// been altered or cut off in transit: two rejected reads mean that the object differs.
//
// Each read is one [ReadAll], so check gets at most limit+1 bytes, and one content is in memory
// at a time. An error of ReadAll is returned unchanged and not retried, and so is the error of
// the second check; the content is then nil. ReadVerified is safe for concurrent use if check
// is.
func ReadVerified(
	ctx context.Context, s Store, key string, limit int64, check func(data []byte) error,
) ([]byte, error) {
	var err error
	for range 2 {
		data, readErr := ReadAll(ctx, s, key, limit)
		if readErr != nil {
			return nil, readErr
		}
		if err = check(data); err == nil {
			return data, nil
		}
	}
	return nil, err
}

// DeletePrefix deletes all objects whose keys begin with prefix, which is empty or ends in
// "/", in batches. It ends with the first error of [Store.List] or [Store.Delete]; a repeat
// continues. Objects that are created meanwhile may remain.
func DeletePrefix(ctx context.Context, s Store, prefix string) error {
	var batch []string
	for info, err := range s.List(ctx, prefix) {
		if err != nil {
			return err
		}
		if batch = append(batch, info.Key); len(batch) == deleteBatch {
			if err := s.Delete(ctx, batch...); err != nil {
				return err
			}
			batch = batch[:0]
		}
	}
	if len(batch) == 0 {
		return nil
	}
	return s.Delete(ctx, batch...)
}
