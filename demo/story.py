"""The main job, for real: two nodes on the embedded engine, ordinary programs contending for locks.

Every step says what was done and what happened, and the demo fails if anything differs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent.parent
DLMFS: Final = [sys.executable, str(HERE / "scripts" / "dlmfs")]
PATIENCE_S: Final = 20.0

HOLD = "exec {fd}{how}{path}; echo held; read line"
"""A shell that opens a lock's file, says so, and holds it until its standard input ends."""


class Differs(Exception):
    """Something went otherwise than the story says."""


def say(text: str) -> None:
    print(text, flush=True)


def expect(what: str, got: object, want: object) -> None:
    if got != want:
        raise Differs(f"{what}: got {got!r}, expected {want!r}")


class Shell:
    """An ordinary shell that holds one lock."""

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        how = "<" if shared else "<>"
        script = HOLD.format(fd=9, how=how, path=path)
        self.process = subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where Ctrl-C meets it, sh complains
        )

    def granted(self, within_s: float) -> bool:
        """Whether the shell says within that time that it has the lock."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], within_s)
        return bool(ready) and os.read(self.process.stdout.fileno(), 16) == b"held\n"

    def end(self) -> None:
        self.process.communicate()


class Demo:
    """The story. Everything it makes is gone afterwards, also when it fails."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state.db"
        self.a = folder / "node-a"
        self.b = folder / "node-b"
        self.started = time.monotonic()
        self.shells: list[Shell] = []

    def dlmfs(self, *args: str) -> str:
        command = [*DLMFS, *args]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise Differs(f"dlmfs {' '.join(args)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def step(self, title: str) -> None:
        say(f"\n[{time.monotonic() - self.started:5.1f}s] {title}")

    def run_dlmfs(self, *args: str) -> str:
        say(f"    $ dlmfs {self.short(' '.join(args))}")
        return self.dlmfs(*args)

    def short(self, text: str) -> str:
        for path, name in ((self.a, "A"), (self.b, "B"), (self.state.parent, "DIR")):
            text = text.replace(str(path), name)
        return text

    def show(self, *args: str) -> None:
        for line in self.dlmfs(*args).rstrip().splitlines():
            say("      " + self.short(line))

    def shell(self, path: Path, *, shared: bool = False) -> Shell:
        shell = Shell(path, shared=shared)
        self.shells.append(shell)
        return shell

    def status(self, mountpoint: Path) -> dict[str, Any]:
        report = json.loads(self.dlmfs("status", "--json", str(mountpoint)))[0]
        assert isinstance(report, dict)
        return report

    def source(self, node: str) -> str:  # noqa: ARG002 - on etcd they differ
        return f"local:{self.state}"

    options = "holder=file"

    def mount(self, where: Path, node: str) -> None:
        where.mkdir(exist_ok=True)
        options = f"node={node},{self.options}"
        self.run_dlmfs("mount", self.source(node), str(where), "-o", options)

    # -- the story ------------------------------------------------------------------------------

    def tell(self) -> None:
        self.step("Two nodes join one lock space (A and B; one state file, no server)")
        self.both()
        self.death()
        self.leave()

    def both(self) -> None:
        """What is the same on every engine."""
        self.mount(self.a, "alpha")
        self.mount(self.b, "beta")
        self.join()
        self.exclusive()
        self.shared()
        self.value()
        self.notice()
        self.interrupt()

    def join(self) -> None:
        self.step("mkdir joins the domain 'jobs' on both")
        for node in (self.a, self.b):
            (node / "jobs").mkdir()
            (node / "jobs" / "backup").touch()
        members = self.status(self.a)["domains"][0]["members"]
        expect("members of the domain", members, ["alpha", "beta"])
        say(f"    members: {', '.join(members)}")

    def exclusive(self) -> None:
        self.step("A shell on A takes jobs/backup exclusively; one on B waits for it")
        holder = self.shell(self.a / "jobs/backup")
        expect("A is granted", holder.granted(PATIENCE_S), True)
        waiter = self.shell(self.b / "jobs/backup")
        expect("B is granted while A holds", waiter.granted(0.5), False)
        say("    A holds, B's open(2) has not returned. dlmfs status:")
        self.show("status", str(self.b))
        self.step("A trylock (O_NONBLOCK) on B is refused at once")
        try:
            os.close(os.open(self.b / "jobs/backup", os.O_RDWR | os.O_NONBLOCK))
            raise Differs("a trylock was granted although A holds the lock")
        except OSError as error:
            expect("the trylock's error", error.errno, errno.ETXTBSY)
            say(f"    {error.strerror} (ETXTBSY)")
        self.step("A closes; B's open returns")
        holder.end()
        expect("B is granted after A's close", waiter.granted(PATIENCE_S), True)
        waiter.end()
        say("    B holds it, and lets go")

    def shared(self) -> None:
        self.step("Shared readers: one on A, one on B, together; a writer waits for both")
        first = self.shell(self.a / "jobs/backup", shared=True)
        expect("reader on A", first.granted(PATIENCE_S), True)
        second = self.shell(self.b / "jobs/backup", shared=True)
        expect("reader on B", second.granted(PATIENCE_S), True)
        writer = self.shell(self.b / "jobs/backup")
        expect("writer while readers hold", writer.granted(0.3), False)
        first.end()
        second.end()
        expect("writer after the readers", writer.granted(PATIENCE_S), True)
        writer.end()
        say("    two readers at once, then the writer alone")

    def value(self) -> None:
        self.step("64 bytes travel with the lock: written on A, read on B")
        fd = os.open(self.a / "jobs/backup", os.O_RDWR)
        os.write(fd, b"run 42, ok")
        os.close(fd)
        fd = os.open(self.b / "jobs/backup", os.O_RDONLY)
        value = os.read(fd, 64)
        os.close(fd)
        expect("the value on B", value, b"run 42, ok".ljust(64, b"\0"))
        say(f"    B reads {value.rstrip(bytes(1))!r}")

    def notice(self) -> None:
        self.step("A holder is told by poll(2) that somebody waits")
        fd = os.open(self.a / "jobs/backup", os.O_RDWR)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        expect("poll while nobody waits", poll.poll(0), [])
        waiter = self.shell(self.b / "jobs/backup")
        expect("poll when B waits", poll.poll(PATIENCE_S * 1000), [(fd, select.POLLIN)])
        os.close(fd)
        expect("B after the polite holder", waiter.granted(PATIENCE_S), True)
        waiter.end()
        say("    POLLIN, so A closes, and B has it")

    def interrupt(self) -> None:
        self.step("Ctrl-C ends a wait")
        holder = self.shell(self.a / "jobs/backup")
        expect("holder", holder.granted(PATIENCE_S), True)
        waiter = self.shell(self.b / "jobs/backup")
        expect("waiter", waiter.granted(0.3), False)
        waiter.process.send_signal(signal.SIGINT)
        code = waiter.process.wait(PATIENCE_S)
        expect("the shell that got Ctrl-C ended", code != 0, True)
        waits = self.status(self.b)["domains"][0]["locks"][0]["waiters"]
        expect("waiters left on B", waits, [])
        holder.end()
        say("    the waiting shell is gone, and so is its place in the queue")

    def death(self) -> None:
        self.step("Node B's daemon is killed (SIGKILL) while it holds the lock exclusively")
        victim = self.shell(self.b / "jobs/backup")
        expect("B holds", victim.granted(PATIENCE_S), True)
        os.kill(self.status(self.b)["pid"], signal.SIGKILL)
        killed = time.monotonic()
        heir = self.shell(self.a / "jobs/backup")
        expect("A is granted after B's death", heir.granted(PATIENCE_S), True)
        took = time.monotonic() - killed
        info = json.loads(self.dlmfs("info", "--json", str(self.a / "jobs/backup")))
        expect("the mark of the dead holder", info["abandoned"]["node"], "beta")
        value = bytes.fromhex(info["lvb_hex"]).rstrip(b"\0")
        expect("the value after the death", value, b"run 42, ok")
        say(f"    A has it after {took:.3f} s, value intact; `dlmfs info` says who died:")
        self.show("info", str(self.a / "jobs/backup"))
        heir.end()
        victim.end()

    def leave(self) -> None:
        self.step("B is mounted again: the dead mount is recognised and cleared, never stacked")
        self.mount(self.b, "beta")
        (self.b / "jobs").mkdir()
        fd = os.open(self.b / "jobs/backup", os.O_RDWR | os.O_CREAT)
        os.close(fd)
        say("    node beta is back in the domain")
        self.step("rm forgets the lock, rmdir leaves the domain, umount ends the node")
        for node in (self.a, self.b):
            (node / "jobs/backup").unlink()
            (node / "jobs").rmdir()
            self.run_dlmfs("umount", str(node))

    def clean_up(self) -> None:
        for shell in self.shells:
            if shell.process.poll() is None:
                shell.process.kill()
        for where in (self.a, self.b):
            if os.path.lexists(where):
                with contextlib.suppress(Differs, subprocess.TimeoutExpired):
                    self.dlmfs("umount", "--lazy", str(where))
        for shell in self.shells:
            shell.process.wait()


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    path = Path(tempfile.mkdtemp(prefix="dlmfs-demo-", dir=base))
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # a mount that could not be ended stays, visibly
            for node in ("node-a", "node-b"):
                if (path / node).is_dir():
                    (path / node).rmdir()
            shutil.rmtree(path)


def missing() -> str | None:
    """What this machine lacks, in one line."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return (
            f"/dev/fuse: {error.strerror}. Try `modprobe fuse`; in a container add "
            "--device /dev/fuse --cap-add SYS_ADMIN"
        )
    if os.getuid() != 0 and shutil.which("fusermount3") is None:
        return "fusermount3 (install the package fuse3)"
    return None


def run(kind: type[Demo]) -> int:
    """Exit 0: all went as told; 1: something differed; 77: this machine cannot run it."""
    lack = missing()
    if lack is not None:
        say(f"scripts/demo cannot run here; missing: {lack}")
        return 77
    with folder() as path:
        demo = kind(path)
        try:
            demo.tell()
        except (Differs, OSError, subprocess.SubprocessError) as error:
            say(f"\nFAILED: {error}")
            return 1
        finally:
            demo.clean_up()
    say(f"\nAll as promised, in {time.monotonic() - demo.started:.1f} s.")
    return 0
