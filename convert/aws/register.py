"""`aws register`: a snapshot becomes an image, with copies, permissions, tags and an end of life."""

from __future__ import annotations

import datetime as dt
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.convert.aws.blocks import GIB
from diskmorph.convert.aws.faults import AwsError, Fault
from diskmorph.convert.aws.infer import ARCHITECTURES, BIOS, BOOT_MODES, Found, require
from diskmorph.convert.aws.session import SHORT
from diskmorph.convert.aws.undo import IMAGE, JOB, tags_of
from diskmorph.convert.aws.waiting import wait_image
from diskmorph.convert.options import Progress
from diskmorph.formats.errors import OptionError, TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.convert.aws.job import Job
    from diskmorph.convert.aws.session import Session

# RegisterImage, Name: 3 to 128 of these characters
_NAME = re.compile(r"[A-Za-z0-9()\[\] ./\-'@_]{3,128}")
_ACCOUNT = re.compile(r"\d{12}")
_ORGANIZATION = re.compile(r"arn:aws[a-z-]*:organizations::\d{12}:organization/o-\w+")
_UNIT = re.compile(r"arn:aws[a-z-]*:organizations::\d{12}:ou/o-\w+/ou-[\w-]+")
_REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-\d+")
_DEVICE = re.compile(r"/dev/(sd[a-z]\d{0,2}|xvd[a-z]{1,2}|hd[a-z]\d{0,2})")
VOLUME_TYPES = ("gp3", "gp2", "io1", "io2", "st1", "sc1", "standard")


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How an image is registered; None is read from the disk. `volume_size` in bytes, `imds` "v2.0" or "optional"."""

    name: str = ""
    architecture: str | None = None
    boot_mode: str | None = None
    root_device: str | None = None
    volume_type: str = "gp3"
    volume_size: int | None = None
    imds: str = "v2.0"
    tpm: bool = False
    description: str | None = None
    copy_to: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    deprecate_at: str | None = None


@dataclass(frozen=True, slots=True)
class Registered:
    """An image that is available, in all regions."""

    image_id: str
    name: str
    architecture: str
    boot_mode: str
    root_device: str
    images: Mapping[str, str]
    shared: tuple[str, ...] = ()
    snapshots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return what `aws register --json` shows."""
        return {
            "image_id": self.image_id,
            "name": self.name,
            "architecture": self.architecture,
            "boot_mode": self.boot_mode,
            "root_device": self.root_device,
            "images": dict(self.images),
            "shared": list(self.shared),
        }

    def things(self) -> dict[str, list[str]]:
        """Return region to ids of everything: images, and their snapshots."""
        return {region: [image, *self.snapshots.get(region, ())] for region, image in self.images.items()}


def require_image_options(options: ImageOptions, *, named: bool = True) -> None:
    """Raise OptionError for what RegisterImage and its fellows would refuse later."""
    if (named or options.name) and not _NAME.fullmatch(options.name):
        raise OptionError(
            f"--name {options.name!r} is not an image's name",
            hint="3 to 128 of: letters, digits, space, ( ) [ ] . / - ' @ _",
        )
    _one_of("--arch", options.architecture, ARCHITECTURES)
    _one_of("--boot-mode", options.boot_mode, BOOT_MODES)
    _one_of("--volume-type", options.volume_type, VOLUME_TYPES)
    _one_of("--imds", options.imds, ("v2.0", "optional"))
    if options.root_device is not None and not _DEVICE.fullmatch(options.root_device):
        raise OptionError(f"--root-device {options.root_device} is not a device", hint="such as /dev/xvda or /dev/sda1")
    if options.description is not None and len(options.description) > 255:
        raise OptionError("--description is longer than 255 characters")
    for region in options.copy_to:
        if not _REGION.fullmatch(region):
            raise OptionError(f"--copy-to {region} is not a region")
    if options.tpm and options.boot_mode == BIOS:
        raise OptionError("--tpm needs a machine that boots by UEFI, not legacy-bios")
    permissions(options.share)
    deprecation(options.deprecate_at)


def _one_of(word: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise OptionError(f"{word} {value} is not known", hint=f"one of {', '.join(known)}")


def permissions(share: tuple[str, ...]) -> list[dict[str, str]]:
    """Return launch permissions of accounts, organisations, their units, or `all`. Raises OptionError."""
    found = []
    for who in share:
        if who == "all":
            found.append({"Group": "all"})
        elif _ACCOUNT.fullmatch(who):
            found.append({"UserId": who})
        elif _ORGANIZATION.fullmatch(who):
            found.append({"OrganizationArn": who})
        elif _UNIT.fullmatch(who):
            found.append({"OrganizationalUnitArn": who})
        else:
            raise OptionError(f"--share {who} is neither an account, an organisation's ARN nor all")
    return found


def deprecation(text: str | None) -> str | None:
    """Return a time as EnableImageDeprecation takes it. Raises OptionError."""
    if text is None:
        return None
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        raise OptionError(f"--deprecate-at {text} is not a time", hint="such as 2031-05-01T00:00:00Z") from None
    at = at if at.tzinfo is not None else at.replace(tzinfo=dt.UTC)
    if at.timestamp() <= time.time():
        raise OptionError(f"--deprecate-at {text} has passed")
    return at.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def settled(found: Found, options: ImageOptions) -> Found:
    """Return what the image will be. Raises OptionError, UnknownMachineError; TargetError for a TPM without UEFI."""
    result = require(found, options.architecture, options.boot_mode, options.root_device)
    if options.tpm and result.boot_mode == BIOS:
        raise TargetError("--tpm needs a machine that boots by UEFI, and this disk boots by legacy-bios")
    return result


def preflight(job: Job, options: ImageOptions) -> None:
    """Refuse a name that is taken, and registration that is denied, before anything is made. Raises AwsError."""
    session = job.session
    for region in dict.fromkeys((session.region, *options.copy_to)):
        found = image_named(session, options.name, region)
        if found is not None and tags_of(found).get(JOB) != job.id:
            raise AwsError(
                f"the name {options.name!r} is taken in {region} by {found['ImageId']}",
                action="ec2:RegisterImage",
                code="InvalidAMIName.Duplicate",
                hint="choose another --name, or deregister that image",
            )
    try:
        session.call("ec2:RegisterImage", patience=SHORT, DryRun=True, Name=options.name)
    except AwsError as error:
        if error.code in {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"}:
            raise


def image_named(session: Session, name: str, region: str) -> Any:
    """Return this account's image of that name in a region, None if there is none."""
    answer = session.call(
        "ec2:DescribeImages", region=region, Owners=["self"], Filters=[{"Name": "name", "Values": [_literal(name)]}]
    )
    return next((image for image in answer.get("Images", ()) if image.get("Name") == name), None)


def _literal(name: str) -> str:
    """Return a filter's value that means these characters: ? and * do not occur in names, brackets are not special."""
    return name.replace("[", "?").replace("]", "?")


def register(job: Job, snapshot: str, found: Found, options: ImageOptions) -> Registered:
    """Make the image and its copies, and wait until all are available. Raises AwsError."""
    session = job.session
    image = _register(job, snapshot, found, options)
    job.undo.made(IMAGE, image, session.region)
    row = wait_image(session, image, session.region, born=time.monotonic())
    size = GIB * sum(mapping.get("Ebs", {}).get("VolumeSize", 0) for mapping in row.get("BlockDeviceMappings", ()))
    job.on_progress(Progress("register", size, size))
    rows = {session.region: row}
    if options.copy_to:
        from diskmorph.convert.aws.publish import copies  # noqa: PLC0415 - seldom needed

        rows.update(copies(job, image, options, size))
    images = {region: str(each["ImageId"]) for region, each in rows.items()}
    for region, each_image in images.items():
        _permit(session, region, each_image, options)
    snapshots = {region: tuple(snapshots_of(each)) for region, each in rows.items()}
    assert found.architecture is not None  # noqa: S101 - settled
    assert found.boot_mode is not None  # noqa: S101
    return Registered(
        image, options.name, found.architecture, found.boot_mode, found.root_device, images, options.share, snapshots
    )


def _register(job: Job, snapshot: str, found: Found, options: ImageOptions) -> str:
    """Register once, though answers may be lost: the image of that name with this job's tag is ours."""
    session = job.session
    existing = image_named(session, options.name, session.region)
    if existing is not None and tags_of(existing).get(JOB) == job.id:
        return str(existing["ImageId"])

    def settle(fault: Fault) -> Any:
        if not fault.ambiguous and fault.code != "InvalidAMIName.Duplicate":
            return None
        mine = image_named(session, options.name, session.region)
        return mine if mine is not None and tags_of(mine).get(JOB) == job.id else None

    job.undo.doubtful(session.region)
    answer = session.call(
        "ec2:RegisterImage", born=time.monotonic(), settle=settle, **_words(job, snapshot, found, options)
    )
    return str(answer["ImageId"])


def _words(job: Job, snapshot: str, found: Found, options: ImageOptions) -> dict[str, Any]:
    ebs: dict[str, Any] = {"SnapshotId": snapshot, "VolumeType": options.volume_type, "DeleteOnTermination": True}
    if options.volume_size is not None:
        ebs["VolumeSize"] = -(-options.volume_size // GIB)
    words: dict[str, Any] = {
        "Name": options.name,
        "Description": options.description or f"made by diskmorph, job {job.id}",
        "Architecture": found.architecture,
        "VirtualizationType": "hvm",
        "EnaSupport": True,
        "BootMode": found.boot_mode,
        "RootDeviceName": found.root_device,
        "BlockDeviceMappings": [{"DeviceName": found.root_device, "Ebs": ebs}],
        "TagSpecifications": job.specification("image"),
    }
    if options.imds == "v2.0":
        words["ImdsSupport"] = "v2.0"
    if options.tpm:
        words["TpmSupport"] = "v2.0"
    return words


def snapshots_of(image: Any) -> list[str]:
    """Return the snapshots of an image."""
    found = [mapping.get("Ebs", {}).get("SnapshotId") for mapping in image.get("BlockDeviceMappings", ())]
    return [str(snapshot) for snapshot in found if snapshot]


def _permit(session: Session, region: str, image: str, options: ImageOptions) -> None:
    who = permissions(options.share)
    if who:
        session.call("ec2:ModifyImageAttribute", region=region, ImageId=image, LaunchPermission={"Add": who})
    at = deprecation(options.deprecate_at)
    if at is not None:
        session.call("ec2:EnableImageDeprecation", region=region, ImageId=image, DeprecateAt=at)
