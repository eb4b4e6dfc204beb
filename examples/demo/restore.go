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

// job is what is needed of `restore status -o json`.
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

// startRestore starts a restore of before-sale that is slowed down, and returns
// when the first of its copies are there, and which.
func (d *demo) startRestore(ctx context.Context, t taken, to, rate string) (id string, target int64, made map[string]int64) {
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

// restoreThroughCrash restores a snapshot to shop-restored, kills the server in
// the middle of it, and starts it again.
func (d *demo) restoreThroughCrash(ctx context.Context, t taken) (j job) {
	began := time.Now()
	name, target, _ := d.startRestore(ctx, t, "shop-restored", "300KiB")
	j = d.job(ctx, name)
	d.kill()
	made := int64(len(d.under(target, t)))
	d.check(j.Job.State == "STATE_EXECUTING" && made > 0 && made < t.files, "killed in the middle: %d of %d copies are there", made, t.files)
	d.start(ctx)
	d.fails(ctx, "engine", "--collection", "shop-restored", "digest")
	d.say("Nobody sees a part of a collection. Who keeps the snapshot meanwhile?")
	d.run(ctx, "snapshotctl", "pin", "list", "before-sale")
	d.say("The job goes on by itself, when the lease of what was killed has ended: three seconds here, ten by default. The limit is lifted.")
	d.run(ctx, "snapshotctl", "restore", "limit", name)
	d.run(ctx, "snapshotctl", "restore", "watch", name)
	j = d.job(ctx, name)
	j.took = time.Since(began)
	p := j.Job.Progress
	d.check(j.Job.State == "STATE_COMPLETED" && p.FilesDone == t.files && p.BytesDone == t.bytes, "COMPLETED: %d files, %s", p.FilesDone, size(p.BytesDone))
	d.check(p.Retries > 0, "through the crash: tasks begun again: %d", p.Retries)
	copies, total := d.under(target, t), int64(0)
	for _, n := range copies {
		total += n
	}
	d.check(int64(len(copies)) == t.files && total == t.bytes, "objects of the new collection: %d, %s, as many as the snapshot has", len(copies), size(total))
	return j
}

// job returns a restore job; a zero one when it cannot be had.
func (d *demo) job(ctx context.Context, id string) (j job) {
	out, err := d.command(ctx, "snapshotctl", "restore", "status", id, "-o", "json").Output()
	if err != nil || json.Unmarshal(out, &j) != nil {
		return job{}
	}
	return j
}

// under returns the objects of a collection under all roots of a snapshot's, by
// the last element of their keys, with their sizes.
func (d *demo) under(collection int64, t taken) map[string]int64 {
	found := map[string]int64{}
	for _, root := range t.roots {
		_ = filepath.WalkDir(filepath.Join(d.store(), root.Prefix, fmt.Sprint(collection)), func(_ string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err // there is no such folder, or it is one
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

// fileOfSegment is a file as the catalog and a snapshot tell of it.
type fileOfSegment struct {
	Root      int
	Path      string
	SizeBytes int64 `json:",string"`
	Checksum  struct {
		Type  string
		Value []byte
	}
}

// sameBytes compares all files of a snapshot with those of a collection, which
// come in the same order.
func (d *demo) sameBytes(ctx context.Context, snapshot, collection string) {
	var list filesOfSegments
	d.decode(d.read(ctx, "snapshot", "segments", snapshot, "--files", "-o", "json"), &list)
	roots := d.describe(ctx, snapshot).Collection.Roots
	var from, to []fileOfSegment
	for _, s := range list.Segments {
		from = append(from, s.Segment.Files...)
	}
	for lines := json.NewDecoder(strings.NewReader(d.read(ctx, "catalog", "export", "--collection", collection))); d.err == nil; {
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
		if !bytes.Equal(a, b) || !bytes.Equal(sum[:], to[i].Checksum.Value) || seen[to[i].Path] || from[i].Path == to[i].Path {
			differ++
		}
		seen[to[i].Path] = true
		total += int64(len(b))
	}
	d.check(len(from) > 0 && len(from) == len(to) && differ == 0, "%d files, %s, compared with those of the snapshot: every byte is equal", len(to), size(total))
}

// failedRestore alters a file of a snapshot while that is restored.
func (d *demo) failedRestore(ctx context.Context, t taken) {
	var list filesOfSegments
	d.decode(d.read(ctx, "snapshot", "segments", "--id", t.id, "--files", "-o", "json"), &list)
	id, target, made := d.startRestore(ctx, t, "shop-again", "2MiB")
	var key string // of a file that is not copied yet
	for _, s := range list.Segments {
		for _, f := range s.Segment.Files {
			if _, ok := made[filepath.Base(f.Path)]; !ok { // the copy keeps its log's number
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
	d.say("In the middle of it somebody who knows of no snapshot writes into one of its files: a bit of %s is flipped. "+
		"This program did that, when %d of %d files had been copied.", key, len(made), t.files)
	out := d.fails(ctx, "snapshotctl", "restore", "watch", id)
	d.check(strings.Contains(out, key), "the error names the file")
	j := d.job(ctx, id)
	d.check(j.Job.State == "STATE_FAILED" && strings.Contains(j.Job.Message, key), "the job is FAILED, and says why")
	d.say("Is anything left of what it had made?")
	d.check(len(made) > 0 && len(d.under(target, t)) == 0, "objects left: 0; there were %d or more, under the id %d", len(made), target)
	collections := d.run(ctx, "snapshotctl", "catalog", "collections")
	d.check(strings.Contains(collections, "shop-restored") && !strings.Contains(collections, "shop-again"), "collections left: 0")
	pins := d.run(ctx, "snapshotctl", "pin", "list", "before-sale")
	d.check(strings.Count(pins, "\n") == 1, "pins left: 0")
	d.say("The bit is flipped back. Is the name free?")
	if d.err == nil {
		d.err = os.WriteFile(name, good, 0o600)
	}
	plan := d.run(ctx, "snapshotctl", "restore", "plan", "before-sale", "--to", "shop-again")
	d.check(strings.Contains(plan, "no conflicts"), "it could be restored under the same name")
	d.run(ctx, "snapshotctl", "restore", "list")
	d.verify(ctx)
}
