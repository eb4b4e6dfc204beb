package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// job is the needed part of `restore status -o json`.
type job struct {
	Job struct {
		State, Reason, Message string
		Target                 struct{ ID string }
		StartTime, EndTime     time.Time
		Progress               struct {
			FilesDone, FilesTotal, BytesDone, BytesTotal, Retries int64 `json:",string"`
		}
	}
	took time.Duration
}

// startRestore starts a slow restore of before-sale, waits for its first copies and
// returns them.
func (d *demo) startRestore(ctx context.Context, t taken, to, rate string) (
	id string, target int64, made map[string]int64,
) {
	out := d.run(ctx, "snapshotctl", "restore", "start", "before-sale", "--to", to, "--max-rate", rate)
	if d.err != nil {
		return "", 0, nil
	}
	var job int64
	if _, err := fmt.Sscanf(out, "restore job %d creates collection "+to+" (#%d)", &job, &target); err != nil {
		d.err = fmt.Errorf("restore start printed %q: %w", out, err)
		return "", 0, nil
	}
	d.err = d.poll(ctx, copyWait, "the first copies", func() bool {
		made = d.under(target, t)
		return len(made) > 0
	})
	return fmt.Sprint(job), target, made
}

// restoreThroughCrash restores a snapshot to shop-restored, kills the server
// meanwhile, and restarts it.
func (d *demo) restoreThroughCrash(ctx context.Context, t taken) (j job) {
	began := time.Now()
	name, target, _ := d.startRestore(ctx, t, "shop-restored", "300KiB")
	j = d.job(ctx, name)
	d.kill()
	made := int64(len(d.under(target, t)))
	d.check(j.Job.State == "STATE_EXECUTING" && made > 0 && made < t.files, "killed after %d of %d copies", made, t.files)
	d.start(ctx)
	d.fails(ctx, "engine", "--collection", "shop-restored", "digest")
	d.print("No part of the collection is visible. Meanwhile a pin of the job keeps the snapshot:")
	d.run(ctx, "snapshotctl", "pin", "list", "before-sale")
	d.print("The job continues by itself when the lease of the killed server ends: three seconds here, ten by default. " +
		"The rate limit is removed.")
	d.run(ctx, "snapshotctl", "restore", "limit", name)
	d.run(ctx, "snapshotctl", "restore", "watch", name)
	j = d.job(ctx, name)
	j.took = time.Since(began)
	p := j.Job.Progress
	d.check(
		j.Job.State == "STATE_COMPLETED" && p.FilesDone == t.files && p.BytesDone == t.bytes, "COMPLETED: %d files, %s",
		p.FilesDone, size(p.BytesDone),
	)
	d.check(p.Retries > 0, "across the crash: task retries: %d", p.Retries)
	copies, total := d.under(target, t), int64(0)
	for _, n := range copies {
		total += n
	}
	d.check(
		int64(len(copies)) == t.files && total == t.bytes, "objects of the new collection: %d, %s, the same as the snapshot",
		len(copies), size(total),
	)
	return j
}

// job returns a restore job, the zero value on an error.
func (d *demo) job(ctx context.Context, id string) (j job) {
	out, err := d.command(ctx, "snapshotctl", "restore", "status", id, "-o", "json").Output()
	if err != nil || json.Unmarshal(out, &j) != nil {
		return job{}
	}
	return j
}

// under returns the sizes of the objects of a collection under all roots of a
// snapshot, by the last element of their keys.
func (d *demo) under(collection int64, t taken) map[string]int64 {
	found := map[string]int64{}
	for _, root := range t.roots {
		dir := filepath.Join(d.store(), root.Prefix, fmt.Sprint(collection))
		_ = filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err // no such folder, or a folder
			}
			info, err := e.Info()
			if err == nil {
				found[e.Name()] = info.Size()
			}
			return err
		})
	}
	return found
}

// fileOfSegment is a file in the output of the catalog and of a snapshot.
type fileOfSegment struct {
	Root      int
	Path      string
	SizeBytes int64 `json:",string"`
	Checksum  struct {
		Type  string
		Value []byte
	}
}

// sameBytes compares all files of a snapshot with those of a collection, in the same
// order.
func (d *demo) sameBytes(ctx context.Context, snapshot, collection string) {
	var list filesOfSegments
	d.decode(d.read(ctx, "snapshot", "segments", snapshot, "--files", "-o", "json"), &list)
	roots := d.describe(ctx, snapshot).Collection.Roots
	var from, to []fileOfSegment
	for _, s := range list.Segments {
		from = append(from, s.Segment.Files...)
	}
	exported := d.read(ctx, "catalog", "export", "--collection", collection)
	for lines := json.NewDecoder(strings.NewReader(exported)); d.err == nil; {
		var segment struct{ Files []fileOfSegment }
		err := lines.Decode(&segment)
		if errors.Is(err, io.EOF) {
			break
		}
		d.err = err
		to = append(to, segment.Files...)
	}
	read := func(f fileOfSegment) []byte {
		content, err := os.ReadFile(filepath.Join(d.store(), roots[f.Root].Prefix, f.Path))
		if err != nil {
			d.complain(err.Error())
		}
		return content
	}
	var total, differ int64
	seen := map[string]bool{}
	for i := range min(len(from), len(to)) {
		a, b := read(from[i]), read(to[i])
		sum := sha256.Sum256(b)
		if !bytes.Equal(a, b) || !bytes.Equal(sum[:], to[i].Checksum.Value) ||
			seen[to[i].Path] || from[i].Path == to[i].Path {
			differ++
		}
		seen[to[i].Path] = true
		total += int64(len(b))
	}
	d.check(
		len(from) > 0 && len(from) == len(to) && differ == 0,
		"%d files, %s, compared with those of the snapshot: every byte is equal", len(to), size(total),
	)
}

// failedRestore alters a file of a snapshot during its restore.
func (d *demo) failedRestore(ctx context.Context, t taken) {
	var list filesOfSegments
	d.decode(d.read(ctx, "snapshot", "segments", "--id", t.id, "--files", "-o", "json"), &list)
	id, target, made := d.startRestore(ctx, t, "shop-again", "2MiB")
	var key string // of a file without a copy
	for _, s := range list.Segments {
		for _, f := range s.Segment.Files {
			if _, ok := made[filepath.Base(f.Path)]; !ok { // the copy keeps the log number
				key = t.roots[f.Root].Prefix + f.Path
			}
		}
	}
	if d.err != nil {
		return
	}
	name := filepath.Join(d.store(), key)
	good, err := os.ReadFile(name)
	if err == nil {
		bad := slices.Clone(good)
		bad[len(bad)/2] ^= 1
		err = os.WriteFile(name, bad, 0o600)
	}
	if d.err = err; err != nil {
		return
	}
	d.print("Another program writes into a file of the snapshot during the restore: a bit of %s is flipped. "+
		"This program did that, after %d of %d copies.", key, len(made), t.files)
	out := d.fails(ctx, "snapshotctl", "restore", "watch", id)
	d.check(strings.Contains(out, key), "the error names the file")
	j := d.job(ctx, id)
	d.check(j.Job.State == "STATE_FAILED" && strings.Contains(j.Job.Message, key), "the job is FAILED, with the reason")
	d.print("All of its copies are removed:")
	d.check(
		len(made) > 0 && len(d.under(target, t)) == 0, "objects left: 0; there were %d or more, under the id %d", len(made),
		target,
	)
	collections := d.run(ctx, "snapshotctl", "catalog", "collections")
	d.check(
		strings.Contains(collections, "shop-restored") && !strings.Contains(collections, "shop-again"), "collections left: 0",
	)
	pins := d.run(ctx, "snapshotctl", "pin", "list", "before-sale")
	d.check(strings.Count(pins, "\n") == 1, "pins left: 0")
	d.print("The bit is flipped back. The name is free:")
	if d.err == nil {
		d.err = os.WriteFile(name, good, 0o600)
	}
	plan := d.run(ctx, "snapshotctl", "restore", "plan", "before-sale", "--to", "shop-again")
	d.check(strings.Contains(plan, "no conflicts"), "a restore to the same name is possible")
	d.run(ctx, "snapshotctl", "restore", "list")
	d.verify(ctx)
}
