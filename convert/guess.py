"""What is said of a source that counts as raw because no format left its mark in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import DiskmorphError

if TYPE_CHECKING:
    from diskmorph.convert.opening import Opened

_HEAD = 4096


def remarks_on_guess(opened: Opened, source_format: str | None) -> tuple[str, ...]:
    """Return a note where raw was a guess that nothing on the disk supports, or where the disk is a LUKS volume.

    A partition table, a boot sector, a file system, or an empty beginning is what a raw disk may have. `source_format`
    is what the user said.
    """
    guessed = not any(signature.outer for signature in opened.signatures)
    if source_format is not None or len(opened.layers) != 1 or opened.format != "raw" or not guessed:
        return ()
    try:
        return _remarks(opened)
    except DiskmorphError:  # whoever reads the disk says what is wrong with it
        return ()


def _remarks(opened: Opened) -> tuple[str, ...]:
    disk = opened.disk
    head = disk.read(0, min(_HEAD, disk.size))
    if opened.signatures or not any(head) or _has_boot_sector(head):
        return ()
    from diskmorph.formats import fsprobe  # noqa: PLC0415 - few raw disks begin with something else

    found = fsprobe.probe(disk)
    if found is None:
        return (f"nothing is known at the beginning of {opened.name}: read as a raw disk",)
    return (_locked(opened.name),) if found.type == "luks" else ()


def _has_boot_sector(head: bytes) -> bool:
    """Say whether there is a BIOS boot sector, or an Apple partition map."""
    return head[510:512] == b"\x55\xaa" or (head[:2] == b"ER" and head[512:514] == b"PM")


def _locked(name: str) -> str:
    return f"{name} is a LUKS volume, taken as it is, locked; -f luks --passphrase-file FILE reads what it holds"
