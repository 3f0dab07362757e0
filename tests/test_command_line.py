"""The three scripts as commands: flags and presets, bad input, NOTE lines, best.pt on pictures."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from datasets import make_folder, make_pascal, noise, save, truncate
from PIL import Image

import common
import data
import mkd
import segkc
import speed

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"speed": speed, "mkd": mkd, "segkc": segkc}
OVER_SCRIPTS = pytest.mark.parametrize("script", SCRIPTS)


def run(script: str, argv: str | list, cwd: Path, **env: str) -> SimpleNamespace:
    """`python <script>.py <argv>` in a fork of this process: its status, out and err."""
    argv = argv.split() if isinstance(argv, str) else [str(a) for a in argv]
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(cwd)
            for stream in (1, 2):
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(f"stream{stream}", flags, 0o666), stream)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)
            os.environ.update(env)
            sys.argv = [f"{script}.py", *argv]
            common.launch(SCRIPTS[script].main)
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (
        (cwd / f"stream{k}").read_text().replace("\r", "\n").splitlines() for k in (1, 2)
    )
    return SimpleNamespace(status=status, out=out, err=err)


def error_of(done: SimpleNamespace, status: int = 2) -> str:
    """The one line that a refused command ends with."""
    assert done.status == status, done.err
    errors = [line for line in done.err if "error: " in line]
    assert errors == done.err[-1:], done.err
    assert len(done.err) == 1 or done.err[0].startswith("usage: "), done.err  # argparse's
    assert not any("Traceback" in line for line in done.err + done.out)
    return errors[0]


# ------------------------------------------------------------------------- flags and presets

TAU = {"speed": 0.95, "mkd": 0.0, "segkc": 0.95}  # MKD: off in the released config
CNN = dict(optimizer="sgd", weight_decay=1e-4, output_stride=16, scale=(0.5, 2.0), ramp=0.0)
VIT = dict(optimizer="adamw", lr=5e-6, head_lr_mult=40, weight_decay=0.01, scale=(0.5, 2.0))
VOC = dict(crop_size=321, batch_size=8, epochs=80, lr=1e-3, head_lr_mult=10, sup_loss="ce")
FIELD = {  # the table of the field's protocols
    "pascal": CNN | VOC,
    "folder": CNN | VOC,
    "cityscapes": CNN
    | dict(crop_size=801, batch_size=8, epochs=240, lr=5e-3, head_lr_mult=1, sup_loss="ohem")
    | dict(eval_mode="slide", ohem_share=0.156),
    "pascal --backbone dinov2_vits14": VIT
    | dict(crop_size=518, batch_size=16, epochs=60, sup_loss="ce"),
    "folder --backbone dinov2_vitb14": VIT
    | dict(crop_size=518, batch_size=16, epochs=60, sup_loss="ce"),
    "cityscapes --backbone dinov2_vitb14": VIT
    | dict(crop_size=798, batch_size=8, epochs=180, sup_loss="ohem"),
}


@pytest.mark.parametrize("argv", FIELD)
@OVER_SCRIPTS
def test_presets_are_the_fields(script, argv):
    args = vars(SCRIPTS[script].parse_args(["--dataset", *argv.split()]))
    expected = dict(threshold=0.0 if argv == "cityscapes" else TAU[script], weights="imagenet")
    expected |= FIELD[argv]
    assert {k: args[k] for k in expected} == expected
    pair = {"speed": "resnet101", "mkd": "resnet101", "segkc": "resnet50"}
    assert args["backbone"] == (argv.split()[2] if "--" in argv else pair[script])
    assert args.get("senior", "resnet101") == "resnet101"


@OVER_SCRIPTS
def test_presets_of_the_built_in_images_need_no_file_and_a_flag_overrides_them(script):
    args = SCRIPTS[script].parse_args(["--dataset", "shapes"])
    assert (args.weights, args.threshold, args.ramp) == ("none", 0.95, 0.5)
    assert args.crop_size in (64, 65)
    argv = "--dataset pascal --crop-size 280 --lr 0.5 --threshold 0.7".split()
    args = SCRIPTS[script].parse_args(argv)
    assert (args.crop_size, args.lr, args.threshold) == (280, 0.5, 0.7)


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    found, parse = {}, common.parse
    with pytest.MonkeyPatch.context() as patch:
        for name, module in SCRIPTS.items():

            def seen(p: argparse.ArgumentParser, *args: object, name: str = name, **kw: object):
                found[name] = p
                return parse(p, *args, **kw)

            patch.setattr(common, "parse", seen)
            module.parse_args(["--dataset", "shapes"])
    return found


def test_shared_flags_are_identical_over_scripts(parsers):
    shared = common.make_parser(str(ROOT / "speed.py"), "")
    for action in shared._actions:
        for name, parser in parsers.items():
            other = next(a for a in parser._actions if action.option_strings == a.option_strings)
            for field in ("dest", "nargs", "choices", "help", "metavar", "type"):
                assert getattr(other, field) == getattr(action, field), (name, other.dest, field)


@OVER_SCRIPTS
def test_every_flag_has_help_and_is_used(script, parsers):
    text = "".join((ROOT / f"{name}.py").read_text() for name in (script, "common", "data"))
    for action in parsers[script]._actions:
        assert action.help, action.option_strings
        if action.dest != "help":
            used = rf"\b(args|first)\.{action.dest}\b"
            assert re.search(used, text), f"dead flag {action.dest}"


BLOCKS = {  # from a line of main() to another
    "ranks": ("    # ---- ranks", "    # ---- data"),
    "data": ("    # ---- data", "    # ---- network"),
    "optimizer": ("    fused = None", "    # ---- resume"),
    "resume": ("    start = common.resume", "    # ---- train"),
    "schedule": ("    for step, batch", "        ramp ="),
    "step": ("        optimizer.zero_grad", "        # ---- log, save"),
    "log, save, evaluate, teardown": ("        # ---- log, save", "\n\nif __name__"),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_what_the_scripts_share_is_written_alike(block):
    """Three copies, on purpose: they must not drift apart."""
    first, end = BLOCKS[block]
    texts = set()
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text()
        assert text.count(first) == 1, (name, first)
        texts.add(text[text.index(first) :].split(end)[0])
    assert len(texts) == 1, "\n".join(texts)


def test_cutmix_is_written_alike():
    both = {(ROOT / f"{name}.py").read_text() for name in ("speed", "segkc")}
    assert len({text[text.index("def cutmix") :].split("\n\n\n")[0] for text in both}) == 1


# ------------------------------------------------------------------------- what is found where


@OVER_SCRIPTS
def test_without_voc_the_first_lines_say_so(script, tmp_path):
    """Nothing is trained here: the split is refused in the third line."""
    done = run(script, "--split 9999", tmp_path)
    assert "9999" in error_of(done)
    assert all(line.startswith("NOTE: ") for line in done.out[:2])
    assert "no PASCAL VOC 2012 under data: this run uses the built-in shapes" in done.out[0]
    command = "python data.py --dataset pascal --root data --download"
    assert done.out[1].endswith(command)
    assert data.make_parser().parse_args(command.split()[2:]).download
    assert not any("NOTE" in line for line in run(script, "--dataset shapes --split 9999", tmp_path).out)
    one = run(script, "--split 9999", tmp_path, RANK="1", WORLD_SIZE="2", MASTER_PORT="1")
    assert not one.out


def test_the_data_set_is_voc_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert speed.parse_args([]).dataset == "shapes"
    make_pascal(tmp_path / "data")
    capsys.readouterr()
    for argv in ([], ["--root", "data"]):
        assert speed.parse_args(argv).dataset == "pascal"
    assert "NOTE" not in capsys.readouterr().out
    assert data.find_dataset("shapes", tmp_path) == "shapes"


# --------------------------------------------------------------------------------- bad input

Spoil = Callable[[Path], None]


def lists(labeled: str, unlabeled: str = "t05") -> Spoil:
    def write(tmp: Path) -> None:
        (tmp / "lists").mkdir()
        (tmp / "lists/labeled.txt").write_text(labeled)
        (tmp / "lists/unlabeled.txt").write_text(unlabeled)

    return write


def truncated(pattern: str) -> Spoil:
    return lambda tmp: [truncate(p) for p in (tmp / "root").glob(pattern)]


def masks(change: Callable[[np.ndarray], np.ndarray], part: str = "train") -> Spoil:
    def write(tmp: Path) -> None:
        for path in (tmp / "root" / part / "masks").iterdir():
            save(path, change(np.zeros((40, 48), np.uint8)))

    return write


def put(name: str, content: object) -> Spoil:
    """Writes a file: text, bytes, or whatever torch.save makes of it."""

    def write(tmp: Path) -> None:
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content(tmp) if callable(content) else content, path)

    return write


class Code:
    """Unpickling it would make a file."""

    def __init__(self, tmp: Path) -> None:
        self.marker = tmp / "executed"

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def checkpoint(**changes: object) -> dict:
    """A best.pt with random weights; `changes` may spoil it."""
    torch.manual_seed(0)
    net = common.build_network("resnet18", 3)
    saved = dict(net=net.state_dict(), config=net.config, classes=["sky", "road", "car"])
    saved |= dict(eval=dict(crop_size=33, eval_mode="whole", amp="off"))
    return saved | dict(dataset="folder", step=1, miou=1.0) | changes


def resnet18(_: Path) -> dict:
    return torchvision.models.resnet18(weights=None).state_dict()


NOTHING: Spoil = lambda tmp: None  # noqa: E731
FILE, CODE = put("f", b""), lambda tmp: {"a": Code(tmp)}
LISTS, WEIGHTS, TEST = "--split {tmp}/lists", "--weights {tmp}/w.pth", "--test-only {tmp}/best.pt"
ANOTHER = "another architecture | resnet18"

CASES: dict[str, tuple[Spoil, str, str]] = {
    # name: what is spoilt, flags, what the line must contain: flag, value, remedy
    # -- the split
    "split nonsense": (NOTHING, "--split nonsense", "--split nonsense | 1/8, full | a folder"),
    "split 0": (NOTHING, "--split 0", "--split 0 | 0 labelled images | 1 to 4"),
    "split too large": (NOTHING, "--split 5", "--split 5 | 1 to 4"),
    "split above 1": (NOTHING, "--split 3/2", "--split 3/2 | 1 to 4"),
    "split divided by 0": (NOTHING, "--split 1/0", "--split 1/0 | 1/8, full"),
    "split negative": (NOTHING, "--split=-1", "--split -1 | 1/8, full"),
    "split with a long name": (NOTHING, "--split " + "x" * 300, "--split xxx"),
    "split seed negative": (NOTHING, "--split-seed -1", "--split-seed: -1 | at least 0"),
    "folder without lists": (NOTHING, "--split {tmp}/root", "labeled.txt"),
    "list out of the root": (lists("train/../../x.jpg"), LISTS, "train/../../x.jpg | relative"),
    "list with an absolute path": (lists("/etc/passwd"), LISTS, "/etc/passwd | relative"),
    "list with an unknown id": (lists("t99"), LISTS, "labeled.txt | t99 | remove"),
    "list with a val id": (lists("t00\nv00"), LISTS, "v00 | once"),
    "lists that overlap": (lists("train/images/t00.jpg", "t05\nt00"), LISTS, "t00 | once"),
    "list with nothing": (lists("\n\n"), LISTS, "labeled.txt | empty | at least one"),
    "list without masks": (lists("t00\nt06"), LISTS, "t06 | no mask | unlist"),
    "list that is no text": (put("lists/labeled.txt", b"\x80\xff"), LISTS, "labeled.txt | text"),
    "one unlabelled image": (lists("t00"), LISTS, "1 unlabelled image | label fewer"),
    # -- the data
    "unknown data set": (NOTHING, "--dataset voc", "--dataset | 'voc' | pascal"),
    "no pascal": (NOTHING, "--dataset pascal", "{tmp}/root | --download"),
    "no cityscapes": (NOTHING, "--dataset cityscapes", "{tmp}/root | leftImg8bit"),
    "no folder": (NOTHING, "--root {tmp}/nowhere", "nowhere/classes.txt | not found"),
    "root is a file": (FILE, "--root {tmp}/f", "{tmp}/f/classes.txt"),
    "truncated JPEG": (truncated("train/images/t0[0-3].jpg"), "", ".jpg | replace or remove"),
    "mask of another size": (masks(lambda m: m[1:]), "", ".png | (48, 39) | (48, 40)"),
    "mask value too large": (masks(lambda m: m + 3), "", ".png | value 3 | 0 to 2"),
    "mask value in val": (masks(lambda m: m + 9, "val"), "", "v00.png | value 9 | 0 to 2"),
    "RGB mask": (masks(lambda m: np.stack([m] * 3, 2)), "", ".png | RGB | map each colour"),
    # -- weights and checkpoints
    "weights of another network": (
        put("w.pth", resnet18),
        WEIGHTS + " --backbone resnet34",
        "resnet34 | w.pth | another architecture | give a file of resnet34",
    ),
    "weights missing": (NOTHING, WEIGHTS, "w.pth | give another file"),
    "weights are text": (put("w.pth", b"hello"), WEIGHTS, "w.pth | give another file"),
    "weights are empty": (put("w.pth", {}), WEIGHTS, ANOTHER),
    "weights are a list": (put("w.pth", [1, 2]), WEIGHTS, "w.pth | list"),
    "weights with numbers for names": (put("w.pth", {0: 1}), WEIGHTS, "w.pth"),
    "weights with code": (put("w.pth", CODE), WEIGHTS, "w.pth"),
    "latest.pt with code": (put("out/latest.pt", CODE), "", "latest.pt"),
    "latest.pt truncated": (put("out/latest.pt", b"PK\x03\x04 cut"), "", "latest.pt"),
    "latest.pt of another kind": (put("out/latest.pt", {"net": {}}), "", "latest.pt | --overwrite"),
    "best.pt alone": (put("out/best.pt", {}), "", "{tmp}/out | no latest.pt | give another --out"),
    "out is a file": (FILE, "--out {tmp}/f", "{tmp}/f | give another --out"),
    "out below a file": (FILE, "--out {tmp}/f/out", "{tmp}/f/out | give another --out"),
    # -- --test-only
    "test nothing": (NOTHING, TEST, "best.pt | give another file"),
    "test a folder": (NOTHING, "--test-only {tmp}", "{tmp} | give another file"),
    "test code": (put("best.pt", CODE), TEST, "best.pt"),
    "test a state dict": (put("best.pt", {"a": 1}), TEST, "best.pt | give one"),
    "test other classes": (
        put("best.pt", lambda _: checkpoint(classes=["sky", "road", "cat"])),
        TEST,
        "best.pt | classes | its own data set",
    ),
    "test an unknown network": (
        put("best.pt", lambda _: checkpoint(config=dict(backbone="vgg", num_classes=3))),
        TEST,
        "best.pt | vgg",
    ),
    "test a config that is none": (
        put("best.pt", lambda _: checkpoint(config=[1])),
        TEST,
        "best.pt",
    ),
    "test a strange data set": (put("best.pt", {"dataset": ["x"]}), TEST, "best.pt"),
    "predictions of a run": (NOTHING, "--save-predictions {tmp}/p", "--save-predictions | CKPT"),
    "pictures without a network": (NOTHING, "--predict {tmp}", "--predict | --test-only CKPT"),
    # -- numbers and words
    "odd batch": (NOTHING, "--batch-size 3", "--batch-size 3 on 1 ranks | multiple of 2"),
    "batch 0": (NOTHING, "--batch-size 0", "--batch-size: 0 | at least 1"),
    "crop negative": (NOTHING, "--crop-size -32", "--crop-size: -32 | at least 1"),
    "crop too small": (NOTHING, "--crop-size 31", "--crop-size 31 | at least 32 pixels"),
    "crop off the patches": (
        NOTHING,
        "--crop-size 64 --backbone dinov2_vits14",
        "--crop-size 64 | multiple of 14",
    ),
    "OHEM of more than all": (NOTHING, "--ohem-share 1.1", "--ohem-share: 1.1 | at most 1"),
    "DPT on a CNN": (NOTHING, "--decoder dpt", "--decoder dpt | resnet18 | use deeplab"),
    "lr negative": (NOTHING, "--lr=-1e-3", "--lr: -1e-3 | above 0"),
    "lr 0": (NOTHING, "--lr 0", "--lr: 0 | above 0"),
    "lr nan": (NOTHING, "--lr nan", "--lr: nan | above 0"),
    "lr inf": (NOTHING, "--lr inf", "--lr: inf | above 0"),
    "lr text": (NOTHING, "--lr fast", "--lr | 'fast' | float"),
    "weight decay nan": (NOTHING, "--weight-decay nan", "--weight-decay: nan | at least 0"),
    "iters 0": (NOTHING, "--iters 0", "--iters: 0 | at least 1"),
    "iters half": (NOTHING, "--iters 1.5", "--iters | '1.5' | int"),
    "epochs 0": (NOTHING, "--epochs 0", "--epochs: 0 | at least 1"),
    "workers negative": (NOTHING, "--workers -1", "--workers: -1 | at least 0"),
    "save-every 0": (NOTHING, "--save-every 0", "--save-every: 0 | at least 1"),
    "threshold above 1": (NOTHING, "--threshold 95", "--threshold: 95 | at most 1"),
    "scale of one number": (NOTHING, "--scale 0.5", "--scale | 2 arguments"),
    "scale 0": (NOTHING, "--scale 0 1", "--scale: 0 | above 0"),
    "scale the wrong way": (NOTHING, "--scale 2 0.5", "--scale 2.0 0.5 | smaller one first"),
    "unknown backbone": (NOTHING, "--backbone vgg", "--backbone | 'vgg' | resnet101"),
    "unknown precision": (NOTHING, "--amp fp8", "--amp | 'fp8' | bf16"),
    "output stride 4": (NOTHING, "--output-stride 4", "--output-stride | 4 | 8, 16"),
    "unknown flag": (NOTHING, "--lern-rate 1", "unrecognized | --lern-rate"),
}


def tiny(script: str, tmp: Path) -> str:
    """The flags of a run that works: each case spoils one thing of it."""
    flags = f"--dataset folder --root {tmp}/root --split full --crop-size 33 --batch-size 2 "
    flags += f"--iters 1 --backbone resnet18 --weights none --workers 0 --out {tmp}/out "
    return flags + "--senior resnet18 --senior-weights none " * (script == "segkc")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder data set with one val image; tests that spoil it take a copy."""
    return make_folder(tmp_path_factory.mktemp("data") / "root", val=1)


@pytest.mark.parametrize("name", CASES)
@OVER_SCRIPTS
def test_bad_input(script, name, tmp_path, root):
    spoil, flags, said = CASES[name]
    shutil.copytree(root, tmp_path / "root")
    spoil(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt*")}
    done = run(script, tiny(script, tmp_path) + flags.format(tmp=tmp_path), tmp_path)
    line = error_of(done, 1 if name.startswith("out ") else 2)
    for part in said.split(" | "):
        assert part.format(tmp=tmp_path) in line, line
    assert not (tmp_path / "executed").exists()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt*")} == before  # nothing saved


@pytest.mark.parametrize(("world", "batch"), [(2, 2), (2, 3), (3, 8), (4, 12)])
@OVER_SCRIPTS
def test_batch_that_the_ranks_cannot_share(script, world, batch, tmp_path, root):
    argv = tiny(script, tmp_path) + f"--root {root} --batch-size {batch}"
    args = SCRIPTS[script].parse_args(argv.split())
    split = data.load_split(args)
    with pytest.raises(data.InputError) as e:
        common.settle(args, split, world, torch.device("cpu"))
    assert f"--batch-size {batch} on {world} ranks" in str(e.value)
    assert f"multiple of {2 * world}" in str(e.value)


@OVER_SCRIPTS
def test_a_run_that_fails_ends_with_one_line(script, tmp_path, root):
    argv = tiny(script, tmp_path) + f"--root {root} --lr 1e30 --iters 3 --log-every 1"
    line = error_of(run(script, argv, tmp_path), 1)
    assert re.match(r"error: step [23]: \w+ is (nan|inf|-inf); .*lower --lr", line), line


@pytest.mark.parametrize("flags", ["--split nonsense", "--workers 1 --iters 9"])
def test_as_a_user_sees_it(flags, tmp_path, root):
    """A process of its own, in another folder; the second fails in a worker."""
    shutil.copytree(root, tmp_path / "root")
    truncate(tmp_path / "root/train/images/t01.jpg")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "mkd.py", *(tiny("mkd", tmp_path) + flags).split()]
    p = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    done = SimpleNamespace(status=p.returncode, out=[], err=p.stderr.splitlines())
    line = error_of(done)
    assert line.startswith("error: ")
    assert ("t01.jpg" if "workers" in flags else "--split nonsense") in line


# ------------------------------------------------------------------- the trained network in use


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    """A best.pt of random weights, evaluated in windows of 33 pixels in bf16."""
    path = tmp_path_factory.mktemp("best") / "best.pt"
    saved = checkpoint(eval=dict(crop_size=33, eval_mode="slide", amp="bf16"))
    saved["net"]["classifier.weight"] *= 20  # all classes are predicted
    torch.save(saved, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@OVER_SCRIPTS
def test_a_runs_best_network_has_the_runs_score(script, tmp_path, root):
    """Guards: other weights, sizes or settings in --test-only than in the evaluation of a run;
    a score over some of the classes that does not say so.
    """
    shutil.copytree(root, tmp_path / "root")
    names = ["sky", "road", "car", *[f"unseen{k}" for k in range(9)]]
    (tmp_path / "root/classes.txt").write_text("\n".join(names))
    done = run(script, tiny(script, tmp_path) + "--eval-mode slide", tmp_path)
    assert done.status == 0, done.err
    line = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[-1])
    iou = {k: v for k, v in line["iou"].items() if v is not None}
    absent = [k for k in names if k not in iou]
    assert {"sky", "road", "car"} <= set(iou)
    assert absent
    assert line["miou"] == pytest.approx(sum(iou.values()) / len(iou), abs=1e-3)
    over = f" over {len(iou)} of 12 classes (absent: {', '.join(absent)})"
    assert done.out[-1].startswith(f"mIoU last {line['miou']:.2f}{over} · best ")
    assert [x for x in done.out if x.startswith("eval 1/1 miou ")][0].endswith(over)

    flags = f"--root {tmp_path}/root --test-only {tmp_path}/out/best.pt"
    test = run(script, flags, tmp_path)
    assert test.status == 0, test.err
    assert test.out[-1].startswith(f"mIoU {line['miou']:.2f}{over} on 1 images · resnet18, slide")
    values = {k: f"{v:.2f}" for k, v in iou.items()} | dict.fromkeys(absent, "absent")
    assert dict(text.split() for text in test.out[:-1]) == values


@OVER_SCRIPTS
def test_all_ways_to_predict_give_the_same_files(script, tmp_path, root, best):
    """As val images of a data set, as pictures without one, as one file, and in Python."""
    argv = f"--dataset folder --root {root} --test-only {best} --save-predictions {tmp_path}/val"
    done = run(script, argv, tmp_path)
    assert re.match(r"mIoU \d+\.\d\d on 1 images · ", done.out[-1]), "all classes are present"
    expected = contents(tmp_path / "val")
    assert set(expected) == {"v00.png", "v00_overlay.png"}
    bare = tmp_path / "bare"  # no data set near, nor flags
    bare.mkdir()
    shutil.copy(root / "val/images/v00.jpg", bare / "v00.jpg")
    for pictures in (root / "val/images", "v00.jpg"):
        argv = ["--test-only", best, "--predict", pictures, "--save-predictions", "new/png"]
        done = run(script, argv, bare)
        assert done.status == 0, done.err
        assert done.out == ["new/png: 1 predicted"]
        assert contents(bare / "new/png") == expected
        shutil.rmtree(bare / "new")

    net, classes, settings = common.load_best(best)
    assert (classes, net.training) == (["sky", "road", "car"], False)
    assert vars(settings) == dict(crop_size=33, eval_mode="slide", amp="bf16")
    label = common.predict_image(net, Image.open(bare / "v00.jpg"), settings)
    assert len(np.unique(label)) > 1
    Image.fromarray(label).save(tmp_path / "v00.png")
    assert (tmp_path / "v00.png").read_bytes() == expected["v00.png"]
    shown = np.asarray(Image.open(tmp_path / "val/v00_overlay.png")).astype(int)
    voc = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])  # the colours of ids 0, 1, 2
    mean = (np.asarray(Image.open(bare / "v00.jpg")).astype(int) + voc[label]) / 2
    assert np.abs(shown - mean).max() <= 1


@OVER_SCRIPTS
def test_pictures_of_all_kinds(script, tmp_path, best):
    """Upright at the picture's own size; what cannot be read is named, the rest is done."""
    upright = noise(1, (48, 40))
    save(tmp_path / "in/a.png", upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    turned = Image.fromarray(np.rot90(upright).copy())
    turned.save(tmp_path / "in/b.png", exif=exif)
    Image.fromarray(upright[..., 0]).save(tmp_path / "in/grey.bmp")
    Image.fromarray(upright).save(tmp_path / "in/dot.in.name.webp")
    truncate(save(tmp_path / "in/cut.jpg", upright))
    (tmp_path / "in/words.txt").write_text("no picture")
    (tmp_path / "in/folder").mkdir()
    argv = f"--test-only {best} --predict in --save-predictions {tmp_path}/out"
    done = run(script, argv, tmp_path)
    assert done.status == 1
    bad = [line for line in done.err if "error: " in line]
    assert [Path(line.split("error: ")[1].split(": ")[0]).name for line in bad] == [
        "cut.jpg",
        "words.txt",
    ]
    assert done.out[-1].endswith("out: 4 predicted")
    written = contents(tmp_path / "out")
    stems = ("a", "b", "grey", "dot.in.name")
    assert set(written) == {f"{s}{t}.png" for s in stems for t in ("", "_overlay")}
    assert Image.open(tmp_path / "out/b.png").size == (48, 40)
    assert written["b.png"] == written["a.png"]
    net, _, settings = common.load_best(best)
    label = common.predict_image(net, Image.open(tmp_path / "in/b.png"), settings)
    np.testing.assert_array_equal(label, np.asarray(Image.open(tmp_path / "out/a.png")))
    assert written["b_overlay.png"] == written["a_overlay.png"]


PICTURES = {  # pictures in the folder, its name for --predict, --save-predictions, what is said
    "one stem": ("a.png a.jpg", "in", "out", "a.jpg and a.png would both be a.png | rename"),
    "an overlay's name": ("a.png a_overlay.jpg", "in", "out", "both be a_overlay.png | rename"),
    "into the same folder": ("a.png", "in", "in", "--save-predictions in | another folder"),
    "into the file's folder": ("a.png", "in/a.png", "./in", "--save-predictions in | another"),
    "an empty folder": ("", "in", "out", "--predict in | a file or a folder"),
    "nothing": ("a.png", "in/b.png", "out", "--predict in/b.png | a file or a folder"),
}


@pytest.mark.parametrize("case", PICTURES)
@OVER_SCRIPTS
def test_pictures_that_are_refused(script, case, tmp_path, best):
    names, pictures, out, said = PICTURES[case]
    (tmp_path / "in").mkdir()
    for name in names.split():
        save(tmp_path / "in" / name, noise(0))
    argv = f"--test-only {best} --predict {pictures} --save-predictions {out}"
    line = error_of(run(script, argv, tmp_path))
    for part in said.split(" | "):
        assert part in line
    assert {p.name for p in (tmp_path / "in").iterdir()} == set(names.split())
    assert not (tmp_path / "out").exists()


def test_predictions_into_a_file(tmp_path, root, best):
    (tmp_path / "f").touch()
    argv = f"--dataset folder --root {root} --test-only {best} --save-predictions f"
    assert "f: cannot be written" in error_of(run("speed", argv, tmp_path), 1)
