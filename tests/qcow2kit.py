"""qcow2 images for tests of check and repair: made by qemu-img, to be damaged, checked and repaired."""

import json
import struct

from diskmorph.formats.qcow2 import check_image
from diskmorph.formats.registry import OpenContext
from diskmorph.formats.source import FileSource

from testkit import MIB, content, little_disk, run

MASK = 0x00FF_FFFF_FFFF_FE00


def checked(path, repair=None):
    with FileSource(path) as source:
        return check_image(source, OpenContext(), repair)


def peer(path):
    """Corruptions and leaks by qemu-img check."""
    found = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", path, ok=False).stdout)
    return found.get("corruptions", 0), found.get("leaks", 0)


def counts(report):
    return report.corruptions, report.leaks


def apply(path, report):
    with open(path, "r+b") as file:
        for patch in report.patches:
            assert patch.why
            file.seek(patch.offset)
            file.write(patch.data)


def repaired(path, how="all"):
    apply(path, checked(path, how))
    return checked(path)


class Image:
    """A qcow2 made by qemu-img from the little disk, to be damaged. `put` and the like change `blob`; `save` writes it."""

    def __init__(self, folder, options="", *, packed=False, snapshot=False):
        self.path, self.raw = folder / "image.qcow2", folder / "disk.raw"
        self.raw.write_bytes(content(little_disk(3 * MIB)))
        words = [*(["-c"] if packed else []), *(["-o", options] if options else [])]
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *words, self.raw, self.path)
        if snapshot:
            run("qemu-img", "snapshot", "-c", "before", self.path)
            run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 200k", self.path)
        self.blob = bytearray(self.path.read_bytes())
        self.cluster = 1 << self.get(20, ">I")
        self.l1, self.table = self.get(40), self.get(48)
        self.block = self.get(self.table)
        tables = [self.get(self.l1 + 8 * index) & MASK for index in range(self.get(36, ">I"))]
        self.l2 = [table for table in tables if table]

    def get(self, offset, form=">Q"):
        return struct.unpack_from(form, self.blob, offset)[0]

    def put(self, offset, value, form=">Q"):
        struct.pack_into(form, self.blob, offset, value)
        return self

    def refcount(self, cluster, value):
        return self.put(self.block + 2 * cluster, value, ">H")

    def data_entry(self, number=0):
        """The offset of the L2 entry of a plain data cluster."""
        found = [at for at in range(self.l2[0], self.l2[0] + self.cluster, 8) if self.get(at) & ~1 & MASK]
        return found[number]

    def save(self):
        self.path.write_bytes(self.blob)
        return self.path

    def same(self):
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.raw, self.path)
