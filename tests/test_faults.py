"""Full disks, broken files, kills inside a save, code in checkpoints, numbers that are none.

`FUZZ=2000 pytest tests/test_faults.py -k fuzz` tries that many files each, other ones each time.
"""

import functools
import io
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import procs
import pytest
import torch
from procs import Died, die

import common
import data
from common import RunError
from data import InputError

FUZZ = int(os.environ.get("FUZZ", "40"))
pytestmark = pytest.mark.usefixtures("small")


def run(argv: list[str]) -> None:
    """SPEED in this process."""
    procs.speed.main(argv)


def step_of(path: Path) -> int:
    return common.load_checkpoint(path)["step"]


@pytest.fixture(scope="module")
def half(root, tmp_path_factory):
    """The folder of a run that died in step 6: latest.pt and best.pt are of step 4."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as m, procs.at_step(6, die):
        m.setattr(common, "build_network", procs.tiny_network)
        with pytest.raises(Died):
            run(procs.flags("speed", root, out))
    assert step_of(out / "latest.pt") == step_of(out / "best.pt") == 4
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


def full_at(size: int) -> None:
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = {"": 300, "/best.pt": 20_000, "/latest.pt": 40_000}  # bytes that a file may have


@pytest.mark.parametrize("name", FULL)
def test_disk_full(name, root, out, straight, tmp_path):
    """Guards: a checkpoint that is lost, or half, because the new one did not fit. A real limit."""
    assert (out / "best.pt").stat().st_size > 20_000
    assert (out / "latest.pt").stat().st_size > 40_000 > (out / "best.pt").stat().st_size
    if name == "/best.pt":  # due at step 4, whose evaluation it owes, before any latest.pt
        (out / "best.pt").unlink()
        log = [line for line in procs.lines(out / "log.jsonl") if "eval" not in line]
        (out / "log.jsonl").write_text("\n".join(log) + "\n")
    before = (out / "latest.pt").read_bytes()
    argv, text = procs.flags("speed", root, out), tmp_path / "text"
    p = procs.start("speed", argv, text, first=functools.partial(full_at, FULL[name]))
    assert procs.finish(p) == 1
    assert f"{out}{name}: cannot be " in one_line(text)
    assert not [*out.glob("*.pt.tmp")]
    assert (out / "latest.pt").read_bytes() == before
    run(argv)
    procs.assert_same(procs.result(out), straight("speed"))


def read_only() -> None:
    """For a process: a user who may not write (root may write everywhere)."""
    "".encode("utf-8-sig")  # its module may lie where that user may not read
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


def test_read_only_folder(root, half, tmp_path):
    """Guards: a traceback, or a run that trains for a day before it finds out."""
    text = tmp_path / "text"
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        own, out = Path(top) / "data", Path(top) / "out"
        shutil.copytree(root, own)
        shutil.copytree(half, out).chmod(0o555)
        before = {p: p.read_bytes() for p in out.iterdir()}
        p = procs.start("speed", procs.flags("speed", own, out), text, first=read_only)
        assert procs.finish(p) == 1
        line = one_line(text)
        assert line.startswith(f"error: {out}: cannot be written (")
        assert "Permission denied" in line
        assert "give another place" in line
        assert before == {p: p.read_bytes() for p in out.iterdir()}


# ----------------------------------------------------------------------------- kills inside a save


def dying(at: str, call: int) -> tuple[object, str, Callable]:
    """What to replace so that the `call`-th save dies at a place in it."""
    module, name = (torch, "save") if "write" in at else (os, at.split()[0])
    whole, calls = getattr(module, name), []

    def dies(*args: object, **kwargs: object) -> None:
        calls.append(1)
        if len(calls) == call and "after" not in at:
            if at == "half a write":
                memory = io.BytesIO()
                whole(args[0], memory)
                args[1].write(memory.getvalue()[: len(memory.getvalue()) // 2])
                args[1].flush()
            raise Died
        whole(*args, **kwargs)
        if len(calls) == call:
            raise Died

    return module, name, dies


@pytest.mark.parametrize(
    ("at", "call", "step"),
    [
        ("half a write", 2, 2),
        ("fsync", 2, 2),
        ("replace", 3, 2),  # the first is of the log
        ("replace after", 3, 4),
        ("half a write", 3, 4),  # of best.pt
        ("replace", 4, 4),
        ("replace after", 4, 4),
    ],
)
def test_killed_inside_a_save(at, call, step, root, tmp_path, straight, monkeypatch):
    """Guards: half a file under a whole one's name; a moment in which there is none."""
    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(*dying(at, call))
        with pytest.raises(Died):
            run(procs.flags("speed", root, out))
    assert step_of(out / "latest.pt") == step
    assert (out / "best.pt").exists() == (at == "replace after" and call == 4)
    run(procs.flags("speed", root, out))
    procs.assert_same(procs.result(out), straight("speed"))
    assert not [*out.glob("*.tmp")]


# ----------------------------------------------------------------------------- broken checkpoints


@pytest.fixture
def resume(root, out):
    """common.resume with the flags and the state of the run in `out`."""
    args = procs.speed.parse_args(procs.flags("speed", root, out))
    split = data.load_split(args)
    common.settle(args, split, 1, torch.device("cpu"))
    net = procs.Tiny(3).to(memory_format=torch.channels_last)  # as on a GPU
    groups = [{"params": list(net.backbone.parameters())}, {"params": net.head_parameters()}]
    optimizer = torch.optim.SGD(groups, lr=1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def go_on(name: str = "optimizer") -> int:
        start = common.resume(args, split, {"net": net, name: optimizer, "scaler": scaler})
        for p, kept in optimizer.state.items():  # fused optimizers read memory in its order
            assert kept["momentum_buffer"].stride() == p.stride()
        return start

    return go_on


def test_an_optimizer_of_a_fork_may_have_another_name(out, resume):
    saved = common.load_checkpoint(out / "latest.pt")
    saved["optimizer_senior"] = saved.pop("optimizer")
    torch.save(saved, out / "latest.pt")
    assert resume("optimizer_senior") == 4


def test_fuzz(out, resume):
    """Guards: a traceback over a damaged latest.pt, or a remedy that is none."""
    r = random.Random(None if "FUZZ" in os.environ else 0)
    path, good, said = out / "latest.pt", (out / "latest.pt").read_bytes(), []
    assert resume() == 4
    for k in range(FUZZ):
        content = bytearray(good if k else b"")
        for _ in range(r.randint(1, 3)):  # other bytes in place of some, or of all the rest
            at = r.choice((r.randrange(len(good)), len(good) - r.randrange(1, 6000)))
            content[at : at + r.choice((1, 20, len(good)))] = r.randbytes(r.choice((0, 1, 9)))
        path.write_bytes(content)
        try:
            resume()
        except InputError as e:
            said.append(str(e))
    assert len(said) > FUZZ // 4
    for line in said:
        assert line.startswith(f"{path}: ")
        assert "give another --out, or --overwrite" in line
        assert len(line.splitlines()) == 1


# --------------------------------------------------------------------------------- no memory

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB of"
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: yo"


def fail(where: str, kind: type, told: str) -> None:
    """For a process: that function raises."""
    mock.patch(where, side_effect=kind(told)).start()


@pytest.mark.parametrize(
    ("where", "kind", "told", "step"),
    [
        ("torch.amp.GradScaler.update", torch.OutOfMemoryError, GPU, 4),
        ("common.evaluate", RuntimeError, CPU, 8),
        ("torch.optim.Optimizer.load_state_dict", torch.OutOfMemoryError, GPU, 4),
    ],
)
def test_out_of_memory(where, kind, told, step, root, out, tmp_path):
    """Guards: fifty lines of traceback that name no flag; the saved state lost, or called another
    script's with the advice to throw it away."""
    text = tmp_path / "text"
    first = functools.partial(fail, where, kind, told)
    p = procs.start("speed", procs.flags("speed", root, out), text, first=first)
    assert procs.finish(p) == 1
    assert told in one_line(text)
    for flag in ("--batch-size", "--crop-size", "--eval-mode slide"):
        assert flag in one_line(text)
    assert step_of(out / "latest.pt") == step


def test_a_fault_of_the_gpu_is_told_in_full(root, tmp_path):
    """Guards: advice on memory in place of the line that failed."""
    first = functools.partial(fail, "common.evaluate", RuntimeError, "illegal: ashm, allocated")
    text = tmp_path / "text"
    p = procs.start("speed", procs.flags("speed", root, tmp_path / "out"), text, first=first)
    assert procs.finish(p) == 1
    assert "Traceback" in text.read_text()


def test_little_shared_memory(root, tmp_path, monkeypatch):
    """Guards: a run that waits without end for its workers, as in a container."""
    little = type("usage", (), {"free": 64 * 2**10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    with pytest.raises(InputError, match="/dev/shm has 0.1 MB free.*--workers 0.*--shm-size"):
        run(procs.flags("speed", root, tmp_path / "out", "--workers 2"))
    assert not (tmp_path / "out").exists()
    run(procs.flags("speed", root, tmp_path / "out", "--iters 1"))


# ------------------------------------------------------------------------ numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("more", ["", "--save-every 11 --log-every 11 --eval-every 11"])
def test_term_that_is_no_number(value, more, root, tmp_path, monkeypatch):
    """Guards: saving, or logging, what came after the first step that went wrong."""
    out, calls = tmp_path / "out", []
    step = procs.speed.speed_step

    def spoilt(*args: object) -> dict:
        calls.append(1)
        terms = step(*args)
        if len(calls) >= 4:
            terms |= {"L_feat": terms["L_feat"] * value, "loss": terms["loss"] * value}
        return terms

    monkeypatch.setattr(procs.speed, "speed_step", spoilt)
    with pytest.raises(RunError, match="^step 4: L_feat is (nan|inf|-inf); the last good"):
        run(procs.flags("speed", root, out, more))
    assert {x["step"] for x in procs.log_of(out)} == (set() if more else {3})
    if more:
        assert not [*out.glob("*.pt")]
    else:
        assert step_of(out / "latest.pt") == 2  # it is found at the save of step 4


def test_weights_that_are_no_number_are_not_saved(root, tmp_path):
    """Guards: a finite loss whose update overflows: the checkpoint of that step is no good one."""
    seen = []

    def spoil() -> None:
        seen[0].backbone.deep[1].running_var[0] = float("nan")

    def remember(*args: object) -> procs.Tiny:
        seen.append(procs.Tiny(3))
        return seen[0]

    with pytest.MonkeyPatch.context() as m, procs.at_step(4, spoil):
        m.setattr(common, "build_network", remember)
        with pytest.raises(RunError, match="^step 4: a weight is not finite; the last good"):
            run(procs.flags("speed", root, tmp_path / "out"))
    assert step_of(tmp_path / "out/latest.pt") == 2
    assert not (tmp_path / "out/best.pt").exists()


def test_fp16_that_leaves_out_every_step_ends_the_run(root, tmp_path, monkeypatch):
    """Guards: a run that trains nothing and says nothing, as its gradients are not finite."""
    step = procs.speed.speed_step

    def spoilt(args: object, net: procs.Tiny, *rest: object) -> dict:
        terms = step(args, net, *rest)
        root_of_zero = (net.classifier.bias[0] * 0).sqrt()  # 0, its gradient is not
        return terms | {"loss": terms["loss"] + root_of_zero}

    monkeypatch.setattr(procs.speed, "speed_step", spoilt)
    flags = "--amp fp16 --iters 40 --log-every 18 --eval-every 40 --save-every 40"
    with pytest.raises(RunError, match="step 18: gradients are not finite.*--amp bf16 or off"):
        run(procs.flags("speed", root, tmp_path / "out", flags))
