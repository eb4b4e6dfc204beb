package gotest_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/snapshotd/snapshotd/test/mutants/gotest"
)

// TestRead holds that only a test that failed counts as one.
func TestRead(t *testing.T) {
	const ran = `{"Action":"run","Test":"TestA"}` + "\n" + `{"Action":"run","Test":"TestA/x"}` + "\n"
	for name, c := range map[string]struct {
		in   string
		ok   bool
		want gotest.Result
	}{
		"passes": {
			ran + `{"Action":"pass","Test":"TestA/x"}` + "\n" + `{"Action":"pass","Test":"TestA"}` + "\n" + `{"Action":"pass"}`,
			true,
			gotest.Result{Passed: 1},
		},
		"fails": {
			ran + `{"Action":"fail","Test":"TestA/x"}` + "\n" + `{"Action":"fail","Test":"TestA"}` + "\n" + `{"Action":"fail"}`,
			false,
			gotest.Result{Failed: []string{"TestA"}},
		},
		"panics": {
			ran + `{"Action":"output","Output":"panic: index out of range\n"}` + "\n" + `{"Action":"fail"}`, false,
			gotest.Result{Failed: []string{"TestA"}},
		},
		"does not end": {
			ran + `{"Action":"output","Test":"TestA","Output":"panic: test timed out after 1s\n"}` + "\n" +
				`{"Action":"fail","Test":"TestA"}` + "\n" + `{"Action":"fail"}`, false,
			gotest.Result{TimedOut: true},
		},
		"does not build": {
			`{"ImportPath":"p","Action":"build-output","Output":"undefined: x\n"}` + "\n" +
				`{"ImportPath":"p","Action":"build-fail"}` + "\n" +
				`{"Action":"fail","FailedBuild":"p"}`, false,
			gotest.Result{Broken: "the build failed"},
		},
		"there is none": {
			`{"Action":"output","Output":"testing: warning: no tests to run\n"}` + "\n" + `{"Action":"pass"}`, true,
			gotest.Result{Broken: "no test matches"},
		},
		"is skipped": {
			`{"Action":"run","Test":"TestA"}` + "\n" + `{"Action":"skip","Test":"TestA"}` + "\n" + `{"Action":"pass"}`, true,
			gotest.Result{Broken: "no test matches"},
		},
		"no events": {"go: cannot find module\n", false, gotest.Result{Broken: "go test failed without a failed test"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := gotest.Read(strings.NewReader(c.in), c.ok)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(
				c.want,
				got,
				cmpopts.IgnoreFields(gotest.Result{}, "Output"),
				cmpopts.EquateEmpty(),
			); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
