package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"strconv"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

func (a *app) catalogCommand() *cobra.Command {
	cmd := group("catalog", "Manages collections and their segments",
		`Manages the catalog: collections and the files they consist of. A data plane does
this through the API; these commands are for people and for data from other sources.`)
	cmd.Example = `  snapshotctl catalog apply -f docs.yaml
  snapshotctl catalog add-segments -f segments.jsonl --collection docs`
	cmd.AddCommand(
		a.catalogApply(), a.catalogCollections(), a.catalogGet(), a.catalogAddSegments(), a.catalogExport(),
		a.catalogCompact(), a.catalogDropSegments(), a.catalogDropCollection(), a.catalogAllocateIDs(),
		a.catalogSetCheckpoint(),
	)
	return cmd
}

// addCollection adds a required flag --collection to cmd.
func addCollection(cmd *cobra.Command) *string {
	return cmd.Flags().String("collection", "", "the `collection` (required)")
}

// optionalCollection is a flag --collection that may be omitted.
type optionalCollection struct {
	cmd  *cobra.Command
	text string
}

// addOptionalCollection adds the flag to cmd, with the help text about.
func addOptionalCollection(cmd *cobra.Command, about string) *optionalCollection {
	o := &optionalCollection{cmd: cmd}
	cmd.Flags().StringVar(&o.text, "collection", "", about)
	return o
}

// optionalRef returns the collection of the flag, nil if it is omitted. An empty
// value is a usage error: it may come from an unset variable of a script, and must
// not mean all collections.
func (a *app) optionalRef(o *optionalCollection) (*snapshotdv1.CollectionRef, error) {
	switch {
	case !o.cmd.Flags().Changed("collection"):
		return nil, nil //nolint:nilnil // omitted
	case o.text == "":
		return nil, usageErrorf("--collection is empty")
	}
	return a.collectionRef(o.text)
}

// requiredRef returns the collection of a required flag.
func (a *app) requiredRef(flag *string) (*snapshotdv1.CollectionRef, error) {
	if *flag == "" {
		return nil, usageErrorf("--collection is missing")
	}
	return a.collectionRef(*flag)
}

func (a *app) catalogCollections() *cobra.Command {
	var (
		req    snapshotdv1.ListCollectionsRequest
		states []string
		limit  int
	)
	cmd := &cobra.Command{
		Use:   "collections",
		Short: "Lists collections in id order",
		Example: `  snapshotctl catalog collections
  snapshotctl catalog collections --db prod --state active,dropping`,
		Args: exactArgs(),
	}
	f := cmd.Flags()
	f.StringVar(&req.Db, "db", "", "only in this `database`")
	f.StringSliceVar(&states, "state", nil, "only in these `states`: active, restoring, dropping (default active)")
	f.IntVar(&limit, "limit", 0, "list at most this `number` (default all)")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		var err error
		if req.States, err = parseStates[snapshotdv1.Collection_State](
			states, snapshotdv1.Collection_State_value,
		); err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		l := a.list("collections", "NAME", "ID", "STATE", "SHARDS", "FIELDS", "CREATED")
		err = pages(limit, func(size int32, token string) (int, string, error) {
			req.PageSize, req.PageToken = size, token
			resp, err := unary(ctx, a, c.Catalog.ListCollections, &req)
			if err != nil {
				return 0, "", err
			}
			for _, x := range resp.GetCollections() {
				err := l.add(
					x, fullName(x.GetDb(), x.GetName(), x.GetId()), x.GetId(), stateName(x.GetState()),
					len(x.GetChannels()), len(x.GetSchema().GetFields()), x.GetCreateTime(),
				)
				if err != nil {
					return 0, "", err
				}
			}
			return len(resp.GetCollections()), resp.GetNextPageToken(), l.flush()
		})
		if err != nil {
			return err
		}
		return l.close()
	})
	return cmd
}

// collectionState is a collection with its checkpoints, partitions and indexes.
type collectionState struct {
	collection  *snapshotdv1.Collection
	checkpoints *snapshotdv1.ListCheckpointsResponse
	partitions  *snapshotdv1.ListPartitionsResponse
	indexes     *snapshotdv1.ListIndexesResponse
}

func (a *app) catalogGet() *cobra.Command {
	return &cobra.Command{
		Use:   "get COLLECTION",
		Short: "Shows a collection: state, checkpoints, roots, schema, partitions, indexes",
		Long: `Shows a collection: state, checkpoints, roots, schema, partitions and indexes.
With -o json and yaml these are the fields of the responses of GetCollection,
ListCheckpoints, ListPartitions and ListIndexes in one object.`,
		Example: `  snapshotctl catalog get docs
  snapshotctl catalog get '#7' -o yaml`,
		Args: exactArgs("COLLECTION"),
		RunE: a.run(func(ctx context.Context, args []string) error {
			ref, err := a.collectionRef(args[0])
			if err != nil {
				return err
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			first, err := unary(ctx, a, c.Catalog.GetCollection, &snapshotdv1.GetCollectionRequest{Collection: ref})
			if err != nil {
				return err
			}
			h := collectionState{collection: first.GetCollection()}
			// By id, so that all calls address the same collection.
			ref = idRef(h.collection.GetId())
			if h.checkpoints, err = unary(ctx, a, c.Catalog.ListCheckpoints, &snapshotdv1.ListCheckpointsRequest{
				Collection: ref,
			}); err != nil {
				return err
			}
			if h.partitions, err = unary(ctx, a, c.AllPartitions, &snapshotdv1.ListPartitionsRequest{
				Collection: ref,
			}); err != nil {
				return err
			}
			if h.indexes, err = unary(ctx, a, c.AllIndexes, &snapshotdv1.ListIndexesRequest{Collection: ref}); err != nil {
				return err
			}
			all := make(map[string]json.RawMessage)
			for _, m := range []proto.Message{first, h.checkpoints, h.partitions, h.indexes} {
				data, err := compactJSON(m)
				if err != nil {
					return err
				}
				var fields map[string]json.RawMessage
				if err := json.Unmarshal(data, &fields); err != nil {
					return err
				}
				maps.Copy(all, fields)
			}
			return a.printValue(all, func(w io.Writer) { renderCollection(w, h) })
		}),
	}
}

func idRef(id int64) *snapshotdv1.CollectionRef {
	return &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Id{Id: id}}
}

func renderCollection(w io.Writer, h collectionState) {
	c := h.collection
	fprintf(w, "Collection\n")
	keyValues(w, "  ",
		"name", fullName(c.GetDb(), c.GetName(), c.GetId()),
		"id", c.GetId(),
		"state", stateName(c.GetState()),
		"created", c.GetCreateTime(),
		"layout", enumName(c.GetLayout(), "LAYOUT_"),
		"consistency level", c.GetConsistencyLevel(),
		"properties", formatMap(c.GetProperties()),
		"attributes", formatMap(c.GetAttributes()),
		"revision", c.GetRevision(),
	)
	if len(c.GetChannels()) == 0 {
		fprintf(w, "\nChannels: none; without a stream a snapshot captures everything\n")
	} else {
		fprintf(w, "\nChannels\n")
		at := make(map[int32]string)
		for _, p := range h.checkpoints.GetCheckpoints() {
			at[p.GetShard()] = dataTime(p.GetPosition().GetTimestamp())
		}
		t := newTable(w, "  ", "SHARD", "CHANNEL", "CHECKPOINT")
		for i, name := range c.GetChannels() {
			t.row(i, name, at[int32(i)])
		}
		_ = t.flush() // w is memory
	}
	renderRoots(w, c.GetRoots())
	renderSchema(w, c.GetSchema())
	renderPartitions(w, h.partitions.GetPartitions())
	renderIndexes(w, h.indexes.GetIndexes())
}

func (a *app) catalogDropCollection() *cobra.Command {
	var expected int64
	cmd := &cobra.Command{
		Use:   "drop-collection COLLECTION",
		Short: "Drops a collection with all its contents",
		Long: `Drops a collection with all its contents. Its name is free at once. Its snapshots
stay and keep the files they need. Dropping a collection that does not exist
succeeds.`,
		Example: `  snapshotctl catalog drop-collection docs --expected-id 7
  snapshotctl catalog drop-collection '#7'`,
		Args: exactArgs("COLLECTION"),
	}
	cmd.Flags().Int64Var(&expected, "expected-id", 0, "fail unless the collection has this `id`")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.collectionRef(args[0])
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Catalog.DropCollection, &snapshotdv1.DropCollectionRequest{
			Collection: ref, ExpectedId: expected, RequestToken: client.NewRequestToken(),
		})
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) { renderDropped(w, "collection", args[0], resp.GetCollectionId()) })
	})
	return cmd
}

func (a *app) catalogAllocateIDs() *cobra.Command {
	var first, release int64
	cmd := &cobra.Command{
		Use:   "allocate-ids COUNT",
		Short: "Allocates unique ids",
		Long: `Allocates COUNT consecutive ids that are never allocated again. Collections,
partitions, indexes, index builds and segments are registered under such ids.
--reserve reserves COUNT ids from the given one on, which an engine already uses;
--release releases those above the highest registered id and prints them. Both need
allow_reserve_ids in the server's configuration.`,
		Example: `  snapshotctl catalog allocate-ids 1000
  snapshotctl catalog allocate-ids 500000 --reserve 449000000000000000
  snapshotctl catalog allocate-ids 500000 --release 449000000000000000`,
		Args: exactArgs("COUNT"),
	}
	cmd.Flags().Int64Var(&first, "reserve", 0, "reserve the range that starts at this `id`")
	cmd.Flags().Int64Var(&release, "release", 0, "release the unused end of the reserved range that starts at this `id`")
	cmd.MarkFlagsMutuallyExclusive("reserve", "release")
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		count, err := strconv.ParseInt(args[0], 10, 64)
		if err != nil || count <= 0 {
			return usageErrorf("%q is not a number of ids", args[0])
		}
		req := &snapshotdv1.AllocateIdsRequest{
			Want:         &snapshotdv1.AllocateIdsRequest_Count{Count: count},
			RequestToken: client.NewRequestToken(),
		}
		if cmd.Flags().Changed("reserve") {
			req.Want = &snapshotdv1.AllocateIdsRequest_Reserve{Reserve: &snapshotdv1.IdRange{First: first, Count: count}}
		}
		if cmd.Flags().Changed("release") {
			req.Want = &snapshotdv1.AllocateIdsRequest_Release{Release: &snapshotdv1.IdRange{First: release, Count: count}}
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Catalog.AllocateIds, req)
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) {
			t := newTable(w, "", "FIRST", "LAST", "COUNT")
			ids := resp.GetIds()
			if ids.GetCount() == 0 { // a release of none
				fprintf(w, "all ids of the range are used; none released\n")
				return
			}
			t.row(ids.GetFirst(), ids.GetFirst()+ids.GetCount()-1, ids.GetCount())
			_ = t.flush() // w is memory
		})
	})
	return cmd
}

func (a *app) catalogSetCheckpoint() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "set-checkpoint SHARD=TIMESTAMP... --collection COLLECTION",
		Short: "Sets checkpoints: channel data before them is in files",
		Long: `Sets the checkpoints of channels: all data of the channel before TIMESTAMP
(exclusive) is in files. A checkpoint only moves forward.`,
		Example: "  snapshotctl catalog set-checkpoint --collection docs 0=4500 1=4480",
		Args:    cobra.ArbitraryArgs,
	}
	collection := addCollection(cmd)
	cmd.RunE = a.run(func(ctx context.Context, args []string) error {
		ref, err := a.requiredRef(collection)
		if err != nil {
			return err
		}
		if len(args) == 0 {
			return usageErrorf("SHARD=TIMESTAMP is missing")
		}
		positions, err := parsePositions(args)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		resp, err := unary(ctx, a, c.Catalog.SetCheckpoints, &snapshotdv1.SetCheckpointsRequest{
			Collection: ref, Checkpoints: positions,
		})
		if err != nil {
			return err
		}
		return a.print(resp, func(w io.Writer) {
			fprintf(w, "set %s at catalog revision %d\n", count(len(positions), "checkpoint"), resp.GetCatalogRevision())
		})
	})
	return cmd
}

// count returns n and the noun, in singular or plural.
func count[N ~int | ~int64](n N, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
