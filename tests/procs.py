"""Runs in processes of their own, small networks, and what runs leave behind.

torchrun --nproc_per_node=2 tests/procs.py mkd ...    # a script with networks of a few weights
"""

import json
import multiprocessing
import os
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
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import mkd  # noqa: E402
import segkc  # noqa: E402
import speed  # noqa: E402

SCRIPTS = {"speed": speed, "mkd": mkd, "segkc": segkc}
TIMEOUT = 240  # seconds that no run here takes, also on a busy machine


class TinyBackbone(nn.Sequential):
    """Image to the maps of stride 4 and 16 of a CNN backbone, with 8 and `width` channels."""

    grid, patch = 16, 1

    def __init__(self, width: int) -> None:
        def stage(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 5, 4, 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        super().__init__(OrderedDict(low=stage(3, 8), deep=stage(8, width)))
        self.channels = (8, width)

    def forward(self, x: Tensor) -> list[Tensor]:
        low = self.low(x)
        return [low, self.deep(low)]


class TinyDecoder(nn.Sequential):
    """Both maps to the classifier's input, 16 channels at stride 4."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(8 + width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, maps: list[Tensor]) -> Tensor:
        deep = common.upsample(maps[1], maps[0].shape[-2:])
        return super().forward(torch.cat([deep, maps[0]], 1))


class Tiny(common.Segmenter):
    """A few thousand weights with all that the methods use of a segmentation network."""

    def __init__(self, num_classes: int, width: int = 12) -> None:
        nn.Module.__init__(self)
        self.config = dict(backbone="resnet18", num_classes=num_classes)
        self.layout = torch.contiguous_format
        self.backbone = TinyBackbone(width)
        self.decoder = TinyDecoder(width)
        self.classifier = nn.Conv2d(16, num_classes, 1)


def tiny_network(backbone: str, num_classes: int, *_: object, **__: object) -> Tiny:
    """In place of common.build_network."""
    return Tiny(num_classes)


def flags(script: str, root: Path, out: Path, more: str = "") -> list[str]:
    """A tiny run on a `folder` data set; its train lines and checkpoints fall on other steps."""
    line = f"--dataset folder --root {root} --split full --crop-size 32 --batch-size 4 --workers 0 "
    line += "--backbone resnet18 --weights none --iters 11 --log-every 3 --save-every 2 "
    line += "--eval-every 4 --threshold 0.4 --ramp 0.5 --lr 0.01 "
    if script == "segkc":
        line += "--senior resnet18 "
    return f"{line} --out {out} {more}".split()


class Died(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


def die(*_: object) -> None:
    raise Died


def at_step(step: int, do: Callable[[], None]) -> mock._patch:
    """A patch: calls `do` after a run's `step`-th optimizer step, counted from 1, before its save.

    For a `with`; in a process of its own, `.start()` it.
    """
    whole = torch.amp.GradScaler.update  # the last call of a step, in all precisions
    calls = []

    def update(*args: object) -> None:
        whole(*args)
        calls.append(1)
        if len(calls) == step:
            do()

    return mock.patch.object(torch.amp.GradScaler, "update", update)


# ------------------------------------------------------------------------- processes of their own

_FORK = multiprocessing.get_context("forkserver")
# imported once for all runs; modules of ours are not on the fork server's path yet
_FORK.set_forkserver_preload(
    ["torch", "torch._dynamo", "torchvision.models.segmentation", "pytest"]
)


def start(script: str, argv: list[str], log: Path, first: Callable | None = None) -> BaseProcess:
    """`python <script>.py <argv>` with small networks in a new process, its output in `log`.

    `first`, at the top level of a test module, is called before.
    """
    p = _FORK.Process(target=_child, args=(script, argv, log, first))
    p.start()
    return p


def _child(script: str, argv: list[str], log: Path, first: Callable | None) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(fd, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *argv]
    multiprocessing.set_start_method(None, force=True)  # loader workers start as in a shell's run
    common.build_network = tiny_network
    if first is not None:
        first()
    common.launch(SCRIPTS[script].main)


def on_ranks(world: int, fn: Callable, *args: object) -> list:
    """What fn(*args) returns on each rank of a gloo group; `fn` at the top level of a module."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            ranks.append(_FORK.Process(target=_rank, args=(rank, world, folder, fn, args)))
            ranks[-1].start()
        assert [finish(p) for p in ranks] == [0] * world
        return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(world)]


def _rank(rank: int, world: int, folder: str, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=world)
    torch.save(fn(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # as `launch` does: gloo's end may hang in torch 2.6


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
    until = time.monotonic() + TIMEOUT
    while not seen():
        ended = p.exitcode if isinstance(p, BaseProcess) else p.poll()
        assert ended is None, f"the run ended before, with {ended}"
        assert time.monotonic() < until, f"not seen in {TIMEOUT} s"
        time.sleep(0.01)


def torchrun(argv: list[str], options: str = "--nproc_per_node=2", **env: str) -> subprocess.Popen:
    """torchrun on this file (see below); standard output and error come back together."""
    if "rdzv" not in options:
        options += " --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), str(HERE), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=env, **streams)


def output(p: subprocess.Popen, seconds: float = TIMEOUT) -> str:
    """Waits for a torchrun and returns what it printed; a hang fails the test."""
    try:
        return p.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        p.terminate()  # not kill: torchrun ends its ranks, which have sessions of their own
        raise AssertionError(f"still running after {seconds} s: {p.communicate()[0]}") from None


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _fail_at() -> None:
    """DIE=rank:step:how[,...] in the environment: in its n-th life that rank dies at that step.

    Steps count from the beginning of that life; 0: before it resumes. In later lives rank 0 comes
    last: the others must not read its old address meanwhile.
    """
    deaths = os.environ.get("DIE", "").split(",")
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if life > 0 and os.environ["RANK"] == "0":
        time.sleep(2)
    if life >= len(deaths) or not deaths[life]:
        return
    rank, step, how = deaths[life].split(":")

    def die(*_: object) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise common.RunError("planted")

    if rank == os.environ["RANK"]:
        (at_step(int(step), die) if step != "0" else mock.patch("common.resume", die)).start()


def lines(path: Path) -> list[str]:
    """Of a text file; none if it is not there."""
    return path.read_text().splitlines() if path.exists() else []


def log_of(out: Path) -> list[dict]:
    """log.jsonl without what depends on the machine."""
    found = [json.loads(line) for line in lines(out / "log.jsonl")]
    return [{k: v for k, v in x.items() if k not in ("images_s", "memory_gb")} for x in found]


def result(out: Path) -> dict:
    """All that a run decides: networks, teachers, statistics, optimizer, best network, log.

    Of train lines the step and lr: their means are over the steps since the run went on.
    """
    log = log_of(out)
    for line in log:
        if line["kind"] == "train":
            for name in line.keys() - {"kind", "step", "lr"}:
                del line[name]
    latest = torch.load(out / "latest.pt", weights_only=True)
    best = torch.load(out / "best.pt", weights_only=True)
    return {"latest": latest, "best": best, "log": log}


def wait_for_step(out: Path, step: int, p: BaseProcess | subprocess.Popen) -> None:
    """Until log.jsonl has a line of `step` or a later one."""

    def seen() -> bool:
        whole = [line for line in lines(out / "log.jsonl") if line.endswith("}")]
        return bool(whole) and json.loads(whole[-1])["step"] >= step

    wait_for(seen, p)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal to the last bit, down to every tensor."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            assert_same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}/{k}")
    elif isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
        assert bits[0].equal(bits[1]), f"{where}: {(a != b).sum()} of {a.numel()} differ"
    else:
        assert a == b, where


if __name__ == "__main__":
    torch.set_num_threads(1)
    script = SCRIPTS[sys.argv.pop(1)]
    common.build_network = tiny_network
    _fail_at()
    common.launch(script.main)
