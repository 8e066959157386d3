"""A node that is cut off: nothing is served before another is granted its locks, and after that
never again on what was open (promise 3)."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.etcd.mounts import EtcdNodes, errno_of, gone, is_lost, put, take, trylock, until, value
from tests.etcd.net import Net
from tests.etcd.proxy import Proxy
from tests.etcd.server import PATIENCE_S, Etcd
from tests.fs.nodes import Holder

pytestmark = pytest.mark.fuse


class Victim(NamedTuple):
    """A node whose way to the store can be cut, and healed; and one on the same store, `safe`."""

    nodes: EtcdNodes
    safe: Path
    where: Path
    cut: Callable[[], None]
    heal: Callable[[], None]

    @property
    def lock(self) -> str:
        return f"dom/{self.where.name}"


@pytest.fixture
def by_proxy(nodes: EtcdNodes) -> Iterator[list[Victim]]:
    """Silent towards the server, silent from it, refused."""
    safe = nodes.mount("safe")
    with ExitStack() as stack:
        proxies = [
            stack.enter_context(closing(Proxy(nodes.etcd.members[0].endpoint))) for _ in range(3)
        ]
        cuts: tuple[Callable[[], None], ...] = (
            partial(proxies[0].silence, down=False),
            partial(proxies[1].silence, up=False),
            proxies[2].cut,
        )
        victims = []
        for number, (proxy, cut) in enumerate(zip(proxies, cuts, strict=True)):
            source = f"etcd://{proxy.endpoint}/{nodes.cluster}"
            where = nodes.mount(f"v{number}", source=source)
            victims.append(Victim(nodes, safe, where, cut, proxy.heal))
        yield victims


@pytest.fixture
def by_net(net: Net, folder: Path, start: Callable[..., EtcdNodes]) -> list[Victim]:
    """Packets lost to the server, from it, both."""
    options = {"listen-client-urls": "http://0.0.0.0:2379"}
    nodes = start(Etcd(folder, hosts=["127.0.0.1"], enter=net.hub.enter, options=options))
    safe = nodes.mount("safe", enter=net.hub.enter)
    victims = []
    for number, (up, down) in enumerate(((True, False), (False, True), (True, True))):
        wire = net.wire()
        source = f"etcd://{wire.there}:2379/{nodes.cluster}"
        where = nodes.mount(f"v{number}", source=source, enter=wire.node.enter)
        cut = partial(wire.cut, to_server=up, from_server=down)
        victims.append(Victim(nodes, safe, where, cut, wire.heal))
    return victims


@pytest.mark.root
def test_promise_fencing_nodes_that_are_cut_off(
    by_net: list[Victim], by_proxy: list[Victim]
) -> None:
    """Six ways at once, for each takes the time of a lease."""
    victims = [*by_net, *by_proxy]
    fds, takers, inside = [], [], []
    for nodes, safe in {(v.nodes, v.safe) for v in victims}:
        (safe / "dom").mkdir()
        assert nodes.hold(safe / "dom/theirs").wait() == "held"
    for nodes, safe, where, *_ in victims:
        (where / "dom").mkdir()
        put(safe / "dom" / where.name, b"before")
        fds.append(os.open(where / "dom" / where.name, os.O_RDWR | os.O_CREAT))
        takers.append(nodes.queue(safe / "dom" / where.name))
        inside.append(nodes.queue(where / "dom/theirs"))
    for victim in victims:
        victim.cut()
    for fd, taker in zip(fds, takers, strict=True):
        assert gone(fd)
        assert not taker.poll(0), "granted before the node that held it was fenced"
        assert is_lost(fd)
    for victim, waiting in zip(victims, inside, strict=True):
        assert waiting.wait() == f"error {errno.ENOLCK}"
        assert errno_of(victim.where / "dom/new") == errno.ENOLCK
        lease = victim.nodes.status(victim.where)["lease"]
        assert lease["state"] in ("FENCED", "REJOINING")
        assert lease["reason"]
    for victim, fd, taker in zip(victims, fds, takers, strict=True):
        assert taker.wait() == "held"
        taker.release()
        put(victim.safe / victim.lock, b"after")
        victim.heal()
        assert is_lost(fd)
    for victim, fd in zip(victims, fds, strict=True):
        nodes, where = victim.nodes, victim.where
        until(partial(nodes.is_healthy, where), "it is not back")
        take(where / victim.lock)
        assert value(where / victim.lock) == b"after"
        assert trylock(where / "dom/theirs") == errno.ETXTBSY
        assert is_lost(fd), "an old descriptor works again"
        os.close(fd)
        assert nodes.fences(where) == 1


def test_a_short_silence_harms_nothing(nodes: EtcdNodes) -> None:
    """UNPROVED and back: what is held stays held, what was asked meanwhile is answered."""
    with closing(Proxy(nodes.etcd.members[0].endpoint)) as proxy:
        a = nodes.mount("a", "ttl=10", source=f"etcd://{proxy.endpoint}/{nodes.cluster}")
        b = nodes.mount("b")
        for where in (a, b):
            (where / "dom").mkdir()
        fd = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
        proxy.silence()
        until(lambda: nodes.lease(a) == "UNPROVED")
        cached = nodes.hold(a / "dom/x")
        assert cached.waits, "served before the store is known to be the one that it was"
        waiter = nodes.hold(a / "dom/y")
        wanted = nodes.hold(b / "dom/x")
        proxy.heal()
        assert waiter.wait() == "held"
        assert cached.wait() == "held"
        cached.release()
        assert os.pwrite(fd, b"fine", 0) == 4
        os.close(fd)
        assert wanted.wait() == "held"
        assert nodes.fences(a) == 0


def test_a_slow_network_slows_and_breaks_nothing(nodes: EtcdNodes) -> None:
    with closing(Proxy(nodes.etcd.members[0].endpoint)) as proxy:
        proxy.delay(0.05)
        a = nodes.mount("a", source=f"etcd://{proxy.endpoint}/{nodes.cluster}")
        b = nodes.mount("b")
        for where in (a, b):
            (where / "dom").mkdir()
        for number in range(2):
            put(a / "dom/x", b"a%d" % number)
            assert value(b / "dom/x") == b"a%d" % number
            put(b / "dom/x", b"b%d" % number)
            assert value(a / "dom/x") == b"b%d" % number
        assert trylock(a / "dom/x") == 0
        assert nodes.fences(a) == 0


def stubborn(nodes: EtcdNodes, path: Path) -> Holder:
    """A holder that ignores SIGTERM: ignoring is inherited."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return nodes.hold(path)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_on_lost_signals_the_holders_before_others_are_granted(nodes: EtcdNodes) -> None:
    """With the daemon cut off, and with the daemon itself stopped."""
    with closing(Proxy(nodes.etcd.members[0].endpoint)) as proxy:
        source = f"etcd://{proxy.endpoint}/{nodes.cluster}"
        soft, hard, soft_stopped, hard_stopped = victims = [
            nodes.mount(name, f"on-lost={what}", source=source)
            for name, what in (("s", "term"), ("h", "kill"), ("ss", "term"), ("hs", "kill"))
        ]
        safe = nodes.mount("safe")
        for where in (*victims, safe):
            (where / "dom").mkdir()
        polite = {where: nodes.hold(where / f"dom/{where.name}") for where in victims}
        deaf = {where: stubborn(nodes, where / f"dom/{where.name}") for where in victims}
        for holder in (*polite.values(), *deaf.values()):
            assert holder.wait() == "held"
        idle = nodes.queue(hard_stopped / "dom/s")  # waits, so it holds nothing
        takers = {where: nodes.queue(safe / f"dom/{where.name}") for where in victims}
        for where in (soft_stopped, hard_stopped):
            nodes.stop(where)
        proxy.silence()
        for where in victims:
            assert polite[where].process.wait(PATIENCE_S) == -signal.SIGTERM
            assert not takers[where].poll(0), "granted while a holder had not been told"
        for where in (hard, hard_stopped):
            assert deaf[where].process.wait(PATIENCE_S) == -signal.SIGKILL
            assert not takers[where].poll(0), "granted while a holder was alive"
        for taker in takers.values():
            assert taker.wait() == "held"
        for where in (soft, soft_stopped):
            assert deaf[where].process.poll() is None, "on-lost=term kills"
        assert idle.process.poll() is None, "somebody without a lock was signalled"


def test_on_lost_leaves_alone_who_has_closed(nodes: EtcdNodes) -> None:
    """Closed, and then fenced: by an eviction, which does not wait for the deadline."""
    a = nodes.mount("a", "on-lost=kill")
    b = nodes.mount("b")
    (a / "dom").mkdir()
    here = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    os.close(here)  # this very process
    held = nodes.hold(a / "dom/y")
    assert held.wait() == "held"
    assert nodes.ask(b, "evict", node="a")["how"] == "left"
    assert held.process.wait(PATIENCE_S) == -signal.SIGTERM


def test_an_end_signals_its_holders_and_nobody_else(nodes: EtcdNodes) -> None:
    a = nodes.mount("a", "on-lost=kill")
    (a / "dom").mkdir()
    here = os.open(a / "dom/x", os.O_RDWR | os.O_CREAT)
    os.close(here)  # this very process
    held = nodes.hold(a / "dom/y")
    assert held.wait() == "held"
    watchdogs = {pid: os.pidfd_open(pid) for pid in nodes.helpers}
    assert watchdogs, "there is no watchdog process"
    os.kill(nodes.daemons.pop(a), signal.SIGTERM)
    for fd in watchdogs.values():
        until(partial(_ended, fd), "the watchdog stays behind")
        os.close(fd)
    assert held.process.wait(PATIENCE_S) == -signal.SIGTERM
    nodes.helpers.clear()


def _ended(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False
