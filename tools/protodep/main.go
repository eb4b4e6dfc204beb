// Command protodep writes buf/validate/validate.proto, which the API's files
// import, below the folder named by its argument.
//
// The file is printed from the descriptor in the published Go package, so that the
// build needs no schema registry. That package must have the schema commit that the
// service links: protodep reads the service's go.mod, given as the second argument,
// and fails if the two differ.
package main

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"github.com/jhump/protoreflect/v2/protoprint"
	"golang.org/x/mod/modfile"
)

const module = "buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go"

const header = `// Printed by tools/protodep from the descriptor in the Go module
// %s
// at schema commit %s. DO NOT EDIT.
//
// Origin: https://github.com/bufbuild/protovalidate
// Copyright 2023-2026 Buf Technologies, Inc.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//      http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

`

func main() {
	log.SetFlags(0)
	log.SetPrefix("protodep: ")
	if len(os.Args) != 3 {
		log.Fatal("usage: protodep FOLDER GO.MOD")
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		log.Fatal(err)
	}
}

func run(folder, goMod string) error {
	here, err := linkedCommit()
	if err != nil {
		return err
	}
	there, err := requiredCommit(goMod)
	if err != nil {
		return err
	}
	if here != there {
		return fmt.Errorf("%s: this module has schema commit %s, %s has %s: give both the same", module, here, goMod, there)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, header, module, here)
	file := validate.File_buf_validate_validate_proto
	// The Go package's descriptor has no comments; the printer's layout is close enough
	// to that of buf format for a generated file.
	if err := (&protoprint.Printer{Indent: "  "}).PrintProtoFile(file, &out); err != nil {
		return fmt.Errorf("print %s: %w", file.Path(), err)
	}
	path := filepath.Join(folder, filepath.FromSlash(file.Path()))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644)
}

func linkedCommit() (string, error) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", fmt.Errorf("no build information: run protodep as a built command")
	}
	for _, dep := range info.Deps {
		if dep.Path == module {
			return commit(dep.Version)
		}
	}
	return "", fmt.Errorf("%s is not linked", module)
}

func requiredCommit(goMod string) (string, error) {
	data, err := os.ReadFile(goMod)
	if err != nil {
		return "", err
	}
	mod, err := modfile.Parse(goMod, data, nil)
	if err != nil {
		return "", err
	}
	for _, req := range mod.Require {
		if req.Mod.Path == module {
			return commit(req.Mod.Version)
		}
	}
	return "", fmt.Errorf("%s does not require %s", goMod, module)
}

// commit returns the schema commit in a version of the registry's form,
// v<plugin>-<time>-<commit>.<revision>. The revision is that of the code generator.
func commit(version string) (string, error) {
	parts := strings.Split(version, "-")
	if len(parts) != 3 {
		return "", fmt.Errorf("version %q is not of the form vX.Y.Z-TIME-COMMIT.REVISION", version)
	}
	sum, _, _ := strings.Cut(parts[2], ".")
	return sum, nil
}
