"""Fleets: plans, runs on real clusters, what survives which death, and that nothing is done twice."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from clikit import dm, documented
from fleet.kit import Cluster, all_equal, ended, ledger_lines, once_each, plan, slow, start, wait_for

from diskmorph.convert.fleet import parse_plan
from diskmorph.convert.fleet.expand import filled
from diskmorph.formats.errors import OptionError

from testkit import KIB, MIB, data, run


def test_plans_say_the_same_in_three_ways() -> None:
    toml = parse_plan('[[row]]\nsource="a"\ntarget="b"\ncompress="zstd"\ndigest=true\no={cluster_size="1M"}', "toml")
    lines = parse_plan(
        '{"source":"a","target":"b","options":{"compress":"zstd","digest":true,"o":{"cluster_size":"1M"}}}', "jsonl"
    )
    table = parse_plan("source,target,options\na,b,--compress zstd --digest -o cluster_size=1M\n", "csv")
    words = ("--compress", "zstd", "--digest", "-o", "cluster_size=1M")
    assert toml[0].words == lines[0].words == table[0].words == words
    assert parse_plan('rows=["x/*.vmdk -> y/{stem}.qcow2"]', "toml")[0].target == "y/{stem}.qcow2"


@pytest.mark.parametrize(
    ("text", "format"),
    [("a b", "toml"), ('{"source":1}', "jsonl"), ("[1]", "jsonl"), ("name\nx\n", "csv"), ("source,target\na\n", "csv")],
)
def test_bad_plans_are_refused_with_their_place(text: str, format: str) -> None:
    with pytest.raises(OptionError):
        parse_plan(text, format)


def test_templates() -> None:
    assert filled("{dir}{stem}-{n}{suffix}/{{x}}", "s3://b/p/q/a.b.vmdk", "q/", 3) == "q/a.b-3.vmdk/{x}"
    with pytest.raises(OptionError, match="nosuch"):
        filled("{nosuch}", "a")


def test_plan_foretells_sizes_and_failures(vms: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    path = tmp_path / "plan.toml"
    rows = [f'"{vms}/*.vdi -> out/{{stem}}.qcow2"', '"bad.qcow2 -> out/bad.raw"', '"nothing*.raw -> out/{stem}.raw"']
    path.write_text(f"rows = [{', '.join(rows)}]\n")
    answer = dm("fleet", "plan", path, "--json")
    assert answer.status == 3 and not list(out.iterdir())
    found = answer.json["results"]
    good = [row for row in found if row["will"] == "do"]
    assert len(good) == 3 and answer.json["rows"]["fail"] == 2
    for row in good:
        dm("convert", "-q", row["source"], row["target"]).ok()
        assert Path(row["target"]).stat().st_size <= row["stored_size"] and row["virtual_size"] >= 512 * KIB
    assert {row["error"]["kind"] for row in found if row["error"]} >= {"source"}


def test_a_run_equals_single_conversions_and_is_resumed(vms: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = plan(tmp_path, f"{vms}/*", "out/{stem}.qcow2")
    page = tmp_path / "fleet.html"
    first = dm("fleet", "run", path, "--json", "--report", page).ok().json
    assert first["rows"] == {"total": 18, "done": 18, "failed": 0, "skipped": 0}
    all_equal(vms, out)
    for row in first["results"]:
        assert row["digest"] == dm("digest", row["source"], "--json").ok().json["digest"]
        assert row["stored_size"] == Path(row["target"]).stat().st_size and row["seconds"] > 0
    (out / "vm000.qcow2").unlink()
    source = next(vms.glob("vm001.*"))
    os.utime(source, ns=(1, source.stat().st_mtime_ns + 1_000_000))
    again = dm("fleet", "run", path, "--json")
    assert again.status == 1 and again.json["rows"] == {"total": 18, "done": 1, "failed": 1, "skipped": 16}
    (wrong,) = [row for row in again.json["results"] if row["status"] == "failed"]
    assert "exists already" in wrong["error"]["message"] and wrong["source"] == str(source)
    assert dm("fleet", "run", plan(tmp_path, f"{vms}/*", "out/{stem}.qcow2", force=True)).status == 0
    lost = path.with_name("plan.jsonl.ledger.jsonl")
    lost.unlink()
    skipped = dm("fleet", "run", path, "--json").ok().json
    assert skipped["rows"]["skipped"] == 18, "targets alone tell that they are done"
    assert all(row["digest"] for row in skipped["results"])
    in_chromium(page, 18)


def in_chromium(page: Path, rows: int) -> None:
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    assert browser, "chromium is missing: see tests/packages.txt"
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/profile"]
    dom = run(*words, "--dump-dom", f"file://{page}#only=done&sort=0&down=1").stdout
    assert f"{rows} of {rows} rows" in dom and 'id="histogram"' in dom and "descending" in dom
    assert dom.index(f">{rows}</td>") < dom.index(">1</td>"), "the script has sorted the table"
    shot = page.with_suffix(".png")
    run(*words, f"--screenshot={shot}", f"file://{page}")
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 5000


def test_json_is_as_documented(vms: Path, tmp_path: Path) -> None:
    shown = documented()
    (tmp_path / "out").mkdir()
    for verb in ("plan", "run"):
        path = plan(tmp_path, f"{vms}/vm00[0-3]*", "out/{stem}.qcow2")
        with path.open("a") as file:
            file.write(json.dumps({"source": "none", "target": "x.raw"}) + "\n")
        table = shown[f"fleet {verb}"]
        said = dm("fleet", verb, path, "--json").json
        told = {f"rows.{key}" for key in said.pop("rows")} | set(said)
        told |= {f"results[].{key}" for row in said["results"] for key in row}
        listed = {key for key in table if not key.endswith("[]") and not key.startswith("shortfalls[]")}
        assert told == listed


def test_a_broken_off_run_tells_how_to_go_on(vms: Path, tmp_path: Path) -> None:
    path = slow(vms, tmp_path)
    running = start(path, "--workers", "2")
    wait_for(lambda: ended(path.with_name("plan.jsonl.ledger.jsonl")) >= 1)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "say it again" in err and "Traceback" not in err, err
    assert not [one for one in (tmp_path / "out").iterdir() if one.suffix != ".qcow2"], "nothing half done"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://127.0.0.1:1", "cannot be reached"),
        ("nonsense", "no scheduler's address"),
        ("stranger", "does not answer"),
    ],
)
def test_no_such_cluster(address: str, said: str, vms: Path, tmp_path: Path) -> None:
    import http.server
    import threading

    (tmp_path / "out").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.daemon_threads = True  # a stranger may keep its connection
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"tcp://127.0.0.1:{server.server_port}" if address == "stranger" else address
        path = plan(tmp_path, f"{vms}/vm000*", "out/{stem}.qcow2")
        answer = dm("fleet", "run", path, "--scheduler", url, "--patience", "1", "--json")
        server.shutdown()
    assert answer.status == 1 and answer.json["error"]["kind"] == "fleet" and said in answer.err, answer.err


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    from diskmorph.convert.fleet.report import page
    from diskmorph.convert.fleet.rows import FAILED, Result
    from diskmorph.convert.fleet.summary import Summary

    name = "</td><script>document.title='taken'</script>\udcff"
    path = tmp_path / "r.html"
    wrong = {"kind": "format", "message": name}
    path.write_text(page(Summary("r", [Result(1, "convert", name, name, FAILED, error=wrong)], 1.0, 1), name))
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    dom = run(browser, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}/p", "--dump-dom", f"file://{path}")
    assert "<title>taken" not in dom.stdout and dom.stdout.count("<script>") == 1


def test_every_verb_and_ranges(vms: Path, tmp_path: Path) -> None:
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/hostname").write_text("fleet\n")
    with open(tmp_path / "big.raw", "wb") as file:
        file.truncate(9 * MIB + 512)
        for at in (0, 3 * MIB - 100, 9 * MIB):
            file.seek(at)
            file.write(data(at, 512))
    rows = [
        {"verb": "build", "source": "tree", "target": "disk.qcow2", "boot": "none", "size": "32M"},
        {"verb": "extract", "source": str(next(vms.glob("*.vdi"))), "target": "tree.tar"},
        {"source": "big.raw", "target": "copy.raw"},
        {"source": "big.raw", "target": "x.raw", "options": "--nosuch"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = dm("fleet", "run", path, "--json", "--split", "4M", "--part", "2M")
    assert [row["status"] for row in answer.json["results"]] == ["done", "done", "done", "failed"], answer.out
    assert (tmp_path / "copy.raw").read_bytes() == (tmp_path / "big.raw").read_bytes()
    assert answer.json["results"][2]["ranges"] == 5 and answer.json["results"][3]["error"]["kind"] == "option"
    assert not list(tmp_path.glob(".copy*"))
    words = [sys.executable, "-m", "diskmorph", "cat", tmp_path / "disk.qcow2", "/etc/hostname"]
    assert run(*words).stdout == "fleet\n"


def test_workers_and_scheduler_may_die(vms: Path, tmp_path: Path, cluster: Cluster) -> None:
    path = slow(vms, tmp_path)
    ledger = path.with_name("plan.jsonl.ledger.jsonl")
    running = start(path, "--scheduler", cluster.url, "--json")
    dice = random.Random(9)
    for death in range(5):
        wait_for(lambda least=1 + 2 * death: ended(ledger) >= least)
        cluster.kill_worker(dice.randrange(2))
    wait_for(lambda: ended(ledger) >= 12)
    cluster.kill_scheduler()
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, out + err
    assert json.loads(out)["rows"] == {"total": 18, "done": 18, "failed": 0, "skipped": 0}
    once_each(ledger, 18)
    all_equal(vms, tmp_path / "out")


def test_a_host_is_bounded(vms: Path, tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "out").mkdir()
    few = plan(tmp_path, f"{vms}/vm00*", "out/{stem}.qcow2", rate="2M")
    words = ("--scheduler", cluster.url, "--per-host", "1", "--json")
    answer = dm("fleet", "run", few, *words).ok().json
    spans = sorted((row["started"], row["started"] + row["seconds"]) for row in answer["results"])
    assert len(spans) == 10 and len({row["worker"] for row in answer["results"]}) == 2
    assert all(stop <= start + 0.02 for (_, stop), (start, _) in itertools.pairwise(spans))


def test_the_client_may_die(vms: Path, tmp_path: Path, cluster: Cluster) -> None:
    path = slow(vms, tmp_path)
    ledger = path.with_name("plan.jsonl.ledger.jsonl")
    running = start(path, "--scheduler", cluster.url)
    wait_for(lambda: ended(ledger) >= 4)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    with ledger.open("a") as file:
        file.write('{"row": 3, "ver')  # a line that was cut off
    answer = dm("fleet", "run", path, "--scheduler", cluster.url, "--json").ok().json
    assert answer["rows"]["done"] + answer["rows"]["skipped"] == 18 and answer["rows"]["skipped"] >= 3
    assert len(ledger_lines(ledger)) > 18
    all_equal(vms, tmp_path / "out")


def test_one_run_a_ledger(vms: Path, tmp_path: Path) -> None:
    import fcntl

    path = slow(vms, tmp_path)
    with open(tmp_path / "l", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another run" in dm("fleet", "run", path, "--ledger", tmp_path / "l").err
    (tmp_path / "other").write_text("not a ledger\n")
    assert dm("fleet", "run", path, "--ledger", tmp_path / "other").status == 1
    assert (tmp_path / "other").read_text() == "not a ledger\n"


def test_s3_to_s3(bucket: Any, vms: Path, tmp_path: Path) -> None:
    for path in sorted(vms.iterdir())[:8]:
        bucket.upload_file(str(path), "vms", f"a/{path.name}")
    bucket.put_object(Bucket="qcow2", Key="vm001.qcow2", Body=b"a stranger's")
    path = tmp_path / "p.toml"
    path.write_text('rows = ["s3://vms/a/* -> s3://qcow2/{stem}.qcow2"]\n')
    first = dm("fleet", "run", path, "--json").json
    assert first["rows"] == {"total": 8, "done": 7, "failed": 1, "skipped": 0}, first
    assert bucket.get_object(Bucket="qcow2", Key="vm001.qcow2")["Body"].read() == b"a stranger's"
    for row in first["results"]:
        if row["status"] == "done":
            source = vms / row["source"].rpartition("/")[2]
            dm("compare", "--strict", source, row["target"]).ok()
    bucket.delete_object(Bucket="qcow2", Key="vm001.qcow2")
    assert dm("fleet", "run", path, "--json").ok().json["rows"]["skipped"] == 7
