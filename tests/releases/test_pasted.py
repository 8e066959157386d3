"""README's first steps can be taken out of it: scripts/releases plays them on fresh systems."""

from __future__ import annotations

import subprocess
from pathlib import Path

from dlmfs.cli.checks import configured
from tests.releases.pasted import README, blocks, commands


def test_readme_has_first_steps_that_can_be_pasted() -> None:
    found = blocks(README.read_text())
    kinds = [block.kind for block in found]
    assert kinds.count("sh") >= 4
    assert kinds[-1] == "crontab"
    for block in found:
        for text in commands(block) if block.kind == "crontab" else [block.text]:
            subprocess.run(["bash", "-n", "-c", text], check=True)
    words = "".join(block.text for block in found)
    assert words.count("dlmfs mount ") == words.count("holder=file") - 1 == 2
    (cron,) = commands(found[-1])
    assert all(word.startswith(("/", "-", "lock")) for word in cron.split())


def test_the_lines_for_fstab_say_what_they_seem_to(tmp_path: Path) -> None:
    lines = [
        line.split("'")[1]
        for block in blocks(README.read_text())
        for line in block.text.splitlines()
        if "fstab" in line
    ]
    assert lines
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fstab").write_text("\n".join(lines))
    assert [finding.level for finding in configured.check(tmp_path)] == ["ok"]
