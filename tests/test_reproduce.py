"""The tools beside the tests: what turns runs into a table, and CamVid into our layout."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from datasets import blobs, make_folder, noise, save
from PIL import Image

import data

HERE = Path(__file__).resolve().parent


def call(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_run(run: Path, steps: int, *miou: float) -> None:
    """A folder with the evaluations at steps 10, 20, ... of a run of `steps` steps."""
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps({"iters": steps, "lr": 0.1, "out": str(run)}))
    lines = [{"kind": "train", "step": 5, "loss": 1.0}]
    for k, v in enumerate(miou, 1):
        iou = {"sky": 2 * v, "sea": None}  # sea: in no val image and in no prediction
        lines.append({"kind": "eval", "step": 10 * k, "miou": v, "iou": iou})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_table(tmp_path):
    """Guards: unfinished runs counted, best taken for last, seeds mixed with other runs."""
    write_run(tmp_path / "a-s0", 30, 10.0, 50.0, 40.0)
    write_run(tmp_path / "a-s1", 30, 10.0, 20.0, 44.0)
    write_run(tmp_path / "a-s2", 30, 10.0, 20.0)
    write_run(tmp_path / "b-s0", 20, 1.0, 3.0)
    (tmp_path / "no run").mkdir()
    p = call(HERE / "table.py", *sorted(tmp_path.iterdir()), "--curves", tmp_path / "c.png")
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines()[2:] == [
        "| `a` | 30 | 2 | 42.0 ± 2.8 | 47.0 |",
        "| `b` | 20 | 1 | 3.0 | 3.0 |",
    ]
    assert "a-s2: not finished" in p.stderr
    # saved results print the same table, hold no paths, and grow by a second call
    saved = tmp_path / "saved.jsonl"
    for names in (["a-s0", "a-s1"], ["b-s0"]):
        assert call(HERE / "table.py", *(tmp_path / n for n in names), "--save", saved).stdout
    classes = call(HERE / "table.py", saved, "--classes").stdout
    assert classes.startswith(p.stdout)
    assert classes.splitlines()[-4:] == [
        "| run | mIoU | sky | sea |",
        "|---|---|---|---|",
        "| `a` | 42.0 | 84.0 | - |",
        "| `b` | 3.0 | 6.0 | - |",
    ]
    assert [json.loads(line)["args"] for line in saved.read_text().splitlines()] == [
        {"iters": 30, "lr": 0.1},
        {"iters": 30, "lr": 0.1},
        {"iters": 20, "lr": 0.1},
    ]
    more = call(HERE / "table.py", saved, tmp_path / "b-s0", tmp_path / "a-s0")
    assert more.stdout == p.stdout  # a run in both is one run
    colors = {c for _, c in Image.open(tmp_path / "c.png").getcolors(10_000)}
    assert (0x44, 0x44, 0x44) in colors
    assert (0xD6, 0x27, 0x28) in colors
    assert call(HERE / "table.py", tmp_path / "no run").returncode == 1


def test_table_at_a_step(tmp_path):
    """Guards: another step's result, a run without that step, classes of the last step."""
    write_run(tmp_path / "a-s0", 30, 10.0, 50.0, 40.0)
    write_run(tmp_path / "a-s1", 30, 10.0, 20.0)
    write_run(tmp_path / "b-s0", 30, 60.0)
    runs, saved = sorted(tmp_path.iterdir()), tmp_path / "saved.jsonl"
    p = call(HERE / "table.py", *runs, "--at", 20, "--save", saved, "--classes")
    assert p.stdout.splitlines()[2:] == [
        "| `a` | 20 | 2 | 35.0 ± 21.2 | 35.0 |",
        "",
        "| run | mIoU | sky | sea |",
        "|---|---|---|---|",
        "| `a` | 35.0 | 70.0 | - |",
    ]
    assert "b-s0: not evaluated at step 20, left out" in p.stderr
    assert call(HERE / "table.py", saved, "--classes").stdout == p.stdout
    p = call(HERE / "table.py", saved, "--at", 10, "--classes")
    assert p.stdout.splitlines()[2:] == ["| `a` | 10 | 2 | 10.0 ± 0.0 | 10.0 |"]
    p = call(HERE / "table.py", saved, "--at", 15)
    assert p.returncode == 1
    assert p.stdout == ""
    assert p.stderr.startswith("a-s0: not evaluated at step 15, left out\na-s1")
    p = call(HERE / "table.py", tmp_path / "a-s0", "--at", 20, "--grid", tmp_path / "g.png")
    assert p.returncode == 2
    assert "--grid draws best.pt" in p.stderr


@pytest.mark.parametrize("script", ["speed", "mkd", "segkc"])
def test_unlabeled(script, tmp_path):
    """Guards: another network than the run's last, labelled images counted, sets swapped."""
    root = make_folder(tmp_path / "root", labeled=6, unlabeled=2, val=3)
    flags = f"--dataset folder --root {root} --backbone resnet18 --weights none --crop-size 32"
    flags += " --batch-size 2 --iters 3 --eval-every 3 --lr 0.02 --ramp 0 --workers 0 --amp off"
    flags += " --split 2" + " --senior mobilenet_v2 --junior resnet18" * (script == "segkc")
    p = call(HERE.parent / f"{script}.py", *flags.split(), "--out", tmp_path / "a-s0")
    assert p.returncode == 0, p.stderr
    saved = tmp_path / "saved.jsonl"
    p = call(HERE / "unlabeled.py", "2", tmp_path / "a-s0", "--save", saved)
    assert p.returncode == 0, p.stderr
    found, log = json.loads(saved.read_text()), (tmp_path / "a-s0/log.jsonl").read_text()
    assert found["val_miou"] == pytest.approx(json.loads(log.splitlines()[-1])["miou"], abs=1e-4)
    assert (found["unlabeled_images"], found["val_images"]) == (4, 3)

    # the same network, by --test-only, where the val images are those that were unlabelled
    split = data.make_split(data.load_source("folder", root), "2", 0, "classic")
    for old in root.glob("val/*/*"):
        old.unlink()
    for item in split.unlabeled:
        if item.mask:
            shutil.copy(item.image, root / "val/images")
            shutil.copy(item.mask, root / "val/masks")
    flags = f"--dataset folder --root {root} --test-only {tmp_path / 'a-s0/best.pt'} --workers 0"
    p = call(HERE.parent / f"{script}.py", *flags.split(), "--amp", "off")
    assert f"mIoU {found['unlabeled_miou']:.2f} on 4 images" in p.stdout
    assert found["unlabeled_accuracy"] != found["val_accuracy"]

    table = call(HERE / "unlabeled.py", "2", saved).stdout.splitlines()
    values = [f"{found[k]:.1f}" for k in ("unlabeled_miou", "unlabeled_accuracy")]
    values += [f"{found[k]:.1f}" for k in ("val_miou", "val_accuracy")]
    assert table[-1] == f"| `a` | 1 | {' | '.join(values)} |"
    assert call(HERE / "unlabeled.py", "3", saved).returncode == 2


def test_camvid(tmp_path):
    """Guards: void taken for a class, masks that lose their ids, files in other places."""
    source = tmp_path / "CamVid"
    for part in ("train", "val"):
        for k in range(2):
            save(source / part / f"{part}{k}.png", noise(k, (48, 40)))
            save(source / f"{part}annot" / f"{part}{k}.png", blobs(k, 12))
    p = call(HERE / "camvid.py", source, tmp_path / "out")
    assert p.returncode == 0, p.stderr
    made = data.load_source("folder", tmp_path / "out")
    assert (len(made.train), len(made.val), len(made.classes)) == (2, 2, 11)
    assert data.check(made)[0] == []
    raw = np.asarray(Image.open(source / "valannot/val1.png"))
    mask = np.asarray(Image.open(made.val[1].mask))
    assert (raw == 11).any()
    assert np.array_equal(mask, np.where(raw == 11, 255, raw))
    assert call(HERE / "camvid.py", tmp_path, tmp_path / "out").returncode == 1
    assert call(HERE / "camvid.py", source, tmp_path / "half", 2).returncode == 0
    half = data.load_source("folder", tmp_path / "half")
    assert data.check(half)[0] == []
    image = np.asarray(data.read_image(half.val[1]))
    full = np.asarray(data.read_image(made.val[1]), float)
    small = full.reshape(20, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(image - small).max() <= 1
    small = np.asarray(Image.open(half.val[1].mask))
    assert small.shape == image.shape[:2]
    cells = mask.reshape(20, 2, 24, 2).transpose(1, 3, 0, 2).reshape(4, 20, 24)
    assert (small == cells).any(0).all()  # each is one of the four ids that it stands for


def test_oracle_knows_the_labels_of_the_crops(tmp_path):
    """Guards: a label crop that is drawn anew, or of another image."""
    for part in ("train", "val"):
        for k in range(4):
            mask = blobs(k, 3) % 255  # no ignored pixels
            save(tmp_path / part / f"masks/{k}.png", mask)
            save(tmp_path / part / f"images/{k}.png", np.repeat(60 * mask[..., None], 3, 2))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    source = data.load_source("folder", tmp_path)
    split = data.make_split(source, "1/2", 0, "")
    args = Namespace(
        batch_size=2, seed=0, labeled_only=False, crop_size=32, scale=(0.5, 1.5), iters=3
    )
    seen = set()
    for step in range(3):
        batch = oracle.WithTruth(split, args)[step]
        holds = data.rect_mask(batch["u_rect"], 32, 32)
        assert torch.equal(batch["u_y"] == 255, ~holds)
        u, y = batch["u"][..., 0].float()[holds], batch["u_y"][holds].float()
        assert ((u - 60 * y).abs() < 30).float().mean() > 0.9  # borders of classes are blurred
        seen |= set(y.tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("mode", ["truth", "right"])
def test_oracle_teaches_the_truth(mode):
    r = np.random.default_rng(0)
    z = torch.from_numpy(r.normal(size=(2, 4, 5, 6)))
    y = torch.from_numpy(r.integers(0, 4, (2, 5, 6)).astype(np.uint8))
    y[:, 0] = 255
    net = oracle.Corrected(lambda u, features: (z, u, features), y, mode)
    found, f, deep = net("u", features=True)
    assert (f, deep) == ("u", True)
    p, taught = found.softmax(1).numpy(), 0
    for b, i, j in np.ndindex(2, 5, 6):
        if y[b, i, j] != 255 and (mode == "truth" or z[b, :, i, j].argmax() == y[b, i, j]):
            assert p[b, y[b, i, j], i, j] > 0.999
            taught += 1
        else:
            assert p[b, :, i, j].max() == 0.25
    assert taught == 48 if mode == "truth" else 0 < taught < 48


def test_oracle_trains(tmp_path):
    flags = "--dataset shapes --iters 2 --crop-size 48 --batch-size 2 --workers 0 --log-every 1"
    share = {}
    for mode in ("truth", "right"):
        out = tmp_path / mode
        p = call(HERE / "oracle.py", mode, *flags.split(), "--ramp", 0, "--out", out)
        assert p.returncode == 0, p.stderr
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        share[mode] = [line["confident"] for line in lines if line["kind"] == "train"]
    assert share["truth"] == [1.0, 1.0]
    assert 0 < max(share["right"]) < 1
    other = [HERE / "oracle.py", "right", *flags.split(), "--ramp", 0, "--out", tmp_path / "truth"]
    for words in ([HERE / "oracle.py", "wrong"], other, [*other, "--labeled-only"]):
        p = call(*words)
        assert p.returncode == 2
        assert len(p.stderr.splitlines()) == 1


def test_unlabeled_against_a_row(tmp_path):
    """Guards: seeds paired wrongly, a seed that one of two rows lacks, signs."""
    records = []
    for run, value in [("a-s0", 50.0), ("a-s1", 40.0), ("b-s1", 43.0), ("b-s0", 51.0), ("c-s2", 9)]:
        record = {"run": run, "split": "2", "unlabeled_images": 4, "val_images": 3}
        record |= {"unlabeled_miou": value, "unlabeled_accuracy": 2 * value}
        records.append(record | {"val_miou": 100 - value, "val_accuracy": 70})
    saved = tmp_path / "saved.jsonl"
    saved.write_text("".join(json.dumps(r) + "\n" for r in records))
    p = call(HERE / "unlabeled.py", "2", saved, "--against", "a")
    assert p.returncode == 0, p.stderr
    second = p.stdout.split("\n\n")[-1].splitlines()
    assert second[2:] == [
        "| `b` | 2 | +2.0 (+1.0 +3.0) | +4.0 (+2.0 +6.0) | -2.0 (-1.0 -3.0) | +0.0 (+0.0 +0.0) |"
    ]
    p = call(HERE / "unlabeled.py", "2", saved, "--against", "d")
    assert p.returncode == 2
    assert p.stderr == "error: --against d: is no row; give one of a, b, c\n"
