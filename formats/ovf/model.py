"""What an OVF descriptor says, as plain data: files, disks and machines."""

from __future__ import annotations

from dataclasses import dataclass

from diskmorph.formats.machine import Machine

OVF1 = "http://schemas.dmtf.org/ovf/envelope/1"
OVF2 = "http://schemas.dmtf.org/ovf/envelope/2"
OVF09 = "http://www.vmware.com/schema/ovf/1/envelope"
CIM = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_"
RASD = CIM + "ResourceAllocationSettingData"
VSSD = CIM + "VirtualSystemSettingData"
VMW = "http://www.vmware.com/schema/ovf"
VBOX = "http://www.virtualbox.org/ovf/machine"
XSI = "http://www.w3.org/2001/XMLSchema-instance"
STREAM_OPTIMIZED = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"

# CIM_ResourceAllocationSettingData.ResourceType
CPU, MEMORY, IDE_CONTROLLER, SCSI_CONTROLLER, ETHERNET = 3, 4, 5, 6, 10
CD_DRIVE, DVD_DRIVE, DISK_DRIVE, OTHER_STORAGE, STORAGE_EXTENT, LOGICAL_DISK = 15, 16, 17, 20, 19, 31


@dataclass(frozen=True, slots=True)
class FileRef:
    """A `File` of the `References` (DSP0243 7.1): `size` in bytes as said, `chunk_size` where it is cut into chunks."""

    id: str
    href: str
    size: int | None = None
    compression: str | None = None
    chunk_size: int | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class DiskRef:
    """A `Disk` of the `DiskSection` (DSP0243 9.1): `capacity` in bytes, None where the descriptor does not tell."""

    id: str
    file: str | None
    capacity: int | None
    format: str | None = None
    parent: str | None = None
    units: str | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Envelope:
    """A descriptor. `files` and `disks` by their ids, in order; `version` is "0.9", "1" or "2"."""

    version: str
    files: dict[str, FileRef]
    disks: dict[str, DiskRef]
    networks: tuple[str, ...]
    machines: tuple[Machine, ...]
