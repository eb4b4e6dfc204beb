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

// story runs the demonstration. After an error the remaining steps do nothing.
func story(ctx context.Context, d *demo) {
	d.chapter("A server and a collection")
	d.print("snapshotd runs in one process here, with its etcd inside and a directory as object store. "+
		"The engine is a toy vector store (examples/engine): it writes segment files into that directory "+
		"and registers them in snapshotd's catalog. Lines of more than %d columns are cut (…).", width)
	d.start(ctx)
	if d.err == nil {
		fmt.Printf("\n%s\n", d.paint.bold("$ export SNAPSHOTCTL_ADDR="+d.addr))
		fmt.Printf("%s\n", d.paint.bold(fmt.Sprintf(
			"$ alias engine='engine --addr %s \\\n    --store %s'", d.addr, d.store(),
		)))
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
	d.check(now != found, "the search returns other rows than before")

	d.chapter("Who holds a file")
	d.print("The compaction replaced all segments by new ones. The engine does not delete the old files at once: it " +
		"requests their delete, because a snapshot may hold them.")
	d.collect(ctx, before, 0)
	d.run(ctx, "snapshotctl", "explain", "--collection", "shop", d.fileOf(ctx, before))
	after := d.snapshot(ctx, "after-sale")
	d.run(ctx, "snapshotctl", "snapshot", "list")
	d.run(ctx, "snapshotctl", "snapshot", "describe", "before-sale")

	d.chapter("Undo")
	d.print("A drop undoes a snapshot. After another compaction only after-sale holds its files. A dry run shows what " +
		"a drop would free.")
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
	d.check(dry.Usage.ExclusiveFiles == after.files && dry.Usage.ExclusiveBytes == after.bytes,
		"it would free %d files, %s: all of its files", dry.Usage.ExclusiveFiles, size(dry.Usage.ExclusiveBytes))
	d.print("The drop itself deletes only the snapshot's own objects, at once. Its data files are deleted when the " +
		"engine requests them again.")
	began := time.Now()
	d.run(ctx, "snapshotctl", "snapshot", "drop", "after-sale")
	d.gone(ctx, after)
	undo := time.Since(began)
	freed := d.collect(ctx, before, 0)
	d.check(freed.data == dry.Usage.ExclusiveFiles && freed.dataBytes == dry.Usage.ExclusiveBytes,
		"freed: %d files, %s, as in the dry run", freed.data, size(freed.dataBytes))
	d.run(ctx, "snapshotctl", "snapshot", "list")
	d.print("The other snapshot lists every file with its size and SHA-256. A check of all of them:")
	d.verify(ctx)

	d.chapter("The collection is dropped")
	d.run(ctx, "snapshotctl", "catalog", "drop-collection", "shop")
	d.fails(ctx, "engine", "--collection", "shop", "digest")
	d.print("The snapshot continues without its collection.")
	files, total := d.verify(ctx)
	d.check(
		files == before.files && total == before.bytes, "the snapshot's record has the same number: %d files", before.files,
	)
	d.print("The collector deletes the rest of a dropped collection after three hours. Here it runs without that " +
		"tolerance, first as a dry run.")
	d.run(ctx, "snapshotctl", "gc", "run", "--tolerance", "0s", "--dry-run")
	had := d.measure()
	d.run(ctx, "snapshotctl", "gc", "run", "--tolerance", "0s", "--wait")
	has := d.measure()
	d.check(
		has.data == before.files && has.data < had.data, "of %d data files %d are left: exactly those of the snapshot",
		had.data, has.data,
	)
	d.verify(ctx)
	d.print("It is still readable. The engine opens it in place of the collection.")
	reopened := d.run(ctx, "engine", "--snapshot", "before-sale", "search", "--seed", "7")
	d.check(reopened == found, "the same rows as before the sale")
	d.check(
		d.run(ctx, "engine", "--snapshot", "before-sale", "digest") == digest,
		"the same digest as before the sale, of all rows",
	)

	d.chapter("A restore, and a crash in the middle")
	d.print("A restore brings the collection back for writes, as a new collection. Its plan:")
	d.run(ctx, "snapshotctl", "restore", "plan", "before-sale", "--to", "shop-restored")
	d.print("The engine waits for the event of the new collection. The copies are slowed down, so that a crash can " +
		"happen in between.")
	d.await(ctx, "shop-restored")
	copied := d.restoreThroughCrash(ctx, before)
	d.print("The engine, which waited all the time:")
	last := d.awaited()
	d.check(last == digest, "the engine opened the new collection on its event, with the same digest as before the sale")
	d.check(
		d.run(ctx, "engine", "--collection", "shop-restored", "search", "--seed", "7") == found,
		"the same rows as before the sale",
	)
	d.check(
		d.run(ctx, "engine", "--collection", "shop-restored", "digest") == digest,
		"the same digest as before the sale, of all rows",
	)
	d.sameBytes(ctx, "before-sale", "shop-restored")

	d.chapter("A restore that cannot succeed")
	d.failedRestore(ctx, before)

	d.summary(before, undo, freed, copied)
}

// taken is a snapshot with its measurements.
type taken struct {
	id            string
	prefix        string // of its own objects
	roots         []storeRoot
	files, bytes  int64 // that it holds
	segments      int64
	rows          int64
	cuts          []string
	own, ownBytes int64 // its own objects
	moved         int64 // bytes of data files written
	took          time.Duration
}

// description is the needed part of `snapshot describe -o json`, which has 64-bit
// numbers as strings.
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

// snapshot takes a snapshot and measures the change of the object store.
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
	d.print("The object store has %d data files of %s before and %d of %s after it. "+
		"The snapshot has %d own objects of %s.",
		old.data, size(old.dataBytes), now.data, size(now.dataBytes), t.own, size(t.ownBytes))
	d.check(now.data == old.data && t.moved == 0, "bytes of data moved: 0")
	return t
}

// measured is the content of the object store.
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
		case strings.HasPrefix(rel, "gc/"): // records of the collector
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

// filesOfSegments is the needed part of `snapshot segments --files -o json`.
type filesOfSegments struct {
	Segments []struct {
		Segment struct {
			Files []fileOfSegment
		}
	}
}

// verify reads every file of the snapshot before-sale and compares it with its
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
			if err != nil || int64(len(content)) != f.SizeBytes ||
				f.Checksum.Type != "SHA256" || !bytes.Equal(sum[:], f.Checksum.Value) {
				bad = append(bad, f.Path)
			}
		}
	}
	d.check(files > 0 && len(bad) == 0, "%d files, %s, read and compared in %s: all exist, unaltered",
		files, size(total), round(time.Since(began)))
	for _, path := range bad {
		d.complain("missing or altered: " + path)
	}
	return files, total
}

// collect makes the engine request the delete of unneeded files, and compares its
// output with the object store. It returns the deleted files. before-sale must hold
// all of its files, after-sale afterHolds of them, 0 if it is dropped or has live
// files only.
func (d *demo) collect(ctx context.Context, before taken, afterHolds int64) (freed measured) {
	old := d.measure()
	out := d.run(ctx, "engine", "--collection", "shop", "collect")
	now := d.measure()
	freed = measured{data: old.data - now.data, dataBytes: old.dataBytes - now.dataBytes}
	d.check(
		strings.Contains(out, fmt.Sprintf("deleted: %d files\n", freed.data)), "data files deleted: %d, %s", freed.data,
		size(freed.dataBytes),
	)
	d.check(
		strings.Contains(out, fmt.Sprintf("held by before-sale: %d files\n", before.files)),
		"not deleted: all %d files that before-sale holds", before.files,
	)
	if afterHolds > 0 {
		d.check(
			strings.Contains(out, fmt.Sprintf("held by after-sale: %d files\n", afterHolds)),
			"not deleted: all %d files that after-sale holds", afterHolds,
		)
	}
	return freed
}

// fileOf returns the key of a file of a snapshot.
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

// gone waits until a dropped snapshot is removed.
func (d *demo) gone(ctx context.Context, t taken) {
	if d.err != nil {
		return
	}
	began := time.Now()
	d.err = d.poll(ctx, removeWait, "the removal of the snapshot's record", func() bool {
		err := d.command(ctx, "snapshotctl", "snapshot", "get", "--id", t.id).Run()
		exit, _ := errors.AsType[*exec.ExitError](err)
		return exit != nil && exit.ExitCode() == 3 // NOT_FOUND
	})
	_, err := os.Stat(filepath.Join(d.store(), t.prefix))
	d.check(errors.Is(err, fs.ErrNotExist), "its %d objects under %s are deleted, within %s",
		t.own, t.prefix, round(time.Since(began)))
}

// summary prints the results in plain words.
func (d *demo) summary(t taken, undo time.Duration, freed measured, restored job) {
	d.chapter("In plain words")
	d.print("Captured: all of collection shop, %d rows in %d segments, with one cut per channel: %s.",
		t.rows, t.segments, strings.Join(t.cuts, ", "))
	d.print("Cost: %s, and %d objects of %s in total. Bytes of data moved: %d.",
		round(t.took), t.own, size(t.ownBytes), t.moved)
	d.print("Protection: the snapshot holds its %d files (%s): no delete of them is granted while it exists, whatever "+
		"happens to the collection, as `snapshotctl explain` shows. It does not prevent other deleters: a lifecycle "+
		"rule of the bucket, or an rm, must spare these files.", t.files, size(t.bytes))
	d.print("Undo: `snapshotctl snapshot drop before-sale`; --dry-run shows the effect. The drop of after-sale took %s "+
		"until its last own object was deleted; then the engine was granted %d files (%s).",
		round(undo), freed.data, size(freed.dataBytes))
	d.print("Restore: `snapshotctl restore start before-sale --to NAME`. It took %s here, mostly the wait after the "+
		"crash: %d files and %s were copied, inside the object store. `snapshotctl restore cancel` undoes it while it "+
		"runs, `snapshotctl catalog drop-collection` afterwards. A failed restore leaves nothing.",
		round(restored.took), t.files, size(t.bytes))
	d.print("Deletes: the engine requests them, as above; the collector deletes the rest, such as a dropped collection, " +
		"after three hours, unless a snapshot holds it.")
}
