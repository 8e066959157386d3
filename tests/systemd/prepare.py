"""What lies in the Debian before it boots: our units, what they are to run, and a case runner.

python3 prepare.py ROOT UNITS
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

FILES = {
    "etc/dlmfs/locks.conf": """\
SOURCE=etcd://127.0.0.1:2379/prod
MOUNTPOINT=/mnt/locks
OPTIONS=holder=file,ttl=5,retry=2
""",
    "etc/dlmfs/one-node-reports.conf": "PROGRAM=/bin/sleep infinity\n",
    # A watchdog that has to be fed often during what the cases do, and that bites within a case.
    "etc/systemd/system/dlmfs@.service.d/watchdog.conf": "[Service]\nWatchdogSec=4\n",
    "etc/systemd/system/dlmfs@plain.service.d/plain.conf": """\
[Service]
ExecStart=
ExecStart=/usr/local/bin/dlmfs mount ${SOURCE} ${MOUNTPOINT} -o ${OPTIONS}
""",
    "etc/systemd/logind.conf.d/soon.conf": "[Login]\nUserStopDelaySec=0\n",
    "etc/systemd/system/cases.service": """\
[Unit]
After=basic.target systemd-logind.service
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /cases/cases.py
ExecStopPost=/bin/systemctl --no-block poweroff
StandardOutput=append:/told/log
StandardError=append:/told/log
""",
}


def main(root: Path, units: Path) -> None:
    here = root / "etc" / "systemd" / "system"
    for unit in units.iterdir():
        shutil.copy(unit, here)
    # The same units for places of their own, beside dlmfs@locks.
    for place in ("unit", "auto"):
        text = (units / "mnt-locks.mount").read_text().replace("/mnt/locks", f"/mnt/{place}")
        (here / f"mnt-{place}.mount").write_text(text.replace("What=local", f"What=local:{place}"))
    text = (units / "mnt-locks.automount").read_text().replace("/mnt/locks", "/mnt/auto")
    (here / "mnt-auto.automount").write_text(text)
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with (root / "etc" / "fstab").open("a") as fstab:
        fstab.write("local:fstab /mnt/fstab fuse.dlmfs holder=file,nofail 0 0\n")
    for place in ("fstab", "unit", "auto"):
        (root / "mnt" / place).mkdir()
    for words in (["-m", "bob"], ["-M", "-d", "/nonexistent", "carol"]):
        subprocess.run(["chroot", root, "useradd", "-s", "/bin/bash", *words], check=True)
    wants = here / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "cases.service").symlink_to("../cases.service")
    enable = ["systemctl", "--quiet", f"--root={root}"]
    subprocess.run([*enable, "enable", "dlmfs@locks", "one-node@reports"], check=True)
    subprocess.run([*enable, "disable", "etcd", "systemd-modules-load"], check=False)
    subprocess.run([*enable, "mask", "systemd-modules-load"], check=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
