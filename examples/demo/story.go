package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// tell runs the story. After an error the rest of it does nothing.
func tell(ctx context.Context, d *demo) {
	d.chapter("A server and a collection")
	d.say("snapshotd runs in one process here, with its etcd inside and a directory as object store. "+
		"The engine is a toy vector store (examples/engine): it writes segment files into that directory "+
		"and tells snapshotd's catalog which there are. Lines of more than %d columns are cut (…).", width)
	d.start(ctx)
	if d.err == nil {
		fmt.Printf("\n%s\n", d.paint.bold("$ export SNAPSHOTCTL_ADDR="+d.addr))
		fmt.Printf("%s\n", d.paint.bold(fmt.Sprintf("$ alias engine='engine --addr %s \\\n    --store %s'", d.addr, d.store())))
	}
	d.run(ctx, "snapshotctl", "info")
	d.run(ctx, "engine", "--collection", "shop", "create")
	d.run(ctx, "engine", "--collection", "shop", "load", "--rows", "20000")
	found := d.run(ctx, "engine", "--collection", "shop", "search", "--seed", "7")
	digest := d.run(ctx, "engine", "--collection", "shop", "digest")

	d.chapter("A snapshot")
	before := d.snapshot(ctx, "before-sale")

	d.chapter("Life goes on")
	d.run(ctx, "engine", "--collection", "shop", "delete", "--every", "3")
	d.run(ctx, "engine", "--collection", "shop", "load", "--rows", "5000", "--seed", "2")
	d.run(ctx, "engine", "--collection", "shop", "compact")
	now := d.run(ctx, "engine", "--collection", "shop", "search", "--seed", "7")
	d.check(now != found, "the search finds other rows than before")

	d.chapter("Who holds a file")
	d.say("The compaction put new segments in the place of all others, whose files are to go. The engine does not " +
		"just delete them: it asks, for any of them may be needed by a snapshot.")
	d.collect(ctx, before, 0)
	d.run(ctx, "snapshotctl", "explain", "--collection", "shop", d.fileOf(ctx, before))
	after := d.snapshot(ctx, "after-sale")
	d.run(ctx, "snapshotctl", "snapshot", "list")
	d.run(ctx, "snapshotctl", "snapshot", "describe", "before-sale")

	d.chapter("Undo")
	d.say("A snapshot is undone by dropping it. After another compaction the files of after-sale are kept by it " +
		"alone. What would a drop free?")
	d.run(ctx, "engine", "--collection", "shop", "delete", "--every", "5")
	d.run(ctx, "engine", "--collection", "shop", "compact")
	d.collect(ctx, before, after.files)
	d.run(ctx, "snapshotctl", "snapshot", "drop", "after-sale", "--dry-run")
	var dry struct {
		Usage struct {
			ExclusiveFiles, ExclusiveBytes int64 `json:",string"`
		}
	}
	d.decode(d.read(ctx, "snapshot", "drop", "after-sale", "--dry-run", "-o", "json"), &dry)
	d.check(dry.Usage.ExclusiveFiles == after.files && dry.Usage.ExclusiveBytes == after.bytes, "it would free %d files, %s: all that it has",
		dry.Usage.ExclusiveFiles, size(dry.Usage.ExclusiveBytes))
	d.say("The drop itself deletes only the objects that the snapshot consists of, and deletes them at once. Its data " +
		"files go when the engine asks for them again.")
	began := time.Now()
	d.run(ctx, "snapshotctl", "snapshot", "drop", "after-sale")
	d.gone(ctx, after)
	undo := time.Since(began)
	freed := d.collect(ctx, before, 0)
	d.check(freed.data == dry.Usage.ExclusiveFiles && freed.dataBytes == dry.Usage.ExclusiveBytes, "freed: %d files, %s, as the dry run said",
		freed.data, size(freed.dataBytes))
	d.run(ctx, "snapshotctl", "snapshot", "list")
	d.say("And the other snapshot? It names every file, with its size and SHA-256; do they hold?")
	d.verify(ctx)

	d.chapter("The collection is dropped")
	d.run(ctx, "snapshotctl", "catalog", "drop-collection", "shop")
	d.fails(ctx, "engine", "--collection", "shop", "digest")
	d.say("The snapshot goes on without it.")
	files, total := d.verify(ctx)
	d.check(files == before.files && total == before.bytes, "the snapshot's record counts the same: %d files", before.files)
	d.say("The collector takes what a dropped collection leaves, after three hours. What if that time is over? It is told not " +
		"to wait, and to say first what it would do.")
	d.run(ctx, "snapshotctl", "gc", "run", "--tolerance", "0s", "--dry-run")
	had := d.measure()
	d.run(ctx, "snapshotctl", "gc", "run", "--tolerance", "0s", "--wait")
	has := d.measure()
	d.check(has.data == before.files && has.data < had.data, "of %d data files %d are left: just those of the snapshot", had.data, has.data)
	d.verify(ctx)
	d.say("And is it still readable? The engine opens it in place of the collection.")
	again := d.run(ctx, "engine", "--snapshot", "before-sale", "search", "--seed", "7")
	d.check(again == found, "the same rows as before the sale")
	d.check(d.run(ctx, "engine", "--snapshot", "before-sale", "digest") == digest, "the same digest as before the sale, of all rows")

	d.chapter("A restore, and a crash in the middle")
	d.say("Reading is not enough: the collection is to come back, to be written to. A restore makes a new one of the " +
		"snapshot. What would it do?")
	d.run(ctx, "snapshotctl", "restore", "plan", "before-sale", "--to", "shop-restored")
	d.say("The engine asks nobody when that is there. It waits for the event. And so that something can happen in the " +
		"middle, the copying is slowed down.")
	d.await(ctx, "shop-restored")
	copied := d.restoreThroughCrash(ctx, before)
	d.say("And the engine, which waited all the time?")
	said := d.awaited()
	d.check(said == digest, "the engine opened the new collection because of the event, and found the same digest as before the sale")
	d.check(d.run(ctx, "engine", "--collection", "shop-restored", "search", "--seed", "7") == found, "the same rows as before the sale")
	d.check(d.run(ctx, "engine", "--collection", "shop-restored", "digest") == digest, "the same digest as before the sale, of all rows")
	d.sameBytes(ctx, "before-sale", "shop-restored")

	d.chapter("A restore that cannot succeed")
	d.failedRestore(ctx, before)

	d.summary(before, undo, freed, copied)
}

// taken is a snapshot that was taken.
type taken struct {
	id            string
	prefix        string // of its own objects
	roots         []storeRoot
	files, bytes  int64 // that it references
	segments      int64
	rows          int64
	cuts          []string
	own, ownBytes int64 // objects that snapshotd wrote for it
	moved         int64 // bytes of data that it wrote
	took          time.Duration
}

// description is what is needed of `snapshot describe -o json`, which writes
// 64-bit numbers as strings.
type description struct {
	Prefix   string
	Snapshot struct {
		ID                     string
		CreateTime, CommitTime time.Time
		Totals                 struct {
			Segments, Rows, Files, Bytes int64 `json:",string"`
		}
		Cuts []struct {
			Channel  string
			Position struct{ Timestamp string }
		}
	}
	Collection struct{ Roots []storeRoot }
}

type storeRoot struct{ Prefix string }

func (d *demo) describe(ctx context.Context, name string) (v description) {
	d.decode(d.read(ctx, "snapshot", "describe", name, "-o", "json"), &v)
	return v
}

func (d *demo) decode(text string, v any) {
	if d.err == nil {
		d.err = json.Unmarshal([]byte(text), v)
	}
}

// snapshot takes a snapshot and measures what it did to the object store.
func (d *demo) snapshot(ctx context.Context, name string) taken {
	old := d.measure()
	d.run(ctx, "snapshotctl", "snapshot", "create", name, "--collection", "shop")
	now := d.measure()
	v := d.describe(ctx, name)
	t := taken{
		id: v.Snapshot.ID, prefix: v.Prefix, roots: v.Collection.Roots,
		segments: v.Snapshot.Totals.Segments, rows: v.Snapshot.Totals.Rows,
		files: v.Snapshot.Totals.Files, bytes: v.Snapshot.Totals.Bytes,
		own: now.own - old.own, ownBytes: now.ownBytes - old.ownBytes, moved: now.dataBytes - old.dataBytes,
		took: v.Snapshot.CommitTime.Sub(v.Snapshot.CreateTime),
	}
	for _, c := range v.Snapshot.Cuts {
		t.cuts = append(t.cuts, c.Channel+" before "+c.Position.Timestamp)
	}
	d.say("The object store, measured: %d data files of %s before and %d of %s after it. For itself the snapshot wrote %d objects of %s.",
		old.data, size(old.dataBytes), now.data, size(now.dataBytes), t.own, size(t.ownBytes))
	d.check(now.data == old.data && t.moved == 0, "bytes of data moved: 0")
	return t
}

// measured is what is in the object store.
type measured struct{ data, dataBytes, own, ownBytes int64 }

func (d *demo) measure() (m measured) {
	if d.err != nil {
		return m
	}
	d.err = filepath.WalkDir(d.store(), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		switch rel, _ := filepath.Rel(d.store(), path); {
		case strings.HasPrefix(rel, "gc/"): // notes of the collector
		case strings.HasPrefix(rel, "snapshots/"):
			m.own++
			m.ownBytes += info.Size()
		default:
			m.data++
			m.dataBytes += info.Size()
		}
		return nil
	})
	return m
}

// filesOfSegments is what is needed of `snapshot segments --files -o json`.
type filesOfSegments struct {
	Segments []struct {
		Segment struct {
			Files []fileOfSegment
		}
	}
}

// verify reads every file of the snapshot before-sale and compares it with the
// record.
func (d *demo) verify(ctx context.Context) (files, total int64) {
	const name = "before-sale"
	var list filesOfSegments
	d.decode(d.read(ctx, "snapshot", "segments", name, "--files", "-o", "json"), &list)
	roots := d.describe(ctx, name).Collection.Roots
	began := time.Now()
	var bad []string
	for _, s := range list.Segments {
		for _, f := range s.Segment.Files {
			files++
			content, err := os.ReadFile(filepath.Join(d.store(), roots[f.Root].Prefix, f.Path))
			total += int64(len(content))
			sum := sha256.Sum256(content)
			if err != nil || int64(len(content)) != f.SizeBytes || f.Checksum.Type != "SHA256" || !bytes.Equal(sum[:], f.Checksum.Value) {
				bad = append(bad, f.Path)
			}
		}
	}
	d.check(files > 0 && len(bad) == 0, "%d files, %s, read and compared in %s: all are there and unaltered",
		files, size(total), round(time.Since(began)))
	for _, path := range bad {
		d.complain("missing or altered: " + path)
	}
	return files, total
}

// collect has the engine ask for files that it does not need any more, and
// compares what it did with what it says. It returns what was deleted. The
// snapshots before-sale and after-sale have to hold all of their files; held by
// the second are so many, none when it is gone or needs only what lives.
func (d *demo) collect(ctx context.Context, before taken, afterHolds int64) (freed measured) {
	old := d.measure()
	out := d.run(ctx, "engine", "--collection", "shop", "collect")
	now := d.measure()
	freed = measured{data: old.data - now.data, dataBytes: old.dataBytes - now.dataBytes}
	d.check(strings.Contains(out, fmt.Sprintf("deleted: %d files\n", freed.data)), "data files deleted: %d, %s", freed.data, size(freed.dataBytes))
	d.check(strings.Contains(out, fmt.Sprintf("held by before-sale: %d files\n", before.files)), "not deleted: all %d files that before-sale needs", before.files)
	if afterHolds > 0 {
		d.check(strings.Contains(out, fmt.Sprintf("held by after-sale: %d files\n", afterHolds)), "not deleted: all %d files that after-sale needs", afterHolds)
	}
	return freed
}

// fileOf returns the key of a file that a snapshot has.
func (d *demo) fileOf(ctx context.Context, t taken) string {
	var list filesOfSegments
	d.decode(d.read(ctx, "snapshot", "segments", "--id", t.id, "--files", "--limit", "1", "-o", "json"), &list)
	for _, s := range list.Segments {
		for _, f := range s.Segment.Files {
			return t.roots[f.Root].Prefix + f.Path
		}
	}
	return ""
}

// gone waits until nothing is left of a dropped snapshot.
func (d *demo) gone(ctx context.Context, t taken) {
	if d.err != nil {
		return
	}
	began := time.Now()
	d.err = d.poll(ctx, removeWait, "the snapshot's record to go", func() bool {
		err := d.command(ctx, "snapshotctl", "snapshot", "get", "--id", t.id).Run()
		exit, _ := errors.AsType[*exec.ExitError](err)
		return exit != nil && exit.ExitCode() == 3 // NOT_FOUND
	})
	_, err := os.Stat(filepath.Join(d.store(), t.prefix))
	d.check(errors.Is(err, fs.ErrNotExist), "its %d objects under %s are gone, within %s", t.own, t.prefix, round(time.Since(began)))
}

// summary says in plain words what happened.
func (d *demo) summary(t taken, undo time.Duration, freed measured, restored job) {
	d.chapter("In plain words")
	d.say("What was captured? All of collection shop: %d rows in %d segments, as of one cut per channel: %s.",
		t.rows, t.segments, strings.Join(t.cuts, ", "))
	d.say("What did it cost? %s, and %d objects of %s in all. Bytes of data moved: %d.",
		round(t.took), t.own, size(t.ownBytes), t.moved)
	d.say("What protects it? The snapshot keeps its %d files (%s): their deletion is not granted for as long as it "+
		"exists, whatever becomes of the collection, and `snapshotctl explain` says so. It does not hold off others: a "+
		"lifecycle rule of the bucket, or an rm, has to spare these files by itself.", t.files, size(t.bytes))
	d.say("How to undo it? By `snapshotctl snapshot drop before-sale`; with --dry-run it says what that would free. For "+
		"after-sale the drop took %s until the last of its own objects was gone, and the engine then got %d files "+
		"(%s) to delete.", round(undo), freed.data, size(freed.dataBytes))
	d.say("How to get the data back? By `snapshotctl restore start before-sale --to NAME`. It took %s here, most of which "+
		"was waiting after the crash: %d files and %s were copied, inside the object store. It is undone by `snapshotctl restore cancel` "+
		"while it goes on, and by `snapshotctl catalog drop-collection` afterwards. One that cannot succeed leaves nothing.",
		round(restored.took), t.files, size(t.bytes))
	d.say("What deletes the rest? The engine asks, as above; what it forgets, such as all of a dropped collection, the collector " +
		"takes after three hours, unless a snapshot holds it.")
}
