"""s3:// as a target, against moto's server: objects appear whole or not at all."""

import threading
from urllib.request import Request, urlopen

import boto3
import pytest
from botocore.exceptions import IncompleteReadError, ResponseStreamingError
from botocore.response import StreamingBody
from clikit import dm
from moto.server import ThreadedMotoServer

import diskmorph
from diskmorph.formats import marks
from diskmorph.formats.errors import OptionError, SourceError, TargetError, UnsupportedError
from diskmorph.formats.remote import s3_target
from diskmorph.formats.remote.s3 import S3Source

from testkit import MIB, content, data, little_disk, pattern_disk, run, write_image


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    urlopen(Request(f"{moto}/moto-api/reset", method="POST"))
    for name, value in {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    made = boto3.client("s3")
    made.create_bucket(Bucket="bkt")
    return made


@pytest.fixture
def source(tmp_path):
    (path,) = write_image("qcow2", little_disk(), tmp_path / "disk.qcow2")
    return path


def body(s3, key):
    return s3.get_object(Bucket="bkt", Key=key)["Body"].read()


def keys(s3):
    return sorted(entry["Key"] for entry in s3.list_objects_v2(Bucket="bkt").get("Contents", []))


def left_over(s3):
    return s3.list_multipart_uploads(Bucket="bkt").get("Uploads", [])


def options(**words):
    return diskmorph.ConvertOptions(**words)


def test_raw_is_streamed(s3, source, monkeypatch):
    monkeypatch.setattr(s3_target.KeptMember, "__init__", None)  # nothing is kept in a file
    report = diskmorph.convert(source, "s3://bkt/dir/disk.raw")
    assert body(s3, "dir/disk.raw") == content(little_disk())
    assert report.target == "s3://bkt/dir/disk.raw"
    assert report.stored_size == little_disk().size
    assert keys(s3) == ["dir/disk.raw"]
    assert not left_over(s3)


def test_many_parts_arrive_in_order(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_target, "_IN_MEMORY", 1 << 20)  # so that parts go through a file, too
    disk = pattern_disk(33 * MIB + 512, [(0, 20 * MIB, data(1, 20 * MIB)), (33 * MIB, 512, data(2, 512))])
    (path,) = write_image("qcow2", disk, tmp_path / "disk.qcow2")
    diskmorph.convert(path, "s3://bkt/disk.vhd", options=options(format_options={"subformat": "fixed"}))
    got = body(s3, "disk.vhd")
    assert got[: disk.size] == content(disk)
    assert s3.head_object(Bucket="bkt", Key="disk.vhd")["ETag"].endswith('-5"')
    diskmorph.convert(path, tmp_path / "here.vhd", options=options(format_options={"subformat": "fixed"}))
    assert len(got) == (tmp_path / "here.vhd").stat().st_size


@pytest.mark.parametrize("name", ["disk.qcow2", "disk.vmdk", "disk.vdi", "disk.vhdx", "stream.vmdk"])
def test_every_format_arrives(s3, source, tmp_path, name):
    words = {"subformat": "streamOptimized"} if name == "stream.vmdk" else {}
    diskmorph.convert(source, f"s3://bkt/{name}", options=options(format_options=words, verify=name != "stream.vmdk"))
    (tmp_path / name).write_bytes(body(s3, name))
    run("qemu-img", "compare", source, tmp_path / name)
    assert not left_over(s3)


def test_an_image_of_several_files(s3, source, tmp_path):
    diskmorph.convert(source, "s3://bkt/vm/disk.vmdk", options=options(format_options={"subformat": "monolithicFlat"}))
    assert keys(s3) == ["vm/disk-flat.vmdk", "vm/disk.vmdk"]
    for key in keys(s3):
        (tmp_path / key[3:]).write_bytes(body(s3, key))
    run("qemu-img", "compare", source, tmp_path / "disk.vmdk")


def test_packages_and_compressed_files(s3, source, tmp_path):
    diskmorph.convert(source, "s3://bkt/vm.ova")
    diskmorph.convert(source, "s3://bkt/disk.raw.gz")
    assert diskmorph.digest("s3://bkt/vm.ova").digest == diskmorph.digest(source).digest
    (tmp_path / "disk.raw.gz").write_bytes(body(s3, "disk.raw.gz"))
    run("gzip", "-d", tmp_path / "disk.raw.gz")
    assert (tmp_path / "disk.raw").read_bytes() == content(little_disk())


def test_what_exists_needs_force(s3, source):
    s3.put_object(Bucket="bkt", Key="disk.raw", Body=b"old")
    for name in ("disk.raw", "disk.qcow2", "vm.ova"):
        s3.put_object(Bucket="bkt", Key=name, Body=b"old")
        with pytest.raises(TargetError, match=r"exists already.*--force"):
            diskmorph.convert(source, f"s3://bkt/{name}")
        assert body(s3, name) == b"old"
        diskmorph.convert(source, f"s3://bkt/{name}", options=options(force=True))
        assert body(s3, name) != b"old"
    assert not left_over(s3)


def test_an_object_made_meanwhile_is_not_replaced(s3, source, monkeypatch):
    finish = s3_target.Upload.finish

    def late(upload):
        finish(upload)
        s3.put_object(Bucket="bkt", Key="disk.raw", Body=b"theirs")

    monkeypatch.setattr(s3_target.Upload, "finish", late)
    with pytest.raises(TargetError, match="exists already"):
        diskmorph.convert(source, "s3://bkt/disk.raw")
    assert body(s3, "disk.raw") == b"theirs"
    assert not left_over(s3)


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
def test_a_failure_leaves_nothing(s3, source, name, monkeypatch):
    put = s3_target.Upload._put

    def failing(upload, number, held):
        if number == 1:
            held.close()
            held = None
            raise TargetError("no more", file=upload.name)
        return put(upload, number, held)

    monkeypatch.setattr(s3_target.Upload, "_put", failing)
    with pytest.raises(TargetError, match="no more"):
        diskmorph.convert(source, f"s3://bkt/{name}")
    assert not keys(s3)
    assert not left_over(s3)


def test_ctrl_c_leaves_nothing(s3, source):
    def interrupt(progress):
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diskmorph.convert(source, "s3://bkt/disk.raw", on_progress=interrupt)
    assert not keys(s3)
    assert not left_over(s3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("part")]


def test_what_cannot_be_had(s3, source, tmp_path):
    with pytest.raises(TargetError, match=r"create_multipart_upload is refused.*NoSuchBucket"):
        diskmorph.convert(source, "s3://none/disk.raw")
    with pytest.raises(OptionError, match="BUCKET/KEY"):
        diskmorph.convert(source, "s3://bkt")
    with pytest.raises(OptionError, match="folder"):
        diskmorph.convert(source, "s3://bkt/dir/")
    with pytest.raises(OptionError, match="-B"):
        diskmorph.convert(source, "s3://bkt/x.qcow2", options=options(base=source))
    with pytest.raises(OptionError, match="keep-chain"):
        diskmorph.convert(source, "s3://bkt/x.vmdk", options=options(keep_chain=True))
    with pytest.raises(OptionError, match="cannot be written to"):
        diskmorph.convert(source, "http://127.0.0.1/x.raw")
    (tmp_path / "tree").mkdir()
    with pytest.raises(UnsupportedError, match="folder"):
        diskmorph.convert(tmp_path / "tree", "s3://bkt/made", options=options(target_format="oci"))
    assert not left_over(s3)


def test_an_answer_that_breaks_off_is_asked_for_again(s3, monkeypatch):
    s3.put_object(Bucket="bkt", Key="x", Body=b"content")
    faults = [ResponseStreamingError(error="reset"), IncompleteReadError(actual_bytes=1, expected_bytes=7)]
    real = StreamingBody.read

    def read(stream, amt=None):
        if faults:
            raise faults.pop()
        return real(stream, amt)

    monkeypatch.setattr(StreamingBody, "read", read)
    with S3Source("s3://bkt/x") as source:
        assert source.fetch(0, 7) == b"content"
        faults += [ResponseStreamingError(error="reset")] * 100
        with pytest.raises(SourceError, match="breaks off"):
            source.fetch(0, 7)


def test_an_object_carries_its_jobs_mark(s3, source):
    with marks.marked("job 7"):
        diskmorph.convert(source, "s3://bkt/disk.raw")
        diskmorph.convert(source, "s3://bkt/vm.ova")
    for key in ("disk.raw", "vm.ova"):
        assert s3.head_object(Bucket="bkt", Key=key)["Metadata"] == {s3_target.MARK: "job 7"}


def test_a_dry_run_sends_nothing(s3, source):
    for name in ("disk.raw", "disk.vdi", "vm.ova"):
        report = diskmorph.convert(source, f"s3://bkt/{name}", options=options(dry_run=True))
        assert report.target == f"s3://bkt/{name}"
    assert not keys(s3)
    assert not left_over(s3)


def test_from_s3_to_s3_and_also(s3, source):
    diskmorph.convert(source, "s3://bkt/one.qcow2", options=options(also=("s3://bkt/two.vhdx",)))
    assert diskmorph.compare("s3://bkt/one.qcow2", "s3://bkt/two.vhdx").identical
    assert (
        dm("convert", "--json", "s3://bkt/two.vhdx", "s3://bkt/three.raw").ok().json["target"] == "s3://bkt/three.raw"
    )
    assert body(s3, "three.raw")[: little_disk().size] == content(little_disk())
