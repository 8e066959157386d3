"""Network namespaces: a server's, and one for each node with a wire of its own to it.

A direction of a wire is cut by a false entry in the sender's neighbour table: its frames go out to
nobody's hardware address. No packet filter is needed, nothing is answered, no connection is reset.
A namespace lives as long as the process that holds it, and that ends with this one at the latest.
"""

from __future__ import annotations

import subprocess
from typing import Final

from tests.etcd.server import PATIENCE_S

NOBODY: Final = "02:de:ad:00:00:01"


class Unsupported(Exception):
    """No network namespaces or no veth here."""


class Namespace:
    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            raise Unsupported("no network namespaces: needs root and `ip`")

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def enter(self) -> list[str]:
        """The command before one that is to run in it; mounts stay visible outside."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def ip(self, command: str) -> None:
        subprocess.run(
            [*self.enter, "ip", *command.split()],
            capture_output=True,
            timeout=PATIENCE_S,
            check=True,
        )

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait(PATIENCE_S)
        for pipe in (self._holder.stdin, self._holder.stdout):
            if pipe is not None:
                pipe.close()


class Wire:
    """Between the server's namespace and a new one."""

    def __init__(self, hub: Namespace, number: int) -> None:
        self.hub = hub
        self.node = Namespace()
        self.device = f"w{number}"
        self.there, self.here = f"10.77.{number}.1", f"10.77.{number}.2"
        try:
            hub.ip(
                f"link add {self.device} type veth peer name {self.device} netns {self.node.pid}"
            )
        except subprocess.CalledProcessError as error:
            self.node.close()
            raise Unsupported("no veth devices here") from error
        for space, address in ((hub, self.there), (self.node, self.here)):
            space.ip(f"address add {address}/24 dev {self.device}")
            space.ip(f"link set {self.device} up")
        self.node.ip(f"route add default via {self.there}")

    def cut(self, *, to_server: bool = True, from_server: bool = True) -> None:
        if to_server:
            self._cut(self.node, self.there)
        if from_server:
            self._cut(self.hub, self.here)

    def _cut(self, sender: Namespace, receiver: str) -> None:
        sender.ip(f"neigh replace {receiver} lladdr {NOBODY} nud permanent dev {self.device}")

    def heal(self) -> None:
        for sender, receiver in ((self.node, self.there), (self.hub, self.here)):
            sender.ip(f"neigh flush to {receiver} dev {self.device} nud permanent")


class Net:
    """A hub, where the server is to run, and wires to it."""

    def __init__(self) -> None:
        self.hub = Namespace()
        self.wires: list[Wire] = []

    def address(self, number: int) -> str:
        """An address of the hub that all wires lead to, for one of several servers."""
        address = f"10.78.0.{number + 1}"
        self.hub.ip(f"address add {address}/32 dev lo")
        return address

    def wire(self) -> Wire:
        wire = Wire(self.hub, len(self.wires))
        self.wires.append(wire)
        return wire

    def close(self) -> None:
        for wire in self.wires:
            wire.node.close()
        self.hub.close()
