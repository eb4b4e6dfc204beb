package object_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
	"github.com/snapshotd/snapshotd/test/virtual"
)

func newFaulty() (*object.Faulty, *memory.Store) {
	s := memory.New(memory.Options{})
	return object.NewFaulty(s), s
}

func TestFaultyWithoutPlan(t *testing.T) {
	objecttest.Run(t, func(*testing.T) object.Store {
		f, _ := newFaulty()
		return f
	})
}

// TestFaultyEveryMethod plans a fault before and after the second call of each
// method.
func TestFaultyEveryMethod(t *testing.T) {
	has := func(s object.Store, key string) bool {
		_, err := s.Head(context.Background(), key)
		return err == nil
	}
	calls := []struct {
		op     object.Op
		call   func(context.Context, object.Store) error
		effect func(object.Store) bool // nil: none
	}{
		{
			object.OpPut, func(ctx context.Context, s object.Store) error { _, err := s.Put(ctx, "new", nil); return err },
			func(s object.Store) bool { return has(s, "new") },
		},
		{
			object.OpCreate, func(ctx context.Context, s object.Store) error { _, err := s.Create(ctx, "new", nil); return err },
			func(s object.Store) bool { return has(s, "new") },
		},
		{
			object.OpGet, func(ctx context.Context, s object.Store) error { _, _, err := s.Get(ctx, "old", 0, -1); return err },
			nil,
		},
		{object.OpHead, func(ctx context.Context, s object.Store) error { _, err := s.Head(ctx, "old"); return err }, nil},
		{object.OpList, func(ctx context.Context, s object.Store) error {
			for _, err := range s.List(ctx, "") {
				if err != nil {
					return err
				}
			}
			return nil
		}, nil},
		{
			object.OpDelete, func(ctx context.Context, s object.Store) error { return s.Delete(ctx, "old") },
			func(s object.Store) bool { return !has(s, "old") },
		},
		{
			object.OpCopy, func(ctx context.Context, s object.Store) error {
				_, err := s.Copy(ctx, object.CopyRequest{
					From: "old", To: "new", SourceETag: "9dd4e461268c8034f5c8564e155c67a6",
					Size: 1,
				})
				return err
			},
			func(s object.Store) bool { return has(s, "new") },
		},
		{object.OpAbort, func(ctx context.Context, s object.Store) error {
			_, err := s.AbortUploads(ctx, "", time.Time{})
			return err
		}, nil},
		{object.OpOldest, func(ctx context.Context, s object.Store) error {
			_, err := s.OldestUpload(ctx, "")
			return err
		}, nil},
		{object.OpNow, func(ctx context.Context, s object.Store) error { _, err := s.Now(ctx); return err }, nil},
	}
	for _, c := range calls {
		for _, fault := range []object.Fault{object.FaultBefore, object.FaultAfter} {
			t.Run(fmt.Sprint(c.op, fault), func(t *testing.T) {
				f, s := newFaulty()
				reset := func() {
					if _, err := s.Put(t.Context(), "old", []byte("x")); err != nil {
						t.Fatal(err)
					}
					if err := s.Delete(t.Context(), "new"); err != nil {
						t.Fatal(err)
					}
				}
				f.FailNth(c.op, 1, fault)
				reset()
				if err := c.call(t.Context(), f); err != nil {
					t.Fatalf("first call: %v", err)
				}
				reset()
				if n := f.Fired(); n != 0 {
					t.Errorf("fired %d times too early", n)
				}
				if err := c.call(t.Context(), f); !errors.Is(err, object.ErrUnavailable) {
					t.Errorf("second call: err = %v, want ErrUnavailable", err)
				}
				if n := f.Fired(); n != 1 {
					t.Errorf("fired %d, want 1", n)
				}
				if c.effect != nil {
					if got, want := c.effect(s), fault == object.FaultAfter; got != want {
						t.Errorf("took effect: %v, want %v", got, want)
					}
				}
				reset()
				if err := c.call(t.Context(), f); err != nil {
					t.Errorf("third call: %v", err)
				}
				if n := f.Calls(c.op); n != 3 || f.Calls("") != 3 {
					t.Errorf("counted %d and %d calls, want 3", n, f.Calls(""))
				}
			})
		}
	}
}

func TestFaultyCountsAcrossMethods(t *testing.T) {
	f, _ := newFaulty()
	f.FailNth("", 2, object.FaultBefore)
	for i := range 4 {
		_, err := f.Put(t.Context(), "a", nil)
		if i == 1 {
			_, err = f.Head(t.Context(), "a") // third call
			if !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("third call: err = %v", err)
			}
		} else if err != nil {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if f.Calls("") != 5 || f.Calls(object.OpPut) != 4 || f.Calls(object.OpHead) != 1 || f.Calls(object.OpGet) != 0 {
		t.Errorf("calls: %d, %d puts, %d heads", f.Calls(""), f.Calls(object.OpPut), f.Calls(object.OpHead))
	}
}

func TestFaultyListFailsAfterItsObjects(t *testing.T) {
	f, s := newFaulty()
	for _, key := range []string{"a", "b"} {
		if _, err := s.Put(t.Context(), key, nil); err != nil {
			t.Fatal(err)
		}
	}
	f.FailNth(object.OpList, 0, object.FaultAfter)
	n, failed := 0, 0
	for _, err := range f.List(t.Context(), "") {
		if err != nil {
			failed++
		} else {
			n++
		}
	}
	if n != 2 || failed != 1 {
		t.Errorf("%d objects and %d errors, want 2 and 1", n, failed)
	}
}

func TestFaultyDeleteNamesItsKeys(t *testing.T) {
	f, _ := newFaulty()
	f.FailNth(object.OpDelete, 0, object.FaultAfter)
	err := f.Delete(t.Context(), "a", "b")
	for _, key := range []string{"a", "b"} {
		if want := "delete " + key + ":"; err == nil || !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Errorf("err = %v, want %q in it", err, want)
		}
	}
	if _, ok := errors.AsType[*object.DeleteError](err); !ok {
		t.Errorf("err = %v, want a DeleteError", err)
	}
}

func TestFaultyCopyNamesBothKeys(t *testing.T) {
	f, s := newFaulty()
	info, err := s.Put(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	f.Plan(func(c object.Call) object.Fault { seen = append(seen, c.Keys...); return object.FaultNone })
	if _, err := f.Copy(t.Context(), object.CopyRequest{From: "a", To: "b", SourceETag: info.ETag}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.AbortUploads(t.Context(), "c/", time.Time{}); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(seen); got != "[a b c/]" {
		t.Errorf("the plan got %s", got)
	}
}

func TestFaultyCorruptsBodies(t *testing.T) {
	f, s := newFaulty()
	body := []byte("0123456789")
	for key, b := range map[string][]byte{"a": body, "empty": nil} {
		if _, err := s.Put(t.Context(), key, b); err != nil {
			t.Fatal(err)
		}
	}
	read := func(key string) string {
		r, info, err := f.Get(t.Context(), key, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if key == "a" && info.Size != int64(len(body)) {
			t.Errorf("Info has %d bytes", info.Size)
		}
		return string(got)
	}
	for fault, want := range map[object.Fault]error{
		object.FaultDenied: object.ErrDenied, object.FaultMisconfigured: object.ErrMisconfigured,
		object.FaultBefore: object.ErrUnavailable,
	} {
		f.FailNth(object.OpHead, 0, fault)
		if _, err := f.Head(t.Context(), "a"); !errors.Is(err, want) || f.Fired() != 1 ||
			object.IsPassing(err) != (fault == object.FaultDenied) {
			t.Errorf("fault %d: err = %v, fired %d", fault, err, f.Fired())
		}
	}
	for fault, want := range map[object.Fault]string{object.FaultFlip: "0123446789", object.FaultTruncate: "01234"} {
		f.Plan(func(object.Call) object.Fault { return fault })
		if got := read("empty"); got != "" || f.Fired() != 0 {
			t.Errorf("fault %d of an empty body: %q, fired %d", fault, got, f.Fired())
		}
		if got := read("a"); got != want || f.Fired() != 1 {
			t.Errorf("fault %d: %q, want %q; fired %d", fault, got, want, f.Fired())
		}
		if _, err := f.Head(t.Context(), "a"); err != nil || f.Fired() != 1 {
			t.Errorf("fault %d of a Head: %v, fired %d", fault, err, f.Fired())
		}
	}
	f.Plan(nil)
	if got := read("a"); got != string(body) {
		t.Errorf("the store itself has %q", got)
	}
}

func TestFaultyFreeze(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		f, s := newFaulty()
		f.Freeze()
		f.Freeze()
		done := make(chan error, 1)
		go func() {
			_, err := f.Put(t.Context(), "a", nil)
			done <- err
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := f.Put(ctx, "b", nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a frozen Put whose context ends: %v", err)
		}
		virtual.Wait()
		if _, err := s.Head(t.Context(), "a"); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("a frozen Put took effect: err = %v", err)
		}
		f.Thaw()
		f.Thaw()
		if err := <-done; err != nil {
			t.Errorf("after Thaw: %v", err)
		}
		if _, err := s.Head(t.Context(), "a"); err != nil {
			t.Errorf("the late Put: %v", err)
		}
		if _, err := s.Head(t.Context(), "b"); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("the canceled Put took effect: err = %v", err)
		}
	})
}

func TestFaultyLatency(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		f, _ := newFaulty()
		f.SetLatency(time.Second)
		start := time.Now()
		if _, err := f.Now(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("took %v, want 1s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := f.Now(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err = %v, want DeadlineExceeded", err)
		}
	})
}

func TestFaultyConcurrently(t *testing.T) {
	f, _ := newFaulty()
	f.Plan(func(c object.Call) object.Fault {
		if c.NOp%4 == 0 {
			return object.FaultBefore
		}
		return object.FaultNone
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				_, _ = f.Put(t.Context(), "a", nil)
				f.Freeze()
				f.Thaw()
			}
		})
	}
	wg.Wait()
	if f.Calls("") != 400 || f.Fired() != 100 {
		t.Errorf("%d calls, %d faults; want 400, 100", f.Calls(""), f.Fired())
	}
}
