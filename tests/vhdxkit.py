"""Reading hand-made VHDX files, and what refuses them."""

import pytest
from vhdxmade import (
    FULL,
    Made,
)

from diskmorph.formats import vhdx
from diskmorph.formats.errors import FormatError
from diskmorph.formats.registry import OpenContext
from diskmorph.formats.source import BytesSource

from testkit import MIB, data

SIZE = 4 * MIB


def made(**words):
    words.setdefault("blocks", {n: (FULL, data(("read", n), MIB), None) for n in range(4)})
    return Made(SIZE, words.pop("blocks"), **words)


def opened(image):
    return vhdx.open_image(BytesSource(bytes(image), "x.vhdx"), OpenContext())


def kinds(disk, block=MIB):
    return [int(next(iter(disk.extents(at, at + 1)))["kind"][0]) for at in range(0, disk.size, block)]


def refusal(image, kind=FormatError, **place):
    with pytest.raises(kind) as caught:
        disk = opened(image)
        list(disk.extents())
    for name, value in place.items():
        assert getattr(caught.value, name) == value, (name, str(caught.value))
    return caught.value
