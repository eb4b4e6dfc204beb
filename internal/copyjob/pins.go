package copyjob

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// # Pins of sources
//
// A file without a registered ETag is pinned to its ETag at the first attempt of its
// task. These ETags are stored in the object store of the snapshots, before the first
// copy of the task, so that each later attempt copies the same versions:
//
//	gc/restore/<job>/pins-<task>-<part>.json
//
// A part has the ETags of up to filesPerPart files, in the order of the task's plan,
// which follows from the job and the snapshot alone. Files with a registered ETag are
// not in it, and a task of such files alone has no part.
//
//	none ---- create, if absent ----> present ---- roll back, forget ----> none
//
// A part is created only if it is absent, and never changes: of two concurrent
// attempts the first one decides, and the other reads its part. All parts stay until
// the job's record is removed, also for a COMPLETED job: a worker that was frozen
// before its first copy then finds them when it continues, and cannot pin another
// version and copy it over the target. They are deleted before the job's record.
//
// # Failures
//
//	source altered before      the version at the first attempt is copied, as without
//	the first attempt          pins: nothing shows the difference
//	source altered between     the copy fails by its ETag: FAILED, with the name
//	attempts
//	part cannot be created     no copy is made; the next attempt reads the part, or
//	                           creates it. A create that arrives late wins or loses
//	                           like any other
//	process dies after some    the next attempt reads these, and creates the others
//	parts
//	part cannot be read, or    as when a store answers with an error that may pass:
//	is damaged                 the task is tried again, up to the cap of failures. The
//	                           part is never replaced
//	part created late, after   roll back: it is deleted when the job is forgotten;
//	the job has ended          after that by a sweep, since its id has no record

// filesPerPart is the number of files whose ETags one object has; maxPinsBytes bounds its
// size at a read.
const (
	filesPerPart = 4096
	maxPinsBytes = 8 << 20
)

// errPins means that an object of pins does not match its digest.
var errPins = errors.New("the pinned ETags of a task's files are damaged")

// pins is the content of an object of pins.
type pins struct {
	FormatVersion int      `json:"format_version"`
	Job           int64    `json:"job,string"`
	Task          int64    `json:"task,string"`
	Part          int      `json:"part"`
	ETags         []string `json:"etags"`
	SHA256        string   `json:"sha256"` // of the files and their ETags
}

// pinSources sets the ETag of each file without one to its ETag at the task's first
// attempt.
func (a *attempt) pinSources(ctx context.Context, b *budget, files []*fileCopy) error {
	var unpinned []*fileCopy
	for _, f := range files {
		if f.from.ETag == "" {
			unpinned = append(unpinned, f)
		}
	}
	for part := 0; len(unpinned) > 0; part++ {
		n := min(filesPerPart, len(unpinned))
		if err := a.pinPart(ctx, b, part, unpinned[:n]); err != nil {
			return err
		}
		unpinned = unpinned[n:]
	}
	return nil
}

// pinPart pins the files of one part.
func (a *attempt) pinPart(ctx context.Context, b *budget, part int, files []*fileCopy) error {
	store, err := a.job.pinStore(a.worker.o)
	if err != nil {
		return err
	}
	key := catalog.PinsKey(a.jobID, a.number, part)
	if a.attempt > 1 {
		if err := a.readPins(ctx, b, store, key, part, files); !errors.Is(err, object.ErrNotFound) {
			return err
		}
	}
	etags, err := a.sourceETags(ctx, b, files)
	if err != nil {
		return err
	}
	data, err := json.Marshal(&pins{
		FormatVersion: 1, Job: a.jobID, Task: a.number, Part: part, ETags: etags, SHA256: pinsDigest(files, etags),
	})
	if err != nil {
		return err
	}
	if err := b.spend(ctx, 1, 0); err != nil {
		return err
	}
	_, err = store.Create(ctx, key, data)
	switch {
	case errors.Is(err, object.ErrExists): // written by this attempt or another one
		return a.readPins(ctx, b, store, key, part, files)
	case err != nil:
		return fmt.Errorf("pin the ETags of the files of task %d: %w", a.number, err)
	}
	for i, f := range files {
		f.from.ETag = etags[i]
	}
	return nil
}

// readPins sets the ETags of files from an object of pins.
func (a *attempt) readPins(
	ctx context.Context, b *budget, store object.Store, key string, part int, files []*fileCopy,
) error {
	if err := b.spend(ctx, 1, 0); err != nil {
		return err
	}
	data, err := object.ReadAll(ctx, store, key, maxPinsBytes)
	if err != nil {
		return fmt.Errorf("read the pinned ETags of the files of task %d: %w", a.number, err)
	}
	p := &pins{}
	switch err := json.Unmarshal(data, p); {
	case err != nil:
		return fmt.Errorf("%w: %s: %w", errPins, key, err)
	case p.FormatVersion != 1 || p.Job != a.jobID || p.Task != a.number || p.Part != part:
		return fmt.Errorf("%w: %s is of job %d, task %d, part %d, format %d",
			errPins, key, p.Job, p.Task, p.Part, p.FormatVersion)
	case len(p.ETags) != len(files) || p.SHA256 != pinsDigest(files, p.ETags):
		return fmt.Errorf("%w: %s has %d ETags for %d files, or its digest does not match",
			errPins, key, len(p.ETags), len(files))
	}
	for i, f := range files {
		f.from.ETag = p.ETags[i]
	}
	return nil
}

// pinsDigest returns the digest of files and their ETags.
func pinsDigest(files []*fileCopy, etags []string) string {
	h := sha256.New()
	for i, f := range files {
		_, _ = fmt.Fprintf(h, "%s\x00%s\x00%d\x00%s\n", f.alias, f.from.Key, f.from.Size, etags[i]) // it never fails
	}
	return hex.EncodeToString(h.Sum(nil))
}

// sourceETags returns the present ETags of files, by listing their locations.
func (a *attempt) sourceETags(ctx context.Context, b *budget, files []*fileCopy) ([]string, error) {
	found, err := a.list(ctx, b, files, func(f *fileCopy) location { return f.source })
	if err != nil {
		return nil, err
	}
	etags := make([]string, len(files))
	at := make(map[*fileCopy]int, len(files))
	for i, f := range files {
		at[f] = i
	}
	return etags, forEach(ctx, files, func(ctx context.Context, f *fileCopy) error {
		info, ok := found[f.source][f.from.Key]
		if !ok || f.from.Checksum != "" { // a listing has no checksums
			var err error
			if info, err = a.head(ctx, b, f, f.from.Key); err != nil {
				return err
			}
		}
		if likeness, reason := object.Compare(f.from, info); likeness.Refused() {
			return fmt.Errorf("%w: %s: %s", errSourceAltered, f.name(), reason)
		}
		etags[at[f]] = info.ETag
		return nil
	})
}

// pinStore returns the store of the objects with the sources' pinned ETags.
func (j *Job) pinStore(o *Options) (object.Store, error) {
	alias := j.PinStore
	if alias == "" { // record of an older release
		alias = o.PinStore
	}
	store, ok := o.Stores[alias]
	if !ok {
		return nil, fmt.Errorf("%w: %q", errNoStore, alias)
	}
	return store, nil
}

// removePins deletes the pins of a job's sources.
func (l *leader) removePins(ctx context.Context, job *Job) error {
	if !job.Copied {
		return nil
	}
	store, err := job.pinStore(&l.o)
	if err != nil {
		return fmt.Errorf("job %s: delete the pins of its files: %w", job, err)
	}
	err = object.DeletePrefix(ctx, store, catalog.RestoreDir(job.ID))
	if err != nil {
		return fmt.Errorf("job %s: delete the pins of its files: %w", job, err)
	}
	return nil
}
