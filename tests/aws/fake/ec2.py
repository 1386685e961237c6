"""EC2's query API, as far as images need it: requests become nested dicts, answers become XML, both by wire names."""

from __future__ import annotations

import datetime as dt
import subprocess
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from .account import BLOCK, NAME, OWNER, Account, No, Snapshot

REGIONS = ("us-east-1", "eu-west-1", "ap-southeast-2")


def nested(form: dict[str, str]) -> dict[str, Any]:
    """`Tag.1.Key=a` becomes {"Tag": [{"Key": "a"}]}."""
    top: dict[str, Any] = {}
    for name, value in form.items():
        at = top
        *path, last = name.split(".")
        for word in path:
            at = at.setdefault(word, {})
        at[last] = value

    def lists(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        inner = {key: lists(each) for key, each in value.items()}
        return [inner[key] for key in sorted(inner, key=int)] if inner and all(k.isdigit() for k in inner) else inner

    return {key: lists(value) for key, value in top.items()}


def xml(value: Any) -> str:
    """A dict as elements, a list as items."""
    if isinstance(value, dict):
        return "".join(f"<{key}>{xml(each)}</{key}>" for key, each in value.items() if each is not None)
    if isinstance(value, list):
        return "".join(f"<item>{xml(each)}</item>" for each in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return escape(str(value))


def stamp(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def tags_in(asked: dict[str, Any], kind: str) -> dict[str, str]:
    for one in asked.get("TagSpecification", []):
        if one["ResourceType"] == kind:
            return {tag["Key"]: tag.get("Value", "") for tag in one.get("Tag", [])}
    return {}


def tag_set(tags: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


class Ec2:
    """The actions, one method each."""

    def __init__(self, account: Account, fetch: Any, role_trusts: Any) -> None:
        self.account, self.fetch, self.role_trusts = account, fetch, role_trusts

    def call(self, action: str, region: str, form: dict[str, str]) -> str:
        asked = nested(form)
        method = getattr(self, f"do_{action}", None)
        if method is None:
            raise No(400, "InvalidAction", f"The action {action} is not valid for this web service")
        if asked.get("DryRun") == "true":
            raise No(412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
        with self.account.lock:
            body = xml(method(region, asked))
        return f'<{action}Response xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>1</requestId>{body}</{action}Response>'

    @staticmethod
    def passes(asked: dict[str, Any], fields: dict[str, Any], tags: dict[str, str]) -> bool:
        for one in asked.get("Filter", []):
            name = one["Name"]
            if name.startswith("tag:"):
                have = [tags[name[4:]]] if name[4:] in tags else []
            elif name == "tag-key":
                have = list(tags)
            elif name in fields:
                have = [str(fields[name])]
            else:
                raise No(400, "InvalidParameterValue", f"The filter '{name}' is invalid")
            if not any(fnmatchcase(value, pattern) for value in have for pattern in one["Value"]):
                return False
        return True

    # --- snapshots

    def snapshot(self, ident: str, region: str) -> Snapshot:
        try:
            return self.account.find(ident, region)
        except No:
            raise No(400, "InvalidSnapshot.NotFound", f"The snapshot '{ident}' does not exist.") from None

    def do_DescribeSnapshots(self, region: str, asked: dict[str, Any]) -> Any:
        ids = asked.get("SnapshotId")
        rows = [self.snapshot(ident, region) for ident in ids] if ids else list(self.account.snapshots.values())
        shown = []
        for one in rows:
            if one.region != region:
                continue
            if one.settled:
                self.account.find(one.id, region) if not self.account.unknown_seconds else None
            fields = {"snapshot-id": one.id, "status": one.state}
            if self.passes(asked, fields, one.tags):
                shown.append({"snapshotId": one.id, "status": one.state, "startTime": stamp(one.started), "volumeSize": one.gib,
                              "ownerId": OWNER, "encrypted": one.encrypted, "kmsKeyId": one.key, "progress": "50%",
                              "description": one.description, "tagSet": tag_set(one.tags)})  # fmt: skip
        return {"snapshotSet": shown}

    def do_DeleteSnapshot(self, region: str, asked: dict[str, Any]) -> Any:
        ident = self.snapshot(asked["SnapshotId"], region).id
        user = next((image["imageId"] for image in self.account.images.values() if ident in image["_snapshots"]), None)
        if user:
            raise No(400, "InvalidSnapshot.InUse", f"The snapshot {ident} is currently in use by {user}")
        del self.account.snapshots[ident]
        return {"return": True}

    # --- images

    def image(self, ident: str, region: str) -> dict[str, Any]:
        found = self.account.images.get(ident)
        if found is None or found["_region"] != region:
            raise No(400, "InvalidAMIID.NotFound", f"The image id '[{ident}]' does not exist")
        if found["imageState"] == "pending" and self.account.ready(ident):
            found["imageState"] = "available"
        return found

    def do_RegisterImage(self, region: str, asked: dict[str, Any]) -> Any:
        name = asked.get("Name", "")
        if not NAME.fullmatch(name):
            raise No(400, "InvalidAMIName.Malformed", "AMI names have 3 to 128 characters of a certain kind")
        for image in self.account.images.values():
            if image["name"] == name and image["_region"] == region:
                raise No(
                    400, "InvalidAMIName.Duplicate", f"AMI name {name} is already in use by AMI {image['imageId']}"
                )
        hvm = asked.get("VirtualizationType", "paravirtual") == "hvm"
        boot, architecture = asked.get("BootMode"), asked.get("Architecture", "i386")
        if not hvm and (architecture == "arm64" or boot or asked.get("EnaSupport") == "true"):
            raise No(400, "InvalidParameterCombination", "paravirtual images have no boot mode")
        if (architecture == "arm64" or asked.get("TpmSupport")) and boot not in {"uefi", "uefi-preferred"}:
            raise No(400, "InvalidParameterCombination", "this needs UEFI")
        maps, used = [], []
        for one in asked.get("BlockDeviceMapping", []):
            ebs = one.get("Ebs", {})
            source = self.snapshot(ebs["SnapshotId"], region)
            if source.state != "completed":
                raise No(400, "IncorrectState", f"Snapshot is in invalid state - {source.state}")
            if int(ebs.get("VolumeSize", source.gib)) < source.gib:
                raise No(400, "InvalidBlockDeviceMapping", "the volume is smaller than its snapshot")
            used.append(source.id)
            maps.append({"deviceName": one["DeviceName"], "ebs": {
                "snapshotId": source.id, "volumeSize": int(ebs.get("VolumeSize", source.gib)),
                "volumeType": ebs.get("VolumeType", "standard"), "encrypted": source.encrypted,
                "deleteOnTermination": ebs.get("DeleteOnTermination", "true") == "true"}})  # fmt: skip
        if asked.get("RootDeviceName") not in {one["deviceName"] for one in maps}:
            raise No(400, "InvalidBlockDeviceMapping", "the root device is not mapped")
        made = {"imageId": self.account.new_id("ami"), "_region": region, "_snapshots": used, "_launch": [], "_tags": tags_in(asked, "image"),
                "imageState": "pending", "name": name, "description": asked.get("Description"), "architecture": architecture,
                "virtualizationType": "hvm" if hvm else "paravirtual", "rootDeviceName": asked["RootDeviceName"], "bootMode": boot,
                "tpmSupport": asked.get("TpmSupport"), "imdsSupport": asked.get("ImdsSupport"),
                "enaSupport": asked.get("EnaSupport") == "true", "blockDeviceMapping": maps, "creationDate": stamp(time.time())}  # fmt: skip
        self.account.images[made["imageId"]] = made
        self.account.ready(made["imageId"])
        return {"imageId": made["imageId"]}

    def do_DescribeImages(self, region: str, asked: dict[str, Any]) -> Any:
        rows = (
            [self.image(ident, region) for ident in asked["ImageId"]]
            if "ImageId" in asked
            else list(self.account.images.values())
        )
        shown = []
        for one in rows:
            if one["_region"] == region and self.passes(asked, {"name": one["name"]}, one["_tags"]):
                self.image(one["imageId"], region)
                shown.append({k: v for k, v in one.items() if k[0] != "_"} | {"tagSet": tag_set(one["_tags"])})
        return {"imagesSet": shown}

    def do_DeregisterImage(self, region: str, asked: dict[str, Any]) -> Any:
        del self.account.images[self.image(asked["ImageId"], region)["imageId"]]
        return {"return": True}

    def do_CopyImage(self, region: str, asked: dict[str, Any]) -> Any:
        source = self.image(asked["SourceImageId"], asked["SourceRegion"])
        if source["imageState"] != "available":
            raise No(400, "InvalidAMIID.Unavailable", "the image is not available")

        def make() -> Any:
            used, maps = [], []
            for one in source["blockDeviceMapping"]:
                old = self.account.snapshots[one["ebs"]["snapshotId"]]
                copy = Snapshot(self.account.new_id("snap"), region, old.gib, time.time(), "completed", old.encrypted,
                                tags=tags_in(asked, "snapshot"), own=old.content())  # fmt: skip
                self.account.snapshots[copy.id] = copy
                used.append(copy.id)
                maps.append({**one, "ebs": {**one["ebs"], "snapshotId": copy.id}})
            made = {**source, "imageId": self.account.new_id("ami"), "_region": region, "_snapshots": used, "_launch": [],
                    "_tags": tags_in(asked, "image"), "imageState": "pending", "blockDeviceMapping": maps}  # fmt: skip
            self.account.images[made["imageId"]] = made
            self.account.ready(made["imageId"])
            return {"imageId": made["imageId"]}

        return self.account.once(asked.get("ClientToken"), asked, make, "copy", region)

    def do_ModifyImageAttribute(self, region: str, asked: dict[str, Any]) -> Any:
        found = self.image(asked["ImageId"], region)
        if found["imageState"] != "available":
            raise No(400, "InvalidAMIID.Unavailable", "the image is not available")
        found["_launch"] += asked["LaunchPermission"]["Add"]
        return {"return": True}

    def do_EnableImageDeprecation(self, region: str, asked: dict[str, Any]) -> Any:
        self.image(asked["ImageId"], region)["deprecationTime"] = asked["DeprecateAt"]
        return {"return": True}

    # --- tags, settings

    def do_CreateTags(self, region: str, asked: dict[str, Any]) -> Any:
        more = {tag["Key"]: tag.get("Value", "") for tag in asked["Tag"]}
        for ident in asked["ResourceId"]:
            tags = self.image(ident, region)["_tags"] if ident.startswith("ami-") else self.snapshot(ident, region).tags
            tags.update(more)
        return {"return": True}

    def do_GetEbsEncryptionByDefault(self, region: str, asked: dict[str, Any]) -> Any:
        return {"ebsEncryptionByDefault": self.account.encrypts_by_default}

    def do_DescribeRegions(self, region: str, asked: dict[str, Any]) -> Any:
        return {"regionInfo": [{"regionName": name, "optInStatus": "opt-in-not-required"} for name in REGIONS]}

    # --- VM Import

    def do_ImportSnapshot(self, region: str, asked: dict[str, Any]) -> Any:
        return self.begin("import-snap", region, asked, [asked["DiskContainer"]], {"vhd", "vmdk", "raw"})

    def do_ImportImage(self, region: str, asked: dict[str, Any]) -> Any:
        return self.begin("import-ami", region, asked, asked["DiskContainer"], {"ova", "vhd", "vhdx", "vmdk", "raw"})

    def begin(self, kind: str, region: str, asked: dict[str, Any], containers: list[Any], formats: set[str]) -> Any:
        if not self.role_trusts(asked.get("RoleName", "vmimport")):
            raise No(400, "InvalidParameter", "The service role does not exist or does not have sufficient permissions")

        def make() -> Any:
            made = {"importTaskId": self.account.new_id(kind), "_kind": kind, "_region": region, "_asked": asked, "status": "active",
                    "_steps": 0, "_tags": tags_in(asked, f"{kind.replace('ami', 'image').replace('snap', 'snapshot')}-task")}  # fmt: skip
            objects = []
            for one in containers:
                if one["Format"].lower() not in formats:
                    raise No(400, "InvalidParameter", f"Unsupported disk image format {one['Format']}")
                objects.append(
                    (one["Format"].lower(), self.fetch(one["UserBucket"]["S3Bucket"], one["UserBucket"]["S3Key"]))
                )
            made["_objects"] = objects
            self.account.tasks[made["importTaskId"]] = made
            return {"importTaskId": made["importTaskId"]}

        return self.account.once(asked.get("ClientToken"), asked, make, kind, region)

    def advance(self, task: dict[str, Any]) -> None:
        task["_steps"] += 1
        if task["status"] != "active" or task["_steps"] < 3:
            return
        if self.account.task_message:
            task.update(status="deleted", statusMessage=self.account.task_message)
            return
        disks = [disk for form, data in task["_objects"] for disk in unpacked(form, data)]
        ids = []
        for raw in disks:
            parts = {i: raw[i * BLOCK : (i + 1) * BLOCK] for i in range(-(-len(raw) // BLOCK))}
            kept = {i: part for i, part in parts.items() if any(part)}
            ids.append(self.account.seed(kept, gib=max(1, -(-len(raw) >> 30)), region=task["_region"]))
        task["_snapshots"] = ids
        if task["_kind"] == "import-ami":
            maps = [
                {"DeviceName": f"/dev/sd{chr(97 + n)}1", "Ebs": {"SnapshotId": ident}} for n, ident in enumerate(ids)
            ]
            asked = {"Name": task["importTaskId"], "VirtualizationType": "hvm", "RootDeviceName": "/dev/sda1", "BlockDeviceMapping": maps,
                     "Architecture": task["_asked"].get("Architecture", "x86_64"), "BootMode": task["_asked"].get("BootMode")}  # fmt: skip
            task["imageId"] = self.do_RegisterImage(task["_region"], asked)["imageId"]
        task["status"] = "completed"

    def shown(self, region: str, asked: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        rows = [t for t in self.account.tasks.values() if t["_kind"] == kind and t["_region"] == region]
        if "ImportTaskId" in asked:
            rows = [task for task in rows if task["importTaskId"] in asked["ImportTaskId"]]
        for task in rows:
            self.advance(task)
        return rows

    def do_DescribeImportSnapshotTasks(self, region: str, asked: dict[str, Any]) -> Any:
        return {"importSnapshotTaskSet": [
            {"importTaskId": task["importTaskId"], "tagSet": tag_set(task["_tags"]), "snapshotTaskDetail": {
                "status": task["status"], "statusMessage": task.get("statusMessage"), "progress": "40",
                "snapshotId": next(iter(task.get("_snapshots", [])), None)}}
            for task in self.shown(region, asked, "import-snap")]}  # fmt: skip

    def do_DescribeImportImageTasks(self, region: str, asked: dict[str, Any]) -> Any:
        return {"importImageTaskSet": [
            {"importTaskId": task["importTaskId"], "tagSet": tag_set(task["_tags"]), "status": task["status"],
             "statusMessage": task.get("statusMessage"), "progress": "40", "imageId": task.get("imageId"),
             "snapshotDetailSet": [{"snapshotId": ident} for ident in task.get("_snapshots", [])]}
            for task in self.shown(region, asked, "import-ami")]}  # fmt: skip

    def do_CancelImportTask(self, region: str, asked: dict[str, Any]) -> Any:
        task = self.account.tasks.get(asked["ImportTaskId"])
        if task is None or task["status"] != "active":
            raise No(400, "InvalidConversionTaskId", "The task is not active")
        task["status"] = "deleted"
        return {"importTaskId": task["importTaskId"], "state": "deleted"}


def unpacked(form: str, data: bytes) -> list[bytes]:
    """The raw disks of an object, by qemu-img; the VMDKs of an OVA."""
    with tempfile.TemporaryDirectory() as folder:
        if form == "ova":
            subprocess.run(["bsdtar", "-x", "-C", folder, "-f", "-"], input=data, check=True)
            return [
                disk for path in sorted(Path(folder).glob("*.vmdk")) for disk in unpacked("vmdk", path.read_bytes())
            ]
        if form == "raw":
            return [data]
        source, raw = Path(folder, "disk"), Path(folder, "raw")
        source.write_bytes(data)
        subprocess.run(
            ["qemu-img", "convert", "-f", {"vhd": "vpc"}.get(form, form), "-O", "raw", source, raw], check=True
        )
        return [raw.read_bytes()]
