"""Guest systems: VMware's words and the numbers of CIM_OperatingSystem.OSType (DSP0004's ValueMap)."""

from __future__ import annotations

import re

OTHER_32, OTHER_64, LINUX_32, LINUX_64 = 1, 102, 36, 101

# Prefix of VMware's word: the number of its 32-bit and its 64-bit kind.
_SYSTEMS: tuple[tuple[str, int, int], ...] = (
    ("debian", 95, 96),
    ("ubuntu", 93, 94),
    ("rhel", 79, 80),
    ("centos", 106, 107),
    ("oraclelinux", 108, 109),
    ("rockylinux", 80, 80),
    ("almalinux", 80, 80),
    ("amazonlinux", LINUX_64, LINUX_64),
    ("fedora", LINUX_32, LINUX_64),
    ("sles", 84, 85),
    ("opensuse", 82, 83),
    ("suse", 82, 83),
    ("mandriva", 89, 90),
    ("turbolinux", 91, 92),
    ("asianux", LINUX_32, LINUX_64),
    ("coreos", LINUX_64, LINUX_64),
    ("photon", LINUX_64, LINUX_64),
    ("other26xlinux", 99, 100),
    ("other24xlinux", 97, 98),
    ("other", LINUX_32, LINUX_64),  # otherLinux, other3xLinux, ...; those without Linux are taken out before
    ("freebsd", 42, 78),
    ("openbsd", 65, 65),
    ("netbsd", 43, 43),
    ("solaris", 29, 81),
    ("vmkernel", 104, 104),
    ("windows2022", 117, 117),
    ("windows2019", 117, 117),
    ("windows9server", 117, 117),
    ("windows9", 120, 121),
    ("windows11", 121, 121),
    ("windows8server", 113, 113),
    ("windows8", 114, 115),
    ("windows7server", 103, 103),
    ("windows7", 105, 105),
    ("winlonghorn", 76, 77),
    ("winvista", 73, 74),
    ("winxp", 67, 71),
    ("winnet", 69, 70),
)
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def is_system(word: str) -> bool:
    """Return whether a word can be VMware's for a system: letters, digits, `_` and `-`."""
    return _WORD.fullmatch(word) is not None


def vmware_word(word: str) -> str:
    """Return the word as `vmw:osType` has it: with "Guest", before the width where VMware puts it so."""
    if word.endswith("Guest") or "Guest" in word:
        return word
    return f"{word}Guest"


def cim_number(word: str) -> int:
    """Return the number that stands for VMware's word; that of other systems where none does."""
    plain = word.lower().replace("guest", "").replace("-", "_")
    wide = plain.endswith(("64", "srv", "2022", "2019", "_64")) or "64" in plain
    if plain.startswith("other") and "linux" not in plain:
        return OTHER_64 if wide else OTHER_32
    for prefix, narrow, broad in _SYSTEMS:
        if plain.startswith(prefix):
            return broad if wide else narrow
    return OTHER_64 if wide else OTHER_32
