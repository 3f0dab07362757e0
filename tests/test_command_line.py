"""The three scripts as commands: presets, bad input, NOTE lines, best.pt on pictures."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import make_folder, noise, save, truncate
from PIL import Image

import common
import data
import mkd
import segkc
import speed

SCRIPTS = {"speed": speed, "mkd": mkd, "segkc": segkc}
OVER_SCRIPTS = pytest.mark.parametrize("script", SCRIPTS)


def run(script: str, argv: str, cwd: Path, **env: str) -> SimpleNamespace:
    """`python <script>.py <argv>` in a fork of this process: its status, lines of out and err."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(cwd)
            for stream in (1, 2):
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(f"stream{stream}", flags, 0o666), stream)
            sys.stdout, sys.stderr = (open(n, "w", 1, closefd=False) for n in (1, 2))  # noqa: SIM115
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)
            os.environ.update(env)
            sys.argv = [f"{script}.py", *argv.split()]
            common.launch(SCRIPTS[script].main)
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = ((cwd / f"stream{k}").read_text().splitlines() for k in (1, 2))
    return SimpleNamespace(status=status, out=out, err=err)


def error_of(done: SimpleNamespace, status: int = 2) -> str:
    """The one line that a refused command ends with; argparse says the usage before."""
    assert done.status == status, done.err
    errors = [line for line in done.err if "error: " in line]
    assert errors == done.err[-1:], done.err
    assert len(done.err) == 1 or done.err[0].startswith("usage: "), done.err
    assert not any("Traceback" in line for line in done.err + done.out)
    return errors[0]


# ----------------------------------------------------------------------------------- presets

CNN = dict(optimizer="sgd", weight_decay=1e-4, output_stride=16, ramp=0, threshold=0.95)
VIT = dict(optimizer="adamw", lr=5e-6, head_lr_mult=40, weight_decay=0.01, threshold=0.95)
VOC = CNN | dict(crop_size=321, batch_size=8, epochs=80, lr=1e-3, head_lr_mult=10, sup_loss="ce")
CITY = CNN | dict(crop_size=801, batch_size=8, epochs=240, lr=5e-3, head_lr_mult=1, threshold=0)
VOC_VIT = VIT | dict(crop_size=518, batch_size=16, epochs=60, sup_loss="ce")
CITY_VIT = VIT | dict(crop_size=798, batch_size=8, epochs=180)
SHAPES = dict(weights="none", scale=(0.8, 1.25), ramp=0.5)
OHEM = dict(sup_loss="ohem", ohem_share=0.156, eval_mode="slide")
FIELD = {  # the field's protocols
    "pascal": VOC,
    "folder": VOC,
    "cityscapes": CITY | OHEM,
    "pascal --backbone dinov2_vits14": VOC_VIT,
    "folder --backbone dinov2_vitb14": VOC_VIT,
    "cityscapes --backbone dinov2_vitb14": CITY_VIT | OHEM,
    "shapes --backbone resnet18": SHAPES | dict(crop_size=65),
    "shapes --backbone dinov2_vits14": VIT | SHAPES | dict(crop_size=70, lr=5e-4, head_lr_mult=1),
}


def test_help_has_the_defaults_of_the_data_set(capsys):
    with pytest.raises(SystemExit, match="0"):
        speed.parse_args("--dataset cityscapes --help".split())
    assert "(default: 801)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv", FIELD)
@OVER_SCRIPTS
def test_presets_are_the_fields(script, argv):
    args = vars(SCRIPTS[script].parse_args(["--dataset", *argv.split()]))
    expected = dict(weights="imagenet", scale=(0.5, 2.0)) | FIELD[argv]
    if script == "mkd" and "shapes" not in argv:
        expected["threshold"] = 0  # as in the released config
    assert {k: args[k] for k in expected} == expected
    if script == "segkc" and "dinov2" in argv:  # a ViT beside a CNN
        other = vars(segkc.parse_args(["--dataset", *argv.replace("backbone", "senior").split()]))
        assert {k: other[k] for k in expected} == expected
    cnn = {"speed": "resnet101", "mkd": "resnet101", "segkc": "resnet50"}
    assert args["backbone"] == (argv.split()[2] if "--" in argv else cnn[script])
    senior = "resnet34" if "shapes" in argv else "resnet101"
    assert args.get("senior", senior) == senior


@OVER_SCRIPTS
def test_without_voc_the_first_lines_say_so(script, tmp_path):
    """Nothing is trained here: the split is refused thereafter."""
    done = run(script, "--split 9999", tmp_path)
    assert "9999" in error_of(done)
    assert "NOTE: no PASCAL VOC 2012 under data: this run uses the built-in shapes" in done.out[0]
    command = "python data.py --dataset pascal --root data --download"
    assert re.fullmatch(f"NOTE: .*{command}", done.out[1])
    assert data.make_parser().parse_args(command.split()[2:]).download
    assert "NOTE" not in str(run(script, "--dataset shapes --split 9999", tmp_path).out)


# --------------------------------------------------------------------------------- bad input

NUMBERS = {  # values that are refused, flags
    "0 -1 1.5 x": "crop-size batch-size iters epochs eval-every save-every log-every grid",
    "-1 1.5 x 9223372036854775808": "seed split-seed workers",
    "0 -1 nan inf x": "lr head-lr-mult senior-lr temperature feature-temperature",
    "-1 nan inf x": "weight-decay lambda-u lambda-st lambda-ss lambda-cps lambda-feat alpha beta",
    "-0.1 1.1 nan x": "threshold ramp ohem-share threshold-ss ema",
    "x": "dataset protocol backbone decoder output-stride optimizer sup-loss amp eval-mode pick fa",
}


@OVER_SCRIPTS
def test_values_out_of_range(script, capsys):
    """argparse names the flag, the value and the range."""
    args = vars(SCRIPTS[script].parse_args(["--dataset", "shapes"]))
    cases = [(f, v) for v, flags in NUMBERS.items() for f in flags.split()]
    for flag, value in [(f, v) for f, values in cases for v in values.split()]:
        if flag.replace("-", "_") in args:
            with pytest.raises(SystemExit, match="^2$"):
                SCRIPTS[script].parse_args(["--dataset=shapes", f"--{flag}={value}"])
            line = capsys.readouterr().err.splitlines()[-1]
            assert re.search(rf"error: argument .*--{flag}: .*{re.escape(value)}", line), line


Spoil = Callable[[Path], object]


def mask(value: int, part: str = "train") -> Spoil:
    """Masks of one value."""
    array = np.full((40, 48), value, np.uint8)
    return lambda tmp: [save(p, array) for p in (tmp / "root" / part / "masks").iterdir()]


def put(name: str, content: object) -> Spoil:
    """Writes a file: bytes, or what torch.save makes of a value or of a function's."""

    def write(tmp: Path) -> None:
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content() if callable(content) else content, path)

    return write


class Code:
    """Unpickling it would make a file, `executed` in the working directory."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def best_pt(**changes: object) -> dict:
    """A best.pt of random weights; `changes` may spoil it."""
    torch.manual_seed(0)
    net = common.build_network("resnet18", 3)
    saved = dict(net=net.state_dict(), config=net.config, classes=["sky", "road", "car"])
    saved |= dict(eval=dict(crop_size=33, eval_mode="whole", amp="off"))
    return saved | dict(dataset="folder", step=1, miou=1.0) | changes


def vit_pt() -> dict:
    net = common.build_network("dinov2_vits14", 3, decoder="dpt")
    return best_pt(net=net.state_dict(), config=net.config)


def nothing(_: Path) -> None:
    """What a case spoils that is wrong by its flags alone."""


LISTS, WEIGHTS, TEST = "--split {tmp}/lists", "--weights {tmp}/w.pth", "--test-only {tmp}/best.pt"
OTHER, VGG = ["sky", "road", "cat"], dict(backbone="vgg", num_classes=3)
CODE = {"a": Code()}
PAGE = "hub/checkpoints/resnet18-f37072fd.pth"  # torch.hub's copy
VIT_64 = "--crop-size 64 --backbone dinov2_vits14"
ALL = lambda tmp: [p.unlink() for p in (tmp / "root/train/images").glob("t0[4-7]*")]  # noqa: E731
HALF = lambda tmp: [truncate(p) for p in (tmp / "root/train/images").iterdir()]  # noqa: E731

CASES: dict[str, tuple[Spoil, str, str]] = {
    # name: what is spoilt, flags, what the line must say: flag or file, value, remedy
    "split nonsense": (nothing, "--split nonsense", "--split nonsense | 1/8, full | a folder"),
    "folder without lists": (nothing, "--split {tmp}/root", "root/labeled.txt"),
    "all labelled": (ALL, "", "--split full | fewer than 2 unlabelled | --labeled-only"),
    "list of bytes": (put("lists/labeled.txt", b"\x80\xff"), LISTS, "labeled.txt | text"),
    "one list": (put("lists/labeled.txt", b"t00"), LISTS, "unlabeled.txt | text"),
    "no pascal": (nothing, "--dataset pascal", "{tmp}/root | val.txt | --download"),
    "no cityscapes": (nothing, "--dataset cityscapes", "{tmp}/root | leftImg8bit"),
    "no folder": (nothing, "--root {tmp}/nowhere", "nowhere/classes.txt | not found"),
    "truncated JPEG": (HALF, "", ".jpg | replace or remove"),
    "mask value too large": (mask(3), "", ".png | value 3 | 0 to 2"),
    "mask value in val": (mask(9, "val"), "", "v00.png | value 9 | 0 to 2"),
    "no weights": (nothing, WEIGHTS, "w.pth | give a state_dict"),
    "empty weights": (put("w.pth", {}), WEIGHTS, "w.pth | another architecture | resnet18"),
    "weights with code": (put("w.pth", CODE), WEIGHTS, "w.pth | mkdir | give a state_dict"),
    "latest.pt with code": (put("out/latest.pt", CODE), "", "latest.pt | mkdir"),
    "latest.pt cut": (put("out/latest.pt", b"PK\x03\x04 cut"), "", "latest.pt"),
    "another latest.pt": (put("out/latest.pt", {"net": {}}), "", "out | --overwrite"),
    "best.pt alone": (put("out/best.pt", {}), "", "{tmp}/out | no latest.pt | another --out"),
    "out is a file": (put("f", b""), "--out {tmp}/f", "{tmp}/f: cannot be written | another place"),
    "page for weights": (put(PAGE, b"<html>"), "--weights imagenet", "fd.pth | clear {tmp}/hub"),
    "test code": (put("best.pt", CODE), TEST, "best.pt | mkdir"),
    "test a state dict": (put("best.pt", {"a": 1}), TEST, "best.pt | give"),
    "other classes": (put("best.pt", lambda: best_pt(classes=OTHER)), TEST, "best.pt | classes"),
    "unknown network": (put("best.pt", lambda: best_pt(config=VGG)), TEST, "best.pt | vgg"),
    "windows off the patches": (put("best.pt", vit_pt), TEST + " --crop-size 64", "multiple of 14"),
    "strange config": (put("best.pt", lambda: best_pt(config=[1])), TEST, "best.pt | give"),
    "strange amp": (put("best.pt", lambda: best_pt(eval=dict(amp="16"))), TEST, "--amp | '16'"),
    "strange data set": (put("best.pt", {"dataset": ["x"]}), TEST, "best.pt | give"),
    "predictions of a run": (nothing, "--save-predictions {tmp}/p", "--predict | --test-only CKPT"),
    "pictures, no network": (nothing, "--predict {tmp}", "--predict | --test-only CKPT"),
    "odd batch": (nothing, "--batch-size 3", "--batch-size 3 on 1 ranks | multiple of 2"),
    "crop too small": (nothing, "--crop-size 31", "--crop-size 31 | 32 or more"),
    "crop off the patches": (nothing, VIT_64, "--crop-size 64 | DINOv2: 42, 56"),
    "DPT on a CNN": (nothing, "--decoder dpt", "--decoder dpt | resnet18 | use deeplab"),
    "unknown flag": (nothing, "--lern-rate 1", "unrecognized arguments | --lern-rate"),
}


def tiny(script: str, tmp: Path) -> str:
    """The flags of a run that works: each case spoils one thing of it."""
    flags = f"--dataset folder --root {tmp}/root --split full --crop-size 33 --batch-size 2 "
    flags += f"--iters 1 --backbone resnet18 --weights none --workers 0 --out {tmp}/out "
    return flags + "--senior resnet18 " * (script == "segkc")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder data set with one val image; tests that spoil it take a copy."""
    return make_folder(tmp_path_factory.mktemp("data") / "root", val=1)


@OVER_SCRIPTS
@pytest.mark.parametrize("name", CASES)
def test_bad_input(script, name, tmp_path, root, monkeypatch):
    spoil, flags, said = CASES[name]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    shutil.copytree(root, tmp_path / "root")
    spoil(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt*")}
    done = run(script, tiny(script, tmp_path) + flags.format(tmp=tmp_path), tmp_path)
    line = error_of(done, 1 if name.startswith("out ") else 2)
    for part in said.split(" | "):
        assert part.format(tmp=tmp_path) in line, line
    assert not (tmp_path / "executed").exists()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt*")} == before  # nothing saved


@pytest.mark.parametrize(("world", "batch"), [(1, 3), (2, 2), (3, 8), (4, 12)])
def test_batch_that_the_ranks_cannot_share(world, batch, root):
    args = speed.parse_args(f"--dataset folder --root {root} --batch-size {batch}".split())
    with pytest.raises(data.InputError) as e:
        common.settle(args, data.load_split(args), world, torch.device("cpu"))
    assert f"--batch-size {batch} on {world} ranks" in str(e.value)
    assert f"multiple of {2 * world}" in str(e.value)


@OVER_SCRIPTS
def test_a_run_that_fails_ends_with_one_line(script, tmp_path, root):
    argv = tiny(script, tmp_path) + f"--root {root} --lr 1e30 --iters 3 --log-every 1"
    line = error_of(run(script, argv, tmp_path), 1)
    assert re.match(r"error: step [23]: \w+ is (nan|inf|-inf); .*lower --lr", line), line


@OVER_SCRIPTS
def test_a_runs_best_network_has_the_runs_score(script, tmp_path, root):
    """Guards: other weights or settings in --test-only than in a run, absent classes unsaid."""
    shutil.copytree(root, tmp_path / "root")
    names = ["sky", "road", "car", *[f"unseen{k}" for k in range(9)]]
    (tmp_path / "root/classes.txt").write_text("\n".join(names))
    done = run(script, tiny(script, tmp_path) + "--eval-mode slide", tmp_path)
    assert done.status == 0, done.err
    line = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[-1])
    iou = {k: v for k, v in line["iou"].items() if v is not None}
    absent = [k for k in names if k not in iou]
    assert {"sky", "road", "car"} <= set(iou) < set(names)
    assert line["miou"] == pytest.approx(sum(iou.values()) / len(iou), abs=1e-3)
    over = f" over {len(iou)} of 12 classes (absent: {', '.join(absent)})"
    assert done.out[-1].startswith(f"mIoU last {line['miou']:.2f}{over} · best ")
    assert any(x.startswith("eval 1/1 miou ") and x.endswith(over) for x in done.out)

    flags = f"--root {tmp_path}/root --test-only {tmp_path}/out/best.pt"
    test = run(script, flags, tmp_path)
    assert test.status == 0, test.err
    assert test.out[-1].startswith(f"mIoU {line['miou']:.2f}{over} on 1 images · resnet18, slide")
    values = {k: f"{v:.2f}" for k, v in iou.items()} | dict.fromkeys(absent, "absent")
    assert dict(text.split() for text in test.out[:-1]) == values

    argv = f"--weights {tmp_path}/out/best.pt --out {tmp_path}/again"
    done = run(script, tiny(script, tmp_path) + argv, tmp_path)
    assert done.status == 0, done.err
    first, *other = [x for x in done.out if "out/best.pt: " in x]
    assert "the whole network of step 1" in first
    assert len(other) == (script != "speed")  # two equal networks would stay equal
    assert all("120 keys matched, 0 missing" in x for x in other)


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    """A best.pt of random weights, evaluated in windows of 33 pixels in bf16."""
    saved = best_pt(eval=dict(crop_size=33, eval_mode="slide", amp="bf16"))
    saved["net"]["classifier.weight"] *= 20  # several classes are predicted
    path = tmp_path_factory.mktemp("best") / "best.pt"
    torch.save(saved, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@OVER_SCRIPTS
def test_all_ways_to_predict_give_the_same_files(script, tmp_path, root, best):
    """A folder, one file, and in Python; no data set near, nor flags. The score is theirs."""
    shutil.copy(root / "val/images/v00.jpg", tmp_path / "v00.jpg")
    for pictures, out in ((root / "val/images", "all/png"), ("v00.jpg", "one/png")):
        argv = f"--test-only {best} --predict {pictures} --save-predictions {out}"
        done = run(script, argv, tmp_path)
        assert done.status == 0, done.err
        assert done.out == [f"{out}: 1 predicted"]
    expected = contents(tmp_path / "all/png")
    assert set(expected) == {"v00.png", "v00_overlay.png"}
    assert contents(tmp_path / "one/png") == expected

    net, classes, settings = common.load_best(best)
    assert (classes, net.training) == (["sky", "road", "car"], False)
    assert vars(settings) == dict(crop_size=33, eval_mode="slide", amp="bf16")
    label = common.predict_image(net, data.open_picture(tmp_path / "v00.jpg"), settings)
    assert len(np.unique(label)) > 1
    Image.fromarray(label).save(tmp_path / "v00.png")
    assert (tmp_path / "v00.png").read_bytes() == expected["v00.png"]
    shown = np.asarray(Image.open(tmp_path / "one/png/v00_overlay.png")).astype(int)
    voc = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])  # the colours of ids 0, 1, 2
    mean = (np.asarray(Image.open(tmp_path / "v00.jpg")).astype(int) + voc[label]) / 2
    assert np.abs(shown - mean).max() <= 1

    done = run(script, f"--dataset folder --root {root} --test-only {best}", tmp_path)
    mask = np.asarray(Image.open(root / "val/masks/v00.png"))
    label[mask == 255] = 255
    iou = [
        ((label == c) & (mask == c)).sum() / ((label == c) | (mask == c)).sum() for c in range(3)
    ]
    assert done.out[-1].startswith(f"mIoU {100 * np.mean(iou):.2f} on 1 images · resnet18, slide")


def test_pictures_of_all_kinds(tmp_path, best):
    """Upright at the picture's own size; what cannot be read is named, the rest is done."""
    upright = noise(1, (48, 40))
    save(tmp_path / "in/a.png", upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "in/b.png", exif=exif)
    save(tmp_path / "in/dot.in.name.webp", upright[..., 0])
    truncate(save(tmp_path / "in/cut.jpg", upright))
    (tmp_path / "in/words.txt").write_text("no picture")
    (tmp_path / "in/folder").mkdir()
    done = run("mkd", f"--test-only {best} --predict in --save-predictions out", tmp_path)
    assert (done.status, done.out[-1]) == (1, "out: 3 predicted")
    bad = [line.split(": ")[1] for line in done.err if line.startswith("error: ")]
    assert bad == ["in/cut.jpg", "in/words.txt"]
    written = contents(tmp_path / "out")
    assert {"dot.in.name.png", "dot.in.name_overlay.png"} <= set(written)
    assert len(written) == 6
    assert Image.open(tmp_path / "out/b.png").size == (48, 40)
    assert written["b.png"] == written["a.png"]
    assert written["b_overlay.png"] == written["a_overlay.png"]


PICTURES = {  # in the folder: --predict, --save-predictions, what is said
    "a.png a.jpg": ("in", "out", "two pictures would both be a.png | rename"),
    "a.png a_overlay.jpg": ("in", "out", "would both be a_overlay.png | rename"),
    "a.png": ("in", "in", "--save-predictions in | another folder"),
    "b.png": ("in/b.png", "./in", "--save-predictions in | another folder"),
    "": ("in", "out", "--predict in | a file or a folder"),
    "c.png": ("in/d.png", "out", "--predict in/d.png | a file or a folder"),
}


@pytest.mark.parametrize("names", PICTURES)
def test_pictures_that_are_refused(names, tmp_path, best):
    pictures, out, said = PICTURES[names]
    (tmp_path / "in").mkdir()
    for name in names.split():
        save(tmp_path / "in" / name, noise(0))
    argv = f"--test-only {best} --predict {pictures} --save-predictions {out}"
    line = error_of(run("segkc", argv, tmp_path))
    assert all(part in line for part in said.split(" | ")), line
    assert {p.name for p in (tmp_path / "in").iterdir()} == set(names.split())
    assert not (tmp_path / "out").exists()


def test_predictions_into_a_file(tmp_path, root, best):
    (tmp_path / "f").touch()
    argv = f"--test-only {best} --predict {root}/val/images --save-predictions f"
    assert "f: cannot be written" in error_of(run("speed", argv, tmp_path), 1)
