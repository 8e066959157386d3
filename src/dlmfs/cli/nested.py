"""`dlmfs lock` inside of a `dlmfs lock` of the same lock would wait for itself for ever."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from dlmfs.cli.text import plain
from dlmfs.client import logic
from dlmfs.client.place import Place, place
from dlmfs.errors import Deadlock, DlmfsError


def refuse(places: Iterable[Place], environment: dict[str, str], *, shared: bool) -> None:
    """Raises Deadlock if one of the locks is held by what this process runs under. The environment says
    what that may be; whether it still is so, the mount and /proc. Shared in shared is served."""
    if shared and environment.get("DLMFS_MODE") == "PR":
        return
    wanted = {each.order[:3] for each in places}
    for path in filter(None, environment.get("DLMFS_LOCK", "").split("\n")):
        with contextlib.suppress(
            DlmfsError, OSError
        ):  # of another mount namespace, or unmounted since
            held = place(path)
            if held.order[:3] in wanted and _is_ours(held):
                break
    else:
        return
    raise Deadlock(
        f"{plain(path)} is held by the command that this one runs under: it would wait for itself"
    )


def _is_ours(where: Place) -> bool:
    """Whether this process or one above it has the lock. Raises OSError."""
    from dlmfs.fs.kin import Question, is_kin

    file = os.stat(where.path)
    rows = json.loads(os.getxattr(where.path, logic.HOLDERS))
    holders = frozenset(row["pid"] for row in rows if row.get("pid"))
    path = os.fsencode(f"/{where.domain}/{where.name}")
    return is_kin(Question(os.getpid(), holders, file.st_ino, path, where.dev))
