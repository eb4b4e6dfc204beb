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
// A file whose ETag was not registered is pinned to the ETag that it has when its
// task first begins. These ETags are kept in the object store of the snapshots,
// before the first copy of the task, so that each later attempt copies the very
// versions that the first one did:
//
//	gc/restore/<job>/pins-<task>-<part>.json
//
// A part has the ETags of up to pinFiles files, in the order of the task's plan,
// which follows from job and snapshot alone. Files with a registered ETag are not
// in it, and a task of such files alone has no part.
//
//	none ---- create, if absent ----> there ---- roll back, forget ----> none
//
// A part is created only if it is absent, and never changes: of two attempts at
// once the first one decides, and the other reads what it wrote. All parts stay
// until the job's record goes, also of a job that is COMPLETED: a worker that was
// frozen before its first copy and wakes up then finds them, and cannot pin
// another version and copy it over the target. They go before the job's record.
//
// # Failures
//
//	source altered before      the version at the first attempt is copied, as it
//	the first attempt          always was: nothing says that it is another
//	source altered between     the copy fails by its ETag: FAILED, with the name
//	attempts
//	part cannot be created     no copy is made; the next attempt reads it, or
//	                           creates it. A create that comes late wins or loses
//	                           like any other
//	process dies after some    the next attempt reads these, and creates the
//	parts                      others
//	part cannot be read, or    as when a store does not answer well: the task is
//	is not as it was written   tried again, up to the cap of failures. It is never
//	                           replaced
//	part created late, after   roll back: it goes when the job is forgotten; after
//	the job has ended          that a sweep deletes it, for its id has no record

// pinFiles is how many files one object has the ETags of, and maxPins the size in
// bytes up to which it is read.
const (
	filesPerPart = 4096
	maxPinsBytes = 8 << 20
)

// errPins means that an object of pins is not as it was written.
var errPins = errors.New("the pinned ETags of a task's files are not as they were written")

// pins is the content of an object of pins.
type pins struct {
	FormatVersion int      `json:"format_version"`
	Job           int64    `json:"job,string"`
	Task          int64    `json:"task,string"`
	Part          int      `json:"part"`
	ETags         []string `json:"etags"`
	SHA256        string   `json:"sha256"` // of the files that they are of, and of themselves
}

// pinSources gives each file without an ETag the one that it had when the task
// first began.
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
	case errors.Is(err, object.ErrExists): // by us, or by another attempt
		return a.readPins(ctx, b, store, key, part, files)
	case err != nil:
		return fmt.Errorf("keep the ETags of the files of task %d: %w", a.number, err)
	}
	for i, f := range files {
		f.from.ETag = etags[i]
	}
	return nil
}

// readPins takes the ETags of files from an object of pins.
func (a *attempt) readPins(ctx context.Context, b *budget, store object.Store, key string, part int, files []*fileCopy) error {
	if err := b.spend(ctx, 1, 0); err != nil {
		return err
	}
	data, err := object.ReadAll(ctx, store, key, maxPinsBytes)
	if err != nil {
		return fmt.Errorf("read the ETags of the files of task %d: %w", a.number, err)
	}
	p := &pins{}
	switch err := json.Unmarshal(data, p); {
	case err != nil:
		return fmt.Errorf("%w: %s: %w", errPins, key, err)
	case p.FormatVersion != 1 || p.Job != a.jobID || p.Task != a.number || p.Part != part:
		return fmt.Errorf("%w: %s is of job %d, task %d, part %d, format %d", errPins, key, p.Job, p.Task, p.Part, p.FormatVersion)
	case len(p.ETags) != len(files) || p.SHA256 != pinsDigest(files, p.ETags):
		return fmt.Errorf("%w: %s has %d ETags of %d files, or a digest that does not match", errPins, key, len(p.ETags), len(files))
	}
	for i, f := range files {
		f.from.ETag = p.ETags[i]
	}
	return nil
}

// sumOfPins is the digest of files and of their ETags.
func pinsDigest(files []*fileCopy, etags []string) string {
	h := sha256.New()
	for i, f := range files {
		_, _ = fmt.Fprintf(h, "%s\x00%s\x00%d\x00%s\n", f.alias, f.from.Key, f.from.Size, etags[i]) // it never fails
	}
	return hex.EncodeToString(h.Sum(nil))
}

// sourceETags returns the ETags that files have now, by listing where they lie.
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
		if !ok || f.from.Checksum != "" { // which a listing does not tell
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

// pinStore is where the pins of a job's sources lie.
func (j *Job) pinStore(o *Options) (object.Store, error) {
	alias := j.PinStore
	if alias == "" { // of an older release
		alias = o.PinStore
	}
	store, ok := o.Stores[alias]
	if !ok {
		return nil, fmt.Errorf("%w: %q", errNoStore, alias)
	}
	return store, nil
}

// removePins removes the pins of a job's sources.
func (l *leader) removePins(ctx context.Context, job *Job) error {
	if !job.Copied {
		return nil
	}
	store, err := job.pinStore(&l.o)
	if err != nil {
		return fmt.Errorf("job %s: remove the pins of its files: %w", job, err)
	}
	err = object.DeletePrefix(ctx, store, catalog.RestoreDir(job.ID))
	if err != nil {
		return fmt.Errorf("job %s: remove the pins of its files: %w", job, err)
	}
	return nil
}
