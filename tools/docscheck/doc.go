// Command docscheck runs the examples in the documents and compares their output
// with the documents. `make docs-check` runs it on README.md and on every file below
// docs, in the order of their names.
//
// # What it runs
//
// The blocks fenced as ```console. In them a line that starts with "$ " is a
// command; it continues in the next line after a backslash, and in lines that
// start with "> ". All other lines are its output, standard output and standard
// error together; a line of just "..." stands for any number of lines. A command
// that fails must have its output in the document, or be followed by `$ echo $?`.
//
// The commands of one document share a shell and an empty working folder, so
// exports and background processes of a block last. The folder bin of the
// repository comes first in PATH, and make and go work on the repository,
// wherever the document's own folder is. Servers started in the background
// are ended with the document; one that does not end is a failure.
//
// Each document gets separate ports, through the variables in [listeners], so that
// examples with the default ports run beside another snapshotd.
//
// # What it compares
//
// Ids, times, sizes and the like differ from run to run. [mask] replaces them on
// both sides.
//
// With -update, docscheck writes the output of the commands into the documents.
// Review the difference before committing it.
//
// A block fenced as ```console nocheck=REASON is not run, but listed with its
// reason.
package main
