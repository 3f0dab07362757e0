"""Full disks, broken files, kills inside a save, code in checkpoints, numbers that are none.

`FUZZ=2000 pytest tests/test_faults.py -k fuzz` tries that many inputs in all, other ones each time.
"""

import errno
import io
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import procs
import pytest
import torch
from datasets import blobs, make_folder, noise, save, truncate
from PIL import EpsImagePlugin, Image

import common
import data
from common import RunError
from data import InputError
from networks import load_checkpoint

FUZZ = int(os.environ.get("FUZZ", "300"))  # inputs in all
STOP = 6  # steps: a checkpoint at 4 stays behind, see `broken_off`


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of 8 train images, 4 of them labelled, and 8 val images."""
    return make_folder(tmp_path_factory.mktemp("data"), val=8)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank on CPU with small networks, and the signal handlers as they were."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in procs.SCRIPTS.values():
        monkeypatch.setattr(script, "build_network", procs.tiny_network)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(argv: list[str], script: str = "speed") -> None:
    """A script in this process."""
    procs.SCRIPTS[script].main([str(a) for a in argv])


class Died(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """What an undisturbed run leaves."""
    out = tmp_path_factory.mktemp("straight") / "out"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: False)
        m.setattr(procs.SCRIPTS["speed"], "build_network", procs.tiny_network)
        run(procs.flags("speed", root, out))
    return procs.result(out)


@pytest.fixture(scope="module")
def half(root, tmp_path_factory):
    """The folder of a run that died in step 6: latest.pt is of step 4, latest.prev.pt of 2."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: False)
        m.setattr(procs.SCRIPTS["speed"], "build_network", procs.tiny_network)
        whole = common.Run.step_done

        def step_done(self, step, *rest):
            if step == 5:
                raise Died
            whole(self, step, *rest)

        m.setattr(common.Run, "step_done", step_done)
        with pytest.raises(Died):
            run(procs.flags("speed", root, out))
    assert [load_checkpoint(out / f"latest{p}.pt")["step"] for p in ("", ".prev")] == [4, 2]
    return out


@pytest.fixture
def out(half, tmp_path):
    """A copy of `half`."""
    return shutil.copytree(half, tmp_path / "out")


def one_line(text: Path) -> str:
    """The one error line of a run's output."""
    found = text.read_text()
    assert "Traceback" not in found, found
    errors = [line for line in found.splitlines() if "error: " in line]
    assert len(errors) == 1, found
    assert found.splitlines()[-1] == errors[0]
    return errors[0]


# --------------------------------------------------------------------------- what cannot be saved


def full_at_300() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))


def full_at_20_000() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def full_at_40_000() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


FULL = {"": full_at_300, "/best.pt": full_at_20_000, "/latest.pt": full_at_40_000}


@pytest.mark.parametrize("name", FULL)
def test_disk_full(name, root, out, straight, tmp_path):
    """Guards: a checkpoint that is lost, or half, because the new one did not fit. A real limit."""
    sizes = {n: (out / n).stat().st_size for n in ("best.pt", "latest.pt")}
    assert sizes["best.pt"] > 20_000
    assert sizes["latest.pt"] > 40_000 > sizes["best.pt"]
    before = (out / "latest.pt").read_bytes()
    argv, text = procs.flags("speed", root, out), tmp_path / "text"
    if name == "/best.pt":  # due at step 8, before any latest.pt
        argv += ["--save-every", "11"]
    p = procs.start("speed", argv, text, first=FULL[name])
    assert procs.finish(p) == 1
    assert f"{out}{name}: cannot be " in one_line(text)
    assert not [*out.glob("*.tmp")]
    assert (out / "latest.pt").read_bytes() == before
    run(argv)
    procs.assert_same(procs.result(out), straight)


def raising(number: int, call: int = 1, kind: type = OSError) -> Callable:
    """Makes a function fail at its `call`-th call."""
    calls = []

    def wrap(whole: Callable) -> Callable:
        def fails(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == call:
                raise kind(number, os.strerror(number)) if kind is OSError else kind("full")
            return whole(*args, **kwargs)

        return fails

    return wrap


SAVING = {
    "write": (torch, "save", raising(errno.ENOSPC, 2)),
    "torch's own error": (torch, "save", raising(0, 2, RuntimeError)),
    "fsync": (os, "fsync", raising(errno.EIO, 2)),
    "first rename": (os, "replace", raising(errno.EROFS, 2)),
    "second rename": (os, "replace", raising(errno.ENOSPC, 3)),
}


@pytest.mark.parametrize("name", SAVING)
def test_save_that_fails_leaves_the_one_before(name, root, out, straight, monkeypatch):
    """Guards: an unclear end, and a save that spoils what it was to replace."""
    module, function, wrap = SAVING[name]
    with monkeypatch.context() as m:
        m.setattr(module, function, wrap(getattr(module, function)))
        said = r"\.pt: cannot be saved \(.*\); is the disk full\? What was saved before is intact$"
        with pytest.raises(RunError, match=said):
            run(procs.flags("speed", root, out))
    assert not [*out.glob("*.tmp")]
    found = [load_checkpoint(p)["step"] for p in out.glob("latest*.pt")]
    assert max(found) >= 4
    run(procs.flags("speed", root, out))
    procs.assert_same(procs.result(out), straight)


def test_log_line_that_does_not_fit(root, straight, tmp_path, monkeypatch):
    """Guards: half a line without an error, as one write may take a part of what it is given."""
    argv, log = procs.flags("speed", root, tmp_path / "out"), tmp_path / "out/log.jsonl"
    before, whole = resource.getrlimit(resource.RLIMIT_FSIZE), common.Run._train_line

    def full(self: common.Run, done: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 20, before[1]))
        try:
            whole(self, done)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as m:
        m.setattr(common.Run, "_train_line", full)
        with pytest.raises(RunError, match="log.jsonl: cannot be written"):
            run(argv)
    run(argv)
    procs.assert_same(procs.result(tmp_path / "out"), straight)


def test_preview_is_of_the_evaluation(tmp_path, monkeypatch):
    """Guards: other images, padding, or another network's predictions in the picture."""
    root, sizes = make_folder(tmp_path / "data", val=0), [(48, 40), (33, 50), (20, 64), (48, 40)]
    for k, size in enumerate(sizes):
        save(root / f"val/images/v{k}.png", noise(k, size))
        save(root / f"val/masks/v{k}.png", blobs(k, 3, size))
    out = tmp_path / "out"
    run(procs.flags("speed", root, out, "--iters 4"))
    monkeypatch.setattr(common, "build_network", procs.tiny_network)
    run(["--test-only", out / "best.pt", "--root", root, "--save-predictions", tmp_path / "p"])
    rows = []
    for k in (0, 3, 1, 2):  # batches are of one size, in the order in which sizes come
        maps = (blobs(k, 3, sizes[k]), np.asarray(Image.open(tmp_path / f"p/v{k}.png")))
        colors = [data.palette()[m] for m in maps]
        row = np.concatenate([noise(k, sizes[k]), *colors], 1)
        rows.append(np.pad(row, ((0, 0), (0, 3 * 48 - row.shape[1]), (0, 0))))
    found = np.asarray(Image.open(out / "preview/000004.png"))
    assert np.array_equal(found, np.concatenate(rows))


def test_preview_that_cannot_be_written(root, tmp_path, monkeypatch):
    """Guards: a traceback for the one file that is no part of the result."""
    monkeypatch.setattr(Image.Image, "save", raising(errno.ENOSPC)(Image.Image.save))
    with pytest.raises(RunError, match="preview"):
        run(procs.flags("speed", root, tmp_path / "out"))


def read_only() -> None:
    """For a process: a user who may not write (root may write everywhere)."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


@pytest.mark.parametrize("more", ["", "--overwrite"])
@pytest.mark.parametrize("left", ["a run", "nothing"])
def test_read_only_folder(left, more, root, half, tmp_path_factory):
    """Guards: a traceback, or a run that trains for a day before it finds out."""
    top = tmp_path_factory.mktemp("open")
    out, own, text = top / "out", top / "data", top / "text"
    text.touch()
    shutil.copytree(root, own)
    if left == "a run":
        shutil.copytree(half, out)
    else:
        out.mkdir()
    before = {p: p.read_bytes() for p in out.glob("*.pt")}
    modes = {p: p.stat().st_mode for p in (top, *top.parents[:2])}
    for p in (*modes, own):
        p.chmod(0o755)
    for p in (out, out / "preview"):
        if p.exists():
            p.chmod(0o555)
    try:
        p = procs.start("speed", procs.flags("speed", own, out, more), text, first=read_only)
        assert procs.finish(p) == 1
        assert f"{out}: cannot be written (Permission denied)" in one_line(text)
        assert before == {p: p.read_bytes() for p in out.glob("*.pt")}
    finally:
        for p, mode in modes.items():
            p.chmod(mode)
        for p in (out, out / "preview"):
            if p.exists():
                p.chmod(0o755)


def test_out_is_a_file(root, tmp_path):
    """Guards: a traceback for a mistyped --out."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(RunError, match=f"{place}: cannot be written"):
            run(procs.flags("speed", root, place))
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------- kills inside a save


def dying(at: str, call: int) -> tuple[object, str, Callable]:
    """What to replace so that the `call`-th save dies at a place in it."""
    module, name = (torch, "save") if "write" in at else (os, at.split()[0])
    whole, calls = getattr(module, name), []

    def dies(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call and "after" not in at:
            if at == "half a write":
                memory = io.BytesIO()
                whole(args[0], memory)
                args[1].write(memory.getvalue()[: len(memory.getvalue()) // 2])
                args[1].flush()
            raise Died
        result = whole(*args, **kwargs)
        if len(calls) == call:
            raise Died
        return result

    return module, name, dies


# saves are: latest.pt of 2, best.pt of 4, latest.pt of 4; renames: one, one, two (keeps the old)
INSIDE = [
    ("half a write", 2, {2}),
    ("fsync", 2, {2}),
    ("replace", 2, {2}),
    ("replace after", 2, {2}),
    ("half a write", 3, {2}),
    ("fsync", 3, {2}),
    ("replace", 3, {2}),
    ("replace after", 3, {2}),
    ("replace", 4, {2}),
    ("replace after", 4, {2, 4}),
]


@pytest.mark.parametrize(("at", "call", "steps"), INSIDE)
def test_killed_inside_a_save(at, call, steps, root, tmp_path, straight, monkeypatch):
    """Guards: half a file under a whole one's name; a moment in which there is none."""
    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(*dying(at, call))
        with pytest.raises(Died):
            run(procs.flags("speed", root, out))
    found = {load_checkpoint(p)["step"] for p in out.glob("latest*.pt")}
    assert found == steps
    if (out / "best.pt").exists():
        assert load_checkpoint(out / "best.pt")["step"] == 4
    run(procs.flags("speed", root, out))
    procs.assert_same(procs.result(out), straight)
    assert not [*out.glob("*.tmp")]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_killed_while_overwriting(call, root, out, straight, monkeypatch):
    """Guards: a log cut off, or a best network, of the old run when the same goes on from it."""
    with monkeypatch.context() as m:
        whole, calls = Path.unlink, []

        def unlink(self, *args, **kwargs):
            if self.parent == out:
                calls.append(1)
                if len(calls) == call:
                    raise Died
            whole(self, *args, **kwargs)

        m.setattr(Path, "unlink", unlink)
        with pytest.raises(Died):
            run(procs.flags("speed", root, out, "--overwrite"))
    run(procs.flags("speed", root, out))
    procs.assert_same(procs.result(out), straight)


# ----------------------------------------------------------------------------- broken checkpoints


def flip(path: Path, place: float, bit: int = 4) -> None:
    """Turns one bit at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


SPOIL = {
    "truncated": truncate,
    "empty": lambda p: p.write_bytes(b""),
    "last byte gone": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "bit of a weight": lambda p: flip(p, 0.5),
    "bit near the end of the weights": lambda p: flip(p, 0.8),
    "text": lambda p: p.write_text("not found\n"),
    "a list": lambda p: torch.save([1], p),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("name", SPOIL)
def test_broken_latest_is_named_and_the_one_before_used(
    name, root, out, straight, monkeypatch, capsys
):
    """Guards: training on with broken weights, and losing a run to one broken file."""
    SPOIL[name](out / "latest.pt")
    both = shutil.copytree(out, out.with_name("both"))
    SPOIL[name](both / "latest.prev.pt")
    for path in (both / "latest.prev.pt", None):  # both broken, or the only one
        if path is None:
            shutil.rmtree(path := both / "latest.prev.pt", ignore_errors=True)
            path.unlink(missing_ok=True)
        with pytest.raises(InputError, match=rf"{both}/latest.*pt: ") as e:
            run(procs.flags("speed", root, both))
        assert "\n" not in str(e.value)
    if name == "a folder":
        (out / "latest.pt").rmdir()  # in the way of any save
    capsys.readouterr()
    run(procs.flags("speed", root, out))
    said = capsys.readouterr().out
    if name != "a folder":
        assert f"{out}/latest.pt: " in said
        assert f"going back to {out}/latest.prev.pt" in said
    assert f"going on from {out}/latest.prev.pt, step 2" in said
    procs.assert_same(procs.result(out), straight)


def test_a_broken_latest_does_not_take_the_place_of_the_good_one(root, out, monkeypatch):
    """Guards: the one good checkpoint replaced, at the first save, by the broken one."""
    truncate(out / "latest.pt")
    good = (out / "latest.prev.pt").read_bytes()
    monkeypatch.setattr(common.Run, "update", die_at_once)
    with pytest.raises(KeyboardInterrupt):
        run(procs.flags("speed", root, out))
    assert not (out / "latest.pt").exists()
    assert (out / "latest.prev.pt").read_bytes() == good


def die_at_once(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["best.pt", "nothing", "weights"])
def test_latest_of_another_kind_is_refused(name, root, out):
    """Guards: a traceback over a whole checkpoint that is not a run's."""
    (out / "latest.prev.pt").unlink()
    other = {"nothing": {}, "weights": procs.Tiny(3).state_dict()}
    torch.save(other.get(name) or load_checkpoint(out / "best.pt"), out / "latest.pt")
    with pytest.raises(InputError, match=f"{out}/latest.pt: "):
        run(procs.flags("speed", root, out))


class Code:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("use", ["latest", "best", "weights"])
def test_code_in_a_checkpoint_is_not_run(use, form, root, out, tmp_path):
    """Guards: torch.load without weights_only."""
    path, ran = tmp_path / "evil.pt", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"net": Code(ran)}))
    else:
        new = form == "torch"
        torch.save({"net": Code(ran)}, path, _use_new_zipfile_serialization=new)
    argv = procs.flags("speed", root, tmp_path / "new")
    if use == "latest":
        for name in ("latest.pt", "latest.prev.pt"):
            shutil.copy(path, out / name)
        argv = procs.flags("speed", root, out)
    elif use == "best":
        argv += ["--test-only", str(path)]
    else:
        argv += ["--weights", str(path)]
    with pytest.raises(InputError, match=r"(latest.prev|evil)\.pt: no loadable checkpoint"):
        run(argv)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Code(ran)))
    assert ran.exists()  # the code is as dangerous as is said


def test_an_image_that_is_a_program_is_not_run(root, tmp_path, monkeypatch):
    """Guards: PIL knows PostScript by its first bytes, and starts a shell command to draw it."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(a))
    path = tmp_path / "mask.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\n%%EOF\n")
    for read in (data.read_image, lambda i: data.read_mask(i, (48, 40), 3), data._size):
        with pytest.raises(InputError, match="mask.png"):
            read(data.Item("mask", path, path))
    assert not called


# ------------------------------------------------------------------------- broken in mid-run


def slow_steps() -> None:
    whole = common.Run.update

    def update(*args: object) -> None:
        time.sleep(0.1)
        whole(*args)

    common.Run.update = update


def test_image_that_breaks_in_mid_run(tmp_path):
    """Guards: workers that die or hang over a broken file. Repaired, it goes on as if whole."""
    root, more = (
        make_folder(tmp_path / "root", val=2),
        "--workers 2 --iters 24 --log-every 1 --eval-every 24",
    )
    run(procs.flags("speed", root, tmp_path / "straight", more))
    out, text, image = tmp_path / "out", tmp_path / "text", root / "train/images/t06.jpg"
    p = procs.start("speed", procs.flags("speed", root, out, more), text, first=slow_steps)
    procs.wait_for_step(out, 4, p)
    content = image.read_bytes()
    truncate(image)
    assert procs.finish(p) == 2
    assert "t06.jpg: no readable image" in one_line(text)
    assert load_checkpoint(out / "latest.pt")["step"] >= 4
    image.write_bytes(content)
    run(procs.flags("speed", root, out, more))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))


def out_of_memory() -> None:
    """What torch says when the third update does not fit on the GPU."""
    whole = common.Run.update
    seen = []

    def update(*args) -> None:
        seen.append(1)
        if len(seen) == 3:
            size = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB of which"
            raise torch.OutOfMemoryError(f"CUDA out of memory. {size} 8.00 MiB is free.")
        whole(*args)

    common.Run.update = update


def test_out_of_gpu_memory(root, tmp_path):
    """Guards: fifty lines of traceback that name no flag; the saved state lost."""
    out, text = tmp_path / "out", tmp_path / "text"
    p = procs.start("speed", procs.flags("speed", root, out), text, first=out_of_memory)
    assert procs.finish(p) == 1
    told = "error: CUDA out of memory. Tried to allocate 2.00 GiB; free the GPU, or give a smaller"
    assert one_line(text).startswith(told)
    assert load_checkpoint(out / "latest.pt")["step"] == 2


def no_room_for_the_checkpoint() -> None:
    """The optimizer's state does not fit on the GPU."""

    def load_state_dict(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has")

    torch.optim.Optimizer.load_state_dict = load_state_dict


def test_out_of_gpu_memory_in_resume(root, half, tmp_path):
    """Guards: a run called another script's, with the advice to throw it away."""
    out, text = tmp_path / "out", tmp_path / "text"
    shutil.copytree(half, out)
    before = (out / "latest.pt").read_bytes()
    argv = procs.flags("speed", root, out)
    p = procs.start("speed", argv, text, first=no_room_for_the_checkpoint)
    assert procs.finish(p) == 1
    assert one_line(text).startswith("error: CUDA out of memory. Tried to allocate 1.00 GiB; free")
    assert (out / "latest.pt").read_bytes() == before


# --------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("more", ["", "--save-every 11 --log-every 11 --eval-every 11"])
def test_term_that_is_no_number(value, more, root, tmp_path, monkeypatch):
    """Guards: saving, or logging, what came after the first step that went wrong."""
    out, script, calls = tmp_path / "out", procs.SCRIPTS["speed"], []
    whole = script.speed_step

    def step(*args: object) -> dict:
        calls.append(1)
        terms = whole(*args)
        if len(calls) >= 5:
            terms |= {"L_feat": terms["L_feat"] * value, "loss": terms["loss"] * value}
        return terms

    monkeypatch.setattr(script, "speed_step", step)
    with pytest.raises(RunError, match="^step 5: L_feat is (nan|inf|-inf); the last good"):
        run(procs.flags("speed", root, out, more))
    assert {x["step"] for x in procs.log_of(out)} == (set() if more else {3, 4})
    if more:
        assert not [*out.glob("*.pt")]
    else:
        assert load_checkpoint(out / "latest.pt")["step"] == 4
        assert load_checkpoint(out / "best.pt")["step"] == 4


def test_weights_that_are_no_number_are_not_saved(root, tmp_path, monkeypatch):
    """Guards: a finite loss whose update overflows: the checkpoint of that step is no good one."""
    whole, calls = common.Run.update, []

    def update(*args: object) -> None:
        calls.append(1)
        whole(*args)
        if len(calls) == 4:
            for group in args[2].param_groups:
                group["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(common.Run, "update", update)
    with pytest.raises(RunError):
        run(procs.flags("speed", root, tmp_path / "out"))
    for path in (tmp_path / "out").glob("*.pt"):
        found = load_checkpoint(path)
        assert all(v.isfinite().all() for v in found["net"].values()), path


def test_fp16_that_leaves_out_every_step_ends_the_run(root, tmp_path, monkeypatch):
    """Guards: a run that trains nothing and says nothing, as its gradients are not finite."""
    whole = common.Run.update

    def update(self: common.Run, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        p = optimizer.param_groups[0]["params"][0]
        whole(self, loss + (p.flatten()[0] * 0).sqrt(), optimizer)  # 0, its gradient is not

    monkeypatch.setattr(common.Run, "update", update)
    flags = "--amp fp16 --iters 40 --log-every 18 --eval-every 40 --save-every 40"
    with pytest.raises(RunError, match="step 18: gradients are not finite.*--amp bf16 or off"):
        run(procs.flags("speed", root, tmp_path / "out", flags))


# --------------------------------------------------------------------------------------- fuzz


def fuzz(check: Callable, strategies: Callable, share: float) -> None:
    """Calls `check` with that share of FUZZ examples of `strategies(hypothesis.strategies)`."""
    hypothesis = pytest.importorskip("hypothesis")
    settings = hypothesis.settings(
        max_examples=max(1, round(FUZZ * share)),
        deadline=None,
        database=None,
        derandomize="FUZZ" not in os.environ,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    given = hypothesis.given(strategies(hypothesis.strategies))

    @settings
    @given
    def each(drawn: object) -> None:
        check(drawn)

    each()


def clean(call: Callable) -> object:
    """What `call` returns, or None for an InputError of one line. Anything else fails the test."""
    try:
        return call()
    except InputError as e:
        lines = str(e).splitlines()
    assert len(lines) == 1
    return None


WORDS = ["t00", "t01", "t05", "t99", "v00", "train/images/t02.jpg", "train/masks/t02.png", "/"]
WORDS += ["train/images/t06.jpg", "val/images/v01.jpg", "..", "../x", "/etc/passwd", "./", "."]
WORDS += ["train/images/../images/t03.jpg", "a" * 300, "a/" * 2500, "\0", "~", "$HOME", "t00.jpg"]
WORDS += ["train\\images\\t00.jpg", "\ufeff", "\u2028", "C:x", "//", "train/images", "t00/"]


def test_fuzz_lists(root, tmp_path):
    """Guards: a traceback, or a wrong run, over list files."""
    source = data.load_source("folder", root)

    def strategies(st: object) -> object:
        word = st.sampled_from(WORDS) | st.text(max_size=8)
        line = st.lists(word, max_size=3).map(" ".join)
        text = st.lists(line, max_size=5).map("\n".join).map(lambda t: t.encode("utf-8", "replace"))
        return st.tuples(text | st.binary(max_size=60), text | st.just(b"t05\nt06\n"))

    def check(drawn: tuple[bytes, bytes]) -> None:
        for name, content in zip(("labeled", "unlabeled"), drawn, strict=True):
            (tmp_path / f"{name}.txt").write_bytes(content)
        split = clean(lambda: data.make_split(source, str(tmp_path), 0, "classic"))
        if split is None:
            return
        both = [i.image.resolve() for i in (*split.labeled, *split.unlabeled)]
        assert len(set(both)) == len(both) > 1
        assert all(p.is_relative_to(root.resolve()) and p.is_file() for p in both)
        assert not set(both) & {i.image.resolve() for i in source.val}
        assert all(i.mask.resolve().is_relative_to(root.resolve()) for i in split.labeled)

    fuzz(check, strategies, 0.25)


def test_fuzz_split(root):
    """Guards: a --split that is taken for another one."""
    source = data.load_source("folder", root)

    def strategies(st: object) -> object:
        number = st.integers(-3, 12).map(str) | st.text("0123456789٣²e.+-_ /", max_size=12)
        words = st.text(st.characters(exclude_categories=("C", "Z")), max_size=300)
        return st.tuples(number, number).map("/".join) | number | words

    def check(text: str) -> None:
        split = clean(lambda: data.make_split(source, text, 0, "classic"))
        if split is not None:
            assert 1 <= len(split.labeled) <= 4
            assert len(split.labeled) + len(split.unlabeled) == 8
            if text != "full":
                n, of = (int(t) for t in (text.split("/") if "/" in text else (text, "4")))
                assert len(split.labeled) == -(-4 * n // of)

    fuzz(check, strategies, 0.2)


def test_fuzz_masks(root, tmp_path):
    """Guards: a traceback, or a label that is no class, over the contents of masks."""
    good, path = io.BytesIO(), tmp_path / "m.png"
    Image.fromarray(blobs(0, 3)).save(good, "PNG")
    modes, formats = ("L", "P", "1", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK"), (
        "PNG", "TIFF", "JPEG", "GIF", "BMP", "WEBP", "PPM"
    )  # fmt: skip

    def strategies(st: object) -> object:
        at = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)
        damaged = st.tuples(st.just("damaged"), at, st.integers(1, 2**12))
        picture = st.tuples(st.sampled_from(modes), st.sampled_from(formats), st.integers(0, 255))
        size = st.tuples(st.just("size"), st.integers(1, 60), st.integers(1, 60))
        return damaged | picture | size | st.tuples(st.just("bytes"), st.binary(max_size=90))

    def check(drawn: tuple) -> None:
        if drawn[0] == "damaged":
            content = bytearray(good.getvalue())
            for place, value in drawn[1]:
                content[place % len(content)] = value
            path.write_bytes(content[: drawn[2]])
        elif drawn[0] == "bytes":
            path.write_bytes(drawn[1])
        elif drawn[0] == "size":
            Image.new("L", drawn[1:], 1).save(path)
        else:
            try:
                Image.new("L", (48, 40), drawn[2]).convert(drawn[0]).save(path, drawn[1])
            except (OSError, ValueError):  # not every mode goes with every format
                return
        item = data.Item("m", path, path)
        mask = clean(lambda: data.read_mask(item, (48, 40), 3))
        if mask is not None:
            assert set(np.unique(np.asarray(mask))) <= {0, 1, 2, 255}
            assert np.asarray(mask).shape == (40, 48)
        image = clean(lambda: data.read_image(item))
        assert image is None or image.mode == "RGB"
        clean(lambda: data._size(item))

    fuzz(check, strategies, 0.25)


def test_fuzz_checkpoint_bytes(half, tmp_path):
    """Guards: a traceback, or other weights than were saved, over damaged checkpoints."""
    path, good = tmp_path / "latest.pt", (half / "best.pt").read_bytes()
    expected = load_checkpoint(half / "best.pt")

    def strategies(st: object) -> object:
        place = st.integers(0, len(good) - 1) | st.integers(len(good) - 6000, len(good) - 1)
        change = st.tuples(st.just("bit"), place, st.integers(0, 7))
        change |= st.tuples(st.just("byte"), place, st.integers(0, 255))
        change |= st.tuples(st.just("cut"), place, st.integers(1, 200))
        change |= st.tuples(st.just("end"), place, st.just(0))
        change |= st.tuples(st.just("more"), place, st.integers(1, 9))
        return st.lists(change, min_size=1, max_size=3) | st.binary(max_size=200)

    def check(drawn: list | bytes) -> None:
        content = bytearray(good)
        for kind, at, value in () if isinstance(drawn, bytes) else drawn:
            at = min(at, len(content) - 1)
            if at < 0:
                break
            if kind == "bit":
                content[at] ^= 1 << value
            elif kind == "byte":
                content[at] = value
            elif kind == "cut":
                del content[at : at + value]
            elif kind == "end":
                del content[at:]
            else:
                content[at:at] = bytes(value)
        path.write_bytes(drawn if isinstance(drawn, bytes) else content)
        found = clean(lambda: load_checkpoint(path))
        if found is not None:
            procs.assert_same(found, expected)

    fuzz(check, strategies, 0.25)


def test_fuzz_checkpoint_contents(root, half, tmp_path):
    """Guards: a traceback over whole checkpoints that hold something else than ours."""
    good, out = load_checkpoint(half / "latest.pt"), tmp_path / "out"
    best = load_checkpoint(half / "best.pt")

    def strategies(st: object) -> object:
        value = st.sampled_from([None, 1, "a", [], {}, {"a": 1}, torch.zeros(2), (1, 2), [[1]]])
        files = [("latest", k) for k in good] + [("best", k) for k in best]
        return st.tuples(st.sampled_from(files), value | st.just("gone"))

    def check(drawn: tuple) -> None:
        (name, key), value = drawn
        content = dict(good if name == "latest" else best)
        content[key] = value
        if isinstance(value, str) and value == "gone":
            del content[key]
        out.mkdir()
        torch.save(content, out / f"{name}.pt")
        argv = procs.flags("speed", root, out, "--iters 11")
        if name == "best":
            argv += ["--test-only", str(out / "best.pt")]
        with pytest.MonkeyPatch.context() as m:
            m.setattr(common, "build_network", lambda **config: procs.Tiny(config["num_classes"]))
            m.setattr(common.Run, "batches", lambda self, start: ())
            m.setattr(common.Run, "finish", lambda self: None)
            try:
                clean(lambda: run(argv))
            finally:
                shutil.rmtree(out)

    fuzz(check, strategies, 0.1)
