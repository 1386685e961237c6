"""register, publish, import, download, plan, gc against the fake."""

import datetime as dt
import json
import re
import shutil
from pathlib import Path

import pytest
from aws.disks import block, bootable, disk_file, holds, only_snapshot, wait
from aws.fake import BLOCK, Fake
from clikit import ROOT, dm

from testkit import MIB, data, run

TRUST = json.dumps(
    {"Statement": [{"Effect": "Allow", "Principal": {"Service": "vmie.amazonaws.com"}, "Action": "sts:AssumeRole"}]}
)


def one_image(fake: Fake) -> dict:
    (found,) = fake.account.images.values()
    return found


@pytest.mark.parametrize(
    ("kind", "boot", "architecture"),
    [
        ("bios", "legacy-bios", "x86_64"),
        ("uefi", "uefi", "x86_64"),
        ("arm64", "uefi", "arm64"),
        ("hybrid", "uefi-preferred", "x86_64"),
    ],
)
def test_publish_reads_the_disk(kind: str, boot: str, architecture: str, fake: Fake, tmp_path: Path) -> None:
    raw = bootable(tmp_path / "d.raw", kind)
    fake.account.pending_seconds = 0.6
    done = dm("aws", "publish", raw, "--name", f"image {kind}").ok()
    image, snapshot = one_image(fake), only_snapshot(fake)
    holds(snapshot, raw)
    assert (image["bootMode"], image["architecture"], image["virtualizationType"]) == (boot, architecture, "hvm")
    assert image["imageState"] == "available" and image["imdsSupport"] == "v2.0" and image["enaSupport"]
    (mapping,) = image["blockDeviceMapping"]
    assert mapping["ebs"]["snapshotId"] == snapshot.id and mapping["ebs"]["volumeType"] == "gp3"
    assert image["_tags"]["diskmorph:state"] == snapshot.tags["diskmorph:state"] == "finished"
    assert done.out.index(boot) < done.out.index(image["imageId"]), "shown before anything is made"


def test_options_of_an_image(fake: Fake, tmp_path: Path) -> None:
    raw = bootable(tmp_path / "d.raw", "uefi")
    words = ["--tpm", "--root-device", "/dev/sda1", "--volume-size", "3G", "--volume-type", "gp2", "--imds", "optional"]
    words += [
        "--description",
        "what",
        "--tag",
        "team=a",
        "--copy-to",
        "eu-west-1",
        "--share",
        "111122223333",
        "--share",
        "all",
    ]
    words += ["--deprecate-at", "2061-05-01"]
    answer = dm("aws", "publish", raw, "--name", "all of it", *words, "--json").ok().json
    assert set(answer["images"]) == {"us-east-1", "eu-west-1"} and answer["shared"] == ["111122223333", "all"]
    for region, name in answer["images"].items():
        image = fake.account.images[name]
        assert image["_region"] == region and image["_tags"]["team"] == "a" and image["imageState"] == "available"
        assert image["_launch"] == [{"UserId": "111122223333"}, {"Group": "all"}]
        assert image["deprecationTime"].startswith("2061-05-01")
        assert all(fake.account.snapshots[s].tags["diskmorph:state"] == "finished" for s in image["_snapshots"])
    image = fake.account.images[answer["image_id"]]
    assert (image["tpmSupport"], image["imdsSupport"], image["rootDeviceName"]) == ("v2.0", None, "/dev/sda1")
    assert image["blockDeviceMapping"][0]["ebs"]["volumeSize"] == 3


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("bios", ["--name", "ab"], "--name"),
        ("bios", ["--name", "some*"], "--name"),
        ("bios", ["--name", "fine", "--tpm"], "tpm"),
        ("arm64", ["--name", "fine", "--boot-mode", "legacy-bios"], "arm64"),
        ("bios", ["--name", "fine", "--share", "me"], "--share"),
        ("bios", ["--name", "fine", "--copy-to", "mars"], "--copy-to"),
        ("bios", ["--name", "fine", "--deprecate-at", "1999-01-01"], "--deprecate-at"),
        ("bios", ["--name", "fine", "--arch", "vax"], "--arch"),
    ],
)
def test_refused_before_anything_is_made(kind: str, words: list[str], said: str, fake: Fake, tmp_path: Path) -> None:
    done = dm("aws", "publish", bootable(tmp_path / "d.raw", kind), *words)
    assert done.status in {1, 2} and said in done.err and len(done.err.splitlines()) == 1
    assert not [call for call in fake.calls if call[0].startswith("ebs:")]


def test_a_disk_that_says_nothing(fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", [4])
    done = dm("aws", "publish", raw, "--name", "data")
    assert done.status == 1 and "--boot-mode" in done.err and "--arch" in done.err
    dm("aws", "publish", raw, "--name", "data", "--boot-mode", "uefi", "--arch", "arm64").ok()
    done = dm("aws", "publish", raw, "--name", "data", "--boot-mode", "uefi", "--arch", "arm64")
    assert done.status == 1 and "taken" in done.err


def test_architecture_from_a_kernel(tmp_path: Path) -> None:
    """A BIOS disk whose /boot holds a 32-bit kernel is no x86_64."""
    from diskmorph.convert.aws.infer import infer
    from diskmorph.formats.registry import open_disk

    head = bytearray(2048)
    head[0x1FE:0x200], head[0x202:0x206], head[0x206:0x208] = b"\x55\xaa", b"HdrS", (0x20C).to_bytes(2, "little")
    (tmp_path / "root/boot").mkdir(parents=True)
    for flags, architecture in ((0, "i386"), (1, "x86_64")):
        head[0x236] = flags
        (tmp_path / "root/boot/vmlinuz-1").write_bytes(head)
        raw = bootable(tmp_path / "d.raw", "bios")
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tmp_path / "root", "-E", f"offset={MIB}", raw, "16M")
        with open_disk(raw) as disk:
            assert infer(disk).architecture == architecture


def test_register_reads_little(fake: Fake, tmp_path: Path) -> None:
    raw = bootable(tmp_path / "d.raw", "hybrid").read_bytes()
    parts = {i: raw[i * BLOCK : (i + 1) * BLOCK] for i in range(len(raw) // BLOCK)}
    source = fake.account.seed({i: part for i, part in parts.items() if any(part)})
    answer = dm("aws", "register", source, "--name", "again", "--json").ok().json
    assert (answer["boot_mode"], answer["architecture"]) == ("uefi-preferred", "x86_64")
    assert len([call for call in fake.calls if call[0] == "ebs:GetSnapshotBlock"]) < 30
    fake.faults.add("500", "ec2:CreateTags")
    assert dm("aws", "register", source, "--name", "another").status == 1
    assert source in fake.account.snapshots and len(fake.account.images) == 1


def bucket() -> str:
    import boto3

    boto3.client("s3").create_bucket(Bucket="some-bucket")
    boto3.client("iam").create_role(RoleName="vmimport", AssumeRolePolicyDocument=TRUST)
    return "some-bucket"


def test_import_snapshot(fake: Fake, tmp_path: Path) -> None:
    raw = tmp_path / "d.raw"
    raw.write_bytes(data("dense", 20 * MIB))  # does not compress: several parts
    answer = dm("aws", "import", raw, "--bucket", bucket(), "--json").ok().json
    holds(only_snapshot(fake), raw)
    assert answer["snapshot_id"] == only_snapshot(fake).id and answer["key"].startswith(f"diskmorph/{answer['job']}/")
    assert not fake.objects("some-bucket") and ("s3:UploadPart", 200) in fake.calls


@pytest.mark.parametrize("rule", [("500", "s3:*", 0.2), ("reset", "s3:*", 0.2), ("lost", "s3:UploadPart", 0.3)])
def test_import_survives(rule: tuple[str, str, float], fake: Fake, tmp_path: Path) -> None:
    raw = tmp_path / "d.raw"
    raw.write_bytes(data("dense", 20 * MIB))
    name = bucket()
    fake.faults.add(rule[0], rule[1], chance=rule[2])
    dm("aws", "import", raw, "--bucket", name).ok()
    holds(only_snapshot(fake), raw)
    assert not fake.objects(name)


def test_import_ova(fake: Fake, tmp_path: Path) -> None:
    raw = bootable(tmp_path / "d.raw", "uefi")
    dm("convert", raw, tmp_path / "vm.ova").ok()
    answer = dm("aws", "import", tmp_path / "vm.ova", "--bucket", bucket(), "--json").ok().json
    assert one_image(fake)["imageId"] == answer["image_id"] and one_image(fake)["bootMode"] == "uefi"
    assert one_image(fake)["_tags"]["diskmorph:state"] == "finished"
    holds(only_snapshot(fake), raw)


def test_import_that_fails(fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", [0])
    assert "vmimport" in dm("aws", "import", raw, "--bucket", "some-bucket").err
    assert not fake.objects("some-bucket")
    name = bucket()
    fake.account.task_message = "ClientError: Unable to determine kernel version"
    done = dm("aws", "import", raw, "--bucket", name)
    assert done.status == 1 and "Unable to determine kernel version" in done.err and "removed object" in done.err
    assert not fake.objects(name) and not fake.account.snapshots


def test_print_role(fake: Fake) -> None:
    answer = dm("aws", "import", "--print-role", "--bucket", "b", "--json").ok().json
    assert "vmie.amazonaws.com" in json.dumps(answer["trust"]) and "arn:aws:s3:::b" in json.dumps(answer["policy"])
    assert not fake.calls


def test_download_since(fake: Fake, tmp_path: Path) -> None:
    old = disk_file(tmp_path / "old.raw", [0, 1, 2, 9], length=1 << 30)
    first = fake.account.seed({i: block(i) for i in (0, 1, 2, 9)})
    second = fake.account.seed({1: block(77), 20: block(78)}, below=first, gone=(2,))
    new = tmp_path / "new.raw"
    shutil.copy(old, new)
    with new.open("r+b") as file:
        for index, part in ((1, block(77)), (2, bytes(BLOCK)), (20, block(78))):
            file.seek(index * BLOCK)
            file.write(part)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", old, tmp_path / "base.qcow2")
    words = ["--since", first, "-B", "base.qcow2"]
    answer = dm("aws", "download", second, "delta.qcow2", *words, "--json").ok().json
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", new, tmp_path / "delta.qcow2")
    assert answer["blocks"] == {"listed": 3, "fetched": 2}
    done = dm("aws", "download", fake.account.seed({}), "x.qcow2", *words)
    assert done.status == 1 and "--since" in done.err and not Path("x.qcow2").exists()
    assert dm("aws", "download", second, "x.qcow2", "--since", first).status == 2


def test_plan_changes_nothing(fake: Fake, tmp_path: Path) -> None:
    raw = bootable(tmp_path / "d.raw", "uefi")
    fake.quotas["PutSnapshotBlock requests per account"] = 55
    fake.faults.add("deny", "ec2:RegisterImage")
    answer = dm("aws", "plan", raw, "--name", "x y z", "--json").ok().json
    allowed = {row["action"]: row["allowed"] for row in answer["permissions"]}
    assert (
        allowed["ec2:RegisterImage"] is False
        and allowed["ec2:CreateTags"] is True
        and allowed["ebs:StartSnapshot"] is None
    )
    assert answer["blocks"]["send"] + answer["blocks"]["omit"] == answer["blocks"]["total"] == 96
    assert 55 in [quota["value"] for quota in answer["quotas"]] and answer["boot_mode"] == "uefi"
    assert not fake.account.snapshots and not any(call[0].startswith("ebs:") for call in fake.calls)
    before = answer["blocks"]["send"]
    fake.faults.clear()
    assert dm("aws", "upload", raw, "--json").ok().json["blocks"]["sent"] == before


def test_gc_takes_only_its_own_dead(fake: Fake, spawn, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(20)))
    finished = dm("aws", "upload", raw, "--json").ok().json["snapshot_id"]
    foreign = fake.account.seed({0: b"x"})
    fake.account.snapshots[foreign].tags["Name"] = "diskmorph:job"
    other = disk_file(tmp_path / "e.raw", list(range(20)), seed=5)
    fake.faults.add("hang", "ebs:PutSnapshotBlock", after=5)
    child = spawn("upload", other)
    wait(lambda: len(fake.account.snapshots) == 3)
    child.kill()
    child.communicate()
    fake.faults.clear()
    (dead,) = set(fake.account.snapshots) - {finished, foreign}
    far = fake.account.seed({0: b"y"}, region="eu-west-1")
    fake.account.snapshots[far].tags["diskmorph:job"] = "20200101-0123456789abcdef"
    assert [row["id"] for row in dm("aws", "gc", "--json").ok().json["removed"]] == [], "they are younger than a day"
    fake.account.snapshots[far].started -= 2 * 86400
    assert [row["id"] for row in dm("aws", "gc", "--dry-run", "--json").ok().json["removed"]] == [far]
    assert {row["id"] for row in dm("aws", "gc", "--older-than", "0", "--json").ok().json["removed"]} == {dead, far}
    assert set(fake.account.snapshots) == {finished, foreign}


def test_documents_hold_what_is_needed() -> None:
    """The policies in docs/aws.md are JSON, and name every action that `plan` asks about."""
    from diskmorph.convert.aws.plan import actions
    from diskmorph.convert.aws.register import ImageOptions
    from diskmorph.convert.aws.vmimport import role_policies

    text = (ROOT / "docs/aws.md").read_text()
    policies = [json.loads(part) for part in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    granted = json.dumps(policies[0])
    for action in actions(ImageOptions(copy_to=("eu-west-1",), share=("all",), deprecate_at="2061-01-01")):
        assert f'"{action}"' in granted, action
    made = role_policies("BUCKET")
    assert made.trust == policies[2] and made.policy == policies[3]
    assert dt.datetime.now(dt.UTC)


def test_cookbook_lines_parse() -> None:
    import shlex

    from diskmorph.cli import load, parse, verb_parser
    from diskmorph.commands import verb_named

    verb = verb_named("aws")
    assert verb is not None
    text = re.sub(r"\\\n", " ", (ROOT / "docs/cookbook-aws.md").read_text())
    lines = re.findall(r"^diskmorph (aws .*)$", text, re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        parse(verb_parser(verb, load(verb)), shlex.split(line.split(" > ")[0])[1:])
