"""A copy of speed.py with the README's three edits is a method of its own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_fork_by_the_readmes_edits_trains_and_goes_on(tmp_path):
    block = re.search(r"three edits:\n\n((?: {4}.*\n|\n)+)", README)[1]
    flag, function, total = re.split(r"^ {4}# \d\..*\n", block, flags=re.M)[1:]
    outdented = re.sub("^ {4}", "", function, flags=re.M).strip()
    code = (ROOT / "speed.py").read_text(encoding="utf-8")
    for before, text in (
        ("    return common.parse(p, argv)", flag.rstrip()),
        ("def speed_step(", outdented + "\n\n"),
        ("    loss = 0.5 * (", total.rstrip()),
        ('        "L_x": loss_x', '        "L_ent": loss_ent,'),
    ):
        assert code.count(before) == 1
        code = code.replace(before, f"{text}\n{before}")
    (tmp_path / "mine.py").write_text(code)
    for name in ("common.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "mine.py", "--dataset", "shapes", "--iters", "3", "--log-every", "1"]
    command += ["--batch-size", "2", "--crop-size", "33", "--gamma", "0.5", "--threshold", "0"]
    command += ["--eval-every", "3"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "finished before" in done.stdout
    log = (tmp_path / "runs/mine-shapes-1-16-s0/log.jsonl").read_text()
    assert log.count('"L_ent"') == 3
