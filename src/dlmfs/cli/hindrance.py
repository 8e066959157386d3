"""Whether it is the store, and nobody who has the lock, that keeps a command from having it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from dlmfs.errors import DlmfsError

if TYPE_CHECKING:
    from dlmfs.client.place import Place

PATIENCE_S: Final = 1.5
"""What a daemon may take to say so: it asks etcd, and waits for that a second at most."""


def hindrance(places: Iterable[Place]) -> str | None:
    """What the daemons say of the node, or its store, that keeps one of the locks from being had; None if
    there is nothing, if a program has that lock here, or if nothing is told. Touches no mount."""
    from dlmfs import control  # here: `dlmfs lock` is to start fast
    from dlmfs.fuse.mountinfo import resolve

    for place in places:
        entry = resolve(place.mountpoint)[1]
        if entry is None or not entry.is_dlmfs:
            continue
        question: dict[str, object] = {
            "cmd": "hindrance",
            "domain": place.domain,
            "lock": place.name,
        }
        with contextlib.suppress(DlmfsError):
            told = control.ask(entry, question, PATIENCE_S)
            if told["held"]:
                continue
            if told["trouble"]:
                return str(told["trouble"])
            if told["state"] not in ("HEALTHY", "SUSPECT", "UNPROVED"):
                return f"the node is {told['state']}: {told['reason']}"
    return None
