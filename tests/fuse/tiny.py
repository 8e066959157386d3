"""A file system to test the device loop and the mount with, served by a process of its own.

    python tiny.py MOUNTPOINT

One directory with two files: `now` opens at once, `held` when it is told to (unlink of it waits
as well). It says `ready`, obeys lines on its standard input, and answers each with one line:
`grant` opens all that wait, `refuse` answers them with ETXTBSY, `poll N` makes N the events of
both files and wakes who polls, `forget NAME` makes the kernel forget a name, `wait N` answers
once N requests wait, `state` says in JSON what was seen.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import sys

from dlmfs.fuse import mount, wire
from dlmfs.fuse.device import Device, Reply

FILES = {b"now": 2, b"held": 3}
CACHE_S = 3600.0


class Tiny:
    """Operations of the file system, and what it has seen."""

    def __init__(self) -> None:
        self.device: Device | None = None
        self.waiting: dict[int, int] = {}
        self.open_files: set[int] = set()
        self.next_fh = 1
        self.events = 0
        self.pollers: set[int] = set()
        self.interrupts = 0
        self.undone = 0
        self.calls: list[str] = []

    def attr(self, node: int) -> wire.Attr:
        if node == 1:
            return wire.Attr(ino=1, mode=stat.S_IFDIR | 0o755, nlink=2)
        return wire.Attr(ino=node, mode=stat.S_IFREG | 0o666, size=64)

    def answer(self, unique: int, reply: bytes | int) -> bool:
        assert self.device is not None
        return self.device.answer(unique, reply)

    def lookup(self, h: wire.Header, name: bytes) -> Reply:
        self.calls.append(f"lookup {os.fsdecode(name)}")
        node = FILES.get(name)
        if node is None:
            return errno.ENOENT
        return wire.entry(node, 0, self.attr(node), CACHE_S, CACHE_S)

    def forget(self, node: int, count: int) -> None:
        self.calls.append(f"forget {node} {count}")

    def getattr(self, h: wire.Header, fh: int | None) -> Reply:
        return wire.attr_out(self.attr(h.node), CACHE_S)

    def setattr(self, h: wire.Header, change: wire.SetAttr) -> Reply:
        return wire.attr_out(self.attr(h.node), CACHE_S)

    def _denied(self, h: wire.Header, *_arguments: object) -> Reply:
        return errno.EPERM

    mkdir = rmdir = symlink = link = rename = setxattr = removexattr = _denied

    def mknod(self, h: wire.Header, name: bytes, mode: int, umask: int, rdev: int) -> Reply:
        self.calls.append("mknod")
        if name == b"broken":
            raise ZeroDivisionError("a bug in a handler")
        return errno.EACCES

    def unlink(self, h: wire.Header, name: bytes) -> Reply:
        if name == b"held":
            self.waiting[h.unique] = h.pid  # and the kernel holds the directory's lock meanwhile
            return None
        raise OSError(errno.EBUSY, "always busy")

    def opened(self) -> bytes:
        fh = self.next_fh
        self.next_fh += 1
        self.open_files.add(fh)
        return wire.opened(fh, wire.FOPEN_DIRECT_IO | wire.FOPEN_NOFLUSH)

    def open(self, h: wire.Header, flags: int) -> Reply:
        if h.node == 2:
            return self.opened()
        if flags & os.O_NONBLOCK:
            return errno.ETXTBSY
        self.waiting[h.unique] = h.pid
        return None

    def read(self, h: wire.Header, fh: int, offset: int, size: int) -> Reply:
        return b"v" * max(0, min(size, 64 - offset))

    def write(self, h: wire.Header, fh: int, offset: int, data: bytes) -> Reply:
        return wire.written(len(data))

    def release(self, h: wire.Header, fh: int) -> Reply:
        self.open_files.discard(fh)
        return b""

    def statfs(self, h: wire.Header) -> Reply:
        return wire.statfs(bsize=4096, namelen=255)

    def fsync(self, h: wire.Header, fh: int, datasync: int) -> Reply:
        return b""

    def opendir(self, h: wire.Header, flags: int) -> Reply:
        return wire.opened(0, 0)

    def readdir(self, h: wire.Header, fh: int, offset: int, size: int) -> Reply:
        names = [(1, stat.S_IFDIR, b"."), (1, stat.S_IFDIR, b"..")]
        names += [(node, stat.S_IFREG, name) for name, node in FILES.items()]
        out = wire.Dirents(size)
        for place in range(offset, len(names)):
            node, mode, name = names[place]
            if not out.add(node, place + 1, mode, name):
                break
        return out.payload()

    def releasedir(self, h: wire.Header, fh: int) -> Reply:
        return b""

    def fsyncdir(self, h: wire.Header, fh: int, datasync: int) -> Reply:
        return b""

    def getxattr(self, h: wire.Header, name: bytes, size: int) -> Reply:
        self.calls.append(f"getxattr {os.fsdecode(name)}")
        if name != b"user.long":
            return errno.ENODATA
        value = b"x" * 100
        if size == 0:
            return wire.xattr_size(len(value))
        # One byte more than was asked for when asked for 50: the kernel refuses such a reply.
        return value[:51] if size == 50 else value[:size]

    def listxattr(self, h: wire.Header, size: int) -> Reply:
        return b"" if size else wire.xattr_size(0)

    def poll(self, h: wire.Header, fh: int, kh: int, flags: int, events: int) -> Reply:
        if flags & wire.POLL_SCHEDULE_NOTIFY:
            self.pollers.add(kh)
        return wire.polled(self.events)

    def interrupt(self, unique: int) -> None:
        self.interrupts += 1
        if self.waiting.pop(unique, None) is not None:
            self.answer(unique, errno.EINTR)

    def undelivered(self, h: wire.Header, payload: bytes) -> None:
        self.undone += 1

    def destroy(self) -> None:
        self.calls.append("destroy")


class Server:
    """Serves the mount and obeys standard input."""

    def __init__(self, mountpoint: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.tiny = Tiny()
        fd = mount.mount("tiny", mountpoint, mount.MountFlags(fsname="tiny, with \\ and comma"))
        self.device = self.tiny.device = Device(fd, self.tiny, self.loop)
        self.ended: asyncio.Future[str] = self.loop.create_future()
        self.device.on_ready = lambda: self.say("ready")
        self.device.on_end = self.ended.set_result

    def say(self, text: str) -> None:
        print(text, flush=True)

    async def run(self) -> None:
        self.device.start()
        self.loop.add_reader(0, self.command)
        self.say(f"ended {await self.ended}")
        self.device.close()

    def command(self) -> None:
        words = sys.stdin.readline().split()
        if not words:
            self.loop.remove_reader(0)
            return
        verb, *arguments = words
        if verb == "wait":
            self.wait(int(arguments[0]))
        else:
            self.say(json.dumps(getattr(self, verb)(*arguments)))

    def wait(self, count: int) -> None:
        if len(self.tiny.waiting) >= count:
            self.say("null")
        else:
            self.loop.call_later(0.005, self.wait, count)

    def settle(self, make: str) -> int:
        uniques = list(self.tiny.waiting)
        self.tiny.waiting.clear()
        for unique in uniques:
            reply = self.tiny.opened() if make == "opened" else errno.ETXTBSY
            self.tiny.answer(unique, reply)
        return len(uniques)

    def grant(self) -> int:
        return self.settle("opened")

    def refuse(self) -> int:
        return self.settle("refused")

    def poll(self, events: str) -> int:
        self.tiny.events = int(events)
        for kh in self.tiny.pollers:
            self.device.notify_poll(kh)
        return len(self.tiny.pollers)

    def forget(self, name: str) -> None:
        self.device.invalidate_entry(1, os.fsencode(name))
        self.device.invalidate_inode(2)
        self.device.invalidate_inode(999)

    def state(self) -> dict[str, object]:
        tiny = self.tiny
        return {
            "waiting": len(tiny.waiting),
            "open": len(tiny.open_files),
            "interrupts": tiny.interrupts,
            "undone": tiny.undone,
            "pollers": len(tiny.pollers),
            "calls": tiny.calls,
            "pending": self.device.pending,
        }


async def main() -> None:
    await Server(sys.argv[1]).run()


if __name__ == "__main__":
    asyncio.run(main())
