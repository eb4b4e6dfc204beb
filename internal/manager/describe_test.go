package manager

import (
	"fmt"
	"slices"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestDescribeReportsDamage checks that a description names missing and truncated
// objects with a single listing, and reports a store that cannot be listed.
func TestDescribeReportsDamage(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.addWritten(r, col, e.segment(r, col, 0, 1, 20))
		e.checkpoint(r, col, 100, 100)
		s := e.create(r, col, "x")
		dir, ref := manifest.Dir(s.Collection, s.ID), Ref{ID: s.ID}
		name := manifest.ManifestName(0)
		whole := e.readObject(dir + name)
		described := func() *Description {
			t.Helper()
			d, err := r.Describe(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		want := func(what string, damage ...string) {
			t.Helper()
			before := r.store.Calls(object.OpList)
			d := described()
			if !slices.Equal(d.Damage, damage) || d.DamageErr != nil {
				t.Errorf("%s: got %q, %v", what, d.Damage, d.DamageErr)
			}
			if n := r.store.Calls(object.OpList) - before; n != 1 {
				t.Errorf("%s: %d listings", what, n)
			}
		}
		want("whole")
		e.putObject(dir+name, whole[1:])
		want("short", fmt.Sprintf("%s has %d bytes, not %d", name, len(whole)-1, len(whole)))
		if err := e.objects.Delete(t.Context(), dir+name, dir+manifest.RefsName); err != nil {
			t.Fatal(err)
		}
		want("missing", manifest.RefsName+" is missing", name+" is missing")
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpList {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		if d := described(); d.DamageErr == nil || len(d.Damage) > 0 {
			t.Errorf("not listed: got %q, %v", d.Damage, d.DamageErr)
		}
		r.store.Plan(nil)
		e.putObject(dir+name, whole)
	})
}
