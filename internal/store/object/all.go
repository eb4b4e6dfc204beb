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
