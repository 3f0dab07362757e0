"""A run that is killed, stopped or started again ends as if nothing had happened, to the last bit.

`KILLS=20 pytest tests/test_resume.py -k killed` kills runs of 40 steps 20 times for each method.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import procs
import pytest
import torch
from datasets import make_folder, noise, save

import common
from data import InputError

KILLS = int(os.environ.get("KILLS", "2"))
STEPS = 40 if KILLS > 2 else 11
METHODS = tuple(procs.SCRIPTS)


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


def run(script: str, argv: list[str]) -> None:
    """A script in this process."""
    procs.SCRIPTS[script].main([str(a) for a in argv])


def saved(out: Path) -> dict:
    return torch.load(out / "latest.pt", weights_only=True)


def contents(out: Path) -> dict[str, str]:
    """A hash of every file of a run's folder."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Died(BaseException):
    """Stands for a crash: nothing in the code under test may catch it."""


def at_update(monkeypatch: pytest.MonkeyPatch, call: int, do: Callable[[], None]) -> None:
    """`do` is called when a run is about to update its networks for the `call`-th time, from 1."""
    whole, calls = common.Run.update, []

    def update(*args: object) -> None:
        calls.append(1)
        if len(calls) == call:
            do()
        whole(*args)

    monkeypatch.setattr(common.Run, "update", update)


def die() -> None:
    raise Died


def run_and_die(call: int, script: str, argv: list[str]) -> None:
    """A run that crashes when it is about to update its networks for the `call`-th time, from 1."""
    with pytest.MonkeyPatch.context() as m:
        at_update(m, call, die)
        with pytest.raises(Died):
            run(script, argv)


# ------------------------------------------------------------------------------------- crashes


@pytest.fixture
def quick(tmp_path):
    """A folder in memory if there is room: the real networks' checkpoints have up to 400 MB."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > 4 * 2**30
    with tempfile.TemporaryDirectory(dir=shm if roomy else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("script", METHODS)
def test_killed_runs_end_bit_identical(script, root, quick):
    """Guards: state that is not in the checkpoint, files torn by a kill. Real networks, SIGKILL."""

    def argv(out: Path) -> list[str]:
        return procs.flags(script, root, out, f"--iters {STEPS} --save-every 4")

    straight, text, r = quick / "straight", quick / "output.txt", random.Random(script)
    begin = time.monotonic()
    p = procs.start(script, argv(straight), text, tiny=False)
    procs.wait_for((straight / "log.jsonl").exists, p)
    middle = time.monotonic()
    assert procs.finish(p) == 0
    times = middle - begin, time.monotonic() - middle
    expected, killed, runs = procs.result(straight), 0, 0
    assert expected["latest"]["step"] == STEPS
    shutil.rmtree(straight)
    while killed < KILLS:  # a run that finishes before the last kill is followed by another
        out, runs = quick / f"killed{runs}", runs + 1
        killed += procs.kill_and_go_on(script, argv(out), text, KILLS - killed, times, r)
        procs.assert_same(procs.result(out), expected)
        shutil.rmtree(out)
    assert "Traceback" not in text.read_text()
    print(f"{script}: {killed} kills in {runs} runs of {STEPS} steps, all bit-identical")


@pytest.mark.parametrize(
    "more", ["", "--labeled-only --sup-loss ohem --ohem-least 500"], ids=["whole", "labeled"]
)
@pytest.mark.parametrize("script", METHODS)
def test_crashes_end_bit_identical(script, more, root, tmp_path, monkeypatch):
    """Guards: state that is not in the checkpoint; also log lines twice, or missing."""
    run(script, procs.flags(script, root, tmp_path / "straight", more))
    out = tmp_path / "crashed"
    argv = procs.flags(script, root, out, more)
    for call, at in ((1, None), (4, 2), (2, 2), (4, 4), (7, 10)):  # at: what was saved by then
        run_and_die(call, script, argv)
        assert (saved(out)["step"] if at else (out / "latest.pt").exists()) == (at or False)
    run(script, argv)
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))


def test_workers_and_save_every_may_change_on_the_way(root, tmp_path, monkeypatch):
    """Guards: batches or log lines that depend on how often a run was saved, or by whom read."""
    run("speed", procs.flags("speed", root, tmp_path / "straight"))
    out = tmp_path / "changed"
    run_and_die(6, "speed", procs.flags("speed", root, out, "--save-every 5"))
    run("speed", procs.flags("speed", root, out, "--workers 2 --save-every 1"))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
@pytest.mark.parametrize("script", METHODS)
def test_signal_saves_the_step_under_way_and_stops(
    script, number, root, tmp_path, monkeypatch, capsys
):
    """Guards: a step that is lost, done twice or half when a job is preempted."""
    run(script, procs.flags(script, root, tmp_path / "straight"))
    out = tmp_path / "stopped"
    capsys.readouterr()
    with monkeypatch.context() as m:
        at_update(m, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as e:
            run(script, procs.flags(script, root, out))
    assert e.value.code == 128 + number
    assert saved(out)["step"] == 5  # neither --save-every nor --log-every divide it
    last = f"signal {int(number)}: saved step 5; the same command goes on from there"
    text = capsys.readouterr()
    assert text.out.splitlines()[-1] == last
    assert "Traceback" not in text.out + text.err
    run(script, procs.flags(script, root, out))
    assert f"going on from {out}/latest.pt, step 5" in capsys.readouterr().out
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))


def slow_steps() -> None:
    """For a process: a group of its own, as a terminal's, and 0.1 s more a step."""
    os.setpgrp()
    whole = common.Run.update

    def update(*args: object) -> None:
        time.sleep(0.1)
        whole(*args)

    common.Run.update = update


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_signal_to_the_whole_group_of_processes(number, root, tmp_path):
    """Guards: another exit status; loader workers that die of Ctrl-C and take the step along."""
    out, text = tmp_path / "out", tmp_path / "out.txt"
    argv = procs.flags("speed", root, out, "--workers 2 --iters 60 --log-every 1 --eval-every 60")
    p = procs.start("speed", argv, text, first=slow_steps)
    procs.wait_for_step(out, 3, p)
    os.killpg(p.pid, number)
    assert procs.finish(p) == 128 + number
    step = saved(out)["step"]
    assert 3 <= step < 60
    assert len(procs.log_of(out)) == step
    last = f"signal {int(number)}: saved step {step}; the same command goes on from there"
    assert procs.lines(text)[-1] == last
    assert "Traceback" not in text.read_text()


def test_best_is_the_best_and_last_the_last(root, tmp_path, monkeypatch, capsys):
    """Guards: the last network saved as the best, the best mIoU told as the last."""
    falling = iter([30.0, 50.0, 50.0, 40.0])  # at steps 3, 6, 9, 11
    monkeypatch.setattr(common, "iou_of", lambda _: (next(falling), [None] * 3))
    at_six = {}
    at_update(monkeypatch, 7, lambda: at_six.update(saved(tmp_path)["net"]))
    argv = procs.flags("speed", root, tmp_path, "--eval-every 3 --save-every 6")
    run("speed", argv)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["miou"]) == (6, 50.0)
    procs.assert_same(dict(best["net"]), at_six)
    assert "mIoU last 40.00 · best 50.00 at step 6" in capsys.readouterr().out.splitlines()[-1]


def test_test_only_evaluates_as_the_run_did(root, tmp_path, capsys, monkeypatch):
    """Guards: windows of the preset's size in place of the run's: another mIoU of the same file."""
    run("speed", procs.flags("speed", root, tmp_path, "--eval-mode slide --tta --iters 4"))
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["eval"] == {"crop_size": 32, "eval_mode": "slide", "tta": True}
    argv = f"--dataset folder --root {root} --test-only {tmp_path / 'best.pt'}".split()
    args = procs.SCRIPTS["speed"].parse_args(argv)
    assert (args.crop_size, args.eval_mode, args.tta) == (32, "slide", True)
    changed = procs.SCRIPTS["speed"].parse_args([*argv, "--crop-size", "64", "--no-tta"])
    assert (changed.crop_size, changed.tta) == (64, False)


def test_a_world_size_alone_starts_no_group(monkeypatch):
    """Guards: a quarter of a batch, as a cluster's template exports WORLD_SIZE."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert common.rank_world() == (0, 1)
    common.start_process(argparse.Namespace(dataset="shapes", workers=0, amp="off", seed=0))
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "2")
    assert common.rank_world() == (2, 4)


@pytest.mark.parametrize("more", ["", "--overwrite"])
def test_two_processes_do_not_share_a_folder(more, root, tmp_path):
    """Guards: a command that is started twice, each spoiling what the other saves."""
    out, text = tmp_path / "out", tmp_path / "out.txt"
    argv = procs.flags("speed", root, out, "--iters 60 --log-every 1 --eval-every 60")
    p = procs.start("speed", argv, tmp_path / "first.txt", first=slow_steps)
    procs.wait_for_step(out, 3, p)
    assert procs.finish(procs.start("speed", [*argv, *more.split()], text)) == 2
    assert "another process is writing this run" in procs.lines(text)[-1]
    p.terminate()
    assert procs.finish(p) == 128 + signal.SIGTERM
    run("speed", argv)
    assert [x["step"] for x in procs.log_of(out) if x["kind"] == "train"] == [*range(1, 61)]


def interrupt_at_start() -> None:
    """For a process: Ctrl-C while its data and networks are made."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would ignore it

    def resume(*args: object, **state: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    common.Run.resume = resume


def test_interrupted_while_it_starts(root, tmp_path):
    """Guards: a traceback, or status 0."""
    text = tmp_path / "out.txt"
    argv = procs.flags("speed", root, tmp_path / "out")
    assert procs.finish(procs.start("speed", argv, text, first=interrupt_at_start)) == 130
    assert procs.lines(text)[-1].startswith("interrupted before the first step")
    assert "Traceback" not in text.read_text()


def test_signal_to_a_run_with_overwrite(root, tmp_path, monkeypatch, capsys):
    """Guards: advice that would throw the saved steps away."""
    at_update(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run("speed", procs.flags("speed", root, tmp_path / "out", "--overwrite"))
    assert "the same command without --overwrite goes on" in capsys.readouterr().out


def test_signal_at_the_last_step_is_a_finished_run(root, tmp_path, monkeypatch, capsys):
    """Guards: a run that is done but says that it was stopped."""
    at_update(monkeypatch, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run("speed", procs.flags("speed", root, tmp_path / "out"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("mIoU last ")


# --------------------------------------------------------------------------------- what is found


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The folders of runs of two steps, one a method."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: False)
        for name, script in procs.SCRIPTS.items():
            m.setattr(script, "build_network", procs.tiny_network)
            run(name, procs.flags(name, root, folder / name, "--iters 2"))
    return folder


OTHER_FLAGS = [
    ("speed", "--lr 0.02", "lr was 0.01, is 0.02"),
    ("speed", "--batch-size 2", "batch_size was 4, is 2"),
    ("speed", "--iters 3", "iters was 2, is 3"),
    ("speed", "--seed 7", "seed was 0, is 7"),
    ("speed", "--split 2", "lists was "),
    ("speed", "--scale 0.5 1", "scale was [0.5, 2.0], is [0.5, 1.0]"),
    ("speed", "--labeled-only", "labeled_only was False, is True"),
    ("speed", "--log-every 1", "log_every was 3, is 1"),
    ("speed", "--grid 2 --no-host-cutmix", "host_cutmix was True, is False"),
    ("mkd", "--ema 0.9", "ema was 0.6, is 0.9"),
    ("mkd", "--keep-padding", "keep_padding was False, is True"),
    ("segkc", "--consult none", "consult was both, is none"),
    ("segkc", "--senior resnet34", "senior was resnet18, is resnet34"),
]


@pytest.mark.parametrize(("script", "more", "said"), OTHER_FLAGS)
def test_other_flags_are_refused_by_name(script, more, said, root, finished):
    """Guards: a run that goes on with other flags than it began with."""
    out = finished / script
    before = contents(out)
    with pytest.raises(InputError) as e:
        run(script, procs.flags(script, root, out, f"--iters 2 {more}"))
    assert said in str(e.value)
    assert str(out) in str(e.value)
    assert "\n" not in str(e.value)
    assert contents(out) == before


def test_another_methods_run_is_refused(root, finished):
    """Guards: a folder given to two scripts."""
    with pytest.raises(InputError, match="method was speed, is mkd"):
        run("mkd", procs.flags("mkd", root, finished / "speed", "--iters 2"))


def test_changed_lists_are_refused(tmp_path):
    """Guards: a data set that grew between two lives of a run, with the same flags."""
    root = make_folder(tmp_path / "root")
    run("speed", procs.flags("speed", root, tmp_path / "out", "--iters 2"))
    save(root / "train/images/t99.jpg", noise(99))
    with pytest.raises(InputError, match="lists was [0-9a-f]{8}, is [0-9a-f]{8}"):
        run("speed", procs.flags("speed", root, tmp_path / "out", "--iters 2"))


@pytest.mark.parametrize("script", METHODS)
def test_finished_run_prints_its_last_line(script, root, finished, monkeypatch, capsys):
    """Guards: a run that trains on, rewrites its files, or is silent, when it is started again."""
    out = finished / script
    before, line = contents(out), saved(out)
    at_update(monkeypatch, 1, die)
    run(script, procs.flags(script, root, out, "--iters 2"))
    text, (best, step, last) = capsys.readouterr().out, line["best"]
    end = f"mIoU last {last:.2f} · best {best:.2f} at step {step} · {out}"
    assert text.splitlines()[-1] == end
    assert f"{out}: finished before, no step is left" in text
    assert "train" not in text
    assert contents(out) == before


@pytest.mark.parametrize("every", [1, 9])  # 9: only the last step was saved
@pytest.mark.parametrize("more", ["", "--resume none", "--lr 0.5"])
def test_a_run_without_its_checkpoints_is_refused(more, every, root, tmp_path):
    """Guards: best.pt and log of a run, lost as its latest.pt, no longer needed, was removed."""
    out = tmp_path / "out"
    run("speed", procs.flags("speed", root, out, f"--iters 2 --save-every {every}"))
    for path in out.glob("latest*"):
        path.unlink()
    before = contents(out)
    with pytest.raises(InputError, match="give another --out, or --overwrite"):
        run("speed", procs.flags("speed", root, out, f"--iters 2 {more}"))
    assert contents(out) == before
    run("speed", procs.flags("speed", root, out, f"--iters 2 {more} --overwrite"))
    assert saved(out)["step"] == 2


@pytest.mark.parametrize("left", ["latest.pt", "latest.prev.pt"])
def test_resume_none_refuses(left, root, tmp_path):
    """Guards: a finished run, or the one checkpoint a kill left, lost to --resume none."""
    out = tmp_path / "out"
    run("speed", procs.flags("speed", root, out, "--iters 2 --save-every 1"))
    for name in {"latest.pt", "latest.prev.pt"} - {left}:
        (out / name).unlink()
    before = contents(out)
    with pytest.raises(InputError, match="holds a run; give another --out, or --overwrite"):
        run("speed", procs.flags("speed", root, out, "--iters 2 --save-every 1 --resume none"))
    assert contents(out) == before


def test_resume_none_begins_in_an_empty_folder(root, tmp_path):
    """Guards: a --resume none that can never run."""
    out = tmp_path / "out"
    run("speed", procs.flags("speed", root, out, "--iters 2 --resume none"))
    assert saved(out)["step"] == 2


def test_overwrite_starts_anew(root, tmp_path):
    """Guards: a checkpoint, a best network or log lines of the run before in the new one."""
    run("speed", procs.flags("speed", root, tmp_path / "straight", "--iters 5"))
    out = tmp_path / "out"
    run("speed", procs.flags("speed", root, out, "--seed 1 --iters 9"))
    best = torch.load(out / "best.pt", weights_only=True)
    torch.save(best | {"miou": 100.0}, out / "best.pt")
    (out / "events.out.tfevents.1").touch()
    run("speed", procs.flags("speed", root, out, "--iters 5 --overwrite"))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))
    assert max(p.name for p in (out / "preview").iterdir()) == "000005.png"
    assert not (out / "events.out.tfevents.1").exists()
    prev = torch.load(out / "latest.prev.pt", weights_only=True)
    assert (prev["step"], prev["flags"]["seed"]) == (4, 0)


def test_tensorboard_is_told_what_the_log_is(root, tmp_path, monkeypatch):
    """Guards: points of steps that a resumed run does again, drawn twice."""
    told = []

    class Writer:
        def __init__(self, folder: Path, purge_step: int) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append("closed")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    argv = procs.flags("speed", root, tmp_path, "--iters 6")
    run_and_die(6, "speed", argv)  # the last checkpoint is of step 4
    assert told.pop(0) == (tmp_path, 1)
    assert max(step for _, _, step in told) == 4
    told.clear()
    run("speed", argv)
    assert told.pop(0) == (tmp_path, 5)
    assert told.pop() == "closed"
    log = [json.loads(line) for line in procs.lines(tmp_path / "log.jsonl")]
    want = [(f"{r['kind']}/{k}", v, 6) for r in log if r["step"] == 6 for k, v in r.items()]
    assert told == [w for w in want if isinstance(w[1], float)]
    assert {"train/loss", "train/L_x", "eval/miou"} <= {name for name, _, _ in told}


def test_overwrite_killed_before_its_first_checkpoint(root, tmp_path, monkeypatch):
    """Guards: going back to the old run when the new one had saved nothing yet."""
    run("speed", procs.flags("speed", root, tmp_path / "straight", "--iters 5"))
    out = tmp_path / "out"
    run("speed", procs.flags("speed", root, out, "--iters 5"))
    run_and_die(1, "speed", procs.flags("speed", root, out, "--iters 5 --overwrite"))
    assert not [*out.glob("*.pt")]
    run("speed", procs.flags("speed", root, out, "--iters 5"))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))


def test_overwrite_is_for_the_first_life(root, tmp_path, monkeypatch):
    """Guards: torchrun's restarts that each begin anew, as they have --overwrite again."""
    run("speed", procs.flags("speed", root, tmp_path / "straight"))
    out = tmp_path / "out"
    run_and_die(6, "speed", procs.flags("speed", root, out, "--overwrite"))
    at_update(monkeypatch, 8, die)  # 7 steps are left
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("speed", procs.flags("speed", root, out, "--overwrite"))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))


# ---------------------------------------------------------------------------------------- fp16


@pytest.mark.parametrize("script", METHODS)
def test_scaler_is_in_the_checkpoint(script, root, tmp_path, monkeypatch):
    """Guards: a loss scale that starts anew, and a schedule that counts the steps not skipped."""
    whole, skipped = torch.amp.GradScaler, []

    class Scaler(whole):
        """Starts so high that the first steps overflow; grows again every third good step."""

        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=2.0**24, growth_interval=3, enabled=enabled)

        def update(self) -> None:
            before = self.get_scale()
            super().update()
            skipped.append(self.get_scale() < before)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    run(script, procs.flags(script, root, tmp_path / "straight", "--amp fp16 --iters 25"))
    straight = saved(tmp_path / "straight")
    assert skipped[0]  # and not all: else nothing is tested
    assert not all(skipped)
    assert straight["scaler"]["scale"] < 2.0**24
    out = tmp_path / "crashed"
    for call in (6, 4, 16):  # dies at step 6 while steps are skipped, at 8, at 22
        run_and_die(call, script, procs.flags(script, root, out, "--amp fp16 --iters 25"))
    run(script, procs.flags(script, root, out, "--amp fp16 --iters 25"))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))
    lr = {x["step"]: x["lr"] for x in procs.log_of(out) if x["kind"] == "train"}
    assert lr == {s: pytest.approx(0.01 * (1 - (s - 1) / 25) ** 0.9, rel=1e-5) for s in lr}
