package main

import _ "github.com/twmb/avro/ocf"

func main() {}
