package epoch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Prefix is what the keys of all notes begin with.
const Prefix = "gc/epoch/"

const (
	formatVersion = 1
	maxNoteBytes  = 4 << 10 // a note has far fewer
	kept          = 2       // notes, the newest
	maxListed     = 3       // lists before a note that goes whenever it is read is an error
)

// note is an object of a beat, as JSON.
type note struct {
	FormatVersion int       `json:"format_version"`
	Cluster       string    `json:"cluster_id"`
	Beat          int64     `json:"beat,string"`
	Nonce         string    `json:"nonce"`
	Revision      int64     `json:"revision,string"` // of the metadata store, before the beat
	Ceiling       int64     `json:"ceiling,string"`
	Time          time.Time `json:"time"` // UTC, for people
}

// key is the object of a beat.
func key(beat int64) string { return Prefix + keys.ID(beat) + ".json" }

// beatOf reads the beat that an object's key is of; not ok: it is none of ours.
func beatOf(name string) (beat int64, ok bool) {
	digits, isJSON := strings.CutSuffix(strings.TrimPrefix(name, Prefix), ".json")
	beat, err := strconv.ParseInt(digits, 10, 64)
	if !isJSON || err != nil || beat < 1 || key(beat) != name {
		return 0, false
	}
	return beat, true
}

func encode(n *note) ([]byte, error) {
	data, err := json.Marshal(n)
	if err != nil {
		return nil, fmt.Errorf("encode epoch object %d: %w", n.Beat, err)
	}
	return seal(data), nil
}

// sumField begins the last field of a note: the SHA-256 of the note without it, for
// with one digit altered on the way it would be another note.
const sumField = `,"sha256":"`

// seal adds it to a JSON object.
func seal(data []byte) []byte {
	return fmt.Appendf(nil, "%s%s%x\"}\n", bytes.TrimSuffix(data, []byte("}")), sumField, sha256.Sum256(data))
}

// sealed says whether it is right. A note of a release before has none, and one that
// was altered in one place cannot both lack it and say something else.
func sealed(data []byte) bool {
	body, _, found := bytes.Cut(data, []byte(sumField))
	return !found || bytes.Equal(bytes.TrimSpace(data), bytes.TrimSpace(seal(append(bytes.Clone(body), '}'))))
}

// decode reads the note of beat. The error is an ErrDamaged.
func decode(beat int64, data []byte) (*note, error) {
	n := &note{}
	var problem string
	switch err := json.Unmarshal(data, n); {
	case len(data) > maxNoteBytes:
		problem = fmt.Sprintf("more than %d bytes", maxNoteBytes)
	case err != nil:
		problem = err.Error()
	case n.FormatVersion != formatVersion:
		problem = fmt.Sprintf("format version %d, this release reads %d", n.FormatVersion, formatVersion)
	case n.Beat != beat:
		problem = fmt.Sprintf("it says that it is of beat %d", n.Beat)
	case n.Nonce == "" || n.Revision < 0 || n.Ceiling < 0:
		problem = "fields are missing or negative"
	case !sealed(data):
		problem = "its SHA-256 is another than it says"
	default:
		return n, nil
	}
	return nil, fmt.Errorf("%w %s: %s; see who wrote it: nothing is deleted while it is there", ErrDamaged, key(beat), problem)
}

// newest lists the notes and reads the newest; it is nil when there is none. The
// keys are those of the older ones that are kept no longer.
func (e *Epoch) newest(ctx context.Context) (*note, []string, error) {
	for attempt := 1; ; attempt++ {
		beats, err := e.list(ctx)
		if err != nil {
			return nil, nil, err
		}
		if len(beats) == 0 {
			n, err := e.byName(ctx)
			return n, nil, err
		}
		last := beats[len(beats)-1]
		data, err := object.ReadAll(ctx, e.o.Store, key(last), maxNoteBytes)
		if errors.Is(err, object.ErrNotFound) && attempt < maxListed { // there are newer ones by now
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read epoch object: %w", err)
		}
		n, err := decode(last, data)
		if err != nil {
			return nil, nil, err
		}
		e.lists.Passed()
		var old []string
		for _, beat := range beats[:max(len(beats)-kept, 0)] {
			old = append(old, key(beat))
		}
		return n, old, nil
	}
}

// maxByName bounds the beats that byName goes beyond the known one.
const maxByName = 1 << 40

// byName reads the newest note without a list, for a store may list nothing of what
// it has: it asks for the beat that the metadata store knows and for those after it.
// The note is nil when none of them is there. A store that lists nothing deletes no
// old note either, so the notes after the known one follow each other without a gap,
// and a search by doubling and halving finds the last.
func (e *Epoch) byName(ctx context.Context) (*note, error) {
	s, err := e.read(ctx)
	if err != nil || s.behind == nil && s.epoch.GetBeat() == 0 && s.intent == nil {
		return nil, err
	}
	known := s.epoch.GetBeat()
	there := func(beat int64) (*note, error) {
		if beat < 1 {
			return nil, nil
		}
		data, err := object.ReadAll(ctx, e.o.Store, key(beat), maxNoteBytes)
		if errors.Is(err, object.ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read epoch object: %w", err)
		}
		return decode(beat, data)
	}
	newest, err := there(known)
	if err != nil {
		return nil, err
	}
	low, high := known, known+1 // low is there, or the known one; high is not looked at yet
	for high-known <= maxByName {
		n, err := there(high)
		if err != nil {
			return nil, err
		}
		if n == nil {
			break
		}
		newest, low = n, high
		high = known + 2*(high-known)
	}
	for high-low > 1 {
		middle := low + (high-low)/2
		n, err := there(middle)
		if err != nil {
			return nil, err
		}
		if n == nil {
			high = middle
			continue
		}
		newest, low = n, middle
	}
	if newest != nil {
		e.lists.Failed(fmt.Errorf("nothing is listed under %s, and %s is there", Prefix, key(low)))
	}
	return newest, nil
}

// list returns the beats of which there are notes, ascending. What else lies there
// is passed over.
func (e *Epoch) list(ctx context.Context) ([]int64, error) {
	var beats []int64
	for info, err := range e.o.Store.List(ctx, Prefix) {
		if err != nil {
			return nil, fmt.Errorf("list epoch objects: %w", err)
		}
		if beat, ok := beatOf(info.Key); ok {
			beats = append(beats, beat)
		}
	}
	slices.Sort(beats)
	return beats, nil
}
