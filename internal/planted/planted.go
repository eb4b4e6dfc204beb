// Package planted holds the switches of bugs that are planted on purpose, so that
// it is known which tests would find them. Each is a constant that is false, and
// true under a build tag of its own: planted_p1 for P1. What depends on one is left
// out by the compiler of every build without the tag.
//
// A bug is planted where a mistake could be made: a compare that is left out, an
// answer that is believed. `make planted` builds with each of them in turn and
// demands a test that fails; the table in run says which tests are asked. A plain
// build has none of them, which a test checks, and a released program is refused
// when it was built with such a tag.
package planted
