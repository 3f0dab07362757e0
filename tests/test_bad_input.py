"""Bad input through the three scripts: one line that says what is wrong, and no run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from datasets import make_folder, make_pascal, noise, save, truncate

import common
import mkd
import segkc
import speed
from common import RunError
from data import InputError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"speed": speed, "mkd": mkd, "segkc": segkc}


def base(script: str, tmp: Path) -> list[str]:
    """The flags of a tiny run that works: each case spoils one thing of it."""
    flags = f"--dataset folder --root {tmp}/root --split full --crop-size 32 --batch-size 2 "
    flags += f"--iters 1 --backbone resnet18 --weights none --workers 0 --out {tmp}/out"
    return (flags + " --senior resnet18 --senior-weights none" * (script == "segkc")).split()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No torchrun around the test, and the signal handlers as they were."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def refused(script: str, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """Runs a script in this process; returns the line that it ends with."""
    with pytest.raises((InputError, RunError, SystemExit)) as e:
        SCRIPTS[script].main([str(a) for a in argv])
    if e.type is not SystemExit:
        return str(e.value)
    assert e.value.code == 2  # argparse: usage, then one line
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert ": error: " in line
    return line


# --------------------------------------------------------------------------- what is spoilt

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
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, bytes):
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


def resnet18(missing: str) -> dict:
    """torchvision's state dict without a key."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    return {k: v for k, v in state.items() if k != missing}


def checkpoint(**changes: object) -> dict:
    """A best.pt of another data set of the right format; `changes` spoil it further."""
    net = common.build_network("resnet18", 3, 16, "deeplab")
    saved = {"net": net.state_dict(), "config": net.config, "classes": ["sky", "road", "car"]}
    return saved | {"dataset": "folder", "step": 1, "miou": 1.0} | changes


TORCH = {"state": {0: torch.zeros(2)}, "param_groups": [{"lr": 0.1}]}  # an optimizer's
NOTHING: Spoil = lambda tmp: None  # noqa: E731
PATHS = "train/images/t00.jpg train/masks/t00.png"

CASES: dict[str, tuple[Spoil, str, str]] = {
    # name: what is spoilt, flags, what the line must contain
    # -- the split
    "unknown split": (NOTHING, "--split 1/16x", "--split 1/16x"),
    "split nonsense": (NOTHING, "--split nonsense", "--split nonsense"),
    "split 0": (NOTHING, "--split 0", "--split 0: 0 labelled"),
    "split too large": (NOTHING, "--split 5", "it must be 1 to 4"),
    "split above 1": (NOTHING, "--split 3/2", "--split 3/2"),
    "split divided by 0": (NOTHING, "--split 1/0", "--split 1/0"),
    "split negative": (NOTHING, "--split=-1", "--split -1"),
    "split with a long name": (NOTHING, "--split " + "x" * 300, "--split"),
    "split seed negative": (NOTHING, "--split-seed -1", "--split-seed"),
    "folder without lists": (NOTHING, "--split {tmp}/root", "labeled.txt"),
    "list with an absolute path": (lists("/etc/passwd"), "--split {tmp}/lists", "/etc/passwd"),
    "list with ..": (lists("../x.jpg"), "--split {tmp}/lists", "../x.jpg"),
    "list with .. inside": (lists("train/../../x.jpg"), "--split {tmp}/lists", "train/../../x"),
    "list with a mask outside": (lists(f"{PATHS[:20]} ../m.png"), "--split {tmp}/lists", "../m"),
    "list with an unknown id": (lists("t99"), "--split {tmp}/lists", "t99"),
    "list with an unknown file": (lists("train/images/t99.jpg"), "--split {tmp}/lists", "t99"),
    "list with a val id": (lists("t00\nv00"), "--split {tmp}/lists", "v00"),
    "list with an id twice": (lists("t01\nt00\nt01"), "--split {tmp}/lists", "t01"),
    "lists that overlap": (lists(PATHS, "t05\nt00"), "--split {tmp}/lists", "t00"),
    "list with nothing": (lists("\n\n"), "--split {tmp}/lists", "empty"),
    "list without masks": (lists("t00\nt06"), "--split {tmp}/lists", "t06"),
    "list in a long name": (lists("a/" + "b" * 300), "--split {tmp}/lists", "bbb"),
    "list that is no text": (put("lists/labeled.txt", b"\x80\xff"), "--split {tmp}/lists", "text"),
    # -- the data
    "unknown data set": (NOTHING, "--dataset voc", "--dataset"),
    "no pascal": (NOTHING, "--dataset pascal", "--download"),
    "no cityscapes": (NOTHING, "--dataset cityscapes", "leftImg8bit"),
    "no folder": (NOTHING, "--root {tmp}/nowhere", "classes.txt"),
    "root is a file": (put("f", ""), "--root {tmp}/f", "classes.txt"),
    "no class names": (put("root/classes.txt", "\n"), "", "classes.txt"),
    "one unlabelled image": (lists("t00"), "--split {tmp}/lists", "leaves 1 unlabelled image"),
    "truncated JPEG": (truncated("train/images/t0[0-3].jpg"), "", ".jpg"),
    "truncated unlabelled JPEG": (truncated("train/images/t0[4-7].jpg"), "", ".jpg"),
    "truncated val JPEG": (truncated("val/images/v00.jpg"), "--labeled-only", "v00.jpg"),
    "mask of another size": (masks(lambda m: m[1:]), "", "(48, 39)"),
    "mask value too large": (masks(lambda m: m + 3), "", "value 3"),
    "mask value 254 in val": (masks(lambda m: m + 254, "val"), "--labeled-only", "value 254"),
    "RGB mask": (masks(lambda m: np.stack([m] * 3, 2)), "", "RGB"),
    # -- weights and checkpoints
    "weights of another network": (
        put("w.pth", lambda _: torchvision.models.mobilenet_v2(weights=None).state_dict()),
        "--weights {tmp}/w.pth",
        "another architecture",
    ),
    "weights of a smaller network": (
        put("w.pth", lambda _: resnet18("")),
        "--weights {tmp}/w.pth --backbone resnet34",
        "another architecture",
    ),
    "weights in part": (
        put("w.pth", lambda _: resnet18("layer4.1.bn2.bias")),
        "--weights {tmp}/w.pth",
        "layer4.1.bn2.bias",
    ),
    "weights missing": (NOTHING, "--weights {tmp}/w.pth", "w.pth"),
    "weights are text": (put("w.pth", "hello"), "--weights {tmp}/w.pth", "w.pth"),
    "weights are empty": (put("w.pth", {}), "--weights {tmp}/w.pth", "another architecture"),
    "weights are a list": (put("w.pth", [1, 2]), "--weights {tmp}/w.pth", "w.pth"),
    "weights of an optimizer": (put("w.pth", TORCH), "--weights {tmp}/w.pth", "w.pth"),
    "weights with numbers for names": (put("w.pth", {0: 1}), "--weights {tmp}/w.pth", "w.pth"),
    "weights with code": (put("w.pth", lambda t: {"a": Code(t)}), "--weights {tmp}/w.pth", "w.pth"),
    "latest.pt with code": (put("out/latest.pt", lambda t: {"a": Code(t)}), "", "latest.pt"),
    "latest.pt truncated": (put("out/latest.pt", b"PK\x03\x04 cut"), "", "latest.pt"),
    "latest.pt of another kind": (put("out/latest.pt", {"net": {}}), "", "latest.pt"),
    "best.pt alone": (put("out/best.pt", {}), "", "no latest.pt to go on from; give another --out"),
    "holds a run": (put("out/latest.pt", {}), "--resume none", "holds a run"),
    "out is a file": (put("f", ""), "--out {tmp}/f", "cannot be written"),
    "out below a file": (put("f", ""), "--out {tmp}/f/out", "cannot be written"),
    # -- --test-only
    "test nothing": (NOTHING, "--test-only {tmp}/best.pt", "best.pt"),
    "test a folder": (NOTHING, "--test-only {tmp}", "{tmp}"),
    "test a text": (put("best.pt", "hello"), "--test-only {tmp}/best.pt", "best.pt"),
    "test code": (put("best.pt", lambda t: {"a": Code(t)}), "--test-only {tmp}/best.pt", "best.pt"),
    "test a state dict": (put("best.pt", {"a": 1}), "--test-only {tmp}/best.pt", "best.pt"),
    "test other classes": (
        put("best.pt", lambda _: checkpoint(classes=["sky", "road", "cat"])),
        "--test-only {tmp}/best.pt",
        "classes",
    ),
    "test more classes": (
        put("root/classes.txt", "sky\nroad\ncar\nbike\n"),
        "--test-only {tmp}/best.pt",
        "4 of folder",
    ),
    "test an unknown network": (
        put("best.pt", lambda _: checkpoint(config=dict(backbone="vgg", num_classes=3))),
        "--test-only {tmp}/best.pt",
        "best.pt",
    ),
    "test a network without a name": (
        put("best.pt", lambda _: checkpoint(config=dict(backbone="nonsense", num_classes=3))),
        "--test-only {tmp}/best.pt",
        "best.pt",
    ),
    "test a config that is none": (
        put("best.pt", lambda _: checkpoint(config=[1])),
        "--test-only {tmp}/best.pt",
        "best.pt",
    ),
    "test into a file": (
        put("f", ""),
        "--test-only {tmp}/best.pt --save-predictions {tmp}/f",
        "{tmp}/f",
    ),
    # -- numbers
    "odd batch": (NOTHING, "--batch-size 3", "--batch-size 3"),
    "batch of 1": (NOTHING, "--batch-size 1", "--batch-size 1"),
    "batch 0": (NOTHING, "--batch-size 0", "--batch-size"),
    "crop 0": (NOTHING, "--crop-size 0", "--crop-size"),
    "crop negative": (NOTHING, "--crop-size -32", "--crop-size"),
    "crop too small": (NOTHING, "--crop-size 31", "--crop-size 31"),
    "crop off the patches": (
        NOTHING,
        "--crop-size 64 --backbone dinov2_vits14",
        "multiple of 14, e.g. 70",
    ),
    "OHEM of over half": (NOTHING, "--sup-loss ohem --ohem-least 1025", "over half of a batch"),
    "OHEM of every pixel": (
        NOTHING,
        "--sup-loss ohem",
        "over half of a batch of 2 crops of 32 (2048)",
    ),
    "DPT on a CNN": (NOTHING, "--decoder dpt", "--decoder dpt"),
    "lr negative": (NOTHING, "--lr=-1e-3", "--lr"),
    "lr 0": (NOTHING, "--lr 0", "--lr"),
    "lr nan": (NOTHING, "--lr nan", "--lr"),
    "lr inf": (NOTHING, "--lr inf", "--lr"),
    "lr text": (NOTHING, "--lr fast", "--lr"),
    "weight decay nan": (NOTHING, "--weight-decay nan", "--weight-decay"),
    "iters 0": (NOTHING, "--iters 0", "--iters"),
    "iters half": (NOTHING, "--iters 1.5", "--iters"),
    "epochs 0": (NOTHING, "--epochs 0", "--epochs"),
    "workers negative": (NOTHING, "--workers -1", "--workers"),
    "save-every 0": (NOTHING, "--save-every 0", "--save-every"),
    "threshold negative": (NOTHING, "--threshold=-0.5", "--threshold"),
    "threshold above 1": (NOTHING, "--threshold 95", "--threshold"),
    "scale of one number": (NOTHING, "--scale 0.5", "--scale"),
    "scale 0": (NOTHING, "--scale 0 1", "--scale"),
    "scale the wrong way": (NOTHING, "--scale 2 0.5", "--scale"),
    "unknown backbone": (NOTHING, "--backbone vgg", "--backbone"),
    "unknown precision": (NOTHING, "--amp fp8", "--amp"),
    "output stride 4": (NOTHING, "--output-stride 4", "--output-stride"),
    "unknown flag": (NOTHING, "--lern-rate 1", "--lern-rate"),
}


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    """A best.pt that works on the folder data set."""
    path = tmp_path_factory.mktemp("best") / "best.pt"
    torch.save(checkpoint(), path)
    return path


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input(script, name, tmp_path, best, capsys):
    spoil, flags, said = CASES[name]
    make_folder(tmp_path / "root", val=1)
    if name in ("test more classes", "test into a file"):
        (tmp_path / "best.pt").symlink_to(best)
    spoil(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt*")}
    line = refused(script, base(script, tmp_path) + flags.format(tmp=tmp_path).split(), capsys)
    assert said.format(tmp=tmp_path) in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "executed").exists()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt*")} == before  # nothing saved


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_cases_spoil_works(script, tmp_path, best, capsys):
    """Without a spoilt thing the same flags train, and the same best.pt is evaluated."""
    make_folder(tmp_path / "root", val=1)
    SCRIPTS[script].main(base(script, tmp_path))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("mIoU last ")
    assert last.endswith(f"{tmp_path}/out")
    argv = [*base(script, tmp_path), "--test-only", best, "--save-predictions", tmp_path / "png"]
    SCRIPTS[script].main([str(a) for a in argv])
    assert "on 1 images" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "png").iterdir()} == {"v00.png", "v00_overlay.png"}


RANKS = [  # ranks, batch, what the line must contain
    (2, 2, "--batch-size 2 on 2 ranks"),  # 1 a rank
    (2, 3, "--batch-size 3 on 2 ranks"),
    (3, 8, "--batch-size 8 on 3 ranks"),
    (4, 12, "--batch-size 12 on 4 ranks"),  # 3 a rank: one has no partner
]


@pytest.mark.parametrize(("world", "batch", "said"), RANKS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_batch_that_the_ranks_cannot_share(
    script, world, batch, said, tmp_path, monkeypatch, capsys
):
    make_folder(tmp_path / "root")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    line = refused(script, [*base(script, tmp_path), "--batch-size", batch], capsys)
    assert said in line
    assert f"multiple of {2 * world}" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_pascal_without_a_mask_and_with_val_in_train(script, tmp_path, capsys):
    root = make_pascal(tmp_path / "root")
    voc = root / "VOCdevkit/VOC2012"
    argv = [*base(script, tmp_path), "--dataset", "pascal"]
    (voc / "SegmentationClass/2007_000003.png").unlink()
    assert "2007_000003" in refused(script, argv, capsys)
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text("2007_000000\n2008_000001\n")
    assert "2008_000001" in refused(script, argv, capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_left_unlabelled(script, tmp_path, capsys):
    make_folder(tmp_path / "root", unlabeled=0)
    assert "no unlabelled" in refused(script, base(script, tmp_path), capsys)


@pytest.mark.parametrize(
    "saved", [{"dataset": "imagenet"}, {"dataset": ["folder"]}, {"dataset": 5}, {}]
)
def test_checkpoint_of_a_strange_data_set(saved, tmp_path, capsys):
    """Without --dataset the checkpoint's own is taken."""
    torch.save({"net": {}, "config": {}, "classes": []} | saved, tmp_path / "best.pt")
    argv = ["--root", tmp_path, "--test-only", tmp_path / "best.pt"]
    assert "best.pt" in refused("speed", argv, capsys)


def test_resume_with_other_flags(tmp_path, capsys):
    make_folder(tmp_path / "root", val=1)
    argv = base("speed", tmp_path)
    speed.main(argv)
    line = refused("speed", [*argv, "--lr", "0.5", "--seed", "3"], capsys)
    assert "lr was " in line
    assert "is 0.5" in line
    assert "seed was 0, is 3" in line
    assert "holds a run" in refused("speed", [*argv, "--resume", "none"], capsys)
    other = torch.load(tmp_path / "out/latest.pt", weights_only=True)
    torch.save(other | {"net": {}}, tmp_path / "out/latest.pt")  # of another network
    (tmp_path / "out/latest.prev.pt").unlink(missing_ok=True)
    assert "latest.pt" in refused("speed", argv, capsys)


# --------------------------------------------------------------------------- a loss that is nan

NAN = {  # script: what is planted, calls of it a step, term that must be named
    "speed L_x": (common, "supervised_loss", 1, "L_x"),
    "speed L_logit": (speed, "logit_loss", 1, "L_logit"),
    "mkd L_sup1": (common, "supervised_loss", 2, "L_sup1"),
    "segkc L_sup": (common, "supervised_loss", 2, "L_sup"),
    "segkc L_kd": (segkc, "distillation", 1, "L_kd"),
}


@pytest.mark.parametrize("name", NAN)
def test_a_loss_that_is_no_number(name, tmp_path, monkeypatch, capsys):
    """Planted in step 3 of 4, with a checkpoint at 2: found before anything of it is saved."""
    script, (module, function, calls, term) = name.split()[0], NAN[name]
    count, real = [0], getattr(module, function)

    def planted(*args, **kwargs):
        count[0] += 1
        loss = real(*args, **kwargs)
        return loss * float("nan") if count[0] == 2 * calls + 1 else loss

    monkeypatch.setattr(module, function, planted)
    make_folder(tmp_path / "root", val=1)
    argv = [*base(script, tmp_path), *"--iters 4 --save-every 2 --eval-every 2".split()]
    with pytest.raises(RunError) as e:
        SCRIPTS[script].main(argv)
    line = str(e.value)
    assert len(line.splitlines()) == 1
    assert "step 3" in line
    assert f"{term} is nan" in line
    saved = torch.load(tmp_path / "out/latest.pt", weights_only=True)
    assert saved["step"] == 2
    best = torch.load(tmp_path / "out/best.pt", weights_only=True)
    assert best["step"] == 2
    assert all(v.isfinite().all() for v in best["net"].values())
    assert not list((tmp_path / "out").glob("*.tmp"))


# --------------------------------------------------------------------------- as a user sees it

SEEN = {  # script, flags, exit status, what the line contains
    "bad input": ("mkd", "--split nonsense", 2, "error: --split nonsense"),
    "broken file in a worker": ("speed", "--workers 1", 2, "t01.jpg"),
    "failed run": ("segkc", "--lr 1e30 --iters 3 --log-every 1", 1, "is "),
}


@pytest.mark.parametrize("name", SEEN)
def test_one_line_on_stderr_and_no_traceback(name, tmp_path):
    script, flags, status, said = SEEN[name]
    root = make_folder(tmp_path / "root", val=1)
    if name == "broken file in a worker":
        truncate(save(root / "train/images/t01.jpg", noise(0, (48, 40))))
        flags += " --iters 4"
    command = [sys.executable, ROOT / f"{script}.py", *base(script, tmp_path), *flags.split()]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
