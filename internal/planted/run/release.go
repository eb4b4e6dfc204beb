package main

import (
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"strings"
)

// checkPrograms says whether programs were built without a planted bug. One that
// does not tell how it was built is an error.
func checkPrograms(out io.Writer, files []string) error {
	if len(files) == 0 {
		return errors.New("no program is named")
	}
	var errs []error
	for _, file := range files {
		info, err := buildinfo.ReadFile(file)
		if err != nil {
			errs = append(errs, fmt.Errorf("how %s was built is not known: %w", file, err))
			continue
		}
		errs = append(errs, checkSettings(file, info))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d programs, no planted bug\n", len(files))
	return nil
}

// checkSettings looks for the tags of planted bugs among those of a build.
func checkSettings(file string, info *buildinfo.BuildInfo) error {
	for _, s := range info.Settings {
		if s.Key != "-tags" {
			continue
		}
		for tag := range strings.SplitSeq(s.Value, ",") {
			if strings.HasPrefix(tag, "planted_") {
				return fmt.Errorf("%s was built with the planted bug %s", file, tag)
			}
		}
	}
	return nil
}
