"""A Debian release in a folder, and commands in it, as on a fresh machine; nothing stays of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlmfs/releases"
FRESH: Final = "python3 mount sudo procps iproute2 ca-certificates git"
"""What a server of that release has before anything of ours is on it, as far as it matters here."""
TOOLS: Final = (
    "python3-venv fuse3 rsync inotify-tools busybox attr acl lsof psmisc dash systemd gcc libc6-dev"
    " ocfs2-tools-dev comerr-dev e2fsprogs openssl util-linux-extra uidmap strace"
)
"""What the tests look at besides, as far as the release has it."""
INSTALL: Final = """
export DEBIAN_FRONTEND=noninteractive
echo 'Acquire::Check-Valid-Until "false";' >/etc/apt/apt.conf.d/mirror-may-be-behind
apt-get -qq update || exit 1
for package; do
    apt-get -qq -y --no-install-recommends install "$package" >/dev/null 2>&1 || echo "no $package here"
done
"""
CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"

ENTER: Final = """
set -e
mount -t tmpfs -o mode=755 tmpfs "$PLACE"
mkdir "$PLACE/root"
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK" "$PLACE/root"
cd "$PLACE/root"
mkdir -p checkout old
mount --rbind /dev dev
mknod -m 666 "$PLACE/fuse" c $FUSE
mount --bind "$PLACE/fuse" dev/fuse
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount --rbind /sys sys
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mkdir run/lock
ln -sf ../proc/self/mounts etc/mtab
hostname "$NAME"
printf '127.0.0.1 localhost\\n::1 localhost\\n127.0.1.1 %s\\n' "$NAME" >etc/hosts
: >etc/resolv.conf
mount --bind /etc/resolv.conf etc/resolv.conf
if [ -e "$CERTIFICATES" ]; then
    : >".$CERTIFICATES"
    mount --bind "$CERTIFICATES" ".$CERTIFICATES"
    printf '[global]\\ncert = %s\\ndisable-pip-version-check = true\\n' "$CERTIFICATES" >etc/pip.conf
fi
[ -z "$CHECKOUT" ] || mount --bind "$CHECKOUT" checkout
[ -z "$TMP" ] || { mount --bind "$TMP" tmp; chmod 1777 tmp; }
pivot_root . old
cd /
umount -l /old
code=0
"$@" || code=$?
exit $code
"""
"""Not by chroot(2): below that no user namespace may be made. The shell stays, to reap daemons."""


class Root:
    """One release."""

    def __init__(self, release: str) -> None:
        self.release = release
        self.base, self.fresh, self.tools = (
            CACHE / f"{release}.{layer}" for layer in ("base", "fresh", "tools")
        )

    def make(self) -> None:
        """Build what is not there yet: the release, and in layers over it what is installed. Raises
        CalledProcessError, SystemExit."""
        CACHE.mkdir(parents=True, exist_ok=True)
        if not self.base.exists():
            half = self._half(self.base)
            words = ["debootstrap", "--variant=minbase", "--include=ca-certificates"]
            subprocess.run([*words, self.release, half], check=True, stdout=subprocess.DEVNULL)
            half.rename(self.base)
        self._layer(self.fresh, FRESH, str(self.base))
        self._layer(self.tools, TOOLS, f"{self.fresh}:{self.base}")

    def _half(self, folder: Path) -> Path:
        half = folder.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        return half

    def _layer(self, folder: Path, packages: str, below: str) -> None:
        if folder.exists():
            return
        half = self._half(folder)
        if self._run(["sh", "-c", INSTALL, "sh", *packages.split()], below, half, {}):
            raise SystemExit(f"scripts/releases: nothing can be installed in {self.release}")
        half.rename(folder)

    def run(
        self,
        *words: str,
        tools: bool = False,
        checkout: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> int:
        """Run something there, as root, in namespaces of mounts and processes of its own; its exit code.
        What it writes is forgotten, but for what it does in `checkout`, which is there as /checkout."""
        lower = f"{self.tools}:" * tools + f"{self.fresh}:{self.base}"
        upper = Path(tempfile.mkdtemp(prefix=f"{self.release}.", dir=CACHE))
        try:
            (upper / "upper").mkdir()
            (upper / "tmp").mkdir()
            more = {"CHECKOUT": str(checkout or ""), "TMP": str(upper / "tmp"), **(env or {})}
            return self._run(words, lower, upper / "upper", more)
        finally:
            shutil.rmtree(upper)

    def _run(
        self,
        words: Sequence[str],
        lower: str | Path,
        upper: Path,
        env: dict[str, str],
    ) -> int:
        work = Path(tempfile.mkdtemp(prefix=f"{self.release}.", dir=CACHE))
        place = Path(tempfile.mkdtemp(prefix="dlmfs-release-"))
        fuse = os.stat("/dev/fuse").st_rdev
        variables = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "CHECKOUT": "",
            "TMP": "",
            **env,
            "LOWER": str(lower),
            "UPPER": str(upper),
            "WORK": str(work),
            "PLACE": str(place),
            "CERTIFICATES": CERTIFICATES,
            "NAME": self.release,
            "FUSE": f"{os.major(fuse)} {os.minor(fuse)}",
        }
        unshare = "unshare --mount --pid --uts --propagation private --fork --kill-child".split()
        try:
            return subprocess.run(
                [*unshare, "--", "sh", "-c", ENTER, "sh", *words],
                env=variables,
                check=False,
                stdin=subprocess.DEVNULL,
            ).returncode
        finally:
            place.rmdir()
            shutil.rmtree(work)
