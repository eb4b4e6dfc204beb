package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	commandTimeout = 2 * time.Minute
	makeTimeout    = 10 * time.Minute
	endGrace       = 15 * time.Second // for servers started by a document
)

func main() {
	repo := flag.String("repo", ".", "the repository's folder")
	update := flag.Bool("update", false, "write what the commands print into the documents")
	verbose := flag.Bool("v", false, "print each command before it runs")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := checker{out: os.Stdout, update: *update, verbose: *verbose, grace: endGrace}
	err := c.check(ctx, *repo, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "docscheck:", err)
		os.Exit(1)
	}
}

// A checker runs documents.
type checker struct {
	out     io.Writer
	update  bool
	verbose bool
	grace   time.Duration // for processes of a document to end

	commands int
	failures int
}

// check runs the named documents, or all of them. It prints each failure; its error has
// their number.
func (c *checker) check(ctx context.Context, repo string, names []string) error {
	repo, err := filepath.Abs(repo)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		if names, err = documents(repo); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := c.checkDocument(ctx, repo, name); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
	}
	switch {
	case c.failures > 0:
		return fmt.Errorf("%d of %d commands failed", c.failures, c.commands)
	case c.commands == 0:
		return errors.New("no command: no document has a ```console block")
	}
	fmt.Fprintf(c.out, "docscheck: %d commands passed\n", c.commands)
	return nil
}

// documents returns README.md and the documents below docs, relative to the repository.
func documents(repo string) ([]string, error) {
	names := []string{"README.md"}
	err := fs.WalkDir(os.DirFS(repo), "docs", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !entry.IsDir() && strings.HasSuffix(path, ".md") {
			names = append(names, path)
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	slices.Sort(names[1:])
	return names, err
}

func (c *checker) fail(format string, args ...any) {
	c.failures++
	fmt.Fprintf(c.out, "FAIL "+format+"\n", args...)
}

func (c *checker) checkDocument(ctx context.Context, repo, name string) (err error) {
	path := filepath.Join(repo, name)
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	doc, err := parse(name, string(text))
	if err != nil {
		return err
	}
	for _, u := range doc.unchecked {
		fmt.Fprintf(c.out, "skip %s:%d: %s\n", name, u.line, u.reason)
	}
	if len(doc.commands) == 0 {
		return nil
	}
	began := time.Now()
	got, err := c.runDocument(ctx, repo, doc)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "ran  %s: %d commands in %.1fs\n", name, len(doc.commands), time.Since(began).Seconds())
	if !c.update || len(got) == 0 {
		return nil
	}
	fmt.Fprintf(c.out, "wrote %s: %d outputs\n", name, len(got))
	return os.WriteFile(path, []byte(doc.update(got)), 0o644)
}

// runDocument runs a document's commands in order. It returns the new outputs for an
// update, by the number of the command.
func (c *checker) runDocument(ctx context.Context, repo string, doc *document) (map[int][]string, error) {
	s, err := start(ctx, repo)
	if err != nil {
		return nil, fmt.Errorf("start a shell for %s: %w", doc.name, err)
	}
	changed := map[int][]string{}
	for i, cmd := range doc.commands {
		if c.verbose {
			fmt.Fprintf(c.out, "run  %s:%d: %s\n", doc.name, cmd.line, cmd.text)
		}
		c.commands++
		got, err := runCommand(ctx, s, cmd.text)
		if err != nil {
			c.fail("%s:%d: %s\n%v; it printed so far:\n%s", doc.name, cmd.line, cmd.text, err, strings.Join(got, "\n"))
			break // the shell is unusable
		}
		asked := i+1 < len(doc.commands) && strings.TrimSpace(doc.commands[i+1].text) == "echo $?"
		switch {
		case !matches(cmd.want, got):
			if c.update {
				changed[i] = got
				continue
			}
			c.fail("%s:%d: %s\n%s", doc.name, cmd.line, cmd.text, difference(cmd.want, got))
		case s.status != 0 && !asked && !showsSomething(cmd.want):
			c.fail("%s:%d: %s\nexit status %d, of which the document shows nothing:\n%s",
				doc.name, cmd.line, cmd.text, s.status, strings.Join(got, "\n"))
		}
	}
	if err := s.end(c.grace); err != nil {
		c.fail("%s: %v", doc.name, err)
	}
	return changed, nil
}

func runCommand(ctx context.Context, s *session, text string) ([]string, error) {
	limit := commandTimeout
	if strings.HasPrefix(text, "make ") {
		limit = makeTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return s.run(ctx, text)
}

// difference formats both sides as compared, and then the actual output.
func difference(want, got []string) string {
	return fmt.Sprintf("(-document +printed, after masking):\n%s\nprinted:\n\t%s",
		cmp.Diff(maskAll(want), maskAll(got)), strings.Join(got, "\n\t"))
}
