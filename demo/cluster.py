"""The same story on an etcd of three members, and what only a cluster has: a node cut off is fenced.

Node B reaches etcd through relays, which can fall silent as a dead network does.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

from demo.story import PATIENCE_S, Demo, Differs, Shell, expect, say

TTL_S: Final = 5


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class Relay:
    """Carries connections to one port; while `silent`, it carries nothing and tells nobody."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.open = threading.Event()
        self.open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            here, _ = self.listener.accept()
            try:
                there = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                here.close()
                continue
            for pair in ((here, there), (there, here)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.open.wait()
                sink.sendall(data)
        except OSError:
            pass
        for sock in (source, sink):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class Cluster(Demo):
    """See the head of the file."""

    options = f"holder=file,ttl={TTL_S}"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.servers: list[subprocess.Popen[bytes]] = []
        self.ports = free_ports(3)
        self.relays = [Relay(port) for port in self.ports]

    def source(self, node: str) -> str:
        ports = self.ports if node == "alpha" else [relay.port for relay in self.relays]
        return f"etcd://{','.join(f'127.0.0.1:{port}' for port in ports)}/demo"

    def start_etcd(self) -> None:
        peers = free_ports(3)
        cluster = ",".join(f"m{i}=http://127.0.0.1:{port}" for i, port in enumerate(peers))
        program = Path(sys.executable).with_name("etcd")
        for i, (client, peer) in enumerate(zip(self.ports, peers, strict=True)):
            args = {
                "name": f"m{i}",
                "data-dir": self.state.parent / f"etcd{i}",
                "listen-client-urls": f"http://127.0.0.1:{client}",
                # Nobody's: a node that is cut off would find the way around the relays.
                "advertise-client-urls": "http://0.0.0.0:1",
                "listen-peer-urls": f"http://127.0.0.1:{peer}",
                "initial-advertise-peer-urls": f"http://127.0.0.1:{peer}",
                "initial-cluster": cluster,
                "log-level": "panic",
            }
            command = [str(program), *(f"--{name}={value}" for name, value in args.items())]
            self.servers.append(subprocess.Popen(command))
        deadline = time.monotonic() + PATIENCE_S
        while "is healthy" not in self.etcdctl("endpoint", "health"):
            if time.monotonic() > deadline:
                raise Differs("etcd did not start")
            time.sleep(0.1)

    def etcdctl(self, *args: str) -> str:
        program = Path(sys.executable).with_name("etcdctl")
        endpoints = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        command = [str(program), "--endpoints", endpoints, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    # -- the story ------------------------------------------------------------------------------

    def tell(self) -> None:
        self.step("An etcd of three members is started; two nodes join one lock space on it")
        self.start_etcd()
        self.both()
        self.leader()
        self.death()
        self.back()
        self.cut_off()
        self.leave()
        self.nothing_left()

    def leader(self) -> None:
        self.step("The etcd member that leads is killed; locks go on")
        told = json.loads(self.etcdctl("endpoint", "status", "-w", "json").splitlines()[0])
        leads = next(
            i
            for i, member in enumerate(told)
            if member["Status"]["leader"] == member["Status"]["header"]["member_id"]
        )
        self.servers[leads].kill()
        self.servers[leads].wait()
        for node in (self.a, self.b):
            shell = self.shell(node / "jobs/backup")
            expect("a lock without the leader", shell.granted(PATIENCE_S), True)
            shell.end()
        say("    both nodes still take and give the lock")

    def back(self) -> None:
        self.step(
            "B is mounted again under the same name, at once: its former self is provably dead"
        )
        self.mount(self.b, "beta")
        (self.b / "jobs").mkdir()
        self.show("nodes", str(self.a))

    def cut_off(self) -> None:
        self.step("B holds the lock exclusively and is cut off from etcd, without a word")
        fd = os.open(self.b / "jobs/backup", os.O_RDWR | os.O_CREAT)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        for relay in self.relays:
            relay.open.clear()
        cut = time.monotonic()
        heir = self.shell(self.a / "jobs/backup")
        told = poll.poll(PATIENCE_S * 1000)
        fenced = time.monotonic() - cut
        expect("B is told by poll", [event & select.POLLERR for _, event in told], [select.POLLERR])
        try:
            os.pread(fd, 64, 0)
            raise Differs("a fenced node served a read")
        except OSError as error:
            expect("reading on the fenced node", error.errno, errno.EIO)
        expect("A was granted before B was fenced", heir.granted(0), False)
        expect("A is granted when B's lease is over", heir.granted(PATIENCE_S), True)
        took = time.monotonic() - cut
        say(f"    B fenced itself after {fenced:.1f} s: POLLERR, and EIO on the descriptor")
        say(f"    A has the lock after {took:.1f} s (lease time {TTL_S} s)")
        heir.end()
        fd_a = os.open(self.a / "jobs/backup", os.O_RDWR)
        os.pwrite(fd_a, b"run 43, ok", 0)
        os.close(fd_a)
        say("    A looks after what B left undone and writes: the mark of the death is gone")
        self.step("The network heals: B comes back by itself; the old descriptor stays lost")
        for relay in self.relays:
            relay.open.set()
        again = self.shell_when_back(self.b / "jobs/backup")
        again.end()
        try:
            os.pread(fd, 64, 0)
            raise Differs("a lost descriptor came back to life")
        except OSError as error:
            expect("the old descriptor", error.errno, errno.EIO)
        os.close(fd)
        say("    a new open on B is granted, the old one still answers EIO")

    def shell_when_back(self, path: Path) -> Shell:
        """Opens fail with ENOLCK until the node has joined again."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            shell = self.shell(path)
            if shell.granted(PATIENCE_S):
                return shell
            shell.end()
            if time.monotonic() > deadline:
                raise Differs("B did not come back")
            time.sleep(0.2)

    def leave(self) -> None:
        self.step("rm forgets the lock, rmdir leaves the domain, umount ends the node")
        for node in (self.a, self.b):
            (node / "jobs/backup").unlink()
            (node / "jobs").rmdir()
            self.run_dlmfs("umount", str(node))

    def nothing_left(self) -> None:
        left = self.etcdctl("get", "--prefix", "dlmfs", "--keys-only").split()
        # By the stamp a node that was away knows its store again (docs/reference.md, `A restored store`).
        expect("keys left in etcd", left, ["dlmfs/demo/t/stamp"])
        say("    nothing is left in etcd")

    def clean_up(self) -> None:
        for relay in self.relays:
            relay.open.set()
        super().clean_up()
        for server in self.servers:
            server.kill()
            server.wait()
