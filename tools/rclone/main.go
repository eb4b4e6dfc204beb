// Command rclone is rclone with the parts that the benchmark of restores needs: copies
// of objects in S3, on command of a client.
package main

import (
	_ "github.com/rclone/rclone/backend/s3"
	"github.com/rclone/rclone/cmd"
	_ "github.com/rclone/rclone/cmd/rcd"
	_ "github.com/rclone/rclone/fs/operations"
	_ "github.com/rclone/rclone/fs/sync"
)

func main() { cmd.Main() }
