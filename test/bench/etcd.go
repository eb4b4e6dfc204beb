package bench

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// AskEtcd connects to the etcd at an endpoint for as long as fn takes.
func AskEtcd(endpoint string, fn func(*clientv3.Client) error) error {
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	return errors.Join(fn(cli), cli.Close())
}

// Forget has the etcd at an endpoint give up its history.
func Forget(ctx context.Context, endpoint string) error {
	return AskEtcd(endpoint, func(cli *clientv3.Client) error {
		st, err := cli.Status(ctx, endpoint)
		if err != nil {
			return err
		}
		_, err = cli.Compact(ctx, st.Header.GetRevision(), clientv3.WithCompactPhysical())
		return err
	})
}

// Defragment has the etcd at an endpoint give up its history and the room that
// this took, and returns the size of its database in bytes.
func Defragment(ctx context.Context, endpoint string) (size int64, err error) {
	if err := Forget(ctx, endpoint); err != nil {
		return 0, err
	}
	err = AskEtcd(endpoint, func(cli *clientv3.Client) error {
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
