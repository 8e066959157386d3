"""Who this daemon is, and whether one that said so of itself provably exists no more.

The machine is known by its id and by that of its hardware: a cloned image or a container may have
another machine's id, and must not pass for that machine's dead daemon. Without a hardware id
(it is root's to read) only a process under the same boot can be known to be dead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from dlmfs import proc


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().strip().decode("ascii", "replace")
    except OSError:
        return ""


def _state_and_start(pid: int) -> tuple[str, int]:
    """The process's state letter and its start in clock ticks since boot; ("", 0): none such."""
    found = proc.stat(pid)
    return (found.state, found.start) if found is not None else ("", 0)


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def own() -> dict[str, object]:
    """The facts of this process, for its record in the store."""
    hardware = _read("/sys/class/dmi/id/product_uuid")
    machine = _read("/etc/machine-id")
    return {
        "host": os.uname().nodename,
        "machine": f"{machine}/{hardware}" if machine and hardware else "",
        "boot": (proc.read("sys/kernel/random/boot_id") or b"").strip().decode("ascii", "replace"),
        "pidns": _namespace(),
        "pid": os.getpid(),
        "start": _state_and_start(os.getpid())[1],
    }


def is_over(facts: Mapping[str, object]) -> bool:
    """Whether the process that wrote these facts surely exists no more."""
    here = own()
    if not facts.get("boot"):
        return False
    if facts["boot"] != here["boot"]:
        return bool(here["machine"]) and facts.get("machine") == here["machine"]
    if facts.get("pidns") != here["pidns"] or not isinstance(facts.get("pid"), int):
        return False
    state, start = _state_and_start(int(str(facts["pid"])))
    return start != facts.get("start") or state in "ZX"


def state_here(facts: Mapping[str, object]) -> str | None:
    """The state letter, as in ps(1), of the process that wrote these facts; None if it is of another
    machine or pid namespace, or no more."""
    here = own()
    same = all(facts.get(key) == here[key] for key in ("boot", "pidns")) and bool(here["boot"])
    if not same or not isinstance(facts.get("pid"), int):
        return None
    state, start = _state_and_start(int(str(facts["pid"])))
    return state if state and start == facts.get("start") else None
