package object

import (
	"context"
	"fmt"
	"io"
)

// deleteBatch is how many objects DeletePrefix deletes at a time.
const deleteBatch = 500

// ReadAll reads an object whole. Of one that is longer than limit it returns one
// byte more than limit, so that the caller can tell. The error is that of
// [Store.Get], or of the reading, which names the key; there is no content then.
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

// DeletePrefix deletes all objects whose keys begin with prefix, empty or ending
// in "/", some at a time. It ends with the first error, that of [Store.List] or
// [Store.Delete], and objects may be left then; to call it again goes on. None
// that is made meanwhile is sure to be deleted.
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
