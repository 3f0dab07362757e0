"""The number of ranks does not change the experiment; ranks that die come back, or end together."""

import argparse
import functools
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import procs
import pytest
import torch
import torch.distributed as dist
from datasets import blobs, make_folder, noise, save
from torch import nn

import common
import data
import mkd

METHODS = tuple(procs.SCRIPTS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """16 train images, 8 of them labelled, and 7 val images of three sizes, in 5 batches."""
    root = make_folder(tmp_path_factory.mktemp("data"), labeled=8, unlabeled=8, val=0)
    sizes = [(48, 40), (40, 48), (30, 33), (48, 40), (64, 20), (90, 16), (48, 40)]
    for i, size in enumerate(sizes):
        save(root / f"val/images/v{i}.png", noise(i, size))
        save(root / f"val/masks/v{i}.png", blobs(i, 3, size))
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank on CPU, and the signal handlers as they were."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def args_of(script: str, root: Path, more: str = "") -> argparse.Namespace:
    flags = procs.flags(script, root, Path("unused"), f"--batch-size 8 --scale 0.4 0.8 {more}")
    return procs.SCRIPTS[script].parse_args(flags)


def split_of(args: argparse.Namespace) -> data.Split:
    return data.make_split(data.load_source("folder", args.root), args.split, 0, "classic")


# ---------------------------------------------------------------------------- the same batches


def batches_on(root: Path, script: str) -> list[dict]:
    """The first 5 batches that a rank's run gets, on its way through the process group."""
    torch.cuda.is_available = lambda: False
    run = common.Run(args_of(script, root, "--iters 5"))
    found = [dict(batch) for batch in run.batches(0)]
    for step, batch in enumerate(found):  # as mkd_step draws them
        rngs = [data.rng(0, "mkd", step, p) for p in run.positions]
        batch["mkd"] = torch.tensor([mkd.mix_boxes(32, r) for r in rngs])
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(world, root):
    """Guards: a seed, an order or an offset that a rank has for itself."""
    one, ranks = batches_on(root, "speed"), procs.on_ranks(world, batches_on, root, "speed")
    assert len(one) == 5
    for step, batch in enumerate(one):
        shares = [rank[step] for rank in ranks]
        assert all(share.keys() == batch.keys() for share in shares)
        assert all(share["order"] == batch["order"] for share in shares)
        for name in ("x_id", "u_id"):
            assert sum((share[name] for share in shares), []) == batch[name]
        for name in batch.keys() - {"order", "x_id", "u_id"}:
            dim = 1 if name in ("strong", "box") else 0  # [V, B, ...]
            assert torch.cat([share[name] for share in shares], dim).equal(batch[name]), name
    assert len({tuple(batch["x_id"]) for batch in one}) > 1


# --------------------------------------------------------------------------------- evaluation


def confusion_on(root: Path, more: str) -> dict:
    """The confusion matrices of two networks over the val images, and what modes they are left."""
    torch.manual_seed(0)
    nets = {"a": procs.Tiny(3), "b": procs.Tiny(3)}
    nets["a"].train(), nets["b"].eval()
    args = args_of("speed", root, more)
    found = common.evaluate(nets, split_of(args), args, CPU)
    return {name: (found[name], net.training) for name, net in nets.items()}


@pytest.mark.parametrize("more", ["", "--eval-mode slide --tta"])
def test_confusion_matrices_do_not_depend_on_the_ranks(more, root):
    """Guards: images counted twice or left out where the set cannot be shared evenly."""
    one = confusion_on(root, more)
    pixels = sum(int((m != 255).sum()) for m in masks(root))
    assert one["a"][0].sum() == one["b"][0].sum() == pixels
    assert not one["a"][0].equal(one["b"][0])
    assert (one["a"][1], one["b"][1]) == (True, False)
    for world in (2, 3):
        for rank in procs.on_ranks(world, confusion_on, root, more):
            procs.assert_same(rank, one)


def masks(root: Path) -> list:
    items = data.load_source("folder", root).val
    sizes = [data.read_image(i).size for i in items]
    found = [data.read_mask(i, size, 3) for i, size in zip(items, sizes, strict=True)]
    return [np.asarray(m) for m in found]


# ------------------------------------------------------------------------------ the same step


def step_on(root: Path, script: str, more: str) -> dict:
    """A step of a method on a rank: terms (mean over ranks), gradients, statistics and counts.

    Batch norm stays in eval mode; labels are ignored in all but a corner of the first images.
    """
    torch.cuda.is_available = lambda: False
    nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
    args = args_of(script, root, more)
    run = common.Run(args)
    torch.manual_seed(0)
    nets = [procs.Tiny(3) for _ in range(4)]
    for k, net in enumerate(nets):
        for p in net.parameters():
            p.data *= 1.5 + 0.1 * k
        if args.sup_loss == "ohem":
            net.classifier.weight.data *= 10  # sure of most pixels: fewer are below 0.7 than kept
        net.train()
    batch = next(run.batches(0))
    for k, p in enumerate(run.positions):  # very unequal counts: 0, 1, ... 7 eighths are ignored
        batch["y"][k, : 4 * p] = 255
    stats = None
    if script == "speed":
        parts, parameters = (nets[0], run.distribute(nets[0])), nets[0].parameters()
    elif script == "segkc":
        pair = procs.segkc.Pair(*nets[:2])
        parts = {"junior": nets[1], "senior": nets[0]}, run.distribute(pair)
        parameters = pair.parameters()
    else:
        students, teachers = nets[:2], [n.requires_grad_(False) for n in nets[2:]]
        stats = nn.ModuleList(mkd.ClassStatistics(3, 16) for _ in range(4))
        both = mkd.Students(*students)
        parts = students, teachers, stats, run.distribute(both)
        parameters = both.parameters()
    step = getattr(procs.SCRIPTS[script], f"{script}_step")
    terms = step(args, run, *parts, batch, 5)
    terms["loss"].backward()
    return {
        "terms": {k: common.rank_mean(v) for k, v in terms.items()},
        "gradient": [p.grad for p in parameters],
        "stats": [] if stats is None else list(stats.buffers()),
        "counts": [int((batch["y"] != 255).sum()), int(batch["u_valid"].sum())],
    }


BOUND = 2e-5  # of the largest entry: float32 sums of 1e4 pixels in another order


def assert_close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    apart, size = (a - b).abs().max().item(), b.abs().max().item()
    assert apart <= BOUND * max(size, 1e-3), f"{what}: {apart} apart, of {size}"


@pytest.mark.parametrize("more", ["", "--sup-loss ohem --ohem-least 2000"], ids=["ce", "ohem"])
@pytest.mark.parametrize("script", METHODS)
def test_ranks_take_the_same_gradient_step(script, more, root):
    """Guards: a mean of the ranks' means, an OHEM or class statistics of one rank's pixels."""
    train = nn.BatchNorm2d.train
    try:
        one = step_on(root, script, more)
    finally:
        nn.BatchNorm2d.train = train
    for world in (2, 4) if not more else (2,):
        ranks = procs.on_ranks(world, step_on, root, script, more)
        for k in (0, 1):
            counts = [rank["counts"][k] for rank in ranks]
            assert sum(counts) == one["counts"][k]
            assert max(counts) > 1.02 * min(counts)  # else a mean of means would pass
        for rank in ranks:
            for name, term in one["terms"].items():
                assert_close(rank["terms"][name], term, f"{name} on {world} ranks")
            for part in ("gradient", "stats"):
                for k, (a, b) in enumerate(zip(rank[part], one[part], strict=True)):
                    assert_close(a, b, f"{part} {k} on {world} ranks")
    assert max(g.abs().max() for g in one["gradient"]) > 1e-3


def ohem_on(z: torch.Tensor, y: torch.Tensor, least: int) -> tuple:
    """OHEM over this rank's share of z and y: the mean over ranks, the gradient of all shares."""
    rank, world = common.rank_world()
    share = slice(rank * len(z) // world, (rank + 1) * len(z) // world)
    mine = z[share].clone().requires_grad_()
    loss = common.supervised_loss(mine, y[share], "ohem", least, 0.4)
    loss.backward()
    shares = [mine.grad]
    if dist.is_initialized():
        shares = [torch.empty_like(mine.grad) for _ in range(world)]
        dist.all_gather(shares, mine.grad)
    return common.rank_mean(loss), torch.cat(shares) / world


@pytest.mark.parametrize("least", [10, 300, 10**6])
def test_ohem_is_of_the_global_batch(least):
    """Guards: hard pixels picked, or counted, rank by rank."""
    torch.manual_seed(0)
    z = torch.randn(4, 3, 12, 12) * torch.tensor([4.0, 2.0, 1.0, 0.5]).view(4, 1, 1, 1)
    y = torch.randint(0, 3, (4, 12, 12))
    y[0, :9] = y[2, :2] = 255
    loss, gradient = ohem_on(z, y, least)
    kept = int((gradient.abs().sum(1) > 0).sum())
    assert kept == (y != 255).sum() if least == 10**6 else kept < (y != 255).sum()
    for world in (2, 4):
        for found, other in procs.on_ranks(world, ohem_on, z, y, least):
            assert_close(found, loss, "loss")
            assert_close(other, gradient, "gradient")
            assert (other == 0).equal(gradient == 0)


def buffers_on() -> list[torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    net = procs.Tiny(3)
    net(torch.randn(2, 3, 32, 32))
    before = [b.clone() for b in net.buffers()]
    common.average_buffers([net])
    return [before, list(net.buffers())]


def test_batch_norm_statistics_agree_over_ranks():
    """Guards: ranks that evaluate, and guess labels, with different networks."""
    (before0, after0), (before1, after1) = procs.on_ranks(2, buffers_on)
    for a, b, c, d in zip(before0, before1, after0, after1, strict=True):
        assert c.equal(d)
        if a.is_floating_point():
            assert not a.equal(b)
            assert torch.allclose(c, (a + b) / 2)


def test_networks_without_batch_norm_have_nothing_to_average():
    """Guards: DINOv2 with DPT on CPU ranks, which ended after their first step."""
    common.average_buffers([nn.Linear(2, 2)])


# ------------------------------------------------------------------------------------ torchrun


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """What a run of MKD on two ranks leaves."""
    out = tmp_path_factory.mktemp("straight") / "out"
    p = procs.torchrun(["mkd", *procs.flags("mkd", root, out)])
    text = procs.output(p)
    assert p.returncode == 0, text
    return procs.result(out)


@pytest.mark.slow
@pytest.mark.parametrize("deaths", ["0:6:kill", "1:6:kill", "1:3:kill,0:8:kill"])
def test_torchrun_restarts_after_kills(deaths, root, tmp_path, undisturbed):
    """Guards: a restart that hangs on dead ranks' addresses, starts anew, or ends elsewhere."""
    options = "--nproc_per_node=2 --max-restarts=3"
    argv = ["mkd", *procs.flags("mkd", root, tmp_path / "out")]
    p = procs.torchrun(argv, options, DIE=deaths)
    text = procs.output(p)
    assert p.returncode == 0, text
    saved = [2 * (int(death.split(":")[1]) // 2) for death in deaths.split(",")]
    assert [int(n) for n in re.findall(r"going on from .*, step (\d+)", text)] == saved
    procs.assert_same(procs.result(tmp_path / "out"), undisturbed)


def third_of_two(names: dict[str, str]) -> None:
    """Makes this process one of a rank that has no GPU left."""
    os.environ.update(names)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2


@pytest.mark.parametrize("who", ["[rank 2] ", ""])
def test_more_ranks_than_gpus(who, root, tmp_path):
    """Guards: CUDA's traceback; silence, as all ranks but 0 keep. Clusters set LOCAL_RANK alone."""
    names = dict(LOCAL_RANK="2") | (dict(RANK="2", WORLD_SIZE="4") if who else {})
    argv, text = procs.flags("speed", root, tmp_path / "out", "--batch-size 8"), tmp_path / "text"
    p = procs.start("speed", argv, text, first=functools.partial(third_of_two, names))
    assert procs.finish(p) == 1
    told = f"{who}error: LOCAL_RANK 2: no such GPU, this process sees 2; give a lower --nproc_per"
    assert text.read_text().splitlines()[-1].startswith(told)
    assert "Traceback" not in text.read_text()


@pytest.mark.slow
def test_two_nodes(root, tmp_path, undisturbed):
    """Guards: ranks taken for local ranks. Two launchers on the loopback address."""
    port = procs.free_port()
    options = "--nnodes=2 --nproc_per_node=1 --rdzv-backend=c10d --rdzv-id=1 "
    options += f"--rdzv-endpoint=127.0.0.1:{port} --local-addr=127.0.0.1"
    argv = ["mkd", *procs.flags("mkd", root, tmp_path / "out")]
    nodes = [procs.torchrun(argv, options) for _ in range(2)]
    texts = [procs.output(p) for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], texts
    procs.assert_same(procs.result(tmp_path / "out"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "raise"])
def test_rank_that_fails_brings_the_others_down(how, root, tmp_path):
    """Guards: ranks that wait for one that is gone until the cluster's time is up."""
    argv = ["speed", *procs.flags("speed", root, tmp_path / "out")]
    p = procs.torchrun(argv, DIE=f"1:4:{how}")
    procs.wait_for((tmp_path / "out/latest.pt").exists, p)
    begin = time.monotonic()
    text = procs.output(p, 90)
    assert time.monotonic() - begin < 90
    assert p.returncode != 0
    if how == "raise":
        assert re.search(r"\[rank 1\] error: planted", text)
    assert torch.load(tmp_path / "out/latest.pt", weights_only=True)["step"] == 4


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_one_step(root, tmp_path):
    """Guards: ranks that stop at different steps: the checkpoint would never be written."""
    out = tmp_path / "out"
    argv = ["speed", *procs.flags("speed", root, out, "--iters 3000 --eval-every 3000")]
    argv += ["--save-every", "3000", "--log-every", "1"]
    p = procs.torchrun(argv)
    procs.wait_for_step(out, 3, p)
    p.send_signal(signal.SIGTERM)
    text = procs.output(p)
    step = torch.load(out / "latest.pt", weights_only=True)["step"]
    assert 3 <= step < 3000
    assert len(procs.log_of(out)) == step
    assert f"signal 15: saved step {step}; the same command goes on from there" in text
    assert "Error" not in text.split("signal 15: saved")[0].split("eval")[-1]
