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

// Prefix is the common prefix of the keys of all marks.
const Prefix = "gc/epoch/"

const (
	formatVersion = 1
	maxMarkBytes  = 4 << 10 // far more than a mark has
	keptMarks     = 2       // the newest ones
	maxLists      = 3       // lists until a mark that is deleted before each read becomes an error
)

// mark is a high-water mark: the JSON object of one heartbeat.
type mark struct {
	FormatVersion int       `json:"format_version"`
	Cluster       string    `json:"cluster_id"`
	Number        int64     `json:"beat,string"`
	Nonce         string    `json:"nonce"`
	Revision      int64     `json:"revision,string"` // of the metadata store, before the heartbeat
	IDLimit       int64     `json:"ceiling,string"`
	Time          time.Time `json:"time"` // UTC, informative
}

// markKey returns the object key of a mark.
func markKey(number int64) string { return Prefix + keys.ID(number) + ".json" }

// parseMarkKey returns the number of the mark with the key; ok is false for any other key.
func parseMarkKey(name string) (number int64, ok bool) {
	digits, isJSON := strings.CutSuffix(strings.TrimPrefix(name, Prefix), ".json")
	number, err := strconv.ParseInt(digits, 10, 64)
	if !isJSON || err != nil || number < 1 || markKey(number) != name {
		return 0, false
	}
	return number, true
}

func encode(m *mark) ([]byte, error) {
	data, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode epoch object %d: %w", m.Number, err)
	}
	return appendDigest(data), nil
}

// digestField begins the last field of a mark: the SHA-256 of the mark without that
// field. It detects a digit that was altered in transfer.
const digestField = `,"sha256":"`

// appendDigest adds the digest to a JSON object.
func appendDigest(data []byte) []byte {
	return fmt.Appendf(nil, "%s%s%x\"}\n", bytes.TrimSuffix(data, []byte("}")), digestField, sha256.Sum256(data))
}

// digestMatches verifies the digest of a mark. Marks of an earlier release have none. A
// mark that was altered in one place cannot lack the digest and differ elsewhere.
func digestMatches(data []byte) bool {
	body, _, found := bytes.Cut(data, []byte(digestField))
	return !found || bytes.Equal(bytes.TrimSpace(data), bytes.TrimSpace(appendDigest(append(bytes.Clone(body), '}'))))
}

// decode decodes the mark with the number. The error is an ErrDamaged.
func decode(number int64, data []byte) (*mark, error) {
	m := &mark{}
	var problem string
	switch err := json.Unmarshal(data, m); {
	case len(data) > maxMarkBytes:
		problem = fmt.Sprintf("more than %d bytes", maxMarkBytes)
	case err != nil:
		problem = err.Error()
	case m.FormatVersion != formatVersion:
		problem = fmt.Sprintf("format version %d, this release reads %d", m.FormatVersion, formatVersion)
	case m.Number != number:
		problem = fmt.Sprintf("field beat is %d", m.Number)
	case m.Nonce == "" || m.Revision < 0 || m.IDLimit < 0:
		problem = "fields are missing or negative"
	case !digestMatches(data):
		problem = "SHA-256 mismatch"
	default:
		return m, nil
	}
	return nil, fmt.Errorf("%w %s: %s; find its writer: nothing is deleted while this object exists",
		ErrDamaged, markKey(number), problem)
}

// newest lists the marks and reads the newest, nil if there is none. The keys are those
// of superseded marks.
func (e *Epoch) newest(ctx context.Context) (*mark, []string, error) {
	for attempt := 1; ; attempt++ {
		numbers, err := e.list(ctx)
		if err != nil {
			return nil, nil, err
		}
		if len(numbers) == 0 {
			m, err := e.newestByName(ctx)
			return m, nil, err
		}
		last := numbers[len(numbers)-1]
		data, err := object.ReadAll(ctx, e.o.Store, markKey(last), maxMarkBytes)
		if errors.Is(err, object.ErrNotFound) && attempt < maxLists { // superseded since the list
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read epoch object: %w", err)
		}
		m, err := decode(last, data)
		if err != nil {
			return nil, nil, err
		}
		e.lists.Passed()
		var old []string
		for _, number := range numbers[:max(len(numbers)-keptMarks, 0)] {
			old = append(old, markKey(number))
		}
		return m, old, nil
	}
}

// maxByName bounds how far newestByName searches beyond the known number.
const maxByName = 1 << 40

// newestByName finds the newest mark without a list, for stores whose list omits existing
// objects. It reads the mark that the metadata store knows and its successors, and returns
// nil if none exists. Such a store deletes no superseded marks either, so the successors
// are contiguous, and a search by doubling and halving finds the last.
func (e *Epoch) newestByName(ctx context.Context) (*mark, error) {
	s, err := e.read(ctx)
	if err != nil || s.rolledBack == nil && s.epoch.GetBeat() == 0 && s.intent == nil {
		return nil, err
	}
	known := s.epoch.GetBeat()
	newest, err := e.readMark(ctx, known)
	if err != nil {
		return nil, err
	}
	low, high := known, known+1 // low exists or is known; high is unread
	for high-known <= maxByName {
		m, err := e.readMark(ctx, high)
		if err != nil {
			return nil, err
		}
		if m == nil {
			break
		}
		newest, low = m, high
		high = known + 2*(high-known)
	}
	for high-low > 1 {
		middle := low + (high-low)/2
		m, err := e.readMark(ctx, middle)
		if err != nil {
			return nil, err
		}
		if m == nil {
			high = middle
			continue
		}
		newest, low = m, middle
	}
	if newest != nil {
		e.lists.Failed(fmt.Errorf("the list of %s is empty, but %s exists", Prefix, markKey(low)))
	}
	return newest, nil
}

// readMark reads the mark with the number; nil if it does not exist.
func (e *Epoch) readMark(ctx context.Context, number int64) (*mark, error) {
	if number < 1 {
		return nil, nil
	}
	data, err := object.ReadAll(ctx, e.o.Store, markKey(number), maxMarkBytes)
	if errors.Is(err, object.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read epoch object: %w", err)
	}
	return decode(number, data)
}

// list returns the numbers of the existing marks in ascending order. It skips other
// objects.
func (e *Epoch) list(ctx context.Context) ([]int64, error) {
	var numbers []int64
	for info, err := range e.o.Store.List(ctx, Prefix) {
		if err != nil {
			return nil, fmt.Errorf("list epoch objects: %w", err)
		}
		if number, ok := parseMarkKey(info.Key); ok {
			numbers = append(numbers, number)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}
