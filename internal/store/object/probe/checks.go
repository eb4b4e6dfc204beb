package probe

import (
	"bytes"
	"context"
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

// key returns the key of an object of this probe.
func (p *prober) key(name string) string { return p.dir + "/" + name }

// track registers a key for removal, regardless of the result of its write.
func (p *prober) track(key string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.keys = append(p.keys, key)
	return key
}

func (p *prober) put(ctx context.Context, name, body string) (object.Info, error) {
	return p.store.Put(ctx, p.track(p.key(name)), []byte(body))
}

func (p *prober) create(ctx context.Context, name, body string) error {
	_, err := p.store.Create(ctx, p.track(p.key(name)), []byte(body))
	return err
}

// read returns the content of an object, or a finding if it does not exist.
func (p *prober) read(ctx context.Context, name string, offset, length int64) (string, object.Info, error) {
	r, info, err := p.store.Get(ctx, p.key(name), offset, length)
	if errors.Is(err, object.ErrNotFound) {
		return "", info, findingf("%s was written but is not found", name)
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
	return p.store.Delete(ctx, p.keys...)
}

func (p *prober) roundTrip(ctx context.Context) (string, error) {
	const body = "written by the probe of snapshotd"
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
		return "", findingf("GET finds an object that HEAD does not find")
	case err != nil:
		return "", err
	case got != body:
		return "", findingf("the content read differs from the content written")
	case info.ETag != put.ETag || head.ETag != put.ETag || head.Size != int64(len(body)) || info.Size != head.Size:
		return "", findingf("PUT, GET and HEAD return different sizes or ETags: %q, %q, %q", put.ETag, info.ETag, head.ETag)
	}
	return "", nil
}

func (p *prober) conditionalCreate(ctx context.Context) (string, error) {
	if err := p.create(ctx, "created", "first"); err != nil {
		return "", err
	}
	switch err := p.create(ctx, "created", "second"); {
	case err == nil:
		return "", findingf("an existing object was overwritten: the condition If-None-Match is ignored")
	case !errors.Is(err, object.ErrExists):
		return "", err
	}
	if got, _, err := p.read(ctx, "created", 0, -1); err != nil || got != "first" {
		return "", errOrFinding(err, "a refused write changed the object")
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
			return "", findingf("%d bytes from %d are %q of %d bytes, not %q of 10", c.length, c.offset, got, info.Size, c.want)
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
		return "", errOrFinding(err, "a deleted object is listed")
	}
	if _, err := p.store.Head(ctx, p.key("l/b")); !errors.Is(err, object.ErrNotFound) {
		return "", errOrFinding(err, "HEAD finds a deleted object")
	}
	return "", nil
}

// listOrder lists keys that are sorted here by bytes. They are too many to be sorted by
// chance, and have characters that a list may alter. If the store refuses some characters,
// only the accepted keys are checked.
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
			return "", findingf("lists are not in key order: %v", err)
		}
		if err != nil {
			return "", err
		}
		listed = append(listed, strings.TrimPrefix(info.Key, p.dir+"/"))
	}
	if !slices.Equal(listed, names) {
		return "", findingf("lists are not sorted by the bytes of keys, or incomplete: %q", listed)
	}
	return refused, nil
}

// usualKey matches the keys that a store must accept: those of snapshotd and of its
// layouts. Engines may have others.
var usualKey = regexp.MustCompile(`^[A-Za-z0-9/._-]*$`)

// putAll writes an object for each name, with the name as its content. It returns the
// accepted names, and a description of refused ones, none of which is usual.
func (p *prober) putAll(ctx context.Context, names []string) (accepted []string, refused string, err error) {
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
			accepted = append(accepted, name)
		case refused == "":
			refused = fmt.Sprintf("the store refuses some characters in keys, as in %q", path.Base(name))
		}
	}
	return accepted, refused, nil
}

// listed returns the entry of the object in the list of its directory.
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

// wantListed compares the list with the result of a write. Copies are verified by lists,
// and files are pinned to the ETags of lists.
func (p *prober) wantListed(ctx context.Context, want object.Info) error {
	info, ok, err := p.listed(ctx, want.Key)
	switch {
	case err != nil:
		return err
	case !ok:
		return findingf("a written object is not listed")
	case info.ETag != want.ETag || info.Size != want.Size:
		return findingf("a list has ETag %q and %d bytes for an object, its write %q and %d",
			info.ETag, info.Size, want.ETag, want.Size)
	}
	return nil
}

// deleteMany deletes objects with one call, among them a missing one, and checks that they
// are gone.
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
				return errOrFinding(err, "%q exists after a confirmed delete of many", path.Base(key))
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
	return "", p.checkCopies(ctx, "copy", "copied by the probe of snapshotd", object.CopyParts{})
}

// multipartCopy copies in one part, which has no minimum size.
func (p *prober) multipartCopy(ctx context.Context) (string, error) {
	return "", p.checkCopies(ctx, "copy-part", "copied in a part by the probe", object.CopyParts{Threshold: 1})
}

func (p *prober) rangeCopy(ctx context.Context) (string, error) {
	body := strings.Repeat("0123456789abcdef", object.MinPartSize/16) + "the end"
	return "", p.checkCopies(ctx, "copy-parts", body, object.CopyParts{Threshold: 1, PartSize: object.MinPartSize})
}

// checkCopies requests a copy of another version than the current one, and one of the
// current version.
func (p *prober) checkCopies(ctx context.Context, name, body string, parts object.CopyParts) error {
	old, err := p.put(ctx, name+"/other", strings.ToUpper(body))
	if err != nil {
		return err
	}
	source, err := p.put(ctx, name+"/from", body)
	if err != nil {
		return err
	}
	const ignored = "another version than the requested one was copied: " +
		"the condition x-amz-copy-source-if-match is ignored"
	r := object.CopyRequest{
		From: source.Key, To: p.track(p.key(name + "/refused")), SourceETag: old.ETag, Size: old.Size, Parts: parts,
	}
	switch _, err := p.store.Copy(ctx, r); {
	case err == nil:
		return finding(ignored)
	case !errors.Is(err, object.ErrSourceChanged):
		return err
	}
	// The client may have detected a copy that was made despite the condition.
	if _, err := p.store.Head(ctx, r.To); !errors.Is(err, object.ErrNotFound) {
		return errOrFinding(err, ignored)
	}
	r.To, r.SourceETag = p.track(p.key(name+"/to")), source.ETag
	info, err := p.store.Copy(ctx, r)
	if errors.Is(err, object.ErrSourceChanged) {
		return findingf("the requested version was refused")
	}
	if err != nil {
		return err
	}
	got, read, err := p.read(ctx, name+"/to", 0, -1)
	switch {
	case err != nil:
		return err
	case got != body:
		return findingf("the copy differs from its source")
	case read.ETag != info.ETag:
		return findingf("copy and GET return different ETags: %q, %q", info.ETag, read.ETag)
	}
	return p.wantListed(ctx, object.Info{Key: r.To, ETag: info.ETag, Size: int64(len(body))})
}

// copyKeys copies objects with keys that a server may decode wrongly in the header with the
// name of the source.
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
			From: source.Key, To: p.track(p.key(to)), SourceETag: source.ETag, Size: source.Size,
		})
		if errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrSourceChanged) {
			return "", findingf("a copy of %q finds another source: %v", path.Base(name), err)
		}
		if err != nil {
			return "", err
		}
		if got, _, err := p.read(ctx, to, 0, -1); err != nil || got != name {
			return "", errOrFinding(err, "a copy of %q has the content of another object", path.Base(name))
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
			return "", findingf("%d of %d creates of one key succeeded", winners, racers)
		}
		if got, _, err := p.read(ctx, name, 0, -1); err != nil || got != fmt.Sprint(winner) {
			return "", errOrFinding(err, "the object is not from the successful create")
		}
	}
	return "", nil
}

func (p *prober) readAfterWrite(ctx context.Context) (string, error) {
	for i := range readBacks {
		name := fmt.Sprint("follow/", i) // separate keys: some stores limit the writes per key and second
		if _, err := p.put(ctx, name, fmt.Sprint(i)); err != nil {
			return "", err
		}
		if got, _, err := p.read(ctx, name, 0, -1); err != nil || got != fmt.Sprint(i) {
			return "", errOrFinding(err, "the read after write %d returned other content", i)
		}
	}
	return "", nil
}

// similarKeys writes objects with keys that a store might confuse.
func (p *prober) similarKeys(ctx context.Context) (string, error) {
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
			return "", findingf("key %q has the content of key %q", name, got)
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
		return "", findingf("keys must be shorter: the store has a prefix or a lower limit")
	}
	p.track(key)
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
		return "", findingf("the content read differs from the content written")
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
		return "", findingf("the store's clock differs from this host's by %v", skew)
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
