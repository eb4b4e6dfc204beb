package bench

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// WithEtcd calls fn with a client of the etcd at an endpoint.
func WithEtcd(endpoint string, fn func(*clientv3.Client) error) error {
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	return errors.Join(fn(cli), cli.Close())
}

// CompactEtcd compacts the etcd at an endpoint up to its current revision.
func CompactEtcd(ctx context.Context, endpoint string) error {
	return WithEtcd(endpoint, func(cli *clientv3.Client) error {
		st, err := cli.Status(ctx, endpoint)
		if err != nil {
			return err
		}
		_, err = cli.Compact(ctx, st.Header.GetRevision(), clientv3.WithCompactPhysical())
		return err
	})
}

// Defragment compacts and defragments the etcd at an endpoint, and returns the size
// of its database in bytes.
func Defragment(ctx context.Context, endpoint string) (size int64, err error) {
	if err := CompactEtcd(ctx, endpoint); err != nil {
		return 0, err
	}
	err = WithEtcd(endpoint, func(cli *clientv3.Client) error {
		if _, err := cli.Defragment(ctx, endpoint); err != nil {
			return err
		}
		st, err := cli.Status(ctx, endpoint)
		if err == nil {
			size = st.DbSize
		}
		return err
	})
	return size, err
}
