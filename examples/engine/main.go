// Command engine is a toy vector store: what an engine does to have snapshots,
// and little more. Segment files it writes into the directory of snapshotd's
// object store by itself; which there are, only snapshotd's catalog knows.
//
//	engine --store DIR/objects --collection shop load --rows 20000
//	engine --store DIR/objects --snapshot before-sale search --top 3
//
// A snapshot can be searched, digested and counted, even without its collection.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

var (
	addr       = flag.String("addr", "127.0.0.1:7950", "snapshotd's `address`")
	store      = flag.String("store", "", "the object store's `directory`")
	collection = flag.String("collection", "", "the `name` of a collection")
	snapshot   = flag.String("snapshot", "", "the `name` of a snapshot to read instead")
	rows       = flag.Int64("rows", 1000, "load so `many` rows")
	seed       = flag.Uint64("seed", 1, "the `seed` of the rows to load, or of the vector to search for")
	every      = flag.Int64("every", 10, "delete the rows whose ids this `number` divides")
	top        = flag.Int("top", 5, "find so `many` rows")
)

func main() {
	flag.Parse()
	command := flag.Arg(0)
	_ = flag.CommandLine.Parse(flag.Args()[min(1, flag.NArg()):]) // flags after the command; exits by itself
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
	var s *Store
	var live []Row
	if *snapshot != "" {
		live, err = ReadSnapshot(ctx, c, *store, *snapshot)
	} else if s, err = Open(ctx, c, *store, *collection); err == nil {
		live, err = s.Rows(ctx)
	}
	if err != nil {
		return err
	}
	switch {
	case command == "search":
		for i, r := range Search(live, random(*seed, 0), *top) {
			fmt.Printf("%d. %-24s row %d\n", i+1, r.Text[:], r.ID)
		}
	case command == "digest":
		fmt.Println(Digest(live))
	case command == "count":
		fmt.Println(len(live))
	case command == "load" && s != nil:
		ids, err := s.allocate(ctx, *rows)
		for id := ids; id < ids + *rows; id++ {
			s.Write(inserts, random(*seed, id))
			...flush
		}
	case command == "delete" && s != nil:
		for _, r := range live {
			if r.ID%*every == 0 {
				s.Write(deletes, Row{ID: r.ID})
			}
		}
		return s.Flush(ctx)
	case command == "compact" && s != nil:
		return s.Compact(ctx)
	default:
		return fmt.Errorf("%q is no command for this", command)
	}
	return nil
}

// random returns a row that depends on seed and id alone.
func random(seed uint64, id int64) Row {
	r, row := rand.New(rand.NewPCG(seed, uint64(id))), Row{ID: id}
	for i := range row.Vector {
		row.Vector[i] = float32(r.NormFloat64())
	}
	copy(row.Text[:], fmt.Sprintf("%s %s %d", colours[r.IntN(len(colours))], ...))
	return row
}
