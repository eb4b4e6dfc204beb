package manager

import (
	"errors"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestRepeatWithUnreadableToken checks that a repeat that loses to the first call and
// cannot read the token returns UNAVAILABLE, not the conflict that the first call's
// success caused.
func TestRepeatWithUnreadableToken(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		settle()
		tok := request.Token{Principal: "local", Method: "CreateSnapshot", Value: "t", Hash: []byte{1}}
		begun, lost := false, false
		b.kv.Hook(func(c meta.Call) meta.Fault {
			switch {
			case c.Method == meta.MethodGrant && !begun: // the create's lease; its token was read before
				begun = true
				if _, err := a.Create(t.Context(), tok, spec(col, "x")); err != nil {
					t.Error(err)
				}
			case c.Method == meta.MethodRevoke: // its begin has failed
				lost = true
			case c.Method == meta.MethodGet && lost:
				return meta.Before
			}
			return meta.NoFault
		})
		_, err := b.Create(t.Context(), tok, spec(col, "x"))
		b.kv.Hook(nil)
		if !errors.Is(err, meta.ErrUnavailable) || !lost {
			t.Errorf("err = %v, lost: %v", err, lost)
		}
	})
}
