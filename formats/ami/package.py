"""The manifest of an EC2 bundle as a package: told of, but not read as a disk, since only a key opens it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.formats.ami.manifest import FORMAT_OF_TYPE, read_manifest
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.packages import Package

if TYPE_CHECKING:
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.policy import Opener
    from diskmorph.formats.source import ByteSource


class BundlePackage(Package):
    """A bundle's manifest, nothing of it verified."""

    format = "ami"

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        self.name = source.name
        self._source = source
        if source.size > limits.descriptor:
            raise FormatError(
                "is too large for a manifest",
                file=source.name,
                format="ami",
                structure="manifest",
                expected=f"at most {limits.descriptor} bytes",
                found=source.size,
            )
        self.manifest = read_manifest(source.read(0, source.size), file=source.name, limits=limits)
        self.warnings = ["nothing of the bundle is verified without its key"]

    def open_disk(self, number: int | None = None) -> Disk:
        """See Package; a bundle's image is encrypted."""
        del number
        raise UnsupportedError(
            "is the manifest of an encrypted bundle",
            feature="reading bundles in place",
            file=self.name,
            format="ami",
            hint="`diskmorph unbundle MANIFEST DST --key PEM` opens it",
        )

    def details(self) -> dict[str, Any]:
        """See Package."""
        return {"bundle": {**self.manifest.as_dict(), "label": FORMAT_OF_TYPE[self.manifest.type]}}

    def close(self) -> None:
        """See Package."""
        self._source.close()


def open_package(source: ByteSource, format: str, opener: Opener, limits: Limits) -> BundlePackage:
    """See PackageModule."""
    del format, opener
    return BundlePackage(source, limits)
