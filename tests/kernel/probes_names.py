"""Probes of names, attributes, directories and permissions; by section of kernel-behaviour.

Each section is a story on a mount with the domain `dom`; it yields the rows in their order.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

from tests.kernel.tools import (
    CR,
    NOBODY,
    RD,
    RW,
    WR,
    Probe,
    child,
    err,
    facts,
    held,
    make,
    mode_of,
    opened,
    umask,
    value,
)


def stat_rows(dlm: Path) -> Probe:
    dom = dlm / "dom"
    vfs = os.statvfs(dlm)
    counts = [vfs.f_blocks, vfs.f_bfree, vfs.f_files, vfs.f_ffree]
    yield "statfs", [vfs.f_bsize, vfs.f_frsize, *counts, vfs.f_namemax]
    told = subprocess.run(["stat", "-f", "-c", "%t", dlm], capture_output=True, check=True)
    yield "statfs type", told.stdout.decode().strip()
    yield "root", facts(dlm)
    yield "domain", facts(dom)
    with umask(0o022):
        os.mkdir(dlm / "m0", 0o777)
    yield "domain made with 0777 under 022", facts(dlm / "m0")
    yield "links of the root with two domains", os.stat(dlm).st_nlink
    os.rmdir(dlm / "m0")
    with umask(0):
        os.mkdir(dlm / "m1", 0o700)
        yield "domain made with 0700", mode_of(dlm / "m1")
        os.mkdir(dlm / "m2", 0o1777)
        yield "domain made with 01777", mode_of(dlm / "m2")
    os.mkdir(dlm / "m3")
    yield "root listed after making dom m1 m2 m3", os.listdir(dlm)
    yield "rmdir of the three", [err(os.rmdir, dlm / f"m{n}") for n in (1, 2, 3)]
    with umask(0o022):
        make(dom / "s1", 0o666)
    yield "file made with 0666 under 022", facts(dom / "s1")
    with umask(0):
        make(dom / "s2", 0o600)
        yield "file made with 0600", mode_of(dom / "s2")
        make(dom / "s3", 0o6777)
        yield "file made with 06777", mode_of(dom / "s3")
    info = os.stat(dom)
    yield "links and size of the domain with three files", [info.st_nlink, info.st_size]
    yield "domain listed after making s1 s2 s3", os.listdir(dom)
    with os.scandir(dlm) as entries:
        domains = [entry.is_dir(follow_symlinks=False) for entry in entries]
    with os.scandir(dom) as entries:
        files = [entry.is_file(follow_symlinks=False) for entry in entries]
    yield "types in readdir", [all(domains), all(files)]
    before = os.stat(dom).st_mtime_ns
    make(dom / "s4")
    yield "a new file changes the domain's mtime", os.stat(dom).st_mtime_ns != before
    before = os.stat(dlm).st_mtime_ns
    os.mkdir(dlm / "m4")
    between = os.stat(dlm).st_mtime_ns
    os.rmdir(dlm / "m4")
    changes = [between != before, os.stat(dlm).st_mtime_ns != between]
    yield "mkdir and rmdir change the root's mtime", changes
    yield "write changes a file's mtime, read its atime", _times(dom / "s1")
    os.utime(dom / "s1", (1, 2))
    info = os.stat(dom / "s1")
    yield "utime on a file", [info.st_atime, info.st_mtime]
    yield "utime on domain and root", [err(os.utime, path, (3, 4)) for path in (dom, dlm)]
    three = [os.stat(path) for path in (dlm, dom, dom / "s1")]
    devices, inodes = {i.st_dev for i in three}, {i.st_ino for i in three}
    yield "devices and inodes of root, domain, file", [len(devices), len(inodes)]
    yield "unlink of the four", [err(os.unlink, dom / f"s{n}") for n in (1, 2, 3, 4)]


def _times(path: Path) -> list[bool]:
    before = os.stat(path)
    with held(path) as fd:
        os.write(fd, b"x")
        os.pread(fd, 64, 0)
    after = os.stat(path)
    return [after.st_mtime_ns != before.st_mtime_ns, after.st_atime_ns != before.st_atime_ns]


def mkdir_rows(dlm: Path) -> Probe:
    def mkdir(name: str | bytes) -> str:
        path = os.path.join(os.fsencode(dlm), os.fsencode(name))
        result = err(os.mkdir, path)
        if result == "ok":
            os.rmdir(path)
        return result

    yield "existing", err(os.mkdir, dlm / "dom")
    yield "in a domain", err(os.mkdir, dlm / "dom/sub")
    for length in (1, 31, 32, 62, 63, 64, 65, 255, 256):
        yield f"name of {length} bytes", mkdir("n" * length)
    for what, name in (("$x", b"$x"), ("space", b"a b"), ("newline", b"a\nb"), (".x", b".x")):
        yield f"name with {what}", mkdir(name)
    yield "name that is not UTF-8", mkdir(b"\xff\xfe")
    yield "rmdir of nothing", err(os.rmdir, dlm / "nothing")
    yield "rmdir of the root", err(os.rmdir, dlm)
    yield "unlink of a domain", err(os.unlink, dlm / "dom")
    os.mkdir(dlm / "again")
    os.rmdir(dlm / "again")
    yield "made, removed, made again at once", mkdir("again")


def absent_rows(dlm: Path) -> Probe:
    """What the file system does not have, among names."""
    dom = dlm / "dom"
    yield "creat in the root", opened(dlm / "f", RW | CR)
    yield "open of nothing in the root", opened(dlm / "f", RW)

    def bind(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            os.chdir(path.parent)
            try:
                sock.bind(path.name)
            finally:
                os.chdir("/")

    for where, folder in (("domain", dom), ("root", dlm)):
        yield f"symlink in a {where}", err(os.symlink, "x", folder / "new")
        yield f"mkfifo in a {where}", err(os.mkfifo, folder / "new")
        for kind in ("REG", "CHR", "SOCK"):
            mode = 0o644 | int(getattr(stat, f"S_IF{kind}"))
            made = err(os.mknod, folder / "new", mode, os.makedev(1, 3))
            yield f"mknod of {kind} in a {where}", made
            if made == "ok":
                os.unlink(folder / "new")
        yield f"O_TMPFILE in a {where}", opened(folder, os.O_TMPFILE | RW)
        yield f"bind in a {where}", err(bind, folder / "sock")
    make(dom / "f")
    yield "link", err(os.link, dom / "f", dom / "g")
    yield "rename", err(os.rename, dom / "f", dom / "g")
    yield "rename onto itself", err(os.rename, dom / "f", dom / "f")
    yield "rename of a domain", err(os.rename, dom, dlm / "other")
    yield "open of a domain O_RDWR", opened(dom, RW)
    yield "open of a domain with O_CREAT", opened(dom, RD | CR)
    os.chdir(dom)
    yield "chdir into a domain", os.getcwd() == os.path.realpath(dom)
    os.chdir("/")
    os.unlink(dom / "f")


def lock_name_rows(dlm: Path) -> Probe:
    dom = os.fsencode(dlm / "dom")

    def creat(name: bytes) -> str:
        path = os.path.join(dom, name)
        result = err(lambda: os.close(os.open(path, RW | CR)))
        if result == "ok":
            os.unlink(path)
        return result

    for length in (1, 30, 31, 32, 33, 63, 64, 255, 256):
        yield f"name of {length} bytes", creat(b"n" * length)
    for length in (40, 256):
        path = os.path.join(dom, b"n" * length)
        yield f"open of {length} bytes without O_CREAT", err(os.open, path, RW)
    for name in (b"$x", b"$", b"x$", b"a b", b"a\nb", b".", b"..", b".hid", b"%d", b"\xff\x01"):
        yield f"name {name!r}", creat(name)
    yield "open of $x without O_CREAT", err(os.open, os.path.join(dom, b"$x"), RW)
    yield "name with a slash behind", err(os.open, os.path.join(dom, b"x/"), RW | CR)
    make(dlm / "dom/file")
    yield "below a lock file", err(os.open, os.path.join(dom, b"file/x"), RW | CR)
    os.unlink(dlm / "dom/file")


def removal_rows(dlm: Path) -> Probe:
    dom = dlm / "dom"
    with held(dom / "u") as fd:
        yield "unlink while another process has it open", child(lambda: err(os.unlink, dom / "u"))
        yield "still usable", [os.pwrite(fd, b"z", 0), os.pread(fd, 1, 0)]
        yield "unlink while this process has it open", err(os.unlink, dom / "u")
    with held(dom / "u", RD):
        yield "unlink while it is open for reading", err(os.unlink, dom / "u")
    yield "rmdir of a domain with an idle lock", err(os.rmdir, dom)
    yield "unlink of an idle lock", err(os.unlink, dom / "u")
    yield "unlink of nothing", err(os.unlink, dom / "u")
    make(dom / "p")
    with held(dom / "p", os.O_PATH) as fd:
        yield "unlink with only an O_PATH descriptor", err(os.unlink, dom / "p")
        yield "open of that descriptor by /proc", opened(Path(f"/proc/self/fd/{fd}"), RW)
    make(dom / "f")
    yield "rmdir of a file", err(os.rmdir, dom / "f")
    os.unlink(dom / "f")
    os.mkdir(dlm / "d2")
    with held(dlm / "d2/x") as fd:
        os.write(fd, b"old")
        yield "rmdir of a domain with an open lock", err(os.rmdir, dlm / "d2")
    os.unlink(dlm / "d2/x")
    yield "rmdir after close and unlink", err(os.rmdir, dlm / "d2")
    os.mkdir(dlm / "d2")
    with held(dlm / "d2/x") as fd:
        yield "the value in a domain made again", os.read(fd, 64)
    os.unlink(dlm / "d2/x")
    os.rmdir(dlm / "d2")
    os.mkdir(dlm / "d3")
    os.chdir(dlm / "d3")
    gone = [err(os.rmdir, dlm / "d3"), err(os.getcwd), err(os.mkdir, "x")]
    os.chdir("/")
    yield "rmdir of a process's cwd, getcwd, mkdir there", gone
    os.mkdir(dlm / "d4")
    with held(dlm / "d4", RD) as fd:
        first = err(os.rmdir, dlm / "d4")
        made = value(os.open, "x", RW | CR, dir_fd=fd)
        yield "rmdir of an open domain, list, creat there", [first, os.listdir(fd), made]
    yield "rmdir of it again", err(os.rmdir, dlm / "d4")


def permission_rows(dlm: Path) -> Probe:
    dom, file = dlm / "dom", dlm / "dom/mine"

    def nobody(path: Path, flags: int) -> object:
        return child(lambda: opened(path, flags), NOBODY)

    def nobody_does(call: object, *args: object) -> object:
        return child(lambda: err(call, *args), NOBODY)  # type: ignore[arg-type]

    make(file)
    os.chmod(file, 0o600)
    yield "mode after chmod 0600", mode_of(file)
    yield "nobody opens a 0600 file", [nobody(file, RD), nobody(file, RW)]
    os.chmod(file, 0o644)
    yield "nobody opens a 0644 file", [nobody(file, RD), nobody(file, WR)]
    yield "nobody opens it with access mode 3", nobody(file, 3)
    yield "nobody creates in a 0755 domain", nobody(dom / "his", RW | CR)
    yield "nobody unlinks in a 0755 domain", nobody_does(os.unlink, file)
    yield "nobody makes a domain", nobody_does(os.mkdir, dlm / "his")
    yield "nobody creates in the root", nobody(dlm / "his", RW | CR)
    os.chmod(dom, 0o1777)
    yield "nobody creates in a 01777 domain", nobody(dom / "his", RW | CR)
    yield "his file", facts(dom / "his")
    yield "nobody unlinks root's file there", nobody_does(os.unlink, file)
    yield "nobody gives his file to root", nobody_does(os.chown, dom / "his", 0, 0)
    yield "nobody unlinks his own file", nobody_does(os.unlink, dom / "his")
    os.chown(file, NOBODY, NOBODY)
    yield "owner after chown by root", [os.stat(file).st_uid, os.stat(file).st_gid]
    changed = [err(os.chown, dom, NOBODY, NOBODY), err(os.chmod, dlm, 0o777)]
    yield "chown of the domain, chmod of the root", changed
    child(lambda: (os.umask(0o022), err(os.mkdir, dlm / "his", 0o777))[1], NOBODY)
    yield "nobody makes a domain in a 0777 root", facts(dlm / "his")
    os.rmdir(dlm / "his")
    os.chown(dom, 0, 7)
    os.chmod(dom, 0o2755)
    with umask(0):
        make(dom / "set", 0o755)
    yield "file in a setgid domain", facts(dom / "set")
    back = [err(os.chown, dom, 0, 0), err(os.chmod, dom, 0o755), err(os.chmod, dlm, 0o755)]
    yield "all back", back
    os.unlink(dom / "set")
    os.unlink(file)


NAMES = {
    "stat": stat_rows,
    "mkdir": mkdir_rows,
    "absent": absent_rows,
    "lock names": lock_name_rows,
    "removal": removal_rows,
    "permissions": permission_rows,
}
