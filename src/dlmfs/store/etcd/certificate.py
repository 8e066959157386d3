"""From when and until when a file's certificates are good: X.509 read as far as that (RFC 5280, 4.1).

By hand, since nothing that everybody has reads a certificate that no connection has brought. Pure, and
without `ssl`: whatever asks for a status would load it.
"""

from __future__ import annotations

import binascii
import calendar
import time
from typing import Final, NamedTuple

BEGIN: Final = "-----BEGIN CERTIFICATE-----"
END: Final = "-----END CERTIFICATE-----"
SEQUENCE: Final = 0x30
VERSION: Final = 0xA0
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
SOON_S: Final = 30 * 86400.0
SOON_SHARE: Final = 1 / 4
"""Who renews in time, a third of the lifetime before the end as a rule, is not warned."""


class Lifetime(NamedTuple):
    """Seconds since 1970."""

    begins: float
    ends: float

    def ends_soon(self, now: float) -> bool:
        return self.ends - now < min(SOON_S, (self.ends - self.begins) * SOON_SHARE)


def lifetimes(pem: bytes) -> list[Lifetime]:
    """Those of all certificates in a PEM text that can be read."""
    found = []
    for part in pem.decode("ascii", "replace").split(BEGIN)[1:]:
        try:
            found.append(lifetime(binascii.a2b_base64(part[: part.index(END)])))
        except (ValueError, IndexError):
            continue  # whoever uses it will say what is wrong with it
    return found


def lifetime(der: bytes) -> Lifetime:
    """That of one certificate. Raises ValueError or IndexError for what is none."""
    _, certificate, _ = _read(der, 0)
    _, body, _ = _read(certificate, 0)
    tag, _, at = _read(body, 0)
    if tag == VERSION:
        _, _, at = _read(body, at)  # the serial number
    for _ in ("the signature's algorithm", "the issuer"):
        _, _, at = _read(body, at)
    tag, validity, _ = _read(body, at)
    if tag != SEQUENCE:
        raise ValueError("no validity")
    first, begins, at = _read(validity, 0)
    second, ends, _ = _read(validity, at)
    return Lifetime(_time(first, begins), _time(second, ends))


def _read(der: bytes, at: int) -> tuple[int, bytes, int]:
    """A tag, its content, and where the next one begins."""
    tag, size, at = der[at], der[at + 1], at + 2
    if size & 0x80:
        count = size & 0x7F
        size = int.from_bytes(der[at : at + count], "big")
        at += count
    if at + size > len(der):
        raise ValueError("it is cut off")
    return tag, der[at : at + size], at + size


def _time(tag: int, text: bytes) -> float:
    """RFC 5280, 4.1.2.5: years below 50 are of this century."""
    if tag == UTC_TIME:
        text = (b"20" if text[:2] < b"50" else b"19") + text
    elif tag != GENERALIZED_TIME:
        raise ValueError("no time")
    return float(calendar.timegm(time.strptime(text.decode("ascii"), "%Y%m%d%H%M%SZ")))
