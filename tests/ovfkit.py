"""OVF descriptors and tar archives written by hand for tests: deliberately not by the product's own writers."""

from __future__ import annotations

import datetime as dt
import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

OVF1 = "http://schemas.dmtf.org/ovf/envelope/1"
OVF2 = "http://schemas.dmtf.org/ovf/envelope/2"
OVF09 = "http://www.vmware.com/schema/ovf/1/envelope"
CIM = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_"
RASD, VSSD = CIM + "ResourceAllocationSettingData", CIM + "VirtualSystemSettingData"
STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"


def item(**fields: object) -> str:
    return (
        "<Item>" + "".join(f"<rasd:{name}>{value}</rasd:{name}>" for name, value in sorted(fields.items())) + "</Item>"
    )


def hardware(disks: int = 1, *, cpus: int = 2, memory: object = 512, units: str | None = "byte * 2^20") -> str:
    extra = {} if units is None else {"AllocationUnits": units}
    items = [
        item(InstanceID=1, ResourceType=3, VirtualQuantity=cpus),
        item(InstanceID=2, ResourceType=4, VirtualQuantity=memory, **extra),
        item(InstanceID=3, ResourceType=6, ResourceSubType="lsilogic", Address=0),
    ]
    items += [
        item(InstanceID=10 + i, ResourceType=17, Parent=3, AddressOnParent=i, HostResource=f"ovf:/disk/d{i + 1}")
        for i in range(disks)
    ]
    return "".join(items)


def system(name: str = "box", items: str | None = None, *, family: str = "vmx-13", extra: str = "") -> str:
    return (
        f'<VirtualSystem ovf:id="{name}"><Info>i</Info><Name>{name}</Name>'
        f"<VirtualHardwareSection><Info>i</Info><System><vssd:ElementName>f</vssd:ElementName>"
        f"<vssd:InstanceID>0</vssd:InstanceID><vssd:VirtualSystemType>{family}</vssd:VirtualSystemType></System>"
        f"{hardware() if items is None else items}</VirtualHardwareSection>{extra}</VirtualSystem>"
    )


def envelope(
    files: str = '<File ovf:id="f1" ovf:href="d.vmdk"/>',
    disks: str = f'<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="1048576" ovf:format="{STREAM}"/>',
    body: str | None = None,
    *,
    space: str = OVF1,
    sections: str = "",
    prolog: str = "",
) -> bytes:
    return (
        f'{prolog}<Envelope xmlns="{space}" xmlns:ovf="{space}" xmlns:rasd="{RASD}" xmlns:vssd="{VSSD}" '
        f'xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
        f"<References>{files}</References><DiskSection><Info>i</Info>{disks}</DiskSection>"
        f"{sections}{system() if body is None else body}</Envelope>"
    ).encode()


def header(
    name: str | bytes,
    size: int,
    *,
    kind: bytes = b"0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    mtime: bytes = b"00000000001\0",
    size_field: bytes | None = None,
    prefix: bytes = b"",
) -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    head = bytearray(
        raw.ljust(100, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + (size_field or b"%011o\0" % size)
        + mtime
        + b" " * 8
        + kind
        + link.ljust(100, b"\0")
        + magic
        + bytes(80)
        + prefix.ljust(155, b"\0")
        + bytes(12)
    )
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def entry(name: str | bytes, data: bytes = b"", **fields: bytes) -> bytes:
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)  # type: ignore[arg-type]


def pax(**records: str) -> bytes:
    body = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        body += str(length).encode() + rest
    return entry("PaxHeaders/x", body, kind=b"x")


def ova(path: Path, *members: tuple[str, bytes], manifest: str | None = "sha256") -> Path:
    """Write an archive of members in order, a true manifest in second place."""
    rows = list(members)
    if manifest:
        lines = "".join(
            f"{manifest.upper()}({name})= {hashlib.new(manifest, data).hexdigest()}\n" for name, data in members
        )
        rows.insert(1, (members[0][0].rpartition(".")[0] + ".mf", lines.encode()))
    path.write_bytes(b"".join(entry(name, data) for name, data in rows) + bytes(1024))
    return path


def signed(manifest: bytes, *, days: int = 30, algorithm: str = "SHA256") -> bytes:
    """A certificate file for x.mf: the signature of a manifest, and the certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.x509.oid import NameOID

    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=60))
        .not_valid_after(now + dt.timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    kind = {"SHA1": hashes.SHA1(), "SHA256": hashes.SHA256(), "SHA512": hashes.SHA512()}[algorithm]
    signature = key.sign(manifest, padding.PKCS1v15(), kind).hex()
    return f"{algorithm}(x.mf)= {signature}\n".encode() + certificate.public_bytes(serialization.Encoding.PEM)
