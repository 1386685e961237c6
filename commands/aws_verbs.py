"""What the verbs under `diskmorph aws` do: one call of the library each, and its result shown."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from diskmorph.commands import aws_words as words
from diskmorph.commands.progress import progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from diskmorph.commands.output import Output
    from diskmorph.convert.aws.infer import Found
    from diskmorph.convert.aws.register import ImageOptions, Registered
    from diskmorph.convert.aws.session import Session
    from diskmorph.convert.aws.upload import Uploaded


def run_upload(args: argparse.Namespace, out: Output) -> int:
    """`aws upload`."""
    from diskmorph.convert.aws.publish import upload_disk

    session, options = words.session_of(), words.upload_options(args)
    with progress(out, "uploading") as tell:
        how = words.job_options(args, out, tell)
        made = upload_disk(session, args.source, words.source_options(args), options, how)
    out.report(made.as_dict(), _uploaded(made))
    _tell_retries(session, out)
    return 0


def run_publish(args: argparse.Namespace, out: Output) -> int:
    """`aws publish`."""
    from diskmorph.convert.aws.publish import publish

    session, image = words.session_of(), words.image_options(args)
    with progress(out, "publishing") as tell:
        how = words.job_options(args, out, tell)
        made, registered = publish(
            session,
            args.source,
            words.source_options(args),
            words.upload_options(args),
            image,
            how,
            _shower(args, out, image, session),
        )
    out.report({**made.as_dict(), **registered.as_dict()}, (*_uploaded(made), *_registered(registered)))
    _tell_retries(session, out)
    return 0


def run_register(args: argparse.Namespace, out: Output) -> int:
    """`aws register`."""
    from diskmorph.convert.aws.publish import register_snapshot

    session, image = words.session_of(), words.image_options(args)
    with progress(out, "registering") as tell:
        how = words.job_options(args, out, tell)
        registered = register_snapshot(session, args.snapshot_id, image, how, _shower(args, out, image, session))
    out.report({"snapshot_id": args.snapshot_id, **registered.as_dict()}, _registered(registered))
    _tell_retries(session, out)
    return 0


def run_import(args: argparse.Namespace, out: Output) -> int:
    """`aws import`."""
    from diskmorph.convert.aws.vmimport import ImportOptions, import_disk, role_policies

    if args.print_role:
        policies = role_policies(args.bucket, args.role)
        out.result(policies.as_dict(), policies.lines())
        return 0
    session = words.session_of()
    options = ImportOptions(
        bucket=args.bucket, role=args.role, encrypt=args.encrypt, kms_key=args.kms_key, description=args.description
    )
    with progress(out, "importing") as tell:
        how = words.job_options(args, out, tell)
        made = import_disk(session, args.source, words.source_options(args), options, how)
    what = made.image_id or made.snapshot_id
    out.report(made.as_dict(), [f"{what}: imported by task {made.task_id} in {session.region}"])
    _tell_retries(session, out)
    return 0


def run_download(args: argparse.Namespace, out: Output) -> int:
    """`aws download`."""
    from pathlib import Path

    from diskmorph.commands.common import format_options
    from diskmorph.convert.aws.download import download
    from diskmorph.convert.options import ConvertOptions

    session = words.session_of()
    options = ConvertOptions(
        target_format=args.target_format,
        format_options=format_options(args.options),
        compress=args.compress or ("default" if args.compressed else None),
        base=Path(args.base) if args.base else None,
        base_format=args.base_format,
        force=args.force,
        sync=not args.no_sync,
    )
    with progress(out, "downloading") as tell:
        made = download(session, args.snapshot_id, args.target, options, since=args.since, on_progress=tell)
    for note in made.notes:
        out.note(note)
    line = (
        f"{made.target}: {made.format}, from {made.snapshot_id}; {made.fetched} of {made.listed} listed blocks fetched"
    )
    out.report(made.as_dict(), [line])
    _tell_retries(session, out)
    return 0


def run_plan(args: argparse.Namespace, out: Output) -> int:
    """`aws plan`."""
    from diskmorph.convert.aws.plan import plan

    session = words.session_of()
    with progress(out, "planning") as tell:
        made = plan(
            session,
            args.source,
            words.source_options(args),
            words.upload_options(args),
            words.image_options(args),
            on_progress=tell,
        )
    out.result(made.as_dict(), made.lines())
    return 0


def run_gc(args: argparse.Namespace, out: Output) -> int:
    """`aws gc`."""
    from diskmorph.convert.aws.gc import gc, parse_age

    session = words.session_of()
    age = parse_age(args.older_than)
    if not args.dry_run and _may_ask(args, out):
        found = gc(session, age, bucket=args.bucket, dry_run=True)
        if found.removed:
            for thing in found.removed:
                out.line(f"{thing.kind} {thing.id} in {thing.region}, job {thing.job}")
            _ask("Remove these?", out)
    found = gc(session, age, bucket=args.bucket, dry_run=args.dry_run)
    out.result(found.as_dict(), found.lines())
    return 1 if found.failed else 0


# --- showing


def _uploaded(made: Uploaded) -> Iterator[str]:
    blocks = made.blocks
    sealed = "encrypted" if made.encrypted else "not encrypted"
    yield f"{made.snapshot_id}: {made.volume_size} GiB in {made.region}, {sealed}, job {made.job}"
    again = f", {blocks.resumed} resumed" if blocks.resumed else ""
    yield f"  {blocks.sent} of {blocks.total} blocks sent{again}, {blocks.omitted} omitted"


def _registered(made: Registered) -> Iterator[str]:
    yield f"{made.image_id}: {made.name}, {made.architecture}, {made.boot_mode}, root {made.root_device}"
    for region, image in made.images.items():
        if image != made.image_id:
            yield f"  {image} in {region}"
    if made.shared:
        yield f"  shared with {', '.join(made.shared)}"


def _shower(args: argparse.Namespace, out: Output, image: ImageOptions, session: Session) -> Callable[[Found], None]:
    """Return what shows an image's properties before it is made, and asks on a terminal."""

    def show(found: Found) -> None:
        if out.json or out.quiet:
            return
        where = ", ".join((session.region, *image.copy_to))
        tpm = ", TPM 2.0" if image.tpm else ""
        out.line(
            f"{image.name}: {found.architecture}, {found.boot_mode}, root {found.root_device} ({image.volume_type}), "
            f"IMDS {image.imds}, ENA{tpm}; in {where}"
        )
        for why in found.why:
            out.line(f"  {why}")
        if "all" in image.share:
            out.line("  it will be public")
        out.flush()
        if _may_ask(args, out):
            _ask("Make it?", out)

    return show


def _may_ask(args: argparse.Namespace, out: Output) -> bool:
    return not (args.yes or out.json or out.quiet) and sys.stdin.isatty() and out.stderr.isatty()


def _ask(question: str, out: Output) -> None:
    from diskmorph.formats.errors import PolicyError

    out.flush()
    out.stderr.write(f"{question} [y/N] ")
    out.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise PolicyError("not done: the answer was no", option="--yes")


def _tell_retries(session: Session, out: Output) -> None:
    if session.retries:
        said: dict[str, Any] = dict(session.retries)
        out.detail("calls repeated: " + ", ".join(f"{count} {sort}" for sort, count in sorted(said.items())))
