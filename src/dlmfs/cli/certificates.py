"""Certificates that end soon, in words."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from dlmfs.store.etcd.certificate import Lifetime

DAY_S = 86400.0


def ending(option: str, lifetime: Lifetime, now: float) -> tuple[str, bool] | None:
    """What is to be said of a certificate, and whether it has ended already; None if it is good for
    long."""
    left_s = lifetime.ends - now
    if not lifetime.ends_soon(now):
        return None
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(max(lifetime.ends, 0), 1e11)))
    if left_s <= 0:
        return f"the certificate of {option} has ended ({at})", True
    left = f"{left_s / DAY_S:.0f} days" if left_s > 2 * DAY_S else f"{left_s / 3600:.1f} hours"
    return f"the certificate of {option} ends in {left} ({at})", False


def told(rows: Iterable[dict[str, Any]], now: float | None = None) -> list[tuple[str, bool]]:
    """The same of all that a daemon tells of."""
    now = time.time() if now is None else now
    said = (ending(row["option"], Lifetime(row["begins"], row["ends"]), now) for row in rows)
    return [each for each in said if each is not None]
