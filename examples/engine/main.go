// Command engine is a toy vector store: it writes files and registers them in snapshotd's
// catalog. Try: engine --store DIR/objects --collection shop load --rows 20000
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"

	"github.com/snapshotd/snapshotd/client"
)

var (
	addr       = flag.String("addr", "127.0.0.1:7950", "snapshotd's `address`")
	store      = flag.String("store", "", "`directory` of the object store")
	collection = flag.String("collection", "", "`name` of a collection")
	snapshot   = flag.String("snapshot", "", "`name` of a snapshot to search or digest instead")
	count      = flag.Int64("rows", 1000, "`number` of rows to load")
	seed       = flag.Uint64("seed", 1, "`seed` of the rows to load, or of the vector to search for")
	every      = flag.Int64("every", 10, "delete rows with ids that this `number` divides")
)

func main() {
	flag.Parse()
	command := flag.Arg(0)
	_ = flag.CommandLine.Parse(flag.Args()[min(1, flag.NArg()):]) // flags after the command; exits on an error
	if err := run(context.Background(), command); err != nil {
		fmt.Fprintln(os.Stderr, "engine:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, command string) error {
	c, err := client.Dial(*addr, client.Options{})
	if err != nil {
		return err
	}
	if command == "create" {
		return Create(ctx, c, *collection)
	}
	open, name := Open, *collection
	if *snapshot != "" {
		open, name = OpenSnapshot, *snapshot
	} else if command == "await" { // on the event of its creation, such as by a restore
		open, command = Await, "digest"
	}
	s, rows, err := open(ctx, c, *store, name)
	if err != nil {
		return err
	}
	switch {
	case command == "digest":
		fmt.Printf("%d rows, digest %016x\n", len(rows), digest(rows))
	case command == "search":
		to := random(*seed, 0)
		slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(distance(a, to), distance(b, to)) })
		for _, r := range rows[:min(5, len(rows))] {
			fmt.Printf("row %-6d %s distance %.3f\n", r.ID, r.Text, distance(r, to))
		}
	case command == "load" && s.c != nil:
		first, err := s.allocate(ctx, *count) // ids of rows are used once, too
		for i := int64(0); i < *count && err == nil; i++ {
			if s.Write(inserts, random(*seed, first+i)); i%5000 == 4999 || i == *count-1 {
				err = s.Flush(ctx)
			}
		}
		return err
	case command == "delete" && s.c != nil:
		for _, r := range slices.DeleteFunc(rows, func(r Row) bool { return r.ID%*every != 0 }) {
			s.Write(deletes, Row{ID: r.ID})
		}
		return s.Flush(ctx)
	case command == "compact" && s.c != nil:
		return s.Compact(ctx)
	case command == "collect" && s.c != nil:
		deleted, held, err := s.Collect(ctx)
		fmt.Printf("deleted: %d files\n", deleted)
		for name, n := range held {
			fmt.Printf("held by %s: %d files\n", cmp.Or(name, "the collection itself"), n)
		}
		return err
	default:
		return fmt.Errorf("%q is not a command here", command)
	}
	return nil
}

func random(seed uint64, id int64) Row {
	r, row := rand.New(rand.NewPCG(seed, uint64(id))), Row{ID: id}
	for i := range row.Vector {
		row.Vector[i] = float32(r.NormFloat64())
	}
	copy(row.Text[:], fmt.Sprintf(
		"%-24s", []string{"blue", "red", "old", "new"}[r.IntN(4)]+" "+[]string{"lamp", "chair", "clock"}[r.IntN(3)],
	))
	return row
}

func distance(a, b Row) (d float32) {
	for i, x := range a.Vector {
		d += (x - b.Vector[i]) * (x - b.Vector[i])
	}
	return d
}
