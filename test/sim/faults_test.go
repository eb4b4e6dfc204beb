package sim

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// copyName is what the names of calls that copy begin with.
const copyName = "object copy "

// clock is a clock that may be wrong. It is safe for concurrent use.
type clock struct {
	mu   sync.Mutex
	off  time.Duration
	offs []time.Duration // all that it was off
}

func (c *clock) set(off time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = off
	c.offs = append(c.offs, off)
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.off)
}

// ever returns all that the clock was off.
func (c *clock) ever() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.offs)
}

// setClock sets a clock wrong, by at most d.
func (s *sim) setClock(c *clock, d time.Duration) {
	var off time.Duration
	if d > 0 && !s.calmed {
		off = time.Duration(s.rng.Int64N(int64(2*d))) - d
	}
	c.set(off)
}

// jump makes the clock of a replica jump, at times that of the object store.
func (s *sim) jump() {
	up := s.up()
	if s.profile.clocks == 0 || len(up) == 0 {
		return
	}
	s.reached.jumped++
	if s.chance(0.2) {
		s.setClock(&s.clock, s.profile.clocks/2)
		s.note("the object store's clock jumps")
		return
	}
	m := up[s.rng.IntN(len(up))]
	s.setClock(&m.clock, s.profile.clocks)
	s.note("%v's clock jumps", m)
}

// rot makes all reads of an object of a snapshot return another content for a while.
func (s *sim) rot() {
	id, ok := pick(s, s.work.standing())
	if !ok {
		return
	}
	dir := manifest.Dir(s.oracle.snapshots[id].collection, id)
	key := dir + []string{manifest.RefsName, manifest.MetadataName, manifest.ManifestName(0)}[s.rng.IntN(3)]
	d := time.Duration(1 + s.rng.Int64N(int64(20*time.Minute)))
	s.oracle.rot[key] = rot{time.Now().Add(d), s.rng.IntN(1 << 20)}
	s.reached.rotten++
	s.note("%s is rotten for %v", key, d)
}

// rot is the end of the wrong reads of an object, and their wrong byte.
type rot struct {
	until time.Time
	at    int
}

// rotten returns an object's content as it is read now, and whether that is another.
func (o *oracle) rotten(key string, body []byte) ([]byte, bool) {
	r, ok := o.rot[key]
	if !ok || !time.Now().Before(r.until) || len(body) == 0 {
		return body, false
	}
	return flip(body, r.at%len(body)), true
}

// flip returns content with a byte that is another.
func flip(body []byte, at int) []byte {
	body = bytes.Clone(body)
	body[at] ^= 1
	return body
}

// corrupt returns what a read might return instead of the content.
func corrupt(rng *rand.Rand, body []byte) (other []byte, how string) {
	n := len(body)
	switch {
	case n == 0:
		return []byte{0}, "and there are none"
	case rng.IntN(3) == 0:
		return body[:rng.IntN(n)], "and there are more"
	case rng.IntN(3) == 0:
		return slices.Concat(body[1:], body[:1]), "of another range"
	}
	return flip(body, rng.IntN(n)), "one of them wrong"
}

// read records that a replica has read an object correctly.
func (m *member) read(key string) {
	if _, id, ok := manifest.ParseKey(key); ok && strings.HasSuffix(key, manifest.RefsName) {
		m.knows[id] = true
	}
}

// signatureAge is the age at which S3 refuses a signed request.
const signatureAge = 15 * time.Minute

// leaveUpload leaves an upload open for half of the copies that do not take effect. A store
// starts none for a request that a stopped process signed too long ago. None starts after a
// jump of the store's clock: its start time then shows no order, and it may stay open.
func (s *sim) leaveUpload(c *call) {
	paths, copies := strings.CutPrefix(c.name, copyName)
	offs := s.clock.ever()
	jumped := offs[0] != offs[len(offs)-1]
	if !copies || !s.chance(0.5) || jumped || time.Since(c.came) > signatureAge {
		return
	}
	s.oracle.uploads[strings.Fields(paths)[1]] = s.clock.now()
	s.reached.uploads++
}

// overtake writes a foreign object where none exists yet.
func (s *sim) overtake(key string) {
	if _, err := s.objects.Create(never, key, []byte("this is foreign")); err != nil {
		return
	}
	s.oracle.foreign[key] = true
	s.reached.foreign++
	s.note("foreign write of %s", key)
}

// judgeSweep checks that a sweep deletes no object that is younger than the grace
// period by the object store's clock. asked is when the delete was asked for.
func (o *oracle) judgeSweep(ctx context.Context, m *member, asked time.Time, list []string) {
	if m.engine || len(o.s.clock.ever()) > 1 { // it has jumped, so that ages say nothing
		return
	}
	off := time.Until(o.s.clock.now())
	for _, key := range list {
		_, id, ok := manifest.ParseKey(key)
		if gone, was := o.recordGone[id]; !ok || !was || !gone.Before(asked) {
			continue // it may be of a drop
		}
		info, err := o.s.objects.Head(ctx, key)
		if err != nil {
			continue
		}
		if age := asked.Add(off).Sub(info.ModTime); age >= 0 && age < o.s.profile.grace {
			o.s.wrong("%v sweeps %s, which is %v old, and the grace period is %v", m, key, age, o.s.profile.grace)
		}
	}
}
