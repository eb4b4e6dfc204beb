package gc

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # Halts
//
// What the leader cannot do is known to it alone, and any replica may be asked. So
// the leader writes into the record of its last round what stands still: with each
// round, and between rounds when the list has changed. A replica shows it while the
// one that wrote it leads.
//
//	report  compares: the leader's election key, no /behind, the record as read
//	        puts: the record with the halts, the round as it was
//
//	report: no answer     the next look compares and writes again
//	leader dies           its list is ignored, since another leads; that one writes its own
//	the list is the same  nothing is written

// maxHalts bounds the halts of the record.
const maxHalts = 64

// Halt is something of expiry, removal or collection that stands still.
type Halt struct {
	Name     string
	What     string // what stands still
	Error    string
	Since    time.Time // zero: not known
	Replica  string    // empty: all
	Failures int64     // since then; 0: not known
}

// problems are those that the leader's loops meet.
type problems struct {
	round, note, report, deletes, unconfirmed, sweep *lasting.Problem
}

func newProblems(o *Options) problems {
	add := func(name, text, stops string) *lasting.Problem { return o.Problems.Add(o.Log, name, text, stops) }
	return problems{
		round:   add("collect", "a round of the collector failed and will be made again", "collection of what was dropped"),
		note:    add("note of a round", "the summary of the last round could not be written", ""),
		report:  add("note of halts", "what stands still could not be written", ""),
		deletes: add("delete", "files that nothing holds could not be deleted; it is tried again", "deletion of what was collected"),
		unconfirmed: add("unconfirmed", "granted units are not confirmed; their callers must delete them and call ConfirmReclaimed",
			"deletion of what callers were granted"),
		sweep: add("sweep", "a sweep failed; the next one goes on", "deletion of objects without a record"),
	}
}

// Halts returns what stands still in this process.
func (g *GC) Halts() []Halt {
	var list []Halt
	for _, s := range g.o.Problems.States() {
		if s.Error == "" || s.Stops == "" || len(list) == maxHalts {
			continue
		}
		list = append(list, Halt{
			Name: s.Name, What: s.Stops, Error: record.Clip(s.Error, record.MaxText), Since: s.Since, Replica: g.o.Replica, Failures: s.Failed,
		})
	}
	return list
}

// HaltsOf returns what the leader's record says, and which leader wrote it.
func HaltsOf(rec *storagev1.Round) (list []Halt, replica string) {
	for _, h := range rec.GetHalts() {
		list = append(list, Halt{
			Name: h.GetName(), What: h.GetWhat(), Error: h.GetError(), Since: record.Time(h.GetSince()), Replica: rec.GetHaltedReplica(),
		})
	}
	return list, rec.GetHaltedReplica()
}

// setHalts puts what stands still into a record.
func (g *GC) setHalts(rec *storagev1.Round) {
	rec.Halts, rec.HaltedReplica = nil, g.o.Replica
	for _, h := range g.Halts() {
		rec.Halts = append(rec.Halts, &storagev1.Halt{Name: h.Name, What: h.What, Error: h.Error, Since: record.Nanos(h.Since)})
	}
}

// haltsKey is equal for lists that need not be written again.
func haltsKey(rec *storagev1.Round) string {
	names := []string{rec.GetHaltedReplica()}
	for _, h := range rec.GetHalts() {
		names = append(names, h.GetName())
	}
	if len(names) == 1 { // nothing stands still, whoever says so
		return ""
	}
	slices.Sort(names[1:])
	return strings.Join(names, "\x00")
}

// Report keeps the leader's list of halts current until ctx ends.
func (g *GC) Report(ctx context.Context, fence meta.Cond) error {
	ticker := time.NewTicker(g.o.Interval / 10)
	defer ticker.Stop()
	written, known := "", false // known says that written is what the record has
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now := &storagev1.Round{}
		g.setHalts(now)
		if known && haltsKey(now) == written {
			continue
		}
		err := g.report(ctx, fence)
		if ctx.Err() != nil {
			return nil
		}
		g.problems.report.Note(err)
		if known = err == nil; known {
			written = haltsKey(now)
		}
	}
}

// report writes the halts into the record, unless it has them.
func (g *GC) report(ctx context.Context, fence meta.Cond) error {
	kv, found, _, err := g.kv.Get(ctx, keys.Round)
	if err != nil {
		return err
	}
	rec, is := &storagev1.Round{Format: record.Format}, meta.Absent(keys.Round)
	if found {
		if err := record.Decode(kv, rec); err != nil {
			return err
		}
		is = meta.Unchanged(keys.Round, kv.ModRevision)
	}
	was := haltsKey(rec)
	g.setHalts(rec)
	if haltsKey(rec) == was {
		return nil
	}
	// A round that is noted meanwhile has the list as well.
	_, err = g.kv.Txn(ctx, meta.Txn{
		If:   []meta.Cond{fence, meta.Absent(keys.Behind), is},
		Then: []meta.Op{meta.Put(keys.Round, record.Encode(rec))},
	})
	return err
}
