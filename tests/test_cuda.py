"""A GPU computes what the CPU does, in each precision, resumed, under torchrun and compiled.

Skipped where there is none. All other tests hide it (conftest.py): a run here is its own process.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import TINY

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {  # every term takes part: no threshold, and MKD's released reading
    "speed": "--threshold 0",
    "mkd": "--threshold 0 --threshold-ss 0 --teacher-mode train --fa all",
    "segkc": "--threshold 0 --senior resnet18",
}
each_script = pytest.mark.parametrize("script", SCRIPTS)


def start(words: list[str], gpu: bool = True) -> str:
    """Runs Python in a process that sees the GPU, or none; returns what it printed."""
    # float32 is float32: the layers' TF32 would be another precision than the CPU's
    env = os.environ | dict(OMP_NUM_THREADS="1", NVIDIA_TF32_OVERRIDE="0")
    env["CUDA_VISIBLE_DEVICES"] = os.environ["GPUS_FOR_TESTS"] if gpu else ""
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, *words], env=env, cwd=ROOT, timeout=600, **streams)
    assert done.returncode == 0, done.stdout
    return done.stdout


def gpu_is_there() -> bool:
    """Asks another process, as torch would keep the GPU for this one; the driver's tool first."""
    return shutil.which("nvidia-smi") is not None and "True" in start(
        ["-c", "import torch; print(torch.cuda.is_available())"]
    )


pytestmark = pytest.mark.skipif(not gpu_is_there(), reason="no GPU")


def train_lines(
    script: str, out: Path, *more: str, gpu: bool = True, before: Sequence[str] = ()
) -> list[dict]:
    """Runs a script into `out`; its train lines."""
    flags = [*TINY, "--backbone", "resnet18", *SCRIPTS[script].split(), *more]
    start([*before, f"{script}.py", *flags, "--out", str(out)], gpu)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The train lines of a script's plain run on the GPU, run once."""
    return functools.cache(lambda script: train_lines(script, tmp_path_factory.mktemp(script)))


def assert_same_run(lines: list[dict], others: list[dict], first: float, later: float) -> None:
    """All terms of the first line, made by the same weights, within `first`; then the loss alone.

    A GPU's sums have no fixed order, and batch norm over few pixels amplifies what they differ by:
    the same command had 0.3284 and 0.3307 for SPEED's L_feat of step 2.
    """
    assert len(lines) == len(others) >= 2
    a, b = lines[0], others[0]
    terms = [k for k in a if k[:1] in "lL" and k != "lr"]
    assert len(terms) >= 4
    assert {k: a[k] for k in terms} == pytest.approx({k: b[k] for k in terms}, rel=first)
    losses, expected = ([line["loss"] for line in run[1:]] for run in (lines, others))
    assert losses == pytest.approx(expected, rel=later)


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=1".split()  # NCCL and DDP


@each_script
@pytest.mark.parametrize(
    ("more", "how"), [([], dict(gpu=False)), ([], dict(before=TORCHRUN)), (["--compile"], {})]
)
def test_cpu_torchrun_and_compile(script, more, how, plain, tmp_path):
    lines = train_lines(script, tmp_path / "run", *more, **how)
    assert_same_run(lines, plain(script), 1e-3, 1e-2)


@each_script
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_precision(script, amp, plain, tmp_path):
    """Near float32, and not the same: the flag does something."""
    lines = train_lines(script, tmp_path / "run", "--amp", amp)
    loss, expected = lines[0]["loss"], plain(script)[0]["loss"]
    assert loss == pytest.approx(expected, rel=0.05)  # of the first step: fp16 may skip its update
    assert loss != expected


@each_script
def test_resume(script, tmp_path):
    """From the checkpoint of step 2 of 4, with the scaler's state, the other steps are alike."""
    flags = "--amp fp16 --iters 4 --save-every 2".split()
    whole = train_lines(script, tmp_path / "whole", *flags)
    words = [*TINY, "--backbone", "resnet18", *SCRIPTS[script].split(), *flags]
    code = f"""
import os, common, {script}
save = common.save
def save_and_die(state, split, log, done):
    save(state, split, log, done)
    os._exit(0)
common.save = save_and_die
{script}.main({[*words, "--out", str(tmp_path / "run")]!r})
"""
    start(["-c", code])
    resumed = train_lines(script, tmp_path / "run", *flags)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    losses = [line["loss"] for line in resumed]
    assert losses == pytest.approx([line["loss"] for line in whole], rel=2e-2)
    saved = [torch.load(tmp_path / n / "latest.pt", map_location="cpu") for n in ("whole", "run")]
    assert saved[0]["scaler"] == saved[1]["scaler"]
    assert saved[0]["scaler"]["scale"] >= 1


@each_script
@pytest.mark.parametrize("how", ["--amp bf16", "--amp fp16 --optimizer adamw"])  # SGD's fp16 waits
def test_step_does_not_wait(script, how, tmp_path):
    """No line of three whole steps makes the host wait for the GPU; a planted .item() is seen."""
    words = [*TINY, "--backbone", "resnet18", *SCRIPTS[script].split(), "--iters", "50"]
    words += [*how.split(), "--log-every", "50", "--out", str(tmp_path / "run")]
    code = f"""
import os, sys, warnings, torch, {script} as script
step, calls = script.{script}_step, []
def watched(*args):
    calls.append(1)
    if len(calls) == 3:  # the first two warm up
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
    if len(calls) == 6:
        print("planted", file=sys.stderr)
        torch.ones(1, device="cuda").item()
        sys.stderr.flush()
        os._exit(0)
    return step(*args)
script.{script}_step = watched
script.main({words!r})
"""
    steps, planted = start(["-c", code]).split("planted")
    assert "synchroniz" in planted
    assert "synchroniz" not in steps, steps
