// Package probe finds out what an object store honours of what snapshotd relies
// on. A server that ignores a condition answers that all is well, so only a try
// tells.
//
// # What is relied on
//
// A check that a start makes is marked with S; all of them are made on demand.
//
//	relied on                                  by                     check
//	a write is read back, with one ETag        all                 S  write and read back
//	If-None-Match: * of PutObject              identity, beats,    S  conditional create,
//	                                           pins, manifests        one winner, read after write
//	ranges, also beyond the end                manifests           S  ranges
//	a list shows a write and a delete at once  sweep, roll back    S  list after write and delete
//	a list has the ETag and size of the write  copies' verify,     S  list after write and delete,
//	                                           pins                   conditional and multipart copy
//	lists are in order, with keys as they are  sweep, roll back    S  list in key order
//	a confirmed delete is made                 drop, collector     S  delete of many, of a missing one
//	x-amz-copy-source-if-match                 restore             S  conditional copy, multipart copy
//	the name of a copy's source                restore                copy of unusual keys
//	keys that differ are different objects     all                    keys that look alike
//	the length of keys                         engines                keys of 1024 bytes
//	ranges of a copy in parts                  restore                multipart copy of ranges
//	the field Date                             lifetimes           S  clock
//
// Not tried, since a fallback is there or nothing depends on it: the metadata of a
// write and of a copy in parts (the content is compared, or the copy made again),
// tags (left out), the list and abort of unfinished uploads (a lifecycle rule; one
// warning), DeleteObjects (keys go one by one), checksums (compared where there are
// any), versions, and storage classes (the object is named when it is copied). Pages
// of a list are not tried with the thousand objects that it takes: each page has to
// go on after the last key of the one before, or the list fails. An upload of a write
// in parts begins at a size that no file of snapshotd's own has.
package probe

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Dir is the directory of a store below which probes work, each in one of its
// own. What a probe leaves there, RemoveLeft removes a day later.
const Dir = "snapshotd-probe"

// leftFor is how old, by the store's clock, a thing must be to be of a probe that
// has died.
const leftFor = 24 * time.Hour

const (
	racers         = 16
	followed       = 20 // writes that are read back
	longestKeyTry  = object.MaxKeyBytes
	allowedSkew    = time.Minute
	cleanUpTimeout = 30 * time.Second
)

// ErrMissing means that a store lacks what snapshotd cannot do without.
var ErrMissing = errors.New("the object store lacks what snapshotd needs")

// Check is one thing that was tried.
type Check struct {
	Name     string
	Required bool // snapshotd does not run without
	OK       bool
	Unknown  bool   // it could not be found out, since the store did not answer, or was full
	Detail   string // what was seen, or the error that kept the check from being made
	Err      error  // that error; nil for a check that was made
}

// Report is what a probe found.
type Report struct {
	Checks []Check
}

// Err returns nil when every required check has passed. Else it wraps [ErrMissing]
// and names every required check that failed, or, when none failed, wraps the error
// of the first that could not be made: nothing is then known of the store.
func (r Report) Err() error {
	var missing []string
	var unmade error
	for _, c := range r.Checks {
		switch {
		case !c.Required || c.OK:
		case c.Err == nil:
			missing = append(missing, c.Name+" ("+c.Detail+")")
		case unmade == nil:
			unmade = fmt.Errorf("probe %s: %w", c.Name, c.Err)
		}
	}
	if len(missing) == 0 {
		return unmade
	}
	return fmt.Errorf("%w: %s", ErrMissing, strings.Join(missing, "; "))
}

// Made reports whether any check could be made.
func (r Report) Made() bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Err == nil })
}

// Features are what snapshotd does not need to run, but to do more.
type Features struct {
	// ConditionalCopy says that a copy is made only of the version asked for.
	// Without it a source that changes is copied as if nothing were, and nobody
	// notices. A store without is refused as that of a restore; snapshots copy
	// nothing.
	ConditionalCopy bool
	// MultipartCopy says that objects can be copied in parts, and then too only of
	// the version asked for. Without it objects are copied whole, and none above
	// what one request copies.
	MultipartCopy bool
}

// UnknownCopy returns why it is not known whether the store copies just the version
// that is asked for; nil: it is known. A right that is missing, and a store that does
// not answer or is full, say nothing of that. A request that the store refuses does.
func (r Report) UnknownCopy() error { return r.unknown(conditionalCopy) }

// Decided reports whether all that [Report.Features] returns is known.
func (r Report) Decided() bool {
	return r.unknown(conditionalCopy) == nil && r.unknown(multipartCopy) == nil && r.unknown(rangeCopy) == nil
}

func (r Report) unknown(name string) error {
	for _, c := range r.Checks {
		if c.Name == name && (c.Unknown || errors.Is(c.Err, object.ErrDenied) || object.IsPassing(c.Err)) {
			return fmt.Errorf("probe %s: %w", c.Name, c.Err)
		}
	}
	return nil
}

// Features returns what the checks have found. A feature that was not tried, or
// whose try failed for another reason, is none; see UnknownCopy.
func (r Report) Features() Features {
	return Features{ConditionalCopy: r.passed(conditionalCopy), MultipartCopy: r.passed(multipartCopy) && !r.failed(rangeCopy)}
}

func (r Report) passed(name string) bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Name == name && c.OK })
}

func (r Report) failed(name string) bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Name == name && !c.OK })
}

// Run makes every check, in a directory of its own below dir, which is empty or
// a key, and removes what it made. The error is that of the report, or of ctx; then
// there is no report.
func Run(ctx context.Context, store object.Store, dir string) (Report, error) {
	return run(ctx, store, dir, checks)
}

// Light is Run with the checks alone that a start waits for: half a second
// against a store nearby.
func Light(ctx context.Context, store object.Store, dir string) (Report, error) {
	return run(ctx, store, dir, slices.DeleteFunc(slices.Clone(checks), func(c check) bool { return !c.light }))
}

// Copies is Run with the checks alone that features come from, and that a start makes.
func Copies(ctx context.Context, store object.Store, dir string) (Report, error) {
	return run(ctx, store, dir, slices.DeleteFunc(slices.Clone(checks), func(c check) bool {
		return c.name != conditionalCopy && c.name != multipartCopy
	}))
}

// check is what is tried and how. A finding among the errors of try is a check
// that failed; any other error is one that could not be made.
type check struct {
	name            string
	required, light bool
	alone           bool // no other check is made meanwhile
	try             func(p *prober, ctx context.Context) (detail string, err error)
}

// finding is what a store does wrong.
type finding string

func (f finding) Error() string { return string(f) }

func wrong(format string, args ...any) error { return finding(fmt.Sprintf(format, args...)) }

// orWrong is err, or else a finding.
func orWrong(err error, format string, args ...any) error {
	if err != nil {
		return err
	}
	return wrong(format, args...)
}

// The names of the checks that features come from.
const (
	conditionalCopy = "conditional copy"
	multipartCopy   = "multipart copy"
	rangeCopy       = "multipart copy of ranges"
)

var checks = []check{
	{"write and read back", true, true, false, (*prober).roundTrip},
	{"conditional create", true, true, false, (*prober).conditionalCreate},
	{"ranges", true, true, false, (*prober).ranges},
	{"list after write and delete", true, true, false, (*prober).lists},
	{"list in key order", true, true, false, (*prober).listOrder},
	{"delete of a missing object", true, true, false, (*prober).deleteMissing},
	{"delete of many", true, true, false, (*prober).deleteMany},
	{conditionalCopy, false, true, false, (*prober).conditionalCopy},
	{multipartCopy, false, true, false, (*prober).multipartCopy},
	{"one winner of " + fmt.Sprint(racers), true, false, false, (*prober).race},
	{"read after write", true, false, false, (*prober).follow},
	{"keys that look alike", true, false, false, (*prober).alike},
	{fmt.Sprintf("keys of %d bytes", longestKeyTry), false, false, false, (*prober).longKeys},
	{"copy of unusual keys", false, false, false, (*prober).copyKeys},
	{rangeCopy, false, false, false, (*prober).rangeCopy},
	{"clock", false, true, true, (*prober).clock},
	{"latency", false, false, true, (*prober).latency},
}

// prober is a probe under way.
type prober struct {
	store object.Store
	dir   string

	mu   sync.Mutex
	made []string
}

func run(ctx context.Context, store object.Store, dir string, checks []check) (report Report, err error) {
	p := &prober{store: store, dir: path.Join(dir, Dir) + "/" + strings.ToLower(rand.Text())}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
		defer cancel()
		_ = p.clean(ctx) // what stays, RemoveLeft removes: it says nothing of what was found
	}()
	tried := p.tryAll(ctx, checks)
	if ctx.Err() != nil {
		return report, fmt.Errorf("probe: %w", ctx.Err())
	}
	for i, c := range checks {
		detail, err := tried[i].detail, tried[i].err
		result := Check{Name: c.name, Required: c.required, OK: err == nil, Detail: detail}
		if f, found := errors.AsType[finding](err); found {
			result.Detail = string(f)
		} else if err != nil {
			result.Detail, result.Err = err.Error(), err
			result.Unknown = errors.Is(err, object.ErrUnavailable) || errors.Is(err, object.ErrFull)
		}
		report.Checks = append(report.Checks, result)
	}
	return report, report.Err()
}

// outcome is what a check returned.
type outcome struct {
	detail string
	err    error
}

// tryAll makes the checks, all at once but those that measure time: each uses
// names of its own, and a store that is far away answers none of them quickly.
func (p *prober) tryAll(ctx context.Context, checks []check) []outcome {
	tried := make([]outcome, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		if !c.alone {
			wg.Go(func() { tried[i].detail, tried[i].err = c.try(p, ctx) })
		}
	}
	wg.Wait()
	for i, c := range checks {
		if c.alone {
			tried[i].detail, tried[i].err = c.try(p, ctx)
		}
	}
	return tried
}

// RemoveLeft removes what probes left in a store that died, or could not clean up,
// longer than a day before now, by the store's clock. It returns how many objects
// and uploads it removed, and the bytes of the former, also with an error.
func RemoveLeft(ctx context.Context, store object.Store, now time.Time) (objects, bytes int64, uploads int, err error) {
	parent, before := Dir+"/", now.Add(-leftFor)
	var left []string
	for info, err := range store.List(ctx, parent) {
		if err != nil {
			return 0, 0, 0, err
		}
		if ofProbe.MatchString(info.Key[len(parent):]) && info.ModTime.Before(before) {
			left, bytes = append(left, info.Key), bytes+info.Size
		}
		if len(left) == maxLeft {
			break
		}
	}
	if err := store.Delete(ctx, left...); err != nil {
		return 0, 0, 0, err
	}
	uploads, err = store.AbortUploads(ctx, parent, before)
	return int64(len(left)), bytes, uploads, err
}

// maxLeft is how many objects one call of RemoveLeft removes.
const maxLeft = 1000

// ofProbe are the keys of probes, in lower case as of rand.Text; those that are
// made on demand lie in a directory of that name once more.
var ofProbe = regexp.MustCompile(`^(` + Dir + `/)?[a-z2-7]{26}/`)

// key names an object of this probe.
func (p *prober) key(name string) string { return p.dir + "/" + name }

// note notes a key so that it is removed, whatever becomes of its write.
func (p *prober) note(key string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.made = append(p.made, key)
	return key
}

func (p *prober) put(ctx context.Context, name, body string) (object.Info, error) {
	return p.store.Put(ctx, p.note(p.key(name)), []byte(body))
}

func (p *prober) create(ctx context.Context, name, body string) error {
	_, err := p.store.Create(ctx, p.note(p.key(name)), []byte(body))
	return err
}

// read returns the content of an object, or a finding if there is none.
func (p *prober) read(ctx context.Context, name string, offset, length int64) (string, object.Info, error) {
	r, info, err := p.store.Get(ctx, p.key(name), offset, length)
	if errors.Is(err, object.ErrNotFound) {
		return "", info, wrong("%s was written and is not found", name)
	}
	if err != nil {
		return "", info, err
	}
	body, err := io.ReadAll(r)
	return string(body), info, errors.Join(err, r.Close())
}

func (p *prober) clean(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.store.Delete(ctx, p.made...)
}

func (p *prober) roundTrip(ctx context.Context) (string, error) {
	const body = "written by snapshotd to see whether it can be read"
	put, err := p.put(ctx, "trip", body)
	if err != nil {
		return "", err
	}
	got, info, err := p.read(ctx, "trip", 0, -1)
	if err != nil {
		return "", err
	}
	head, err := p.store.Head(ctx, p.key("trip"))
	switch {
	case errors.Is(err, object.ErrNotFound):
		return "", wrong("an object that can be read is not found by its head")
	case err != nil:
		return "", err
	case got != body:
		return "", wrong("another content is read than was written")
	case info.ETag != put.ETag || head.ETag != put.ETag || head.Size != int64(len(body)) || info.Size != head.Size:
		return "", wrong("its size or ETag is another each time: %q, %q, %q", put.ETag, info.ETag, head.ETag)
	}
	return "", nil
}

func (p *prober) conditionalCreate(ctx context.Context) (string, error) {
	if err := p.create(ctx, "created", "first"); err != nil {
		return "", err
	}
	switch err := p.create(ctx, "created", "second"); {
	case err == nil:
		return "", wrong("an existing object was overwritten: the condition If-None-Match is ignored")
	case !errors.Is(err, object.ErrExists):
		return "", err
	}
	if got, _, err := p.read(ctx, "created", 0, -1); err != nil || got != "first" {
		return "", orWrong(err, "a refused write changed the object")
	}
	return "", nil
}

func (p *prober) ranges(ctx context.Context) (string, error) {
	if _, err := p.put(ctx, "ranges", "0123456789"); err != nil {
		return "", err
	}
	for _, c := range []struct {
		offset, length int64
		want           string
	}{{0, 1, "0"}, {3, 4, "3456"}, {7, -1, "789"}, {8, 100, "89"}, {10, 5, ""}, {100, 1, ""}} {
		got, info, err := p.read(ctx, "ranges", c.offset, c.length)
		if err != nil {
			return "", err
		}
		if got != c.want || info.Size != 10 {
			return "", wrong("%d bytes from %d on are %q of %d, not %q of 10", c.length, c.offset, got, info.Size, c.want)
		}
	}
	return "", nil
}

func (p *prober) lists(ctx context.Context) (string, error) {
	names := []string{"l/a", "l/b", "l/c/d"}
	for _, name := range names {
		info, err := p.put(ctx, name, name)
		if err != nil {
			return "", err
		}
		if err := p.wantListed(ctx, info); err != nil {
			return "", err
		}
	}
	if err := p.store.Delete(ctx, p.key("l/b")); err != nil {
		return "", err
	}
	if _, found, err := p.listed(ctx, p.key("l/b")); err != nil || found {
		return "", orWrong(err, "a deleted object is listed")
	}
	if _, err := p.store.Head(ctx, p.key("l/b")); !errors.Is(err, object.ErrNotFound) {
		return "", orWrong(err, "a deleted object is still there")
	}
	return "", nil
}

// listOrder lists keys that only an order by bytes lists as they are here. They are
// so many that a list without an order does not pass by chance, and they have the
// characters that a list may show as others. A store that takes some characters only
// is asked for the order of the keys that it takes.
func (p *prober) listOrder(ctx context.Context) (string, error) {
	names := []string{
		"order/a b", "order/a!", "order/a%25", "order/a&b", "order/a+b", "order/a-b", "order/a-b-/c", "order/a.b/c",
		"order/a/b", "order/a/c", "order/a0", "order/a=b", "order/aa", "order/b", "order/\u00e9", "order/\ue000",
		"order/\uffef", "order/\U00010000",
	}
	names, refused, err := p.putAll(ctx, names)
	if err != nil {
		return "", err
	}
	var listed []string
	for info, err := range p.store.List(ctx, p.key("order")+"/") {
		if errors.Is(err, object.ErrMisconfigured) {
			return "", wrong("lists are not in key order: %v", err)
		}
		if err != nil {
			return "", err
		}
		listed = append(listed, strings.TrimPrefix(info.Key, p.dir+"/"))
	}
	if !slices.Equal(listed, names) {
		return "", wrong("lists are not in the order of the bytes of keys, or not complete: %q", listed)
	}
	return refused, nil
}

// usualKey matches the keys that a store has to take: those of snapshotd and of the
// layouts that it makes. An engine may have others.
var usualKey = regexp.MustCompile(`^[A-Za-z0-9/._-]*$`)

// putAll writes its name under each of names. It returns those that the store takes,
// and says whether it refuses others, which are no usual ones.
func (p *prober) putAll(ctx context.Context, names []string) (taken []string, refused string, err error) {
	var group errgroup.Group
	refuses := make([]bool, len(names))
	for i, name := range names {
		group.Go(func() error {
			_, err := p.put(ctx, name, name)
			if refuses[i] = errors.Is(err, object.ErrInvalidKey) && !usualKey.MatchString(name); refuses[i] {
				return nil
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, "", err
	}
	for i, name := range names {
		switch {
		case !refuses[i]:
			taken = append(taken, name)
		case refused == "":
			refused = fmt.Sprintf("the store refuses some characters in keys, as in %q", path.Base(name))
		}
	}
	return taken, refused, nil
}

// listed returns what a list of the object's directory says of it.
func (p *prober) listed(ctx context.Context, key string) (found object.Info, ok bool, err error) {
	for info, err := range p.store.List(ctx, path.Dir(key)+"/") {
		if err != nil {
			return found, false, err
		}
		if info.Key == key {
			found, ok = info, true
		}
	}
	return found, ok, nil
}

// wantListed wants a list to say of an object what its write did. Copies are verified
// by lists, and files are pinned to the ETags that these have.
func (p *prober) wantListed(ctx context.Context, want object.Info) error {
	info, ok, err := p.listed(ctx, want.Key)
	switch {
	case err != nil:
		return err
	case !ok:
		return wrong("an object that was written is not listed")
	case info.ETag != want.ETag || info.Size != want.Size:
		return wrong("a list says that an object has ETag %q and %d bytes, its write %q and %d",
			info.ETag, info.Size, want.ETag, want.Size)
	}
	return nil
}

// deleteMany deletes objects with one call, among them one that is not there, and
// looks whether they are gone.
func (p *prober) deleteMany(ctx context.Context) (string, error) {
	names, refused, err := p.putAll(ctx, []string{
		"many/a", "many/a b", "many/a+b", "many/a%2Bc", "many/a&amp;b", "many/<b>", "many/\u00e9",
	})
	if err != nil {
		return "", err
	}
	keys := []string{p.key("many/never-written")}
	for _, name := range names {
		keys = append(keys, p.key(name))
	}
	if err := p.store.Delete(ctx, keys...); err != nil {
		return "", err
	}
	var group errgroup.Group
	for _, key := range keys {
		group.Go(func() error {
			if _, err := p.store.Head(ctx, key); !errors.Is(err, object.ErrNotFound) {
				return orWrong(err, "%q is still there after a delete of many that was confirmed", path.Base(key))
			}
			return nil
		})
	}
	return refused, group.Wait()
}

func (p *prober) deleteMissing(ctx context.Context) (string, error) {
	return "", p.store.Delete(ctx, p.key("never-written"))
}

func (p *prober) conditionalCopy(ctx context.Context) (string, error) {
	return "", p.copies(ctx, "copy", "copied by snapshotd to see whether it can be", object.CopyParts{})
}

// multipartCopy copies in one part, which may be as small as it likes.
func (p *prober) multipartCopy(ctx context.Context) (string, error) {
	return "", p.copies(ctx, "copy-part", "copied by snapshotd in a part", object.CopyParts{Threshold: 1})
}

func (p *prober) rangeCopy(ctx context.Context) (string, error) {
	body := strings.Repeat("0123456789abcdef", object.MinPartSize/16) + "the end"
	return "", p.copies(ctx, "copy-parts", body, object.CopyParts{Threshold: 1, PartSize: object.MinPartSize})
}

// copies copies an object that is the version asked for, and one that is not.
func (p *prober) copies(ctx context.Context, name, body string, parts object.CopyParts) error {
	old, err := p.put(ctx, name+"/other", strings.ToUpper(body))
	if err != nil {
		return err
	}
	source, err := p.put(ctx, name+"/from", body)
	if err != nil {
		return err
	}
	r := object.CopyRequest{From: source.Key, To: p.note(p.key(name + "/refused")), SourceETag: old.ETag, Size: old.Size, Parts: parts}
	switch _, err := p.store.Copy(ctx, r); {
	case err == nil:
		return wrong("another version was copied than the one asked for: the condition x-amz-copy-source-if-match is ignored")
	case !errors.Is(err, object.ErrSourceChanged):
		return err
	}
	// The client may see by itself that a copy was made in spite of the condition.
	if _, err := p.store.Head(ctx, r.To); !errors.Is(err, object.ErrNotFound) {
		return orWrong(err, "a copy of another version was made than the one asked for: "+
			"the condition x-amz-copy-source-if-match is ignored")
	}
	r.To, r.SourceETag = p.note(p.key(name+"/to")), source.ETag
	info, err := p.store.Copy(ctx, r)
	if errors.Is(err, object.ErrSourceChanged) {
		return wrong("the version asked for was refused")
	}
	if err != nil {
		return err
	}
	got, read, err := p.read(ctx, name+"/to", 0, -1)
	switch {
	case err != nil:
		return err
	case got != body:
		return wrong("the copy has another content than its source")
	case read.ETag != info.ETag:
		return wrong("its ETag is another each time: %q, %q", info.ETag, read.ETag)
	}
	return p.wantListed(ctx, object.Info{Key: r.To, ETag: info.ETag, Size: int64(len(body))})
}

// copyKeys copies objects whose keys a server may read as others in the field that
// names the source.
func (p *prober) copyKeys(ctx context.Context) (string, error) {
	names, refused, err := p.putAll(ctx, []string{
		"source/a", "source/a b", "source/a+b", "source/a%2Bb", "source/a?b&c", "source/\u00e9",
	})
	if err != nil {
		return "", err
	}
	for i, name := range names {
		source, err := p.store.Head(ctx, p.key(name))
		if err != nil {
			return "", err
		}
		to := fmt.Sprint("target/", i)
		_, err = p.store.Copy(ctx, object.CopyRequest{
			From: source.Key, To: p.note(p.key(to)), SourceETag: source.ETag, Size: source.Size,
		})
		if errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrSourceChanged) {
			return "", wrong("a copy of %q finds another source: %v", path.Base(name), err)
		}
		if err != nil {
			return "", err
		}
		if got, _, err := p.read(ctx, to, 0, -1); err != nil || got != name {
			return "", orWrong(err, "a copy of %q has another content", path.Base(name))
		}
	}
	return refused, nil
}

func (p *prober) race(ctx context.Context) (string, error) {
	for round := range 3 {
		name := fmt.Sprintf("race/%d", round)
		errs := make([]error, racers)
		var wg sync.WaitGroup
		for i := range racers {
			wg.Go(func() { errs[i] = p.create(ctx, name, fmt.Sprint(i)) })
		}
		wg.Wait()
		winner, winners := 0, 0
		for i, err := range errs {
			switch {
			case err == nil:
				winner = i
				winners++
			case !errors.Is(err, object.ErrExists):
				return "", err
			}
		}
		if winners != 1 {
			return "", wrong("%d of %d creates of one key succeeded", winners, racers)
		}
		if got, _, err := p.read(ctx, name, 0, -1); err != nil || got != fmt.Sprint(winner) {
			return "", orWrong(err, "the object is of another create than the one that succeeded")
		}
	}
	return "", nil
}

func (p *prober) follow(ctx context.Context) (string, error) {
	for i := range followed {
		name := fmt.Sprint("follow/", i) // each its own: some stores take one write of a key in a second
		if _, err := p.put(ctx, name, fmt.Sprint(i)); err != nil {
			return "", err
		}
		if got, _, err := p.read(ctx, name, 0, -1); err != nil || got != fmt.Sprint(i) {
			return "", orWrong(err, "write %d is not what was read next", i)
		}
	}
	return "", nil
}

// alike are keys that a store might take for one.
func (p *prober) alike(ctx context.Context) (string, error) {
	names := []string{"alike/x", "alike/X", "alike/%78", "alike/x+y", "alike/x y", "alike/\u00e9", "alike/e\u0301"}
	names, refused, err := p.putAll(ctx, names)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		got, _, err := p.read(ctx, name, 0, -1)
		if err != nil {
			return "", err
		}
		if got != name {
			return "", wrong("key %q holds what was written as %q", name, got)
		}
	}
	return refused, nil
}

func (p *prober) longKeys(ctx context.Context) (string, error) {
	key := p.dir + "/"
	for len(key) < longestKeyTry {
		n := min(100, longestKeyTry-len(key))
		if n < 100 || len(key)+n == longestKeyTry {
			key += strings.Repeat("k", n)
		} else {
			key += strings.Repeat("k", n-1) + "/"
		}
	}
	if strings.HasSuffix(key, "/") {
		key = key[:len(key)-1] + "k"
	}
	body := []byte("long")
	_, err := p.store.Put(ctx, key, body)
	if errors.Is(err, object.ErrInvalidKey) {
		return "", wrong("they must be shorter, for the store has a prefix or a limit of its own")
	}
	p.note(key)
	if err != nil {
		return "", err
	}
	r, _, err := p.store.Get(ctx, key, 0, -1)
	if err != nil {
		return "", err
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return "", err
	}
	if !bytes.Equal(got, body) {
		return "", wrong("another content is read than was written")
	}
	return "", nil
}

func (p *prober) clock(ctx context.Context) (string, error) {
	before := time.Now()
	now, err := p.store.Now(ctx)
	if err != nil {
		return "", err
	}
	half := time.Since(before) / 2
	skew := now.Sub(before.Add(half)).Round(time.Second)
	if skew.Abs() > allowedSkew {
		return "", wrong("it differs from this host's by %v", skew)
	}
	return fmt.Sprintf("differs by %v", skew), nil
}

func (p *prober) latency(ctx context.Context) (string, error) {
	if _, err := p.put(ctx, "latency", "x"); err != nil {
		return "", err
	}
	const tries = 9
	took := make([]time.Duration, tries)
	for i := range took {
		start := time.Now()
		if _, err := p.store.Head(ctx, p.key("latency")); err != nil {
			return "", err
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	return fmt.Sprintf("median of a head %v", took[tries/2].Round(10*time.Microsecond)), nil
}
