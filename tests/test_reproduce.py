"""docs/reproduce: what runs a table, prints it, and makes its data."""

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import save
from PIL import Image

import data

REPO = Path(__file__).resolve().parents[1]
TOOLS = REPO / "docs/reproduce"
PLANS = [p for p in sorted(TOOLS.glob("*.txt")) if ":" in p.read_text()]  # not lists of ids
sys.path.insert(0, str(TOOLS))
import camvid  # noqa: E402
import run_table  # noqa: E402
import table  # noqa: E402
import voc_animals  # noqa: E402

# A script that only counts: it has the files, signals and exit statuses of the real ones.
FAKE = """
import argparse, json, pathlib, signal, sys, time
p = argparse.ArgumentParser()
for name, kind, default in (("iters", int, 4), ("nap", float, 0.0), ("miou", float, 50.0),
                            ("weights", pathlib.Path, None), ("out", pathlib.Path, None)):
    p.add_argument("--" + name, type=kind, default=default)
a, stop = p.parse_known_args()[0], []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: stop.append(number))
a.out.mkdir(parents=True, exist_ok=True)
(a.out / "args.json").write_text(json.dumps(vars(a), default=str))
if a.weights and not a.weights.exists():
    sys.exit("error: no luck")
latest = a.out / "latest.pt"
start = int(latest.read_text()) if latest.exists() else 0
print("from", start, flush=True)
def log(kind, **line):
    print(json.dumps({"kind": kind} | line), file=open(a.out / "log.jsonl", "a"))
for step in range(start + 1, a.iters + 1):
    time.sleep(a.nap)
    log("train", step=step)
    if step == a.iters:
        log("eval", step=step, miou=a.miou, iou={"sky": 2 * a.miou, "sea": None})
        (a.out / "best.pt").write_text("")
    if stop or step == a.iters:
        latest.write_text(str(step))
    if stop and step < a.iters:
        sys.exit(128 + stop[0])
"""


def call(*words: object) -> subprocess.CompletedProcess:
    """A command of this Python."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


class Place:
    """A folder with a plan, to be run there."""

    def __init__(self, root: Path, *lines: str) -> None:
        self.root, self.out, self.results = root, root / "runs/plan", root / "results.jsonl"
        self.words = [TOOLS / "run_table.py", root / "plan.txt", "--runs", root / "runs"]
        self.words += ["--results", self.results]
        (root / "fake.py").write_text(FAKE)
        self.plan(*lines)

    def plan(self, *lines: str) -> None:
        text = [f"FAKE = {self.root}/fake.py", *lines]
        (self.root / "plan.txt").write_text("\n".join(text))

    def run(self, *flags: object) -> subprocess.CompletedProcess:
        return call(*self.words, *flags)


def started(text: str) -> list[str]:
    """The names of the runs that were started, in their order."""
    return re.findall(r"\] ([\w-]+): started", text)


def test_what_the_results_hold_is_not_run_again(tmp_path):
    """Guards: order, flags and evaluations kept, a run run twice, another command unnoticed."""
    lines = ["M = 30", "MIOU = --miou $M", "b-s0: python $FAKE $MIOU --nap 0.01"]
    place = Place(tmp_path, "# a comment", "", *lines, "a-s0: python $FAKE")
    p = place.run("--only", "s0", "--set", "M=40")
    assert p.returncode == 0, p.stderr
    assert started(p.stdout) == ["b-s0", "a-s0"]
    record = table.load(place.results)["b-s0"]
    assert (record["miou"], record["iou"]) == ({"4": 40.0}, {"sky": 80.0, "sea": None})
    assert record["command"] == f"python {tmp_path}/fake.py --miou 30 --nap 0.01"  # without --set
    assert not {"out", "weights"} & set(record["args"])  # paths of this machine

    place.plan(*lines, "a-s0: python $FAKE --iters 5", "c-s0: python $FAKE")
    p = place.run("--only", "[ac]", "--classes")
    assert started(p.stdout) == ["c-s0"]
    assert "a-s0: the results have it with another command: python" in p.stdout
    assert "| `c` | 4 | 1 | 50.0 | 50.0 |" in p.stdout
    assert "| `b` | 80.0 | - |" in p.stdout  # of the plan, though not of --only
    assert started(place.run().stdout) == []


def test_a_failed_run_is_named(tmp_path):
    """Guards: runs after it lost, its reason lost, a run that waits for it started or hung."""
    use = "b-s0: python $FAKE --weights $RUNS/a-s0/best.pt"
    place = Place(tmp_path, "a-s0: python $FAKE --weights no", use, "c-s0: python $FAKE")
    p = place.run()
    assert p.returncode == 1
    assert "failed: a-s0: exit status 1: error: no luck" in p.stdout
    assert "left: b-s0 0/?: waits for a-s0" in p.stdout
    assert list(table.load(place.results)) == ["c-s0"]
    place.plan("a-s0: python $FAKE", use)
    assert started(place.run().stdout) == ["a-s0", "b-s0"]


def test_a_run_waits_for_the_file_of_another(tmp_path):
    """Guards: started too early; more than N at a time, or one after the other; a file that is
    gone though its run is in the results.
    """
    use, nap = "python $FAKE --weights $RUNS/slow-s0/best.pt", "python $FAKE --nap 0.1"
    place = Place(tmp_path, f"a-s0: {use}", f"slow-s0: {nap}", f"x-s0: {nap}", f"y-s0: {nap}")
    said = place.run("--parallel", 2).stdout
    assert started(said)[:2] == ["slow-s0", "x-s0"]
    assert re.findall(r"(started|mIoU)", said)[:3] == ["started", "started", "mIoU"]
    (place.out / "slow-s0/best.pt").unlink()
    (place.out / "slow-s0/latest.pt").unlink()
    place.plan(f"slow-s0: {nap}", f"a-s0: {use}", f"c-s0: {use}")
    assert started(place.run().stdout) == ["slow-s0", "c-s0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_goes_on(tmp_path, number):
    """Guards: a signal that is not passed on, a run that begins anew, minutes that are lost."""
    place = Place(tmp_path, "a-s0: python $FAKE --nap 0.1 --iters 15", "b-s0: python $FAKE")
    words = [sys.executable, *map(str, place.words)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not list(place.out.glob("*/log.jsonl")):  # a step is done
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    text = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + number
    saved = int((place.out / "a-s0/latest.pt").read_text())
    assert f"left: a-s0 {saved}/15: goes on" in text
    assert started(text) == ["a-s0"]
    assert started(place.run().stdout) == ["a-s0", "b-s0"]
    assert f"from {saved}" in (place.out / "a-s0.txt").read_text()
    assert table.load(place.results)["a-s0"]["minutes"] > 0.015  # the naps of both parts


def test_a_faulty_plan_is_one_line(tmp_path):
    p = Place(tmp_path, "a-s0: python $NONE").run()
    assert p.returncode == 1
    assert re.fullmatch(r"error: .*plan.txt:2: \$NONE is not defined above.*\n", p.stderr)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.stem)
def test_plans_parse(plan):
    """Guards: flags that a script no longer has, a seed beside its name, other crops."""
    for run in run_table.read_plan(plan, Path("runs") / plan.stem, {}):
        script = importlib.import_module(Path(run.words[1]).stem)
        args = script.parse_args(run.words[2:])
        assert args.crop_size % 16 == 1
        assert args.iters == run.iters()
        assert run.name.endswith(f"-s{args.seed}")


def test_table_by_hand(tmp_path):
    """Guards: best taken for last, seeds paired wrongly, the wrong baseline, a lost minus."""
    saved = tmp_path / "saved.jsonl"
    runs = "labeled-s0 10 50 40, labeled-s1 10 20 44, labeled-8-s0 60, speed-s1 10 20 50"
    runs += ", speed-s0 10 20 39, speed-s2 10 20 31, mkd-ss0-8-s0 61, labeled-8-s0 62"
    for words in runs.split(", "):  # the last one replaces the third
        run, *miou = words.split()
        record = {"run": run, "iou": {"sky": 2 * float(miou[-1]), "sea": None}}
        record["miou"] = {str(10 * k): float(value) for k, value in enumerate(miou, 1)}
        table.save(record, saved)
    p = call(TOOLS / "table.py", saved, "--classes")
    assert p.stdout.splitlines()[:6] == [
        "| run | steps | seeds | last mIoU | best mIoU | − `labeled` (by seed) | minutes |",
        "|---|---|---|---|---|---|---|",
        "| `labeled` | 30 | 2 | 42.0 ± 2.8 | 47.0 |  |  |",
        "| `labeled-8` | 10 | 1 | 62.0 | 62.0 |  |  |",
        "| `speed` | 30 | 3 | 40.0 ± 9.5 | 40.0 | +2.5 (-1.0 +6.0) |  |",
        "| `mkd-ss0-8` | 10 | 1 | 61.0 | 61.0 | -1.0 (-1.0) |  |",
    ]
    assert "| `labeled` | 84.0 | - |" in p.stdout
    p = call(TOOLS / "table.py", saved, "--against", "speed")
    assert "| `labeled` | 30 | 2 | 42.0 ± 2.8 | 47.0 | -2.5 (+1.0 -6.0) |  |" in p.stdout


def test_table_of_folders_and_of_kept_results(tmp_path):
    """Guards: an unfinished run counted; kept results that cannot be read any more."""
    for name, step in (("a-s0", 4), ("a-s1", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text('{"iters": 4}')
        line = {"kind": "eval", "step": step, "miou": 5.0, "iou": {}}
        (tmp_path / name / "log.jsonl").write_text(json.dumps(line) + "\n")
    p = call(TOOLS / "table.py", *sorted(tmp_path.iterdir()))
    assert p.stdout.splitlines()[2:] == ["| `a` | 4 | 1 | 5.0 | 5.0 |  |  |"]
    assert "a-s1: no finished run, left out" in p.stderr
    p = call(TOOLS / "table.py", *(REPO / "docs/results").glob("*.jsonl"), "--classes")
    assert "| `labeled" in p.stdout, p.stderr


def main_of(module, monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    module.main()


def test_voc_animals(tmp_path, monkeypatch):
    """Guards: other classes kept, void lost, SBD's mask before VOC's."""
    voc, r, out = tmp_path / "VOC2012", np.random.default_rng(0), tmp_path / "out"
    ours = {0: 0, 8: 1, 10: 2, 12: 3, 13: 4, 17: 5, 15: 0, 255: 255}  # 15: person, anything else
    masks = {f"2007_{k}": r.choice(np.array([*ours], np.uint8), (20, 15)) for k in (1, 2, 3)}
    for name, mask in masks.items():
        save(voc / f"JPEGImages/{name}.jpg", np.full((40, 30, 3), 90, np.uint8))
        folder = "SegmentationClass" if name == "2007_1" else "SegmentationClassAug"
        save(voc / f"SegmentationClassAug/{name}.png", np.zeros((40, 30), np.uint8))
        save(voc / f"{folder}/{name}.png", mask.repeat(2, 0).repeat(2, 1))  # VOC's own wins
    monkeypatch.setattr(voc_animals, "HERE", tmp_path)
    (tmp_path / "voc_animals_train.txt").write_text("2007_1\n2007_2")
    (tmp_path / "voc_animals_val.txt").write_text("2007_3")
    main_of(voc_animals, monkeypatch, voc, out, 2)
    made = data.load_source("folder", out)
    assert list(made.classes) == ["background", "cat", "cow", "dog", "horse", "sheep"]
    for item, mask in zip(made.train + made.val, masks.values(), strict=True):
        assert np.array_equal(Image.open(item.mask), np.vectorize(ours.get)(mask))
        assert Image.open(item.image).size == (15, 20)


def test_camvid(tmp_path, monkeypatch, capsys):
    """Guards: void taken for a class, masks that lose their ids, a frame without a mask."""
    source, r, masks = tmp_path / "CamVid", np.random.default_rng(0), {}
    for name in ("train0.png", "train1.png", "val0.png"):
        masks[name] = r.integers(0, 12, (20, 24), np.uint8)
        save(source / name[:-5] / name, np.full((40, 48, 3), 90, np.uint8))
        save(source / f"{name[:-5]}annot" / name, masks[name].repeat(2, 0).repeat(2, 1))
    main_of(camvid, monkeypatch, source, tmp_path / "half", 2)
    half = data.load_source("folder", tmp_path / "half")
    assert (len(half.train), len(half.val), len(half.classes)) == (2, 1, 11)
    for item in half.train + half.val:
        mask = masks[item.mask.name]
        assert np.array_equal(Image.open(item.mask), np.where(mask == 11, 255, mask))
        assert Image.open(item.image).size == (24, 20)
    (source / "trainannot/train0.png").unlink()
    with pytest.raises(SystemExit, match="1 frames are missing"):
        main_of(camvid, monkeypatch, source, tmp_path / "c")
    assert "train0.png: frame or mask cannot be used" in capsys.readouterr().err
