"""What a run is made of: its steps, its lines, its best network, --compile, other systems."""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import procs
import pytest
import torch
from torch import nn

import common
import data

METHODS = tuple(procs.SCRIPTS)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "epochs", "steps", "epoch"),
    [
        (92, 10490, 80, 104880, 1311),  # VOC, 1/16 of the classic protocol with SBD, batches of 8
        (4, 37, 3, 12, 4),  # the incomplete last batch is dropped
        (4, 3, 5, 5, 1),  # fewer than a batch
        (20, 0, 7, 14, 2),  # --labeled-only with --split full: of the labelled
    ],
)
def test_steps_of_epochs(labeled, unlabeled, epochs, steps, epoch):
    """Guards: epochs over the labelled images, or a step too few or many in each."""
    items = [data.Item(f"{k}", k, data.BUILT_IN) for k in range(labeled + unlabeled)]
    split = data.Split(items[:labeled], items[labeled:], items[:1], ["a", "b"], "", "", [])
    argv = f"--dataset shapes --batch-size 8 --epochs {epochs}".split()
    for more, expected in (([], steps), (["--iters", "9"], 9)):
        args = procs.speed.parse_args([*argv, *more, *["--labeled-only"] * (unlabeled == 0)])
        args.eval_every = None  # shapes' preset has one
        common.settle(args, split, 1, torch.device("cpu"))
        assert args.iters == expected
        assert (args.eval_every, args.save_every) == (epoch, epoch)
        assert (args.amp, args.workers) == ("off", 0)
        assert str(args.out) == f"runs/speed{'' if unlabeled else '-labeled'}-shapes-1-16-s0"


def miou_of(net: common.Segmenter, root: Path, args: argparse.Namespace) -> float:
    """Over the classes in labels or predictions, counted pixel by pixel."""
    hits, either = np.zeros(3), np.zeros(3)
    for item in data.load_source("folder", root).val:
        image = data.read_image(item)
        label = np.asarray(data.read_mask(item, image.size, 3))
        guess = common.predict_image(net.eval(), image, args)
        for c in range(3):
            hits[c] += ((label == c) & (guess == c)).sum()
            either[c] += ((label == c) | (guess == c))[label != 255].sum()
    return 100 * float(np.mean(hits[either > 0] / either[either > 0]))


NETWORKS = {  # names in eval lines, and where latest.pt has them; the first is for inference
    "speed": {"miou": "net"},
    "mkd": {"miou": "student1", **{f"miou_{n}": n for n in ("student2", "teacher1", "teacher2")}},
    "segkc": {"miou": "pair.junior", "miou_senior": "pair.senior"},
}


@pytest.mark.parametrize("script", METHODS)
def test_eval_line_and_best_are_of_the_named_networks(script, root, tmp_path, small):
    """Guards: another network's mIoU in a line, or its weights in best.pt."""
    procs.SCRIPTS[script].main(procs.flags(script, root, tmp_path, "--iters 8 --eval-every 8"))
    line = procs.log_of(tmp_path)[-1]
    latest = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert {k for k in line if k.startswith("miou")} == NETWORKS[script].keys()
    best, classes, settings = common.load_best(tmp_path / "best.pt")
    assert classes == ["sky", "road", "car"]
    for name, place in NETWORKS[script].items():
        part, _, inner = place.partition(".")
        state = latest[part]
        if inner:
            prefix = f"{inner}."
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        net = procs.Tiny(3)
        net.load_state_dict(state)
        assert line[name] == pytest.approx(miou_of(net, root, settings), abs=1e-3), name
        if name == "miou":
            procs.assert_same(dict(best.state_dict()), dict(net.state_dict()))


def test_best_is_the_best_and_last_the_last(root, tmp_path, small, monkeypatch, capsys):
    """Guards: the last network saved as the best, the best mIoU told as the last."""
    falling = iter([30.0, 50.0, 50.0, 40.0])  # at steps 3, 6, 9, 11
    iou = {"sky": 1.0, "road": 2.0, "car": None}
    monkeypatch.setattr(common, "iou_of", lambda *_: (next(falling), iou))
    at_six = {}

    def look() -> None:
        at_six.update(torch.load(tmp_path / "latest.pt", weights_only=True)["net"])

    with procs.at_step(7, look):
        procs.speed.main(procs.flags("speed", root, tmp_path, "--eval-every 3 --save-every 6"))
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["miou"]) == (6, 50.0)
    procs.assert_same(dict(best["net"]), at_six)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("mIoU last 40.00")
    assert "best 50.00 at step 6" in last


@pytest.mark.parametrize(("more", "images"), [("", 2), ("--labeled-only", 1)])
def test_images_a_second_are_of_training_alone(more, images, root, tmp_path, small, monkeypatch):
    """Guards: evaluations, or steps of another line, in the rate. Each step takes 0.5 s."""
    now, update, evaluate = [0.0], torch.amp.GradScaler.update, common.evaluate

    def lasting(seconds: float, function: Callable, *args: object) -> object:
        now[0] += seconds
        return function(*args)

    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: lasting(0.5, update, self))
    monkeypatch.setattr(common, "evaluate", partial(lasting, 1000, evaluate))
    procs.speed.main(procs.flags("speed", root, tmp_path, more))
    log = [json.loads(line) for line in procs.lines(tmp_path / "log.jsonl")]
    found = [(line["step"], line["images_s"]) for line in log if line["kind"] == "train"]
    assert found == [(step, images * 4 / 0.5) for step in (3, 6, 9, 11)]


def test_compile(root, tmp_path, monkeypatch, caplog):
    """Guards: graph breaks that fail, a full cache. Traced alone: code generation takes minutes.

    SegKC, which has two networks; test_scripts.py sees the same lines in the others.
    """
    traced, compile_part = [], nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        traced.append(len(graph.graph.nodes))
        return graph

    def train(out: Path, *more: str) -> list[dict]:
        argv = procs.flags("segkc", root, out, "--iters 2 --log-every 1 --lr 0.001 --batch-size 2")
        procs.segkc.main([*argv, *more])
        return [line for line in procs.log_of(out) if line["kind"] == "train"]

    plain = train(tmp_path / "plain")
    assert not traced
    monkeypatch.setattr(nn.Module, "compile", partialmethod(compile_part, backend=backend))
    limit = torch._dynamo.config.cache_size_limit
    torch._dynamo.reset()
    try:
        with caplog.at_level(logging.WARNING, "torch._dynamo"):
            compiled = train(tmp_path / "compiled", "--compile")
    finally:
        torch._dynamo.config.cache_size_limit = limit
        torch._dynamo.reset()
    assert not [r.message for r in caplog.records if "hit config." in r.message]
    assert max(traced) > 50  # a backbone in one piece
    for a, b in zip(plain, compiled, strict=True):
        terms = [k for k in a if k[0] in "lL"]
        assert {k: a[k] for k in terms} == pytest.approx({k: b[k] for k in terms}, rel=1e-4)


WITHOUT = """
import os, sys, torch  # torch itself may need some of these
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it is an ImportError
del os.sched_getaffinity
import speed, mkd, segkc
for script in (speed, mkd, segkc):
    script.parse_args([])
"""


def test_scripts_start_where_unix_modules_are_missing():
    """Guards: scripts that do not start on Windows."""
    words = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(words, cwd=procs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
