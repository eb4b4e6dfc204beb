//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"time"

	"github.com/snapshotd/snapshotd/test/bench"
)

// rclone is a running rclone, which copies on command: the measured time excludes its
// start.
type rclone struct {
	process *bench.Process
	at      string // host:port
	s3      string
}

// startRclone starts rclone for the S3 server at an address.
func startRclone(ctx context.Context, bin, dir, s3 string) (*rclone, error) {
	addr, err := bench.FreeAddr(ctx)
	if err != nil {
		return nil, err
	}
	p, err := bench.Start(ctx, bench.Command{
		Name: "rclone",
		Args: []string{bin, "rcd", "--rc-no-auth", "--rc-addr", addr, "--rc-enable-metrics", "--config", ""},
		Log:  filepath.Join(dir, "rclone.log"),
		Env:  []string{"AWS_CA_BUNDLE="},
	})
	if err != nil {
		return nil, err
	}
	c := &rclone{process: p, at: addr, s3: s3}
	if err := p.WaitHealthy(ctx, "http://"+addr+"/metrics"); err != nil {
		p.Stop()
		return nil, err
	}
	return c, nil
}

// fs returns rclone's name of a prefix, without optional work: no check of the
// bucket, no modification times.
func (c *rclone) fs(prefix string) string {
	return fmt.Sprintf(
		`:s3,provider=Other,access_key_id=%s,secret_access_key=%s,endpoint="http://%s",`+
			`force_path_style=true,no_check_bucket=true:%s/%s`,
		bench.AccessKeyID,
		bench.SecretAccessKey,
		c.s3,
		bucket,
		prefix,
	)
}

// copy copies a prefix and returns the duration in seconds.
func (c *rclone) copy(ctx context.Context, from, to string, inFlight int) (float64, error) {
	body, err := json.Marshal(map[string]any{
		"srcFs": c.fs(from), "dstFs": c.fs(to),
		"_config": map[string]any{
			"Transfers":        inFlight,
			"Checkers":         inFlight,
			"UseListR":         true,
			"SizeOnly":         true,
			"NoCheckDest":      true,
			"UseServerModTime": true,
			"MaxBacklog":       100_000,
		},
	})
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+c.at+"/sync/copy", bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	begin := time.Now()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	answer, err := io.ReadAll(resp.Body)
	took := time.Since(begin).Seconds()
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("rclone: %s: %.500s", resp.Status, answer)
	}
	return took, errors.Join(err, resp.Body.Close())
}
