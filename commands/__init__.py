"""The verbs of the command line, one module each: words in, one call of the library, rendering out.

A verb is a row of `VERBS` and a module with `DESCRIPTION`, `EXAMPLES`, `add_arguments(parser)` and
`run(args, out) -> exit status`. The modules load when their verb is said, and load what they need in `run`.
"""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """A row of the table: the word, the module that holds it, and one line of help."""

    name: str
    module: str
    help: str


_HERE = "diskmorph.commands."

VERBS: tuple[Verb, ...] = (
    Verb("convert", _HERE + "convert", "write an image anew, in another format"),
    Verb("info", _HERE + "info", "tell what an image is, and what lies inside"),
    Verb("map", _HERE + "map", "show which ranges hold data, and where they are stored"),
    Verb("measure", _HERE + "measure", "tell the size that a target would have"),
    Verb("check", _HERE + "check", "check the structure of an image, and repair it"),
    Verb("compare", _HERE + "compare", "compare the contents of two images"),
    Verb("digest", _HERE + "digest", "hash the content, whatever the format"),
    Verb("create", _HERE + "create", "make an empty image, or an overlay on another"),
    Verb("resize", _HERE + "resize", "give an image another virtual size"),
    Verb("rebase", _HERE + "rebase", "give an overlay another parent"),
    Verb("snapshot", _HERE + "snapshot", "list internal snapshots, or extract one"),
    Verb("serve", _HERE + "serve", "serve a disk, read-only, over NBD"),
    Verb("build", _HERE + "build", "build a bootable disk from a tree or a container image"),
    Verb("bundle", _HERE + "bundle", "make an EC2 bundle of a machine image, kernel or ramdisk"),
    Verb("unbundle", _HERE + "unbundle", "open an EC2 bundle"),
    Verb("lint", _HERE + "lint", "tell what an importer would refuse in a package"),
    Verb("extract", _HERE + "extract", "take a disk's root file system out, as a tree or a container image"),
    Verb("aws", _HERE + "aws", "bring disks to Amazon's cloud, and back"),
    Verb("fleet", _HERE + "fleet", "do many conversions on a cluster, each a row of a plan"),
    Verb("commit", _HERE + "commit", "write what changed on a disk as a new container layer"),
    Verb("ls", _HERE + "ls", "list files inside a disk, an ISO, an archive or an image"),
    Verb("cat", _HERE + "cat", "print a file that lies inside"),
    Verb("formats", _HERE + "formats", "list the formats, subformats and options"),
    Verb("completion", _HERE + "completion", "print a completion script for bash, zsh or fish"),
)


def verb_named(name: str) -> Verb | None:
    """Return the row of that verb, None if there is none."""
    return next((verb for verb in VERBS if verb.name == name), None)
