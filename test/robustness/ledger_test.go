package robustness

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// ledger is the clients' record of what they wrote and requested, when, and of the
// answers. It is safe for concurrent use while the clients are at work; the judges read
// it afterwards.
type ledger struct {
	mu          sync.Mutex
	files       map[string]file      // by key
	foreign     map[string]stored    // by key: objects that snapshotd must not touch
	harmed      map[string]bool      // by key: files that were replaced or deleted behind snapshotd
	segments    map[int64]*segment   // by id
	snapshots   map[string]*snapshot // by tag
	drops       []drop
	pins        []pin
	compactions []compaction
	restores    []*restore
	events      []event
}

func newLedger() *ledger {
	return &ledger{
		files:     map[string]file{},
		foreign:   map[string]stored{},
		harmed:    map[string]bool{},
		segments:  map[int64]*segment{},
		snapshots: map[string]*snapshot{},
	}
}

// note changes or reads the ledger while the clients are at work.
func (l *ledger) note(fn func(l *ledger)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fn(l)
}

// idTag stands for the tag of a snapshot of which only the id is known.
func idTag(id int64) string { return fmt.Sprintf("#%d", id) }

// history returns the events of names. Events that have only an id get the tag of its
// snapshot: empty, which is any, when that is not known.
func (l *ledger) history() []event {
	tags := map[string]string{}
	for _, s := range l.snapshots {
		if s.id != 0 {
			tags[idTag(s.id)] = s.tag
		}
	}
	list := slices.Clone(l.events)
	for i, e := range list {
		if strings.HasPrefix(e.Tag, "#") {
			list[i].Tag = tags[e.Tag]
		}
	}
	return list
}

// file is an object that a client wrote, before it registered it.
type file struct {
	sum     [sha256.Size]byte
	size    int64
	segment int64
}

// segment is a segment that a client registered. Only that client removes it, by at most
// one call that is not known to have failed.
type segment struct {
	collection int64
	keys       []string
	call, ret  moment // of the registration; ret is forever when it was not acknowledged
	removal    moment // when the first call was made that may have removed it, else forever
	removed    moment // when that was acknowledged, else forever
}

// snapshot is a create, and what was seen of its snapshot.
type snapshot struct {
	collection int64
	tag, name  string
	id         int64 // 0: not known
	call, ret  moment
	committed  bool               // it was acknowledged, or seen
	content    map[int64][]string // keys of the files by segment; nil: not read
}

// drop is a call that dropped a snapshot, or may have.
type drop struct {
	name      string
	id        int64 // of what was dropped; 0: not known
	call, ret moment
}

// pin is a pin that was acknowledged, until the call was made that removes it.
type pin struct {
	id       int64
	from, to moment
}

// compaction is one that was acknowledged.
type compaction struct {
	inputs    []int64
	output    int64
	call, ret moment
}

// restore is a restore that was asked for.
type restore struct {
	job, target int64 // ids; 0: not known
	name        string
	snapshot    int64
	completed   bool
	keys        map[string]bool // of the target, when it is completed
}

// mayGo returns from when on a snapshot may have been dropped.
func (l *ledger) mayGo(s *snapshot) moment {
	first := forever
	for _, d := range l.drops {
		if d.id != 0 && d.id == s.id || d.id == 0 && d.name == s.name {
			first = min(first, d.call)
		}
	}
	return first
}

// deletion is a delete of one key that the S3 server was asked for, at a moment
// before it was.
type deletion struct {
	key string
	at  moment
}

// Prefixes of keys.
const (
	dataPrefix     = "data/"
	snapshotPrefix = "snapshots/"
	heldPrefix     = "gc/held/"
	restorePrefix  = "gc/restore/"
	epochPrefix    = "gc/epoch/"
	probePrefix    = "snapshotd-probe/"
	identityKey    = "snapshots/identity.json"
)

// misdeeds judges each delete that reached the S3 server against all objects that were
// needed at that moment: segments without a request to remove them, files and objects
// of committed snapshots without a request to drop them, files of restored collections.
// A key is never used twice, so a delete of a snapshot's file is wrong also before the
// snapshot.
func (l *ledger) misdeeds(deletions []deletion) []string {
	holders := map[string][]*snapshot{}
	byID := map[int64]*snapshot{}
	for _, s := range l.snapshots {
		if !s.committed {
			continue
		}
		byID[s.id] = s
		for _, keys := range s.content {
			for _, key := range keys {
				holders[key] = append(holders[key], s)
			}
		}
	}
	var text []string
	say := func(d deletion, format string, args ...any) {
		text = append(text, fmt.Sprintf("%v: %s was deleted: %s", d.at, d.key, fmt.Sprintf(format, args...)))
	}
	for _, d := range deletions {
		for _, s := range holders[d.key] {
			if gone := l.mayGo(s); d.at < gone {
				say(d, "snapshot %d (%s) needs it, and no drop was requested before %v", s.id, s.name, gone)
			}
		}
		f, ours := l.files[d.key]
		_, foreign := l.foreign[d.key]
		switch {
		case foreign:
			say(d, "it is foreign")
		case ours:
			if s := l.segments[f.segment]; s == nil || d.at < s.removal {
				say(d, "segment %d lives", f.segment)
			}
		case strings.HasPrefix(d.key, snapshotPrefix):
			id, ok := ownID(d.key)
			if s := byID[id]; !ok {
				say(d, "no object of a snapshot")
			} else if s != nil && d.at < l.mayGo(s) {
				say(d, "snapshot %d (%s) is committed", s.id, s.name)
			}
		case strings.HasPrefix(d.key, heldPrefix), strings.HasPrefix(d.key, restorePrefix),
			strings.HasPrefix(d.key, epochPrefix), strings.HasPrefix(d.key, probePrefix):
		default:
			restored := false
			for _, r := range l.restores {
				if r.keys[d.key] {
					say(d, "collection %s was restored with it", r.name)
				}
				restored = restored || r.target == 0 || strings.HasPrefix(d.key, fmt.Sprintf("%s%d/", dataPrefix, r.target))
			}
			if !restored {
				say(d, "it has no owner")
			}
		}
	}
	return text
}

// ownID returns the id of the snapshot that owns an object, by its key.
func ownID(key string) (int64, bool) {
	parts := strings.Split(key, "/") // snapshots/<collection>/<id>/<file>
	if len(parts) != 4 {
		return 0, false
	}
	id, err := strconv.ParseInt(parts[2], 10, 64)
	return id, err == nil
}

// captures judges the content of snapshots: all segments that were acknowledged before
// the start of the create and not requested to be removed before its end; none that was
// removed before or registered after; exactly one side of a compaction.
func (l *ledger) captures() []string {
	var text []string
	for _, tag := range slices.Sorted(maps.Keys(l.snapshots)) {
		s := l.snapshots[tag]
		if !s.committed || s.content == nil {
			continue
		}
		say := func(format string, args ...any) {
			text = append(
				text,
				fmt.Sprintf("snapshot %d (%s, %v–%v): %s", s.id, s.name, s.call, s.ret, fmt.Sprintf(format, args...)),
			)
		}
		for _, id := range slices.Sorted(maps.Keys(s.content)) {
			g := l.segments[id]
			switch {
			case g == nil:
				say("segment %d is unknown", id)
			case g.call > s.ret:
				say("segment %d was registered after it", id)
			case g.removed < s.call:
				say("segment %d was removed before it", id)
			default:
				if !slices.Equal(slices.Sorted(slices.Values(g.keys)), slices.Sorted(slices.Values(s.content[id]))) {
					say("segment %d has files %v, not %v", id, s.content[id], g.keys)
				}
			}
		}
		for _, id := range slices.Sorted(maps.Keys(l.segments)) {
			if g := l.segments[id]; g.collection == s.collection && g.ret < s.call && g.removal > s.ret && s.content[id] == nil {
				say("segment %d is missing", id)
			}
		}
		for _, c := range l.compactions {
			n := 0
			for _, id := range c.inputs {
				if s.content[id] != nil {
					n++
				}
			}
			out := s.content[c.output] != nil
			switch g := l.segments[c.output]; {
			case g.collection != s.collection:
			case out && n > 0, n > 0 && n < len(c.inputs) && l.registeredBefore(c.inputs, s.call):
				say("it has %d of the segments %v, and their compaction %d: %v", n, c.inputs, c.output, out)
			case !out && n == 0 && l.registeredBefore(c.inputs, s.call) && g.removal > s.ret && c.call > s.call:
				say("it has neither the segments %v nor their compaction %d", c.inputs, c.output)
			}
		}
	}
	return text
}

func (l *ledger) registeredBefore(ids []int64, t moment) bool {
	for _, id := range ids {
		if g := l.segments[id]; g == nil || g.ret >= t {
			return false
		}
	}
	return true
}

// pinned judges that no snapshot was dropped while it was pinned.
func (l *ledger) pinned() []string {
	var text []string
	for _, p := range l.pins {
		for _, d := range l.drops {
			if d.id == p.id && d.call > p.from && d.ret < p.to {
				text = append(
					text,
					fmt.Sprintf("snapshot %d was dropped at %v–%v, and was pinned from %v to %v", p.id, d.call, d.ret, p.from, p.to),
				)
			}
		}
	}
	return text
}

// lost judges that each acknowledged snapshot is among the final ones, given by their
// ids, unless a drop was requested, and that no dropped snapshot is.
func (l *ledger) lost(there map[int64]bool) []string {
	var text []string
	for _, tag := range slices.Sorted(maps.Keys(l.snapshots)) {
		s := l.snapshots[tag]
		if s.ret != forever && s.id != 0 && !there[s.id] && l.mayGo(s) == forever {
			text = append(text, fmt.Sprintf("snapshot %d (%s), acknowledged at %v, is lost", s.id, s.name, s.ret))
		}
		for _, d := range l.drops {
			if s.id != 0 && d.id == s.id && d.ret != forever && there[s.id] {
				text = append(text, fmt.Sprintf("snapshot %d (%s) is there; it was dropped at %v", s.id, s.name, d.ret))
			}
		}
	}
	return text
}

// stored is an object in the bucket.
type stored struct {
	sum  [sha256.Size]byte
	size int64
}

// objects judges the bucket, byte by byte: the objects of committed snapshots and live
// segments exist with the bytes that the client wrote, and every object has an owner.
// known reports whether the id of a snapshot was ever allocated. It also returns the
// number of orphans that the sweep has yet to find.
func (l *ledger) objects(
	bucket map[string]stored,
	there, living map[int64]bool,
	known func(id int64) bool,
) (text []string, orphans int) {
	need := map[string]string{}
	for _, s := range l.snapshots {
		if !there[s.id] || !s.committed {
			continue
		}
		own := false
		for key := range bucket {
			id, ok := ownID(key)
			own = own || ok && id == s.id && strings.HasPrefix(key, snapshotPrefix)
		}
		if !own {
			text = append(text, fmt.Sprintf("snapshot %d (%s) has no objects of its own", s.id, s.name))
		}
		for _, keys := range s.content {
			for _, key := range keys {
				need[key] = fmt.Sprintf("snapshot %d (%s)", s.id, s.name)
			}
		}
	}
	for id := range living {
		if g := l.segments[id]; g != nil {
			for _, key := range g.keys {
				need[key] = fmt.Sprintf("segment %d", id)
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(need)) {
		switch got, ok := bucket[key]; {
		case l.harmed[key]:
		case !ok:
			text = append(text, fmt.Sprintf("%s is missing, which %s needs", key, need[key]))
		case got.sum != l.files[key].sum || got.size != l.files[key].size:
			text = append(text, fmt.Sprintf("%s has other bytes than were written, and %s needs it", key, need[key]))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(l.foreign)) {
		if got, ok := bucket[key]; !ok || got != l.foreign[key] {
			text = append(text, fmt.Sprintf("%s, which is foreign, is gone or has other bytes", key))
		}
	}
	restored := map[string]bool{}
	for _, r := range l.restores {
		maps.Copy(restored, r.keys)
	}
	for _, key := range slices.Sorted(maps.Keys(bucket)) {
		_, ours := l.files[key]
		_, foreign := l.foreign[key]
		switch {
		case ours,
			foreign,
			restored[key],
			key == identityKey,
			strings.HasPrefix(key, epochPrefix),
			strings.HasPrefix(key, heldPrefix),
			strings.HasPrefix(key, restorePrefix),
			strings.HasPrefix(key, probePrefix):
		case strings.HasPrefix(key, snapshotPrefix):
			if id, ok := ownID(key); !ok || !known(id) {
				text = append(text, fmt.Sprintf("%s has no owner", key))
			} else if !there[id] {
				orphans++
			}
		default:
			if l.lateCopy(key) {
				orphans++
			} else {
				text = append(text, fmt.Sprintf("%s has no owner", key))
			}
		}
	}
	return text, orphans
}

// lateCopy reports whether a restore may have copied an object late.
func (l *ledger) lateCopy(key string) bool {
	for _, r := range l.restores {
		if r.target != 0 && strings.HasPrefix(key, fmt.Sprintf("%s%d/", dataPrefix, r.target)) {
			return true
		}
	}
	return false
}

// harmedIn reports whether a file of a snapshot was replaced or deleted behind snapshotd.
func (l *ledger) harmedIn(id int64) bool {
	for _, s := range l.snapshots {
		if s.id != id {
			continue
		}
		for _, keys := range s.content {
			if slices.ContainsFunc(keys, func(key string) bool { return l.harmed[key] }) {
				return true
			}
		}
	}
	return false
}
