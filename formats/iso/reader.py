"""An ISO as a tree: Rock Ridge where it is, else UDF, else Joliet, else plain ISO 9660."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.iso.directory import Records, parse_records, record_seconds
from diskmorph.formats.iso.schema import ASSOCIATED, DIRECTORY, MORE_EXTENTS, SECTOR
from diskmorph.formats.iso.susp import RockRidge, read_rock_ridge, sharing_protocol_skip
from diskmorph.formats.iso.volume import Root, Volume, read_volume
from diskmorph.formats.limits import Limits
from diskmorph.formats.tree import Node, Piece, Tree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

_SELF, _PARENT = b"\0", b"\1"
_MAX_DEPTH = 512


def open_tree(source: ByteSource, limits: Limits | None = None) -> Tree:
    """Return the files of an ISO. Directories are read when they are first asked for; file data stays where it lies.

    Raises FormatError (damaged, looping, truncated), UnsupportedError (features by name).
    """
    limits = limits or Limits()
    volume = read_volume(source)
    skip = _rock_ridge_skip(source, volume)
    if skip is None and volume.udf:
        from diskmorph.formats.iso.udf import open_udf  # noqa: PLC0415 - loads pycdlib

        return open_udf(source, limits)
    joliet = skip is None and volume.joliet is not None
    root = volume.joliet if joliet and volume.joliet is not None else volume.root
    reader = _Hierarchy(source, limits, skip, joliet=joliet)
    tree = Tree(reader.root(root), name=source.name, format="iso", limits=limits)
    tree.sources.append(source)
    return tree


def _rock_ridge_skip(source: ByteSource, volume: Volume) -> int | None:
    records = parse_records(
        source.read(volume.root.offset, min(volume.root.size, SECTOR)), source.name, volume.root.offset
    )
    begin, end = records.system_use()
    return sharing_protocol_skip(records.data, int(begin[0]), int(end[0]))


class _Hierarchy:
    """Reads the directories of one hierarchy; each directory's extent may be met only once."""

    def __init__(self, source: ByteSource, limits: Limits, skip: int | None, *, joliet: bool) -> None:
        self._source = source
        self._limits = limits
        self._skip = skip
        self._joliet = joliet
        self._met: dict[int, int] = {}  # extent of a directory -> extent of the directory that names it
        self._entries = 0

    def root(self, root: Root) -> Node:
        """Return the root directory."""
        records, rock = self._read(root.offset, root.size, limit=SECTOR)
        node = self._folder(root.offset, root.size, parent=-1, depth=0)
        self._attributes(node, records, rock, 0)
        return node

    def _folder(self, offset: int, size: int, parent: int, depth: int) -> Node:
        if self._met.setdefault(offset, parent) != parent or depth > _MAX_DEPTH:
            raise self._damaged("directories loop: one is reached in two ways", offset)
        return Node(stat.S_IFDIR | 0o555, children=lambda: self._children(offset, size, depth))

    def _read(self, offset: int, size: int, limit: int | None = None) -> tuple[Records, RockRidge | None]:
        if size % SECTOR or not size:
            size = -(-size // SECTOR) * SECTOR
        if offset + size > self._source.size or not size:
            raise self._damaged(f"a directory of {size} bytes lies beyond the end of the file", offset)
        data = self._source.read(offset, min(size, limit or size))
        records = parse_records(data, self._source.name, offset)
        skip = self._skip
        if skip is None:
            return records, None
        return records, read_rock_ridge(records, self._source, skip)

    def _children(self, offset: int, size: int, depth: int) -> dict[bytes, Node]:
        records, rock = self._read(offset, size)
        self._entries += len(records.at)
        if self._entries > self._limits.directory_entries + 2:
            raise self._damaged(f"more than {self._limits.directory_entries} directory entries", offset)
        head = records.head
        seconds = record_seconds(head["time"], head["zone"])
        if rock is not None:
            seconds = np.where(rock.has_time, rock.mtime, seconds)
        columns = _Columns(records, rock, [second * 1_000_000_000 for second in seconds.tolist()])
        self._require_inside(head, offset)
        found: dict[bytes, Node] = {}
        pending: list[Piece] = []
        for index, stored in enumerate(records.names()):
            if stored in (_SELF, _PARENT) or columns.flags[index] & ASSOCIATED or columns.hidden(index):
                continue
            name = self._name(stored, rock, index, offset)
            more = columns.flags[index] & MORE_EXTENTS
            if more or pending:
                at = pending[-1].start + pending[-1].length if pending else 0
                pending.append(Piece(at, columns.sizes[index], self._source, columns.offsets[index]))
                if more:
                    continue
            found[name] = self._node(columns, index, pending, offset, depth)
            pending = []
        if pending:
            raise self._damaged("the last extent of a file is missing", offset)
        return found

    def _require_inside(self, head: NDArray[np.void], offset: int) -> None:
        ends = head["extent"].astype(np.int64) * SECTOR + head["size"]
        bad = np.flatnonzero((ends > self._source.size) & (head["size"] > 0))
        if len(bad):
            row = head[bad[0]]
            raise FormatError(
                "a file lies beyond the end of the image: it is truncated or damaged",
                file=self._source.name,
                format="iso",
                structure="directory record",
                field="extent",
                offset=offset,
                expected=f"{int(row['size'])} bytes at {int(row['extent']) * SECTOR}",
                found=f"the end at {self._source.size}",
            )
        if (head["unit_size"] != 0).any():
            raise UnsupportedError(
                "interleaved files are not supported", feature="interleaving", file=self._source.name
            )

    def _name(self, stored: bytes, rock: RockRidge | None, index: int, offset: int) -> bytes:
        name = rock.names.get(index) if rock is not None else None
        if name is None:
            name = self._plain_name(stored)
        if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
            raise self._damaged(f"a directory has the name {name!r}, which is none", offset)
        return name

    def _plain_name(self, stored: bytes) -> bytes:
        if self._joliet:
            return stored.decode("utf-16-be", "surrogatepass").partition(";")[0].encode("utf-8", "surrogatepass")
        return stored.partition(b";")[0].rstrip(b".") or stored

    def _node(self, columns: _Columns, index: int, pending: list[Piece], parent: int, depth: int) -> Node:
        if columns.flags[index] & DIRECTORY:
            node = self._folder(columns.offsets[index], columns.sizes[index], parent, depth + 1)
        elif columns.child(index):
            node = self._relocated(columns.child(index) * SECTOR, parent, depth + 1)
        else:
            node = self._file(columns, index, pending)
        node.mtime = columns.mtimes[index]
        columns.attributes(node, index)
        return node

    def _relocated(self, offset: int, parent: int, depth: int) -> Node:
        """Return a directory that was moved for its depth: its first record says how long it is (RRIP 4.1.5.1)."""
        if offset + SECTOR > self._source.size:
            raise self._damaged("a relocated directory lies beyond the end of the file", offset)
        head = parse_records(self._source.read(offset, SECTOR), self._source.name, offset).head
        node = self._folder(offset, int(head["size"][0]), parent, depth)
        records, rock = self._read(offset, SECTOR)
        self._attributes(node, records, rock, 0)
        return node

    def _attributes(self, node: Node, records: Records, rock: RockRidge | None, index: int) -> None:
        seconds = record_seconds(records.head["time"], records.head["zone"])
        if rock is not None:
            seconds = np.where(rock.has_time, rock.mtime, seconds)
        columns = _Columns(records, rock, [second * 1_000_000_000 for second in seconds.tolist()])
        node.mtime = columns.mtimes[index]
        columns.attributes(node, index)

    def _file(self, columns: _Columns, index: int, pending: list[Piece]) -> Node:
        size = columns.sizes[index]
        pieces = pending or ([Piece(0, size, self._source, columns.offsets[index])] if size else [])
        if pending:
            size = pending[-1].start + pending[-1].length
        node = Node(stat.S_IFREG | 0o444, size=size, pieces=pieces)
        if columns.zisofs(index) and size:
            from diskmorph.formats.iso.zisofs import ZisofsSource  # noqa: PLC0415 - seldom met

            decoded = ZisofsSource(node.source(self._source.name))
            node.size = decoded.size
            node.pieces = [Piece(at, n, decoded, at) for at, n, stored in decoded.runs(0, decoded.size) if stored]
        return node

    def _damaged(self, what: str, offset: int) -> FormatError:
        return FormatError(what, file=self._source.name, format="iso", structure="directory", offset=offset)


class _Columns:
    """The tables of a directory as Python lists, for the loop that makes nodes."""

    def __init__(self, records: Records, rock: RockRidge | None, mtimes: list[int]) -> None:
        head = records.head
        data_begin = head["extent"].astype(np.int64) + head["attribute_length"]
        self.offsets: list[int] = (data_begin * SECTOR).tolist()
        self.sizes: list[int] = head["size"].tolist()
        self.flags: list[int] = head["flags"].tolist()
        self.mtimes = mtimes
        self._rock = rock
        if rock is None:
            return
        self._relocated: list[bool] = rock.relocated.tolist()
        self._child: list[int] = rock.child.tolist()
        self._px: list[bool] = rock.has_px.tolist()
        self._mode: list[int] = rock.mode.tolist()
        self._uid: list[int] = rock.uid.tolist()
        self._gid: list[int] = rock.gid.tolist()

    def hidden(self, index: int) -> bool:
        return self._rock is not None and self._relocated[index]

    def child(self, index: int) -> int:
        return self._child[index] if self._rock is not None else 0

    def zisofs(self, index: int) -> bool:
        return self._rock is not None and index in self._rock.zisofs

    def attributes(self, node: Node, index: int) -> None:
        """Give a node what Rock Ridge says of it."""
        rock = self._rock
        if rock is None:
            return
        if self._px[index]:
            mode = self._mode[index]
            kind = stat.S_IFMT(mode)
            node.mode = (node.mode & 0o170000 if node.is_dir or not kind else kind) | stat.S_IMODE(mode)
            node.uid, node.gid = self._uid[index], self._gid[index]
        link = rock.links.get(index)
        if link is not None and not node.is_dir:
            node.mode = stat.S_IFLNK | 0o777
            node.target, node.size, node.pieces = link, len(link), ()
        device = rock.devices.get(index)
        if device is not None:
            node.rdev = device


def describe(source: ByteSource) -> tuple[Volume, dict[str, Any]]:
    """Return the volume and what `info` tells of it."""
    volume = read_volume(source)
    records_skip = _rock_ridge_skip(source, volume)
    features = {
        "label": volume.label,
        "rock_ridge": records_skip is not None,
        "joliet": volume.joliet is not None,
        "udf": volume.udf,
        "el_torito": [
            {
                "platform": image.platform,
                "offset": image.offset,
                "load_sectors": image.load_sectors,
                "bootable": image.bootable,
            }
            for image in volume.boot
        ],
        "system": volume.system,
        "publisher": volume.publisher,
        "application": volume.application,
        "created": volume.created,
    }
    return volume, features
