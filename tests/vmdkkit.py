"""Reading hand-made VMDKs, and what refuses them."""

import pytest
import vmdkmade
from vmdkmade import Hosted, Stream

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import FormatError
from diskmorph.formats.registry import open_disk

from testkit import KIB, content, data

GRAIN = 64 * KIB


def opened(path, **words):
    return open_disk(path, format="vmdk", **words)


def bytes_of(path, **words):
    with opened(path, **words) as disk:
        return content(checked(disk))


def refusal(path, kind=FormatError, **words):
    with pytest.raises(kind) as caught, opened(path, **words) as disk:
        content(disk)
    return caught.value


def put(path, raw):
    path.write_bytes(raw)
    return path


def patched(raw, offset, piece):
    return raw[:offset] + piece + raw[offset + len(piece) :]


def one(capacity, made):
    return vmdkmade.words([f'RW {capacity} SPARSE "x.vmdk"'])


def hosted(capacity=1024, grains=None, **more):
    grains = {n: data(n, GRAIN) for n in range(8)} if grains is None else grains
    return Hosted(capacity, grains, text=vmdkmade.words([f'RW {capacity} SPARSE "x.vmdk"']), **more)


def streamed(capacity=1024, grains=None, **more):
    grains = {n: data(n, GRAIN) for n in range(8)} if grains is None else grains
    text = vmdkmade.words([f'RW {capacity} SPARSE "x.vmdk"'], "streamOptimized")
    return Stream(capacity, grains, text=text, **more)
