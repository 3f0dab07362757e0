"""A copy of speed.py with the README's three edits is a method of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def write_fork(folder: Path) -> None:
    """mine.py: speed.py with a flag, a function and a term in the sum, all three the README's."""
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
    for name in ("common.py", "data.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "mine.py").write_text(code, encoding="utf-8")


def test_a_fork_by_the_readmes_edits_trains_and_goes_on(root, tmp_path):
    write_fork(tmp_path)
    command = [sys.executable, "mine.py", *f"--dataset folder --root {root} --split full".split()]
    command += "--backbone resnet18 --weights none --iters 4 --crop-size 33 --batch-size 2".split()
    command += "--gamma 0.5 --threshold 0 --ramp 0 --save-every 2 --log-every 1 --workers 0".split()
    command += ["--eval-every", "4"]
    how = dict(cwd=tmp_path, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    how |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = tmp_path / "runs/mine-folder-root-full-s0"

    p = subprocess.Popen(command, **how)
    while not (out / "latest.pt").exists():
        assert p.poll() is None, p.communicate()[0]
        time.sleep(0.01)
    p.kill()
    p.communicate()
    done = subprocess.run(command, check=False, **how)
    assert done.returncode == 0, done.stdout
    assert f"{out.name}/latest.pt: going on from step 2 of 4\n" in done.stdout

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    for x in lines[:4]:
        terms = x["L_x"] + x["L_u"] + x["L_feat"] + x["L_logit"] + 0.5 * x["L_ent"]
        assert x["loss"] == pytest.approx(terms / 2, rel=1e-4)
        assert x["L_ent"] > 0.01
