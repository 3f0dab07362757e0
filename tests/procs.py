"""Runs in processes of their own: forked (to be killed), under torchrun, and what they left behind.

torchrun --nproc_per_node=2 tests/procs.py mkd ...    # a script with networks of a few weights
"""

import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT, HERE = Path(__file__).resolve().parents[1], Path(__file__).resolve()
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import mkd  # noqa: E402
import networks  # noqa: E402
import segkc  # noqa: E402
import speed  # noqa: E402

SCRIPTS = {"speed": speed, "mkd": mkd, "segkc": segkc}
TIMEOUT = 240  # seconds that no run here takes, also on a busy machine


# ------------------------------------------------------------------------------ small networks


class TinyBackbone(nn.Sequential):
    """Image to the maps of stride 4 and 16 that a CNN backbone gives, with 8 and 12 channels."""

    grid, patch, channels = 16, 1, (8, 12)

    def __init__(self) -> None:
        def stage(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 5, 4, 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        super().__init__(OrderedDict(low=stage(3, 8), deep=stage(8, 12)))

    def forward(self, x: Tensor) -> list[Tensor]:
        low = self.low(x)
        return [low, self.deep(low)]


class Tiny(networks.Segmenter):
    """A few thousand weights with all that the methods use of a segmentation network."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.config = dict(backbone="resnet18", num_classes=num_classes)
        self.backbone = TinyBackbone()
        self.fuse = nn.Sequential(nn.Conv2d(20, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.classifier = nn.Conv2d(16, num_classes, 1)

    def decode(self, maps: list[Tensor]) -> Tensor:
        deep = networks.upsample(maps[1], maps[0].shape[-2:])
        return self.fuse(torch.cat([deep, maps[0]], 1))


def tiny_network(backbone: str, num_classes: int, *_: object) -> Tiny:
    """In place of networks.build_network."""
    return Tiny(num_classes)


def flags(script: str, root: Path, out: Path, more: str = "") -> list[str]:
    """A tiny run on a `folder` data set; its train lines and checkpoints fall on other steps."""
    line = f"--dataset folder --root {root} --split full --crop-size 32 --batch-size 4 --workers 0 "
    line += "--backbone resnet18 --weights none --iters 11 --log-every 3 --save-every 2 "
    line += "--eval-every 4 --threshold 0.4 --ramp 0.5 --lr 0.01 "
    line += "--senior resnet18 " * (script == "segkc")
    return f"{line} --out {out} {more}".split()


# ---------------------------------------------------------------------- processes that are killed

_FORK = multiprocessing.get_context("forkserver")
# imported once for all runs; modules of ours are not on the fork server's path yet
_FORK.set_forkserver_preload(
    ["torch", "torch._dynamo", "torchvision.models.segmentation", "pytest"]
)


def start(
    script: str, argv: list[str], log: Path, tiny: bool = True, first: Callable | None = None
) -> BaseProcess:
    """`python <script>.py <argv>` in a new process, its output in `log`.

    `tiny` swaps the networks; `first`, at the top level of a test module, is called before.
    """
    p = _FORK.Process(target=_child, args=(script, argv, log, tiny, first))
    p.start()
    return p


def _child(script: str, argv: list[str], log: Path, tiny: bool, first: Callable | None) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(fd, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit is promised on CPU
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *argv]
    if tiny:
        SCRIPTS[script].build_network = tiny_network
    if first is not None:
        first()
    if tiny or first is not None:
        common.launch(SCRIPTS[script].main)
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def on_ranks(world: int, fn: Callable, *args: object) -> list:
    """What fn(*args) returns on each rank of a gloo group; `fn` at the top level of a module."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _FORK.Process(target=_rank, args=(r, world, folder, fn, args)) for r in range(world)
        ]
        for p in ranks:
            p.start()
        assert [finish(p) for p in ranks] == [0] * world
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(world)]


def _rank(rank: int, world: int, folder: str, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=world)
    torch.save(fn(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def finish(p: BaseProcess) -> int:
    """The exit status, negative for a signal. A run that hangs fails the test."""
    p.join(TIMEOUT)
    if p.exitcode is None:
        p.kill()
        p.join()
        raise AssertionError(f"still running after {TIMEOUT} s")
    return p.exitcode


def wait_for(seen: Callable[[], bool], p: BaseProcess | subprocess.Popen) -> None:
    """Polls until `seen`; fails if the process ends before."""
    alive = p.is_alive if isinstance(p, BaseProcess) else lambda: p.poll() is None
    until = time.monotonic() + TIMEOUT
    while not seen():
        assert alive(), "the run ended before"
        assert time.monotonic() < until, f"not seen in {TIMEOUT} s"
        time.sleep(0.01)


def lines(path: Path) -> list[str]:
    """Of a text file; none if it is not there."""
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(out: Path, step: int, p: BaseProcess | subprocess.Popen) -> None:
    """Until log.jsonl has a line of `step` or a later one."""

    def seen() -> bool:
        whole = [x for x in lines(out / "log.jsonl") if x.endswith("}")]
        return bool(whole) and json.loads(whole[-1])["step"] >= step

    wait_for(seen, p)


def kill_and_go_on(
    script: str, argv: list[str], text: Path, kills: int, times: tuple, r: random.Random
) -> int:
    """Starts the same command until it finishes; SIGKILLs it up to `kills` times on the way.

    `times` are seconds until a run has started, and from there to its end. Moments are random: one
    in five while it starts, others up to 1.5 shares of it later. `text` gets the output. Returns
    the number of kills.
    """
    begin, work = times
    for killed in range(kills):
        p = start(script, argv, text, tiny=False)
        later = begin + r.uniform(0, 1.5) * work / kills
        p.join(r.uniform(0, begin) if r.random() < 0.2 else later)
        if p.exitcode is not None:
            assert p.exitcode == 0
            return killed
        p.kill()
        assert finish(p) == -signal.SIGKILL
    assert finish(start(script, argv, text, tiny=False)) == 0
    return kills


# ------------------------------------------------------------------------------- what runs leave


def log_of(out: Path) -> list[dict]:
    """log.jsonl without what depends on the machine."""
    found = [json.loads(line) for line in lines(out / "log.jsonl")]
    return [{k: v for k, v in x.items() if k not in ("images_s", "memory_gb")} for x in found]


def result(out: Path) -> dict:
    """All that a run decides: networks, teachers, statistics, optimizer, best network, log."""
    latest, best = (torch.load(out / f"{n}.pt", weights_only=True) for n in ("latest", "best"))
    del latest["log_bytes"]  # the log's length goes with its images_s
    return {"latest": latest, "best": best, "log": log_of(out)}


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal to the last bit, down to every tensor."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            assert_same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{k}")
    elif isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        same = (
            a.contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(b.contiguous().flatten().view(torch.uint8))
        )
        assert same, f"{where}: {(a != b).sum()} of {a.numel()} differ"
    else:
        assert a == b, where


# --------------------------------------------------------------------------------------- torchrun


def torchrun(argv: list[str], options: str = "--nproc_per_node=2", **env: str) -> subprocess.Popen:
    """torchrun on this file (see below); standard output and error come back together."""
    free = "" if "rdzv" in options else "--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0"
    command = [sys.executable, "-m", "torch.distributed.run", *f"{options} {free}".split()]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.Popen(
        [*command, str(HERE), *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def output(p: subprocess.Popen, seconds: float = TIMEOUT) -> str:
    """Waits for a torchrun and returns what it printed; a hang fails the test."""
    try:
        return p.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {seconds} s: {p.communicate()[0]}") from None


def _fail_at() -> None:
    """DIE=rank:step:how[,...] in the environment: in its n-th life that rank dies at that step."""
    deaths, life = os.environ["DIE"].split(","), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if life >= len(deaths):
        return
    rank, step, how = deaths[life].split(":")
    whole = common.Run.step_done

    def step_done(run: common.Run, done: int, *rest: object) -> None:
        if (run.rank, done) == (int(rank), int(step)):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise common.RunError("planted")
        whole(run, done, *rest)

    common.Run.step_done = step_done


if __name__ == "__main__":
    torch.set_num_threads(1)
    script = SCRIPTS[sys.argv.pop(1)]
    script.build_network = tiny_network
    if "DIE" in os.environ:
        _fail_at()
    common.launch(script.main)
