// Command avrocat prints the records of Avro object container files, each as one line
// of JSON with byte strings in base64. It shares no code with snapshotd, so its output
// is that of any other reader:
//
//	avrocat manifest-0.avro | jq .id
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/twmb/avro/ocf"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: avrocat FILE...")
		os.Exit(2)
	}
	for _, name := range os.Args[1:] {
		if err := cat(os.Stdout, name); err != nil {
			fmt.Fprintf(os.Stderr, "avrocat: %s: %v\n", name, err)
			os.Exit(1)
		}
	}
}

func cat(w io.Writer, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	r, err := ocf.NewReader(bufio.NewReader(f))
	if err != nil {
		return err
	}
	out := bufio.NewWriter(w)
	lines := json.NewEncoder(out)
	for {
		var record any
		err := r.Decode(&record)
		if errors.Is(err, io.EOF) {
			return out.Flush()
		}
		if err != nil {
			return errors.Join(err, out.Flush())
		}
		if err := lines.Encode(record); err != nil {
			return err
		}
	}
}
