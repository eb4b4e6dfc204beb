// Command docscheck runs the examples in the documents and compares what they
// print with what the documents say. `make docs-check` runs it on README.md
// and on every file below docs, in the order of their names.
//
// # What it runs
//
// The blocks fenced as ```console. In them a line that starts with "$ " is a
// command; it goes on in the next line after a backslash, and in lines that
// start with "> ". All other lines are what the command prints, on standard
// output and standard error together; a line of just "..." stands for any
// number of lines. A command that fails has to show what it printed, or be
// followed by `$ echo $?`.
//
// The commands of one document share a shell and an empty working folder, so
// what one block exports or starts is there for the next. The folder bin of the
// repository comes first in PATH, and make and go work on the repository,
// wherever the document's own folder is. Servers started in the background
// are ended with the document; one that does not end is a failure.
//
// Each document gets ports of its own, by way of the variables in [listeners],
// so that examples with the default ports run beside another snapshotd.
//
// # What it compares
//
// Ids, times, sizes and the like differ from run to run. [mask] says what is
// taken for such; it is applied to both sides.
//
// With -update, docscheck writes what the commands printed into the documents
// instead of complaining. Read the difference before committing it.
//
// A block fenced as ```console nocheck=REASON is not run, but listed with its
// reason.
package main
