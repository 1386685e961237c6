"""One job: its name, its journal, what it has made; and what happens to that when it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from diskmorph.convert.aws.journal import Journal
from diskmorph.convert.aws.undo import FINISHED, JOB, STATE, WORKING, Undo
from diskmorph.formats.errors import DiskmorphError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diskmorph.convert.aws.session import Session
    from diskmorph.convert.options import Progress

_MOST_TAGS = 46
"""AWS takes 50, of which the job needs two and import tasks may need others."""


def parse_tags(words: Sequence[str]) -> dict[str, str]:
    """Return the tags of `K=V` words. Raises OptionError for what AWS would refuse."""
    tags: dict[str, str] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not 1 <= len(key) <= 127 or len(value) > 255:
            raise OptionError(f"--tag {word!r} is not KEY=VALUE")
        if key.lower().startswith(("aws:", "diskmorph:")):
            raise OptionError(f"--tag {key}: such names are reserved")
        tags[key] = value
    if len(tags) > _MOST_TAGS:
        raise OptionError(f"more than {_MOST_TAGS} tags")
    return tags


class Job:
    """A job in `with`: what it made is undone when it fails, unless `keep`, and named either way.

    The name of what was undone goes into the error's own line, or, when interrupted, to `say`. `name`: what the job is
    called, and so its client token; None: a new name.
    """

    def __init__(
        self,
        session: Session,
        key: Any,
        *,
        tags: Mapping[str, str] | None = None,
        keep: bool = False,
        note: Callable[[str], None] | None = None,
        say: Callable[[str], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        name: str | None = None,
    ) -> None:
        self.session = session
        self.keep = keep
        self.note = note or (lambda _: None)
        self._say = say or self.note
        self.on_progress = on_progress or (lambda _: None)
        self.user_tags = dict(tags or {})
        self.journal = Journal(key, name)
        self.undo = Undo(session, lambda: self.journal.job)

    @property
    def id(self) -> str:
        """The job's name."""
        return self.journal.job

    @property
    def tags(self) -> list[dict[str, str]]:
        """Tags for everything that the job makes."""
        tags = {**self.user_tags, JOB: self.id, STATE: WORKING}
        return [{"Key": key, "Value": value} for key, value in tags.items()]

    def specification(self, *kinds: str) -> list[dict[str, Any]]:
        """Return TagSpecifications for kinds of resources."""
        return [{"ResourceType": kind, "Tags": self.tags} for kind in kinds]

    def finish(self, things: Mapping[str, Sequence[str]]) -> None:
        """Mark what was made (region to ids) as finished, so that `gc` leaves it alone."""
        for region, ids in things.items():
            if ids:
                marks = [{"Key": STATE, "Value": FINISHED}]
                self.session.call("ec2:CreateTags", region=region, Resources=list(ids), Tags=marks)
        self.undo.clear()
        self.journal.close(remove=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self.undo.clear()
            self.journal.close()
            return
        said = self.undo.keep() if self.keep else self.undo.run()
        self.journal.close(remove=not self.keep and not self.undo.left)
        if not said:
            return
        if isinstance(error, DiskmorphError):
            error.hint = f"{error.hint}; {said}" if error.hint else said
        else:
            self._say(said)
