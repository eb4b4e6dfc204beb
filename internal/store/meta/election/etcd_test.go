//go:build !short

package election_test

import (
	"context"
	"crypto/rand"
	"errors"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// Three replicas with separate clients; the leader freezes for longer than its TTL.
func TestEtcdFrozenLeader(t *testing.T) {
	srv := etcdtest.Shared(t)
	elected := make(chan leadership, 100)
	ts := &terms{seen: map[int64]string{}}
	root := "/" + rand.Text()
	var replicas []*replica
	for _, name := range []string{"a", "b", "c"} {
		replicas = append(replicas, start(t, name, srv.KVAt(t, root), time.Second, elected, ts))
	}
	frozen := <-elected
	if !frozen.write(t, frozen.by.kv) {
		t.Error("the leader's fenced write was refused")
	}
	frozen.by.kv.Freeze()
	l := <-elected
	if l.by == frozen.by || l.Create <= frozen.Create {
		t.Errorf("got %s in term %d after %s in term %d", l.Name, l.Create, frozen.Name, frozen.Create)
	}
	<-frozen.ctx.Done()
	if cause := context.Cause(frozen.ctx); !errors.Is(cause, election.ErrLost) {
		t.Errorf("frozen leader's context: %v, want lost", cause)
	}
	frozen.by.kv.Thaw()
	if frozen.write(t, frozen.by.kv) {
		t.Error("the fenced write of the frozen leader was applied")
	}
	if !l.write(t, l.by.kv) {
		t.Error("the new leader's fenced write is refused")
	}
	close(l.resign)
	if next := <-elected; next.Create <= l.Create {
		t.Errorf("got term %d after %d", next.Create, l.Create)
	}
	for _, r := range replicas {
		r.stop()
	}
	for _, r := range replicas {
		<-r.done
	}
}
