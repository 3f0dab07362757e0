"""The number of ranks does not change the experiment; ranks that die come back, or end together."""

import argparse
import functools
import os
import re
import signal
from pathlib import Path

import procs
import pytest
import torch
import torch.distributed as dist
from datasets import blobs, make_folder, noise, save
from helpers import NO_AMP
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import data
import mkd

METHODS = tuple(procs.SCRIPTS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """16 train images, 8 of them labelled, and 7 val images of three sizes."""
    root = make_folder(tmp_path_factory.mktemp("data"), labeled=8, unlabeled=8, val=0)
    sizes = [(48, 40), (40, 48), (30, 33), (48, 40), (64, 20), (90, 16), (48, 40)]
    for i, size in enumerate(sizes):
        save(root / f"val/images/v{i}.png", noise(i, size))
        save(root / f"val/masks/v{i}.png", blobs(i, 3, size))
    return root


def args_of(script: str, root: Path, more: str = "") -> argparse.Namespace:
    argv = procs.flags(script, root, Path("unused"), f"--batch-size 8 --scale 0.4 0.8 {more}")
    args = procs.SCRIPTS[script].parse_args(argv)
    args.amp = "off"
    return args


# ---------------------------------------------------------------------------- the same batches


def batches_on(root: Path, workers: int) -> list[dict]:
    """The first 3 batches that a rank gets, with the boxes that mkd_step draws for them."""
    rank, world = common.rank_world()
    args = args_of("speed", root, f"--iters 3 --workers {workers}")
    found = []
    for batch in data.train_batches(data.load_split(args), args, rank, world, 0, CPU):
        found.append(dict(batch))
        draws = [data.rng(0, "mkd", batch["step"], p) for p in batch["positions"]]
        found[-1]["mkd"] = torch.tensor([mkd.draw_boxes(32, r) for r in draws])
    return found


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 4), (2, 1), (4, 0)])
def test_ranks_and_workers_share_the_global_batch(world, workers, root):
    """Guards: a seed, an order or an offset that a rank or a worker has for itself."""
    one = batches_on(root, 0)
    ranks = [batches_on(root, workers)]
    if world > 1:
        ranks = procs.on_ranks(world, batches_on, root, workers)
    assert len(one) == 3
    for step, batch in enumerate(one):
        shares = [rank[step] for rank in ranks]
        for name, value in batch.items():
            mine = [share[name] for share in shares]
            if name in ("order", "step"):
                assert mine == [value] * world
            elif isinstance(value, list):
                assert sum(mine, []) == value, name
            else:
                dim = 1 if name in ("strong", "cutmix") else 0  # [V, B, ...]
                assert torch.cat(mine, dim).equal(value), name
    assert one[0]["positions"] == [*range(8)]
    assert len({tuple(batch["x_id"]) for batch in one}) > 1


# --------------------------------------------------------------------------------- evaluation


def confusion_on(root: Path, more: str) -> dict:
    """The confusion matrices of two networks over the val images."""
    torch.manual_seed(0)
    nets = {"a": procs.Tiny(3), "b": procs.Tiny(3)}
    args = args_of("speed", root, more)
    return common.evaluate(nets, data.load_split(args), args, CPU)


@pytest.mark.parametrize("more", ["", "--eval-mode slide"])
def test_confusion_matrices_do_not_depend_on_the_ranks(more, root):
    """Guards: images counted twice or left out where the set cannot be shared evenly."""
    one = confusion_on(root, more)
    assert not one["a"].equal(one["b"])
    for rank in procs.on_ranks(3, confusion_on, root, more):
        procs.assert_same(rank, one)


# ------------------------------------------------------------------------------ the same step


def step_on(root: Path, script: str, more: str) -> dict:
    """A step of a method on a rank: terms (mean over ranks), gradients, statistics and counts.

    Batch norm stays in eval mode; labels are ignored in all but a corner of the first images.
    """
    nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
    rank, world = common.rank_world()
    args = args_of(script, root, more)
    torch.manual_seed(0)
    nets = [procs.Tiny(3) for _ in range(4)]
    for net in nets:
        for p in net.parameters():
            p.data *= 1.5
        if args.sup_loss == "ohem":
            net.classifier.weight.data *= 10  # sure of most pixels: fewer are below 0.7 than kept
        net.train()
    batch = next(data.train_batches(data.load_split(args), args, rank, world, 0, CPU))
    for k, p in enumerate(batch["positions"]):  # very unequal counts: p eighths are ignored
        batch["y"][k, : 4 * p] = 255
    stats = nn.ModuleDict()
    whole, step, parts = nets[0], procs.speed.speed_step, [nets[0]]
    if script == "mkd":
        names = ("student1", "student2", "teacher1", "teacher2")
        stats = mkd.ClassStatistics(mkd.AUGMENTED[args.fa], 3, 16)
        nets[2].requires_grad_(False)
        nets[3].requires_grad_(False)
        parts = [dict(zip(names, nets, strict=True)), stats]
        whole, step = mkd.Students(*nets[:2]), mkd.mkd_step
    elif script == "segkc":
        parts = [{"junior": nets[1], "senior": nets[0]}]
        whole, step = procs.segkc.Pair(*nets[:2]), procs.segkc.segkc_step
    model = DistributedDataParallel(whole) if world > 1 else whole
    terms = step(args, *parts, model, NO_AMP, batch, 1.0)
    terms["loss"].backward()
    return {
        "terms": {k: common.rank_mean(v) for k, v in terms.items()},
        "gradient": [p.grad for p in whole.parameters()],
        "stats": list(stats.buffers()),
        "counts": [int((batch["y"] != 255).sum()), int(batch["u_valid"].sum())],
    }


def assert_close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Within 2e-5 of the largest entry: float32 sums of 1e4 pixels in another order."""
    apart, size = (a - b).abs().max().item(), b.abs().max().item()
    assert apart <= 2e-5 * max(size, 1e-3), f"{what}: {apart} apart, of {size}"


@pytest.mark.parametrize(
    ("script", "world", "more"),
    [
        ("speed", 2, "--sup-loss ohem --ohem-share 0.25"),
        ("speed", 4, "--pick random"),
        ("mkd", 2, "--sup-loss ohem --ohem-share 0.25"),
        ("mkd", 4, "--fa all --teacher-mode train"),
        ("segkc", 2, "--sup-loss ohem --ohem-share 0.25"),
        ("segkc", 4, ""),
    ],
)
def test_ranks_take_the_same_gradient_step(script, world, more, root):
    """Guards: a mean of the ranks' means, an OHEM or class statistics of one rank's pixels."""
    train = nn.BatchNorm2d.train
    try:
        one = step_on(root, script, more)
    finally:
        nn.BatchNorm2d.train = train
    ranks = procs.on_ranks(world, step_on, root, script, more)
    for k in (0, 1):
        counts = [rank["counts"][k] for rank in ranks]
        assert sum(counts) == one["counts"][k]
        assert max(counts) > 1.02 * min(counts)  # else a mean of means would pass
    for rank in ranks:
        for name, term in one["terms"].items():
            assert_close(rank["terms"][name], term, name)
        for part in ("gradient", "stats"):
            for k, (a, b) in enumerate(zip(rank[part], one[part], strict=True)):
                assert_close(a, b, f"{part} {k}")
    assert max(g.abs().max() for g in one["gradient"]) > 1e-3


def buffers_on() -> list:
    torch.manual_seed(dist.get_rank())
    mine = torch.tensor([1.0, 2.0]) * (1 + dist.get_rank())
    assert common.rank_sum(mine.requires_grad_()).equal(torch.tensor([3.0, 6.0]))
    assert common.rank_mean(mine).equal(torch.tensor([1.5, 3.0]))
    assert mine.equal(torch.tensor([1.0, 2.0]) * (1 + dist.get_rank())), "its input has changed"
    net = procs.Tiny(3)
    net(torch.randn(2, 3, 32, 32))
    before = [b.clone() for b in net.buffers()]
    common.average_buffers([net, nn.Linear(2, 2)])  # the second has none
    common.average_buffers([nn.Linear(2, 2)])
    return [before, list(net.buffers())]


def test_batch_norm_statistics_agree_over_ranks():
    """Guards: ranks that evaluate, and guess labels, with different networks."""
    (before0, after0), (before1, after1) = procs.on_ranks(2, buffers_on)
    for a, b, c, d in zip(before0, before1, after0, after1, strict=True):
        assert c.equal(d)
        if a.is_floating_point():
            assert not a.equal(b)
            assert torch.allclose(c, (a + b) / 2)


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """For a process: a rank, without torchrun, that keeps what it would save."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    save = common.save

    def keep(state: dict, *rest: object) -> None:
        nets = {k: v.state_dict() for k, v in state.items() if isinstance(v, nn.Module)}
        torch.save(nets, folder / f"{rank}.pt")
        save(state, *rest)

    common.save = keep


@pytest.fixture(scope="module")
def on_two(root, tmp_path_factory):
    """A script's run on two ranks: what each of them would save, and the run's result."""

    @functools.cache
    def run(script: str, more: str) -> tuple[list[dict], dict]:
        folder, port = tmp_path_factory.mktemp(script), procs.free_port()
        argv = procs.flags(script, root, folder / "out", more)
        ranks = []
        for rank in (0, 1):
            first = functools.partial(one_of_two, rank, port, folder)
            ranks.append(procs.start(script, argv, folder / "text", first=first))
        assert [procs.finish(p) for p in ranks] == [0, 0], (folder / "text").read_text()
        kept = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
        return kept, procs.result(folder / "out")

    return run


@pytest.mark.parametrize("words", [*METHODS, "speed --labeled-only"])
def test_networks_agree_over_ranks(words, on_two):
    """Guards: ranks that drift apart in their running statistics, teachers or class statistics."""
    script, _, more = words.partition(" ")
    kept, result = on_two(script, more)
    procs.assert_same(*kept)
    procs.assert_same(kept[0], {name: result["latest"][name] for name in kept[0]})


# ------------------------------------------------------------------------------------- the log


def log_on(out: Path) -> None:
    """Five steps with the losses 1 to 5 on rank 0, 10 more on rank 1; lines at 2, 4 and 5."""
    args = argparse.Namespace(out=out, iters=5, batch_size=8, labeled_only=False, eval_every=5)
    log = common.Log(args, 0)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for done in range(1, 6):
        loss = torch.tensor(done + 10.0 * common.rank_world()[0])
        log.add({"loss": loss, "L_x": loss / 4})
        if done in (2, 4, 5):
            log.train(done, optimizer, scaler)


def test_train_lines_are_means_over_steps_and_ranks(tmp_path):
    """Guards: rank 0's own losses, the last step's, a mean over --log-every where fewer were."""
    procs.on_ranks(2, log_on, tmp_path)
    found = [(x["step"], x["loss"], x["L_x"], x["lr"]) for x in procs.log_of(tmp_path)]
    assert found == [(2, 6.5, 1.625, 0.5), (4, 8.5, 2.125, 0.5), (5, 10.0, 2.5, 0.5)]


# ------------------------------------------------------------------------------------ torchrun


def test_torchrun_restarts(root, tmp_path, on_two):
    """Guards: a restart that hangs on dead ranks' addresses, starts anew, or ends elsewhere; ranks
    that wait for one that failed until the cluster's time is up; silence.

    With --overwrite over a finished run: it counts until the first step, and not after it.
    """
    (tmp_path / "out").mkdir()
    torch.save(on_two("mkd", "")[1]["latest"], tmp_path / "out/latest.pt")
    argv = ["mkd", *procs.flags("mkd", root, tmp_path / "out", "--overwrite")]
    flags = "--nproc_per_node=2 --max-restarts=3"
    p = procs.torchrun(argv, flags, DIE="1:0:raise,1:3:kill,1:3:raise")
    text = procs.output(p, 150)
    assert p.returncode == 0, text
    assert [int(n) for n in re.findall(r"going on from step (\d+)", text)] == [2, 4]
    assert re.search(r"\[rank 1\] error: planted", text)
    procs.assert_same(procs.result(tmp_path / "out"), on_two("mkd", "")[1])
    assert not (tmp_path / "out/latest.old.pt").exists()


def mean_of_one_pixel() -> float:
    """Of a mask that is valid in one pixel of one rank: a value of 3."""
    valid = torch.tensor([common.rank_world()[0] == 0])
    return common.masked_mean(torch.tensor([3.0]), valid, valid).item()


def test_a_mean_over_fewer_pixels_than_ranks():
    """Guards: a denominator that is one pixel on each rank, not one in all."""
    assert sum(procs.on_ranks(2, mean_of_one_pixel)) / 2 == 3


def signal_to_rank_1() -> list[int]:
    common._process.signal = signal.SIGTERM * int(os.environ["RANK"])
    return [common.stop_signal(False), common.stop_signal(True)]


def test_a_signal_to_one_rank_stops_all():
    """Guards: a node that is preempted alone: the others would wait for it, and nothing is saved.
    They agree where a log line is due."""
    assert procs.on_ranks(2, signal_to_rank_1) == [[0, signal.SIGTERM]] * 2


def test_sigterm_to_torchrun_saves_one_step(root, tmp_path):
    """Guards: ranks that stop at different steps: the checkpoint would never be written."""
    out = tmp_path / "out"
    argv = ["speed", *procs.flags("speed", root, out, "--iters 3000 --eval-every 3000")]
    p = procs.torchrun([*argv, "--save-every", "3000", "--log-every", "2"])
    procs.wait_for_step(out, 4, p)
    p.send_signal(signal.SIGTERM)
    text = procs.output(p)
    step = torch.load(out / "latest.pt", weights_only=True)["step"]
    assert 4 <= step < 3000
    assert step % 2 == 0  # where a log line is due
    assert len(procs.log_of(out)) == step / 2
    assert text.count("signal 15: saved; the same command, without --overwrite, goes on") == 1
    ours = [line for line in text.splitlines() if "/speed.py" in line or "/common.py" in line]
    assert not ours  # no traceback of ours


def test_more_ranks_than_gpus(monkeypatch):
    """Guards: CUDA's traceback; silence, as all ranks but 0 keep over an InputError."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(common.RunError, match="^LOCAL_RANK 2: .*no such GPU; lower --nproc"):
        common.pick_device(2)


def test_a_world_size_alone_starts_no_group(monkeypatch):
    """Guards: a quarter of a batch, as a cluster's template exports WORLD_SIZE."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert common.rank_world() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    assert common.rank_world() == (2, 4)
