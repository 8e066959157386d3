"""A mount that another user made, with a program of his in the daemon's place: a mount without a daemon,
and a socket where his daemon would have it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from dlmfs import rundir
from dlmfs.fuse.mountinfo import MountEntry, mounts
from tests.control.asking import acting
from tests.fs.nodes import PATIENCE_S

MNT_DETACH = 2
Play = Callable[[socket.socket, bytes], None]


class Impostor:
    """`play` gets each connection and its question; `asked` counts them. One after the other."""

    def __init__(self, entry: MountEntry, listener: socket.socket) -> None:
        self.entry = entry
        self.where = entry.mountpoint
        self.asked = 0
        self.accepted = threading.Event()
        self.play: Play = lambda _sock, _question: None
        self._listener = listener
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def says(self, answer: bytes) -> None:
        self.play = lambda sock, _question: sock.sendall(answer)

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted.set()
            with sock, contextlib.suppress(OSError):  # who asked may have had enough
                sock.settimeout(PATIENCE_S)
                question = sock.makefile("rb").readline()
                if question:  # else somebody looks whether we are there
                    self.asked += 1
                    self.play(sock, question)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self._listener.close()


@contextlib.contextmanager
def impostor(where: Path, uid: int) -> Iterator[Impostor]:
    """Nothing of it is left. The mount answers nothing: who touches it, waits until the end."""
    where.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    words = f"fd={fuse},rootmode=40000,user_id={uid},group_id={uid},allow_other".encode()
    assert libc.mount(b"theirs", os.fsencode(where), b"fuse.dlmfs", 0, words) == 0
    folder = Path(rundir.places(uid)[0])
    made = not folder.parent.exists()
    try:
        (entry,) = [e for e in mounts() if e.mountpoint == str(where)]
        folder.mkdir(parents=True, exist_ok=True)
        for part in (folder, folder.parent):
            os.chown(part, uid, uid)
            part.chmod(0o755 if uid == 0 else 0o700)
        with acting(uid):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            path = folder / rundir.name(entry.dev, "sock")
            listener.bind(str(path))
            listener.listen()
        playing = Impostor(entry, listener)
        try:
            yield playing
        finally:
            playing.close()
            path.unlink()
    finally:
        assert libc.umount2(os.fsencode(where), MNT_DETACH) == 0
        os.close(fuse)
        if made:
            shutil.rmtree(folder.parent)
