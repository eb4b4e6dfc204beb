package sim

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// call is a call of a store that waits at the gate, or that no caller waits for any more.
type call struct {
	m     *member
	name  string                                           // method, keys, digest: the same in each run
	write bool                                             // it may have an effect without a waiting caller
	seq   int                                              // settles between calls of one name
	step  int                                              // of the scheduler, after which it came
	came  time.Time                                        // in virtual time
	do    func(ctx context.Context) string                 // ctx never ends: there may be no caller any more
	spoil func(ctx context.Context, rng *rand.Rand) string // do with another answer than the true one; nil: it has no such
	held  time.Time                                        // not to be chosen before
	gone  bool                                             // no caller waits for it
	done  chan error
	lost  error // what a failed call wraps
}

func byName(a, b *call) int {
	return cmp.Or(
		cmp.Compare(a.m.index, b.m.index),
		cmp.Compare(a.m.life, b.m.life),
		cmp.Compare(a.name, b.name),
		cmp.Compare(a.seq, b.seq),
	)
}

// gate is where the calls of all replicas wait. It is safe for concurrent use.
type gate struct {
	mu      sync.Mutex
	waiting []*call
	seq     int
	step    int
	open    bool // all that comes is refused: the run is over
	arrived chan struct{}
}

func newGate() *gate { return &gate{arrived: make(chan struct{}, 1)} }

var errDead = errors.New("the replica is dead")

// wait waits until the scheduler has decided about a call. do is carried out by
// the scheduler, or never; it returns the answer for the trace.
func (g *gate) wait(
	ctx context.Context,
	m *member,
	lost error,
	write bool,
	name string,
	do func(ctx context.Context) string,
) error {
	return g.waitCall(ctx, &call{m: m, name: name, write: write, do: do, lost: lost})
}

// waitCall is wait of a call that is made.
func (g *gate) waitCall(ctx context.Context, c *call) error {
	m, name, lost := c.m, c.name, c.lost
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	c.done = make(chan error, 1)
	g.mu.Lock()
	if g.open || m.dead {
		g.mu.Unlock()
		return fmt.Errorf("%s: %w: %w", name, lost, errDead)
	}
	g.seq++
	c.seq, c.step, c.came = g.seq, g.step, time.Now()
	g.waiting = append(g.waiting, c)
	g.mu.Unlock()
	select {
	case g.arrived <- struct{}{}:
	default:
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case err := <-c.done: // it was decided before
		return err
	default:
	}
	c.gone = true
	if !c.write {
		g.removeLocked(c)
	}
	return fmt.Errorf("%s: %w", name, ctx.Err())
}

func (g *gate) removeLocked(c *call) {
	if i := slices.Index(g.waiting, c); i >= 0 {
		g.waiting = slices.Delete(g.waiting, i, i+1)
	}
}

// setStep sets the step of the scheduler.
func (g *gate) setStep(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.step = n
}

// list returns the waiting calls, in the order of names.
func (g *gate) list() []*call {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := slices.Clone(g.waiting)
	slices.SortFunc(list, byName)
	return list
}

// take removes a call for the decision of the scheduler.
func (g *gate) take(c *call) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removeLocked(c)
}

// kill refuses all later calls of a replica, and returns its waiting ones.
func (g *gate) kill(m *member) []*call {
	g.mu.Lock()
	defer g.mu.Unlock()
	m.dead = true
	var list []*call
	for _, c := range g.waiting {
		if c.m == m {
			list = append(list, c)
		}
	}
	slices.SortFunc(list, byName)
	return list
}

// close refuses all calls.
func (g *gate) close() {
	g.mu.Lock()
	list := g.waiting
	g.waiting, g.open = nil, true
	g.mu.Unlock()
	for _, c := range list {
		c.done <- fmt.Errorf("%w: the run is over", c.lost)
	}
}

// gatedKV is the metadata store behind the gate of a replica.
type gatedKV struct {
	meta.KV
	g     *gate
	m     *member
	o     *oracle
	batch int // keys of a scan per batch
}

var never = context.Background() // what is delivered late has no caller any more

func digest(parts ...any) string {
	h := fnv.New32a()
	for _, p := range parts {
		_, _ = fmt.Fprintf(h, "%v|", p) // a hash takes everything
	}
	return fmt.Sprintf("#%08x", h.Sum32())
}

func answer(err error, format string, args ...any) string {
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf(format, args...)
}

func (k *gatedKV) Get(ctx context.Context, key string) (kv meta.KeyValue, found bool, revision int64, err error) {
	perr := k.g.wait(ctx, k.m, meta.ErrUnavailable, false, "get "+key, func(ctx context.Context) string {
		kv, found, revision, err = k.KV.Get(ctx, key)
		return answer(err, "%v of %d at %d", found, kv.ModRevision, revision)
	})
	if perr != nil {
		return meta.KeyValue{}, false, 0, perr
	}
	return kv, found, revision, err
}

func (k *gatedKV) Range(ctx context.Context, r meta.Range) (res meta.RangeResult, err error) {
	perr := k.g.wait(
		ctx,
		k.m,
		meta.ErrUnavailable,
		false,
		"range "+r.From+" "+r.To+" "+digest(r.Revision, r.Limit, r.KeysOnly),
		func(ctx context.Context) string {
			res, err = k.KV.Range(ctx, r)
			return answer(err, "%d of %d at %d", len(res.KVs), res.Count, res.Revision)
		},
	)
	if perr != nil {
		return meta.RangeResult{}, perr
	}
	return res, err
}

func (k *gatedKV) Scan(
	ctx context.Context,
	from, to string,
	revision int64,
	fn func([]meta.KeyValue) error,
) (rev int64, err error) {
	var all []meta.KeyValue
	c := &call{m: k.m, name: "scan " + from + " " + to + " " + digest(revision), lost: meta.ErrUnavailable}
	c.do = func(ctx context.Context) string {
		rev, err = k.KV.Scan(ctx, from, to, revision, func(kvs []meta.KeyValue) error {
			all = append(all, kvs...)
			return nil
		})
		return answer(err, "%d at %d", len(all), rev)
	}
	c.spoil = func(ctx context.Context, rng *rand.Rand) string {
		text := c.do(ctx)
		if err != nil {
			return text
		}
		all, err = all[:rng.IntN(len(all)+1)], meta.ErrUnavailable
		if rng.IntN(2) == 0 {
			err = meta.ErrCompacted
		}
		err = fmt.Errorf("scan %s: %w: in its middle", from, err)
		return fmt.Sprintf("%s, cut after %d", text, len(all))
	}
	if perr := k.g.waitCall(ctx, c); perr != nil {
		return 0, perr
	}
	for b := range slices.Chunk(all, k.batch) {
		if err := fn(b); err != nil {
			return 0, err
		}
	}
	if err != nil {
		return 0, err
	}
	return rev, nil
}

// txnName names a transaction by its keys and compares; values hold ids of
// operations, which depend on the order in which goroutines ask for them.
func txnName(t *meta.Txn) string {
	var b strings.Builder
	b.WriteString("txn")
	for _, op := range t.Then {
		if op.Kind != meta.OpGet || len(t.Then) < 4 {
			fmt.Fprintf(&b, " %s%s", [...]string{"?", "put ", "delete ", "get "}[op.Kind], op.From)
		}
	}
	parts := make([]any, 0, len(t.If)+len(t.Else)+len(t.Then))
	for _, c := range t.If {
		parts = append(parts, c)
	}
	for _, op := range slices.Concat(t.Then, t.Else) {
		parts = append(parts, op.Kind, op.From, op.To, len(op.Value))
	}
	b.WriteString(" " + digest(parts...))
	return b.String()
}

func (k *gatedKV) Txn(ctx context.Context, t meta.Txn) (res meta.TxnResult, err error) {
	t = meta.Txn{If: slices.Clone(t.If), Then: cloneOps(t.Then), Else: cloneOps(t.Else)}
	perr := k.g.wait(ctx, k.m, meta.ErrUnavailable, true, txnName(&t), func(ctx context.Context) string {
		res, err = k.KV.Txn(ctx, t)
		if err == nil && res.Succeeded && k.o != nil {
			k.o.sawTxn(ctx, k.m, &t)
		}
		return answer(err, "%v at %d", res.Succeeded, res.Revision)
	})
	if perr != nil {
		return meta.TxnResult{}, perr
	}
	return res, err
}

func cloneOps(ops []meta.Op) []meta.Op {
	ops = slices.Clone(ops)
	for i := range ops {
		ops[i].Value = bytes.Clone(ops[i].Value)
	}
	return ops
}

func (k *gatedKV) Grant(ctx context.Context, ttl time.Duration) (id meta.LeaseID, err error) {
	perr := k.g.wait(ctx, k.m, meta.ErrUnavailable, true, fmt.Sprint("grant ", ttl), func(ctx context.Context) string {
		id, err = k.KV.Grant(ctx, ttl)
		return answer(err, "%x", id)
	})
	if perr != nil {
		return 0, perr
	}
	return id, err
}

func (k *gatedKV) KeepAlive(ctx context.Context, id meta.LeaseID) (err error) {
	perr := k.g.wait(
		ctx,
		k.m,
		meta.ErrUnavailable,
		true,
		fmt.Sprintf("keep alive %x", id),
		func(ctx context.Context) string {
			err = k.KV.KeepAlive(ctx, id)
			return answer(err, "ok")
		},
	)
	return cmp.Or(perr, err)
}

func (k *gatedKV) Revoke(ctx context.Context, id meta.LeaseID) (err error) {
	perr := k.g.wait(ctx, k.m, meta.ErrUnavailable, true, fmt.Sprintf("revoke %x", id), func(ctx context.Context) string {
		err = k.KV.Revoke(ctx, id)
		return answer(err, "ok")
	})
	return cmp.Or(perr, err)
}

// Watch opens a watch at once; its events wait.
func (k *gatedKV) Watch(ctx context.Context, from, to string, after int64) meta.Watcher {
	return &gatedWatcher{k: k, ctx: ctx, name: from, w: k.KV.Watch(ctx, from, to, after)}
}

type gatedWatcher struct {
	k    *gatedKV
	ctx  context.Context //nolint:containedctx // that of the watch, which ends Next
	name string
	w    meta.Watcher
	err  error // final
}

func (w *gatedWatcher) Next() (meta.WatchBatch, error) {
	if w.err != nil {
		return meta.WatchBatch{}, w.err
	}
	b, err := w.w.Next()
	if err == nil {
		err = w.k.g.wait(
			w.ctx,
			w.k.m,
			meta.ErrUnavailable,
			false,
			fmt.Sprintf("send %s %d events to %d", w.name, len(b.Events), b.Revision),
			func(context.Context) string { return "sent" },
		)
	}
	w.err = err
	if err != nil {
		return meta.WatchBatch{}, err
	}
	return b, nil
}

func (w *gatedWatcher) Progress(ctx context.Context) (err error) {
	perr := w.k.g.wait(ctx, w.k.m, meta.ErrUnavailable, false, "progress "+w.name, func(ctx context.Context) string {
		err = w.w.Progress(ctx)
		return answer(err, "ok")
	})
	return cmp.Or(perr, err)
}

// gatedStore is the object store behind the gate of a replica.
type gatedStore struct {
	ledger
	g *gate
	m *member
}

func (s *gatedStore) write(
	ctx context.Context,
	name string,
	do func(ctx context.Context) (object.Info, error),
) (info object.Info, err error) {
	perr := s.g.wait(ctx, s.m, object.ErrUnavailable, true, name, func(ctx context.Context) string {
		info, err = do(ctx)
		return answer(err, "%d bytes %s", info.Size, info.ETag)
	})
	if perr != nil {
		return object.Info{}, perr
	}
	return info, err
}

func (s *gatedStore) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	body = bytes.Clone(body)
	return s.write(
		ctx,
		fmt.Sprintf("object put %s %d", key, len(body)),
		func(ctx context.Context) (object.Info, error) { return s.ledger.Put(ctx, key, body) },
	)
}

func (s *gatedStore) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	body = bytes.Clone(body)
	return s.write(
		ctx,
		fmt.Sprintf("object create %s %d", key, len(body)),
		func(ctx context.Context) (object.Info, error) { return s.ledger.Create(ctx, key, body) },
	)
}

func (s *gatedStore) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	return s.write(
		ctx,
		copyName+r.From+" "+r.To,
		func(ctx context.Context) (object.Info, error) { return s.ledger.Copy(ctx, r) },
	)
}

func (s *gatedStore) Get(
	ctx context.Context,
	key string,
	offset, length int64,
) (r io.ReadCloser, info object.Info, err error) {
	var body []byte
	c := &call{m: s.m, name: fmt.Sprint("object get ", key, " ", offset, " ", length), lost: object.ErrUnavailable}
	read := func(ctx context.Context) {
		if r, info, err = s.ledger.Get(ctx, key, offset, length); err == nil {
			body, err = io.ReadAll(r)
		}
	}
	c.do = func(ctx context.Context) string {
		if read(ctx); err != nil {
			return answer(err, "")
		}
		var bad bool
		if body, bad = s.o.rotten(key, body); bad {
			s.m.misread++
			return fmt.Sprintf("%d bytes, rotten", len(body))
		}
		if offset == 0 && int64(len(body)) == info.Size {
			s.m.read(key)
		}
		return fmt.Sprintf("%d bytes", len(body))
	}
	c.spoil = func(ctx context.Context, rng *rand.Rand) string {
		if read(ctx); err != nil {
			return answer(err, "")
		}
		var how string
		body, how = corrupt(rng, body)
		s.m.misread++
		return fmt.Sprintf("%d bytes, %s", len(body), how)
	}
	if strings.HasPrefix(key, epoch.Prefix) { // a note has no digest
		c.spoil = nil
	}
	if err = cmp.Or(s.g.waitCall(ctx, c), err); err != nil {
		return nil, object.Info{}, err
	}
	return io.NopCloser(bytes.NewReader(body)), info, nil
}

func (s *gatedStore) Head(ctx context.Context, key string) (info object.Info, err error) {
	perr := s.g.wait(ctx, s.m, object.ErrUnavailable, false, "object head "+key, func(ctx context.Context) string {
		info, err = s.ledger.Head(ctx, key)
		return answer(err, "%d bytes", info.Size)
	})
	if err = cmp.Or(perr, err); err != nil {
		return object.Info{}, err
	}
	return info, nil
}

func (s *gatedStore) List(ctx context.Context, prefix string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		var list []object.Info
		var err error
		c := &call{m: s.m, name: "object list " + prefix, lost: object.ErrUnavailable}
		c.do = func(ctx context.Context) string {
			for info, lerr := range s.ledger.List(ctx, prefix) {
				if err = lerr; err == nil {
					list = append(list, info)
				}
			}
			return answer(err, "%d objects", len(list))
		}
		c.spoil = func(ctx context.Context, rng *rand.Rand) string {
			text := c.do(ctx)
			if err != nil || len(list) == 0 {
				return text
			}
			i := rng.IntN(len(list))
			switch rng.IntN(3) {
			case 0:
				list, err = list[:i], fmt.Errorf("%s: %w: in its middle", c.name, object.ErrUnavailable)
				return fmt.Sprintf("%s, cut after %d", text, i)
			case 1:
				s.o.hidden[list[i].Key] = true
				text += ", not " + list[i].Key
				list = slices.Delete(list, i, i+1)
				return text
			default:
				text += ", twice " + list[i].Key
				list = slices.Insert(list, i, list[i])
				return text
			}
		}
		if prefix == epoch.Prefix { // that the newest note is there is all there is to know
			c.spoil = nil
		}
		if perr := s.g.waitCall(ctx, c); perr != nil {
			yield(object.Info{}, perr)
			return
		}
		for _, info := range list {
			if !yield(info, nil) {
				return
			}
		}
		if err != nil {
			yield(object.Info{}, err)
		}
	}
}

// Delete lets each key's delete wait with the others': a fault concerns all of them.
func (s *gatedStore) Delete(ctx context.Context, list ...string) (err error) {
	list = slices.Clone(list)
	if len(list) == 0 {
		return nil
	}
	asked := time.Now()
	perr := s.g.wait(
		ctx,
		s.m,
		object.ErrUnavailable,
		true,
		fmt.Sprint("object delete ", len(list), " ", list[0], " ", digest(list)),
		func(ctx context.Context) string {
			s.o.judgeSweep(ctx, s.m, asked, list)
			err = s.ledger.Delete(ctx, list...)
			return answer(err, "ok")
		},
	)
	if perr == nil {
		return err
	}
	errs := make([]error, len(list))
	for i, key := range list {
		errs[i] = &object.DeleteError{Key: key, Err: perr}
	}
	return errors.Join(errs...)
}

func (s *gatedStore) AbortUploads(ctx context.Context, prefix string, before time.Time) (n int, err error) {
	perr := s.g.wait(ctx, s.m, object.ErrUnavailable, true, "object abort "+prefix, func(ctx context.Context) string {
		n, err = s.ledger.AbortUploads(ctx, prefix, before)
		return answer(err, "%d", n)
	})
	return n, cmp.Or(perr, err)
}

func (s *gatedStore) OldestUpload(ctx context.Context, prefix string) (oldest time.Time, err error) {
	perr := s.g.wait(ctx, s.m, object.ErrUnavailable, false, "object uploads "+prefix, func(ctx context.Context) string {
		oldest, err = s.ledger.OldestUpload(ctx, prefix)
		return answer(err, "%v", oldest.Format(time.TimeOnly))
	})
	return oldest, cmp.Or(perr, err)
}

func (s *gatedStore) Now(ctx context.Context) (now time.Time, err error) {
	perr := s.g.wait(ctx, s.m, object.ErrUnavailable, false, "object now", func(ctx context.Context) string {
		now, err = s.ledger.Now(ctx)
		return answer(err, "%v", now.Format(time.TimeOnly))
	})
	return now, cmp.Or(perr, err)
}
