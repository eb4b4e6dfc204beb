// Package probe tests whether an object store has the properties that snapshotd relies
// on. A server that ignores a condition reports success, so only an experiment detects it.
//
// # Properties
//
// Checks marked with S run at the start of a replica; all checks run on demand.
//
//	property                                   used by                check
//	a write is read back, with one ETag        all                 S  write and read back
//	If-None-Match: * of PutObject              identity, epoch,    S  conditional create,
//	                                           pins, manifests        one winner, read after write
//	ranges, also beyond the end                manifests           S  ranges
//	a list shows a write and a delete at once  sweep, roll back    S  list after write and delete
//	a list has the ETag and size of the write  copies' verify,     S  list after write and delete,
//	                                           pins                   conditional and multipart copy
//	lists are ordered and have unaltered keys  sweep, roll back    S  list in key order
//	a confirmed delete has taken effect        drop, collector     S  delete of many, of a missing one
//	x-amz-copy-source-if-match                 restore             S  conditional copy, multipart copy
//	the name of a copy's source                restore                copy of unusual keys
//	different keys are different objects       all                    keys that look alike
//	the length of keys                         engines                keys of 1024 bytes
//	ranges of a copy in parts                  restore                multipart copy of ranges
//	the header Date                            lifetimes           S  clock
//
// Not tested, because a fallback exists or nothing depends on it: the metadata of a write
// and of a copy in parts (the content is compared, or the copy repeated), tags (omitted),
// the list and abort of incomplete uploads (a lifecycle rule; one warning), DeleteObjects
// (single deletes), checksums (compared if present), versions, and storage classes (a copy
// reports the object). Pages of a list would need a thousand objects: the store checks
// that each page continues after the last key of the previous one. Uploads of writes in
// parts begin at a size that no object of snapshotd has.
package probe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Dir is the parent directory of all probes, each of which has a subdirectory. RemoveLeft
// removes leftovers of probes after a day.
const Dir = "snapshotd-probe"

const (
	racers         = 16
	readBacks      = 20 // writes of the check "read after write"
	longestKeyTry  = object.MaxKeyBytes
	allowedSkew    = time.Minute
	cleanUpTimeout = 30 * time.Second
)

// ErrMissing means that a store lacks a required property.
var ErrMissing = errors.New("the object store lacks what snapshotd needs")

// Check is the result of one check.
type Check struct {
	Name     string
	Required bool // snapshotd does not run without it
	OK       bool
	Unknown  bool   // the check did not complete, because the store was unavailable or full
	Detail   string // the observation, or the error that ended the check
	Err      error  // that error; nil for a completed check
}

// Report is the result of a probe.
type Report struct {
	Checks []Check
}

// Err returns nil if every required check has passed. Otherwise it wraps [ErrMissing] and
// names every required check that failed. If none failed, it wraps the error of the first
// required check that did not complete: the properties of the store are then unknown.
func (r Report) Err() error {
	var missing []string
	var incomplete error
	for _, c := range r.Checks {
		switch {
		case !c.Required || c.OK:
		case c.Err == nil:
			missing = append(missing, c.Name+" ("+c.Detail+")")
		case incomplete == nil:
			incomplete = fmt.Errorf("probe %s: %w", c.Name, c.Err)
		}
	}
	if len(missing) == 0 {
		return incomplete
	}
	return fmt.Errorf("%w: %s", ErrMissing, strings.Join(missing, "; "))
}

// Made reports whether any check completed.
func (r Report) Made() bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Err == nil })
}

// Features are optional properties of a store.
type Features struct {
	// ConditionalCopy: copies are made only of the requested version. Without it a copy
	// of a changed source succeeds undetected, so restores refuse the store. Snapshots
	// copy nothing.
	ConditionalCopy bool
	// MultipartCopy: objects can be copied in parts, and only of the requested version.
	// Without it objects are copied in one request, up to its size limit.
	MultipartCopy bool
}

// UnknownCopy returns why ConditionalCopy is unknown, or nil if it is known. It is unknown
// after a denied request, and if the store is unavailable or full. A refused request
// decides it.
func (r Report) UnknownCopy() error { return r.unknown(conditionalCopy) }

// Decided reports whether all fields of [Report.Features] are known.
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

// Features returns the features whose checks have passed. A feature is false if its check
// was not run or did not complete; see UnknownCopy.
func (r Report) Features() Features {
	return Features{
		ConditionalCopy: r.passed(conditionalCopy),
		MultipartCopy:   r.passed(multipartCopy) && !r.failed(rangeCopy),
	}
}

func (r Report) passed(name string) bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Name == name && c.OK })
}

func (r Report) failed(name string) bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Name == name && !c.OK })
}

// Run runs every check in a new directory below dir, which is empty or a key, and removes
// its objects. The error is that of the report, or of ctx without a report.
func Run(ctx context.Context, store object.Store, dir string) (Report, error) {
	return run(ctx, store, dir, checks)
}

// Light runs the checks of a replica's start: half a second with a nearby store.
func Light(ctx context.Context, store object.Store, dir string) (Report, error) {
	return run(ctx, store, dir, slices.DeleteFunc(slices.Clone(checks), func(c check) bool { return !c.light }))
}

// Copies runs the checks of the start that determine features.
func Copies(ctx context.Context, store object.Store, dir string) (Report, error) {
	return run(ctx, store, dir, slices.DeleteFunc(slices.Clone(checks), func(c check) bool {
		return c.name != conditionalCopy && c.name != multipartCopy
	}))
}

// check is a check to run. It has failed if run returns a finding. After any other error it
// has not completed.
type check struct {
	name            string
	required, light bool
	exclusive       bool // no other check runs at the same time
	run             func(p *prober, ctx context.Context) (detail string, err error)
}

// finding is a wrong behaviour of a store.
type finding string

func (f finding) Error() string { return string(f) }

func findingf(format string, args ...any) error { return finding(fmt.Sprintf(format, args...)) }

// errOrFinding returns err, or a finding if err is nil.
func errOrFinding(err error, format string, args ...any) error {
	if err != nil {
		return err
	}
	return findingf(format, args...)
}

// Names of the checks that determine features.
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
	{"read after write", true, false, false, (*prober).readAfterWrite},
	{"keys that look alike", true, false, false, (*prober).similarKeys},
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
	keys []string // of written objects
}

func run(ctx context.Context, store object.Store, dir string, checks []check) (report Report, err error) {
	p := &prober{store: store, dir: path.Join(dir, Dir) + "/" + strings.ToLower(rand.Text())}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
		defer cancel()
		_ = p.clean(ctx) // RemoveLeft removes the rest; a failure does not affect the report
	}()
	outcomes := p.runAll(ctx, checks)
	if ctx.Err() != nil {
		return report, fmt.Errorf("probe: %w", ctx.Err())
	}
	for i, c := range checks {
		detail, err := outcomes[i].detail, outcomes[i].err
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

// outcome is the result of a check's function.
type outcome struct {
	detail string
	err    error
}

// runAll runs the checks in parallel, and then those that measure time one by one. Each
// check has its own keys. Parallel checks keep the probe of a distant store short.
func (p *prober) runAll(ctx context.Context, checks []check) []outcome {
	outcomes := make([]outcome, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		if !c.exclusive {
			wg.Go(func() { outcomes[i].detail, outcomes[i].err = c.run(p, ctx) })
		}
	}
	wg.Wait()
	for i, c := range checks {
		if c.exclusive {
			outcomes[i].detail, outcomes[i].err = c.run(p, ctx)
		}
	}
	return outcomes
}
