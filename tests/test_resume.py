"""A run that is killed, stopped or started again ends as if nothing had happened, to the last bit.

`KILLS=20 pytest tests/test_resume.py -k killed` kills 20 runs of each method, twice each.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import procs
import pytest
import torch
from procs import Died, die

import common
import data
from data import InputError

KILLS = int(os.environ.get("KILLS", "1"))
METHODS = tuple(procs.SCRIPTS)
pytestmark = pytest.mark.usefixtures("small")


def run(script: str, argv: list[str]) -> None:
    """A script in this process."""
    procs.SCRIPTS[script].main(argv)


def saved(out: Path) -> dict:
    return torch.load(out / "latest.pt", weights_only=True)


def run_and_die(call: int, script: str, argv: list[str]) -> None:
    """A run that crashes after its `call`-th step, before that step's save."""
    with procs.at_step(call, die), pytest.raises(Died):
        run(script, argv)


# --------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("script", METHODS)
def test_killed_runs_end_bit_identical(script, root, tmp_path):
    """Guards: state that is not in the checkpoint, files torn by a kill. SIGKILL at any moment."""
    more = "--iters 40 --save-every 1 --eval-every 3"
    text, r = tmp_path / "text", random.Random(script)

    def begin(out: Path) -> BaseProcess:
        """A run whose training has begun."""
        about = out / "args.json"
        before = about.stat().st_mtime_ns if about.exists() else 0
        p = procs.start(script, procs.flags(script, root, out, more), text)
        procs.wait_for(lambda: about.exists() and about.stat().st_mtime_ns > before, p)
        return p

    p = begin(tmp_path / "straight")
    clock, killed = time.monotonic(), 0
    assert procs.finish(p) == 0
    seconds = time.monotonic() - clock
    for k in range(KILLS):
        for share in (r.uniform(0, 0.5), r.uniform(0, 0.5), None):
            p = begin(tmp_path / f"{k}")
            if share is not None:
                p.join(share * seconds)
                p.kill()
            status = procs.finish(p)
            killed += status == -signal.SIGKILL
        assert status == 0
        procs.assert_same(procs.result(tmp_path / f"{k}"), procs.result(tmp_path / "straight"))
    assert killed > KILLS
    assert "Traceback" not in text.read_text()


@pytest.mark.parametrize("script", METHODS)
def test_crashes_end_bit_identical(script, root, tmp_path, straight):
    """Guards: state that is not in the checkpoint; also log lines twice, or missing."""
    out = tmp_path / "crashed"
    argv = procs.flags(script, root, out)
    for call, at in ((1, None), (4, 2), (2, 2), (4, 4), (7, 10)):  # at: what was saved by then
        run_and_die(call, script, argv)
        assert (saved(out)["step"] if at else (out / "latest.pt").exists()) == (at or False)
    run(script, argv)
    procs.assert_same(procs.result(out), straight(script))


def test_labeled_only_ohem_and_workers(root, tmp_path):
    """Guards: the baseline's own state; batches that depend on who reads them, or on saves."""
    more = "--labeled-only --sup-loss ohem --ohem-share 0.1"
    run("speed", procs.flags("speed", root, tmp_path / "straight", more))
    out = tmp_path / "crashed"
    for workers in (0, 1):
        run_and_die(3, "speed", procs.flags("speed", root, out, f"{more} --workers {workers}"))
    run("speed", procs.flags("speed", root, out, f"{more} --workers 4 --save-every 1"))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))


def test_log_is_the_same_where_it_is_saved_with_its_lines(root, tmp_path):
    """Guards: means over fewer steps than the line says, or a step counted twice."""
    more = "--log-every 2 --save-every 4 --eval-every 4"
    run("speed", procs.flags("speed", root, tmp_path / "straight", more))
    run_and_die(7, "speed", procs.flags("speed", root, tmp_path / "out", more))  # 6 is logged
    with (tmp_path / "out/log.jsonl").open("a") as f:
        f.write('{"kind": "train", "st')  # torn
    run("speed", procs.flags("speed", root, tmp_path / "out", more))
    assert procs.log_of(tmp_path / "out") == procs.log_of(tmp_path / "straight")
    steps = [(x["kind"], x["step"]) for x in procs.log_of(tmp_path / "out")]
    assert steps == [(kind, k) for k in (2, 4, 6, 8, 10, 11) for kind in ("train", "eval")
                     if kind == "train" or k in (4, 8, 11)]  # fmt: skip


@pytest.mark.parametrize("script", METHODS)
def test_killed_after_the_save_it_evaluates_first(script, root, tmp_path, straight):
    """Guards: an evaluation that is left out, or made of later weights, when a run goes on."""
    out = tmp_path / "out"
    argv = procs.flags(script, root, out)
    with mock.patch.object(common, "evaluate", die), pytest.raises(Died):
        run(script, argv)
    assert saved(out)["step"] == 4
    assert not (out / "best.pt").exists()
    run_and_die(1, script, argv)  # it has evaluated before its first step
    assert [x["step"] for x in procs.log_of(out) if x["kind"] == "eval"] == [4]
    assert torch.load(out / "best.pt", weights_only=True)["step"] == 4
    log = procs.lines(out / "log.jsonl")
    (out / "log.jsonl").write_text("\n".join(log[:-1]) + "\n")  # as if killed before the line
    run(script, argv)
    log = procs.lines(out / "log.jsonl")  # the last one is due, though not by --eval-every
    (out / "log.jsonl").write_text("\n".join(log[:-1]) + "\n")
    run(script, argv)
    procs.assert_same(procs.result(out), straight(script))


@pytest.mark.parametrize("script", METHODS)
def test_scaler_is_in_the_checkpoint(script, root, tmp_path, monkeypatch):
    """Guards: a loss scale that starts anew, and a schedule that counts the steps not skipped."""
    whole, scales = torch.amp.GradScaler, []

    class Scaler(whole):
        """Starts so high that the first steps overflow; grows again every third good step."""

        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=2.0**24, growth_interval=3, enabled=enabled)

        def update(self) -> None:
            super().update()
            scales.append(self.get_scale())

    argv = "--amp fp16 --iters 25"
    with monkeypatch.context() as m:
        m.setattr(torch.amp, "GradScaler", Scaler)
        run(script, procs.flags(script, root, tmp_path / "straight", argv))
        assert scales[0] < 2.0**24  # a step was left out
        assert max(b / a for a, b in zip(scales, scales[1:], strict=False)) == 2.0  # others not
        out = tmp_path / "crashed"
        for call in (7, 5, 17):  # after steps 7, 11, 27 would be: dies at 7, 11 and never
            with contextlib.suppress(Died), procs.at_step(call, die):
                run(script, procs.flags(script, root, out, argv))
    procs.assert_same(procs.result(out), procs.result(tmp_path / "straight"))
    assert saved(out)["scaler"]["scale"] == scales[-1]
    for line in procs.log_of(out):
        if line["kind"] == "train":
            lr = 0.01 * (1 - (line["step"] - 1) / 25) ** 0.9
            assert line["lr"] == pytest.approx(lr, rel=1e-5)


# --------------------------------------------------------------------------------------- signals


def slow_steps() -> None:
    """For a process: a group of its own, as a terminal's, and 0.1 s more a step."""
    os.setpgrp()
    update = torch.amp.GradScaler.update

    def slow(*args: object) -> None:
        update(*args)
        time.sleep(0.1)

    torch.amp.GradScaler.update = slow


@pytest.mark.parametrize(
    ("script", "number"),
    [("speed", signal.SIGTERM), ("mkd", signal.SIGINT), ("segkc", signal.SIGTERM)],
)
def test_signal_saves_the_step_under_way_and_stops(script, number, root, tmp_path, straight):
    """Guards: a step that is lost, done twice or half when a job is preempted; another status;
    loader workers that die of Ctrl-C and take the step along."""
    out, text = tmp_path / "out", tmp_path / "text"
    argv = procs.flags(script, root, out, "--save-every 4")  # as the evaluations
    p = procs.start(script, [*argv, "--workers", "1"], text, first=slow_steps)
    procs.wait_for_step(out, 4, p)
    os.killpg(p.pid, number)
    assert procs.finish(p) == 128 + number
    assert saved(out)["step"] in (5, 6, 7)
    last = f"signal {int(number)}: saved; the same command, without --overwrite, goes on"
    assert procs.lines(text)[-1] == last
    assert "Traceback" not in text.read_text()
    run(script, argv)
    procs.assert_same(procs.result(out), straight(script))


def hang(where: str) -> None:
    """For a process: that function says that it is called, and does not return."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would ignore it
    mock.patch(where, side_effect=lambda *_: print("there", flush=True) or time.sleep(60)).start()


AT_ONCE = "signal 2: ended at once; the last checkpoint stays"


@pytest.mark.parametrize(
    ("where", "signals", "last"),
    [
        ("common.load_weights", 1, "error: interrupted before the first step"),
        ("torch.amp.GradScaler.update", 2, AT_ONCE),
        ("common.evaluate", 1, AT_ONCE),
    ],
)
def test_process_ends_at_once(where, signals, last, root, tmp_path):
    """Guards: a job that is killed for not ending in time, a traceback, status 0. In a step that
    hangs the second signal ends it, else the first."""
    out, text = tmp_path / "out", tmp_path / "text"
    first = functools.partial(hang, where)
    p = procs.start("speed", procs.flags("speed", root, out), text, first=first)
    procs.wait_for(lambda: "there" in procs.lines(text), p)
    if signals == 2:
        for _ in range(2):  # a cluster's, and the same once more by torchrun
            os.kill(p.pid, signal.SIGTERM)
            time.sleep(0.3)
            assert p.exitcode is None
    begin = time.monotonic()
    os.kill(p.pid, signal.SIGINT)
    assert procs.finish(p) == 130
    assert time.monotonic() - begin < 2
    assert procs.lines(text)[-1] == last
    assert "Traceback" not in text.read_text()
    assert (out / "latest.pt").exists() == (where == "common.evaluate")


# --------------------------------------------------------------------------------- what is found


@pytest.fixture
def finished(root, tmp_path, small):
    """The folder of a finished run of SPEED, two steps long."""
    out = tmp_path / "finished"
    run("speed", procs.flags("speed", root, out, "--iters 2"))
    return out


# which flags the parts of a run need not share: all that change no number of its result
MAY_CHANGE = {"out", "root", "workers", "save_every", "overwrite", "resume_edited"}


@pytest.mark.parametrize("script", METHODS)
def test_which_flags_may_change(script, root, tmp_path):
    """Guards: a run that goes on with other flags than it began with. All flags, one by one."""
    out = tmp_path / "out"
    args = procs.SCRIPTS[script].parse_args(procs.flags(script, root, out))
    split = data.load_split(args)
    common.settle(args, split, 1, torch.device("cpu"))
    state = {"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1)}
    common.save(state, split, common.Log(args, 0), 2)
    assert common.resume(args, split, state) == 2
    flags = vars(args).keys() - {"out", "overwrite"}  # these two lead elsewhere
    assert len(flags) > 35
    for name in sorted(flags):
        other = type(args)(**vars(args) | {name: Path("other")})
        if name in MAY_CHANGE:
            assert common.resume(other, split, state) == 2, name
        else:
            said = "was edited" if name == "sources" else f"{name} was .*, is other"
            with pytest.raises(InputError, match=said):
                common.resume(other, split, state)
    split.hash = "12345678"
    with pytest.raises(InputError, match="lists was [0-9a-f]{8}, is 12345678"):
        common.resume(args, split, state)


@pytest.mark.parametrize("edited", ["speed.py", "common.py", "data.py"])
def test_edited_sources_are_refused(edited, root, tmp_path, monkeypatch, capsys):
    """Guards: the old code's result under the new code's name."""
    for name, module in (("speed", procs.speed), ("common", common), ("data", data)):
        shutil.copy(module.__file__, tmp_path)
        monkeypatch.setattr(module, "__file__", str(tmp_path / f"{name}.py"))
    argv = procs.flags("speed", root, tmp_path / "out", "--iters 4 --save-every 2 --eval-every 2")
    run_and_die(3, "speed", argv)
    with (tmp_path / edited).open("a") as f:
        f.write("# an edit\n")
    with pytest.raises(InputError, match="edited since.*--overwrite, or --resume-edited"):
        run("speed", argv)
    capsys.readouterr()
    run("speed", [*argv, "--resume-edited"])
    assert "going on from step 2" in capsys.readouterr().out
    run("speed", argv)  # the edited sources are now the run's
    with pytest.raises(InputError, match="lr was"):  # other flags are not the edit's
        run("speed", [*argv, "--resume-edited", "--lr", "1"])


def test_args_json_says_what_ran(root, finished, monkeypatch):
    about = json.loads((finished / "args.json").read_text())
    assert about["torch"] == torch.__version__
    assert {"command", "python", "sources", "commit"} <= about.keys()
    assert (about["lr"], about["iters"], about["seed"]) == (0.01, 2, 0)
    monkeypatch.setattr("sys.argv", ["speed.py", "--out", "a b"])
    run("speed", procs.flags("speed", root, finished, "--iters 2"))
    again = json.loads((finished / "args.json").read_text())
    assert again["command"] == "speed.py --out 'a b'"


def test_finished_run_prints_its_last_line(root, finished, capsys):
    """Guards: a run that trains on, or loses its files, when it is started again."""
    before = {p: p.read_bytes() for p in finished.glob("*.*")}
    miou = procs.log_of(finished)[-1]["miou"]
    capsys.readouterr()
    with procs.at_step(1, die):
        run("speed", procs.flags("speed", root, finished, "--iters 2"))
    text = capsys.readouterr().out
    end = f"mIoU last {miou:.2f} · best {miou:.2f} at step 2 · {finished}"
    assert text.splitlines()[-1] == end
    assert "going on from step 2 of 2" in text
    assert before == {p: p.read_bytes() for p in finished.glob("*.*")}


def test_overwrite_starts_anew(root, tmp_path, straight):
    """Guards: a checkpoint, a best network or log lines of the run before in the new one."""
    out = tmp_path / "out"
    run("speed", procs.flags("speed", root, out, "--seed 1 --iters 12"))
    best = torch.load(out / "best.pt", weights_only=True)
    torch.save(best | {"miou": 100.0}, out / "best.pt")
    argv = procs.flags("speed", root, out)
    run_and_die(1, "speed", [*argv, "--overwrite"])  # killed before it saved anything
    assert not [*out.glob("*.pt")]
    run("speed", argv)
    procs.assert_same(procs.result(out), straight("speed"))
