"""`aws publish`: upload and register in one job; and an image's copies in other regions."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.convert.aws.infer import Found, infer
from diskmorph.convert.aws.job import Job
from diskmorph.convert.aws.register import (
    ImageOptions,
    Registered,
    preflight,
    register,
    require_image_options,
    settled,
)
from diskmorph.convert.aws.snapshots import open_snapshot, require_completed
from diskmorph.convert.aws.sources import SourceOptions, opened
from diskmorph.convert.aws.undo import IMAGE
from diskmorph.convert.aws.upload import Uploaded, UploadOptions, key_of, require_options, upload, volume_gib
from diskmorph.convert.aws.waiting import wait_image
from diskmorph.convert.options import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskmorph.convert.aws.session import Session
    from diskmorph.formats.disk import Disk

_MOST_COPIES = 16


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What every job takes: tags for all that it makes, whether that is kept on failure, and whom to tell what.

    `note` takes notes; `say` what must be told although the job was interrupted.
    """

    tags: Mapping[str, str]
    keep: bool = False
    note: Callable[[str], None] | None = None
    on_progress: Callable[[Progress], None] | None = None
    say: Callable[[str], None] | None = None

    def job(self, session: Session, key: Any) -> Job:
        """Return a new job, or the one that an earlier run of the same command began."""
        return Job(
            session,
            key,
            tags=self.tags,
            keep=self.keep,
            note=self.note,
            say=self.say,
            on_progress=self.on_progress,
        )


def upload_disk(
    session: Session, what: str | Disk, source: SourceOptions, options: UploadOptions, how: JobOptions
) -> Uploaded:
    """`aws upload`. Raises what opening and uploading raise."""
    require_options(options)
    with opened(what, source) as found:
        volume_gib(found.disk.size, options.volume_size)
        _tell(how, found.notes)
        with how.job(session, key_of(found, options, session.region)) as job:
            made = upload(job, found, options)
            job.finish({session.region: [made.snapshot_id]})
            return made


def publish(
    session: Session,
    what: str | Disk,
    source: SourceOptions,
    options: UploadOptions,
    image: ImageOptions,
    how: JobOptions,
    show: Callable[[Found], None],
) -> tuple[Uploaded, Registered]:
    """`aws publish`; `show` is told what the image will be before anything is made. Raises as upload and register."""
    require_options(options)
    require_image_options(image)
    with opened(what, source) as found:
        volume_gib(found.disk.size, options.volume_size)
        shape = settled(infer(found.disk, found.machine), image)
        _tell(how, found.notes)
        with how.job(session, key_of(found, options, session.region)) as job:
            preflight(job, image)
            show(shape)
            made = upload(job, found, options)
            registered = register(job, made.snapshot_id, shape, image)
            things = registered.things()
            things[session.region].append(made.snapshot_id)
            job.finish(things)
            return made, registered


def register_snapshot(
    session: Session, snapshot: str, image: ImageOptions, how: JobOptions, show: Callable[[Found], None]
) -> Registered:
    """`aws register`: an image from a snapshot that exists, which stays whatever happens. Raises AwsError."""
    require_image_options(image)
    require_completed(session, snapshot)
    found = Found()
    if image.architecture is None or image.boot_mode is None:
        with open_snapshot(session, snapshot, ahead=False) as disk:
            found = infer(disk)
    shape = settled(found, image)
    key = {"verb": "register", "snapshot": snapshot, "name": image.name, "region": session.region}
    with how.job(session, key) as job:
        preflight(job, image)
        show(shape)
        registered = register(job, snapshot, shape, image)
        things = registered.things()
        things[session.region].remove(snapshot)
        job.finish(things)
        return registered


def _tell(how: JobOptions, notes: tuple[str, ...]) -> None:
    if how.note is not None:
        for text in notes:
            how.note(text)


# --- copies


def copies(job: Job, image: str, options: ImageOptions, size: int) -> dict[str, Any]:
    """Copy an image of `size` bytes to regions, all at the same time, and wait; return the images as EC2 has them."""
    regions = [region for region in dict.fromkeys(options.copy_to) if region != job.session.region]
    stop, done = threading.Event(), 0
    job.on_progress(Progress("copy", 0, size * len(regions)))
    for region in regions:
        job.undo.doubtful(region)
    pool = ThreadPoolExecutor(min(_MOST_COPIES, max(1, len(regions))), thread_name_prefix="copy")
    waiting: dict[str, Future[Any]] = {}
    try:
        for region in regions:
            waiting[region] = pool.submit(_copy, job, image, region, options, stop)
        while any(not future.done() for future in waiting.values()):
            for future in waiting.values():
                if future.done():
                    future.result()
            finished = sum(future.done() for future in waiting.values())
            if finished != done:
                done = finished
                job.on_progress(Progress("copy", size * done, size * len(regions)))
            time.sleep(0.05)
        found = {region: future.result() for region, future in waiting.items()}
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    job.on_progress(Progress("copy", size * len(regions), size * len(regions)))
    return found


def _copy(job: Job, image: str, region: str, options: ImageOptions, stop: threading.Event) -> Any:
    words: dict[str, Any] = {
        "ClientToken": f"{job.id}-{region}",
        "SourceImageId": image,
        "SourceRegion": job.session.region,
        "Name": options.name,
        "CopyImageTags": True,
        "TagSpecifications": job.specification("image", "snapshot"),
    }
    if options.description:
        words["Description"] = options.description
    begun = time.monotonic()
    answer = job.session.call("ec2:CopyImage", region=region, born=begun, stop=stop, **words)
    copy = str(answer["ImageId"])
    job.undo.made(IMAGE, copy, region)
    return wait_image(job.session, copy, region, born=begun, stop=stop)
