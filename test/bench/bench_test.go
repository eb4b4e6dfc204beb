//go:build linux

package bench_test

import (
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/test/bench"
)

func TestStatistics(t *testing.T) {
	values := []float64{5, 1, 4, 2, 3}
	for _, c := range []struct {
		what      string
		got, want float64
	}{
		{"median", bench.Median(values), 3},
		{"median of an even number", bench.Median([]float64{1, 2, 4, 8}), 3},
		{"median of no values", bench.Median(nil), 0},
		{"minimum", bench.Quantile(values, 0), 1},
		{"maximum", bench.Quantile(values, 1), 5},
		{"p90", bench.Quantile(values, 0.9), 4.6},
		{"spread", bench.Spread([]float64{10, 20, 9, 11, 10}), 0.2},
		{"spread with a low outlier", bench.Spread([]float64{10, 1, 10, 11, 10}), 0.1},
		{"spread of few", bench.Spread([]float64{10, 9, 11}), 0.2},
		{"spread of no values", bench.Spread(nil), 0},
		{"range with an outlier", bench.Range([]float64{1, 1, 1, 1, 9}), 8},
		{"median of ratios", bench.Median(bench.Ratios([]float64{2, 6, 40}, []float64{1, 2, 4})), 3},
	} {
		if math.Abs(c.got-c.want) > 1e-9 {
			t.Errorf("%s: got %v, want %v", c.what, c.got, c.want)
		}
	}
}

func TestProxy(t *testing.T) {
	var host string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host = r.Host
		_, _ = io.Copy(w, r.Body)
	}))
	defer srv.Close()
	p, err := bench.StartProxy(t.Context(), strings.TrimPrefix(srv.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const delay = 50 * time.Millisecond
	for _, d := range []time.Duration{0, delay} {
		p.Delay(d)
		req, err := http.NewRequestWithContext(
			t.Context(),
			http.MethodPut,
			"http://"+p.Addr+"/a/b?c",
			strings.NewReader("body"),
		)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(resp.Body)
		if err != nil || string(answer) != "body" || host != p.Addr {
			t.Errorf("got %q from %q, err = %v", answer, host, err)
		}
		_ = resp.Body.Close()
		var seen []bench.Request
		for len(seen) == 0 { // recorded shortly after the response
			seen = p.Drain()
		}
		if q := seen[0]; len(seen) != 1 || q.Method != http.MethodPut || q.Path != "/a/b" || q.Bytes != 4 ||
			q.End.Sub(q.Begin) < d {
			t.Errorf("saw %+v", seen)
		}
	}
}

func TestPace(t *testing.T) {
	srv := httptest.NewServer(
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "body") }),
	)
	defer srv.Close()
	p, err := bench.StartProxy(t.Context(), strings.TrimPrefix(srv.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const minTime = 50 * time.Millisecond
	p.Pace(func(r *http.Request) time.Duration {
		if r.URL.Path == "/slow" {
			return minTime
		}
		return 0
	})
	for _, path := range []string{"/slow", "/fast"} {
		begin := time.Now()
		answer, err := bench.Get(t.Context(), "http://"+p.Addr+path)
		took := time.Since(begin)
		if err != nil || string(answer) != "body" || path == "/slow" && took < minTime {
			t.Errorf("%s: got %q after %v, err = %v", path, answer, took, err)
		}
	}
}

func TestSum(t *testing.T) {
	text := []byte("# HELP a A help text.\na{x=\"1\",y=\"2\"} 3\na{x=\"1\",y=\"3\"} 4e0\na{x=\"2\"} 5\na_total 6\nb 7\n")
	for _, c := range []struct {
		metric string
		labels []string
		want   float64
	}{
		{"a", nil, 12},
		{"a", []string{`x="1"`}, 7},
		{"a", []string{`y="3"`, `x="1"`}, 4},
		{"b", nil, 7},
		{"c", nil, 0},
	} {
		if got, err := bench.Sum(text, c.metric, c.labels...); err != nil || got != c.want {
			t.Errorf("%s%v: got %v, %v, want %v", c.metric, c.labels, got, err, c.want)
		}
	}
	if _, err := bench.Sum([]byte("a x\n"), "a"); err == nil {
		t.Error("got no error for an invalid number")
	}
}

func TestReport(t *testing.T) {
	r := &bench.Report{Name: "x", Facts: []string{"Fact."}, Tables: []bench.Table{{Title: "T", Head: []string{"a", "b"}}}}
	r.Tables[0].Add("1", "two")
	r.Bars = []bench.Bar{
		{What: "p", OK: true}, {What: "m"}, {What: "i", OK: true, Noise: "busy"},
	}
	if p, m, i := r.Count(); p != 1 || m != 1 || i != 1 {
		t.Errorf("got %d passed, %d missed, %d inconclusive", p, m, i)
	}
	name := filepath.Join(t.TempDir(), "report.md")
	for range 2 { // creates the file, then replaces the report
		if err := r.WriteInto(name); err != nil {
			t.Fatal(err)
		}
	}
	var plain strings.Builder
	r.Plain(&plain)
	for _, want := range []string{"Fact.\n", "  1  two\n", "inconclusive: busy"} {
		if !strings.Contains(plain.String(), want) {
			t.Errorf("%q is not in\n%s", want, plain.String())
		}
	}
}

func TestFinish(t *testing.T) {
	for _, c := range []struct {
		what   string
		bars   []bench.Bar
		strict bool
		want   int
	}{
		{"all passed", []bench.Bar{{OK: true}}, true, 0},
		{"one missed", []bench.Bar{{OK: true}, {}, {Noise: "busy"}}, true, 1},
		{"one inconclusive", []bench.Bar{{OK: true}, {Noise: "busy"}}, true, 3},
		{"one missed, not strict", []bench.Bar{{}}, false, 0},
	} {
		var out strings.Builder
		r := &bench.Report{Name: "x", Bars: c.bars}
		if got, err := r.Finish(&out, "", c.strict); err != nil || got != c.want {
			t.Errorf("%s: got %d, %v, want %d", c.what, got, err, c.want)
		}
		if !strings.Contains(out.String(), " passed, ") {
			t.Errorf("%s: no count in %q", c.what, out.String())
		}
	}
}

func TestCPUSeconds(t *testing.T) {
	p, err := bench.Start(t.Context(), bench.Command{
		Name: "sh", Args: []string{"sh", "-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo done; read x"},
		Log: filepath.Join(t.TempDir(), "log"), Pipes: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	if _, err := io.ReadFull(p.Stdout, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if got := p.CPUSeconds(); got <= 0 || got > 60 {
		t.Errorf("a loop took %v seconds of processor time", got)
	}
}
