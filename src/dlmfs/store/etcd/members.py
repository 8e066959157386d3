"""Which member is asked: those that the mount names, and behind them those that these know of.

Rules of this file
------------------
* What members say of the cluster is a hint. It takes no given address away, and brings at most
  `FOUND_MAX` others, which are spoken to as the given ones: with TLS or without, as the same user.
* None of them is on a loopback address, or on none at all, unless all given ones are: what is meant there
  is another host's. In clear text nothing goes to other hosts that would not have gone to any: what
  is given on the loopback may be the end of a tunnel.
* Who answers at such an address must be of the cluster that named it. Addresses pass from hand to hand.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dlmfs.config import ENDPOINT

if TYPE_CHECKING:
    from dlmfs.store.etcd import etcd_pb2 as pb

FOUND_MAX: Final = 16
"""Members beyond the given ones; etcd advises 7 at most."""
HOST_MAX: Final = 253
"""Characters of a name of DNS."""
_URL: Final = re.compile(rf"(?P<scheme>https?)://(?P<endpoint>{ENDPOINT.pattern})/?")


class Members:
    """The members in the order in which they are asked; `endpoint` is the present one."""

    def __init__(self, given: Sequence[str], *, encrypted: bool) -> None:
        self.given = tuple(given)
        self.found: tuple[str, ...] = ()
        self.endpoint = self.given[0]
        self._scheme = "https" if encrypted else "http"
        self._here = all(map(_is_here, self.given))
        self._stays_here = self._here and not encrypted
        self._cluster = 0
        """That which has named those that were found."""

    def __len__(self) -> int:
        return len(self.given) + len(self.found)

    def next(self) -> None:
        """The present one is of no use: go on to the one behind it."""
        ring = self.given + self.found
        at = ring.index(self.endpoint) if self.endpoint in ring else -1
        self.endpoint = ring[(at + 1) % len(ring)]

    def learn(self, cluster: int, members: Sequence[pb.Member]) -> bool:
        """What a member has said of all; whether others are known now than before."""
        found: list[str] = []
        for member in members:
            # One that learns cannot answer us, one that was never started has no address.
            for url in () if member.is_learner else member.client_urls:
                endpoint = self._endpoint(url)
                if endpoint is not None and endpoint not in (*self.given, *found):
                    found.append(endpoint)
        before, self.found = self.found, tuple(found[:FOUND_MAX])
        self._cluster = cluster
        return set(self.found) != set(before)

    def are(self, endpoint: str, cluster: int) -> bool:
        """Whether who answers at this address, as that cluster, may be believed to be a member."""
        return endpoint in self.given or cluster == self._cluster

    def _endpoint(self, url: str) -> str | None:
        """The address in one of a member's URLs; None if it is not one for us."""
        match = _URL.fullmatch(url)
        if match is None or match["scheme"] != self._scheme or match["port"] is None:
            return None
        endpoint, host = match["endpoint"], match["endpoint"].rpartition(":")[0]
        if len(host) > HOST_MAX or int(match["port"]) not in range(1, 65536):
            return None
        good = self._here if _is_here(endpoint) else _is_elsewhere(host) and not self._stays_here
        return endpoint if good else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name."""
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip


def _is_here(endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0]
    address = _address(host)
    return _is_localhost(host) if address is None else address.is_loopback


def _is_localhost(name: str) -> bool:
    name = name.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost")


def _is_elsewhere(host: str) -> bool:
    """Whether what is not on the loopback may be another host's name or address. Of a name that ends as
    a number does a resolver makes an address (127.1, 0x7f000001)."""
    address = _address(host)
    if address is None:
        return host.rstrip(".").rpartition(".")[2][:1].isalpha()
    return not (
        address.is_unspecified
        or address.is_multicast
        or address.is_link_local
        or address.is_reserved
    )
