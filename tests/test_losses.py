"""Oracles of the losses that all methods share, on one rank and on two with unequal counts."""

import math
import types

import numpy as np
import pytest
import torch
from datasets import make_folder
from helpers import TINY, run_main, run_ranks

import common
import mkd
import segkc
import speed

C = 5


def labels(case: str, r: np.random.Generator, shape: tuple[int, ...] = (3, 7, 6)) -> np.ndarray:
    y = r.integers(0, C, shape)
    if case == "ignore":
        y[r.random(shape) < 0.3] = 255
    elif case == "one class":
        y[:] = 2
    elif case == "all ignored":
        y[:] = 255
    elif case == "one pixel":
        y[:], y[1, 3, 4] = 255, 0
    return y


CASES = ("none ignored", "ignore", "one class", "all ignored", "one pixel")


def cross_entropies(z: np.ndarray, y: np.ndarray) -> list[tuple[float, tuple[int, int, int]]]:
    """(-log p of the true class, place) of every labelled pixel, by loops."""
    found = []
    for b, i, j in np.ndindex(y.shape):
        if y[b, i, j] != 255:
            e = [math.exp(v) for v in z[b, :, i, j]]
            found.append((-math.log(e[y[b, i, j]] / sum(e)), (b, i, j)))
    return found


def hard(found: list[tuple[float, tuple]], least: int, thresh: float = 0.7) -> list[float]:
    """OHEM: the pixels with p <= thresh, or the `least` hardest ones where those are fewer."""
    ordered = sorted((ce for ce, _ in found), reverse=True)  # least probable first
    below = [ce for ce in ordered if math.exp(-ce) <= thresh]
    return below if len(below) >= least else ordered[:least]


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


# --------------------------------------------------------------------------------- masked_mean


@pytest.mark.parametrize("keep_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("valid_p", [0.0, 0.6, 1.0])
def test_masked_mean_divides_by_valid_pixels_not_by_kept_ones(keep_p: float, valid_p: float):
    r = np.random.default_rng(0)
    a = r.normal(size=(2, 5, 4)) + 3  # far from a mean of 0
    valid = r.random(a.shape) < valid_p
    keep = (r.random(a.shape) < keep_p) & valid
    total = 0.0
    for place in np.ndindex(a.shape):
        total += a[place] if keep[place] else 0.0
    t = torch.from_numpy
    mine = total / max(np.count_nonzero(valid), 1)
    theirs = common.masked_mean(t(a), t(keep), t(valid)).item()
    np.testing.assert_allclose(theirs, mine, rtol=1e-10)


# ----------------------------------------------------------------------------- supervised_loss


@pytest.mark.parametrize("case", CASES)
def test_supervised_loss_is_the_mean_over_labelled_pixels(case: str):
    r = np.random.default_rng(1)
    z, y = r.normal(size=(3, C, 7, 6)) * 2, labels(case, r)
    found = cross_entropies(z, y)
    z_t = torch.tensor(z, requires_grad=True)
    loss = common.supervised_loss(z_t, torch.from_numpy(y), "ce")
    np.testing.assert_allclose(loss.item(), mean([ce for ce, _ in found]), rtol=1e-10)
    loss.backward()
    # the gradient: (softmax - onehot) / count at labelled pixels, exactly zero at others
    mine = np.zeros_like(z)
    for _, (b, i, j) in found:
        e = np.exp(z[b, :, i, j])
        mine[b, :, i, j] = e / e.sum()
        mine[b, y[b, i, j], i, j] -= 1
    np.testing.assert_allclose(z_t.grad, mine / max(len(found), 1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("least", [1, 40, 75, 10_000])
@pytest.mark.parametrize("scale", [0.5, 4.0])  # nearly all below 0.7, or many above it
def test_ohem_keeps_the_hard_pixels(case: str, least: int, scale: float):
    r = np.random.default_rng(2)
    y = labels(case, r)
    z = r.normal(size=(3, C, 7, 6)) * scale
    for b, i, j in np.ndindex(y.shape):  # mostly right, as in training
        if y[b, i, j] != 255 and r.random() < 0.8:
            z[b, y[b, i, j], i, j] += 2 * scale
    found = cross_entropies(z, y)
    args = torch.from_numpy(z), torch.from_numpy(y), "ohem", least
    mine = mean(hard(found, least))
    np.testing.assert_allclose(common.supervised_loss(*args).item(), mine, rtol=1e-10)


def test_ohem_cases_differ():
    """Of the cases above, some drop pixels by 0.7 and some are filled up to `least`."""
    r = np.random.default_rng(2)
    y = labels("none ignored", r)
    z = r.normal(size=(3, C, 7, 6)) * 4
    for b, i, j in np.ndindex(y.shape):
        z[b, y[b, i, j], i, j] += 8 * (r.random() < 0.8)
    found = cross_entropies(z, y)
    assert 40 < len(hard(found, 40)) < 75 < len(found)
    assert len(hard(found, 75)) == 75


def test_ohem_defaults_are_the_notes():
    r = np.random.default_rng(3)
    z, y = r.normal(size=(1, C, 500, 500)), r.integers(0, C, (1, 500, 500))
    z = z + 6 * (np.arange(C)[None, :, None, None] == y[:, None])
    e = np.exp(z)
    p = np.sort(np.take_along_axis(e / e.sum(1, keepdims=True), y[:, None], 1).ravel())
    assert (p <= 0.7).sum() < 200_000 < len(p)
    theirs = common.supervised_loss(torch.from_numpy(z), torch.from_numpy(y), "ohem").item()
    np.testing.assert_allclose(theirs, -np.log(p[:200_000]).mean(), rtol=1e-10)
    z = z / 4  # now more than 200 000 are below 0.7
    e = np.exp(z)
    p = np.sort(np.take_along_axis(e / e.sum(1, keepdims=True), y[:, None], 1).ravel())
    assert 200_000 < (p <= 0.7).sum() < len(p)
    theirs = common.supervised_loss(torch.from_numpy(z), torch.from_numpy(y), "ohem").item()
    np.testing.assert_allclose(theirs, -np.log(p[p <= 0.7]).mean(), rtol=1e-10)


@pytest.mark.parametrize("labeled_only", [False, True], ids=["whole", "labeled"])
@pytest.mark.parametrize("script", [speed, mkd, segkc], ids=lambda s: s.__name__)
def test_every_supervised_loss_is_what_the_flags_say(script, labeled_only, tmp_path, monkeypatch):
    """Guards: a script, or a network of it, that trains by CE or keeps the default pixels."""
    flags, supervised_loss = [], common.supervised_loss

    def record(z: torch.Tensor, y: torch.Tensor, *kind: object) -> torch.Tensor:
        flags.append(kind)
        return supervised_loss(z, y, *kind)

    monkeypatch.setattr(common, "supervised_loss", record)
    make_folder(tmp_path / "root")
    argv = [*TINY, "--dataset", "folder", "--root", str(tmp_path / "root"), "--split", "1/2"]
    argv += ["--backbone", "resnet18", *["--senior", "resnet18"] * (script is segkc)]
    argv += ["--sup-loss", "ohem", "--ohem-least", "500", *["--labeled-only"] * labeled_only]
    run_main(script, argv, tmp_path / "run")
    networks = 1 if labeled_only or script is speed else 2
    assert flags == [("ohem", 500)] * (2 * networks)  # two steps


def test_all_rates_follow_the_schedule():
    """Guards: rates that fall faster and faster, and heads at the backbone's rate."""

    def groups() -> torch.optim.Optimizer:
        two = ({"params": [torch.zeros(1)], "lr": rate} for rate in (0.1, 1.0))
        return torch.optim.SGD([*two], momentum=0.9)

    run, optimizer = object.__new__(common.Run), groups()
    run.args = types.SimpleNamespace(lr=0.1, iters=10)
    for step in range(10):
        if step == 4:  # resumed
            saved, optimizer = optimizer.state_dict(), groups()
            optimizer.load_state_dict(saved)
        run.set_lr(optimizer, step)
        poly = (1 - step / 10) ** 0.9
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * poly, poly])


def test_ohem_has_no_gradient_at_dropped_pixels():
    r = np.random.default_rng(4)
    z, y = r.normal(size=(1, C, 6, 6)), labels("ignore", r, (1, 6, 6))
    found = sorted(cross_entropies(z, y), reverse=True)
    z_t = torch.tensor(z * 1.0, requires_grad=True)
    common.supervised_loss(z_t, torch.from_numpy(y), "ohem", 7, 0.0).backward()
    kept = {place for _, place in found[:7]}
    for b, i, j in np.ndindex(y.shape):
        assert z_t.grad[b, :, i, j].any().item() == ((b, i, j) in kept)


def test_at_the_start_the_loss_is_log_c():
    z, y = torch.zeros(1, C, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    assert common.supervised_loss(z, y, "ce").item() == pytest.approx(math.log(C), rel=1e-6)


# ------------------------------------------------------------------------------------ two ranks


def world_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four images whose first half has far fewer labelled pixels than the second."""
    r = np.random.default_rng(5)
    features, y = r.normal(size=(4, 3, 6, 5)), r.integers(0, C, (4, 6, 5))
    y[:2][r.random((2, 6, 5)) < 0.9] = 255
    y[2:][r.random((2, 6, 5)) < 0.1] = 255
    return torch.from_numpy(features), torch.from_numpy(y), torch.from_numpy(r.normal(size=(C, 3)))


KINDS = (("ce", 1, 0.7), ("ohem", 1, 0.7), ("ohem", 30, 0.1))


def on_a_rank() -> dict:
    """Loss and gradient of this rank's half, as DDP would use them; rank_sum and rank_mean."""
    rank, world = common.rank_world()
    features, y, weight = world_batch()
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    out = {}
    for kind in KINDS:
        w = weight.clone().requires_grad_()
        z = torch.einsum("ca,bahw->bchw", w, features[share])
        loss = common.supervised_loss(z, y[share], *kind)
        loss.backward()
        out[kind] = loss.item(), w.grad
    x = torch.arange(3.0, dtype=torch.float64) * (rank + 1)
    before = x.clone().requires_grad_()
    out["sum"], out["mean"] = common.rank_sum(before), common.rank_mean(before)
    out["same input"], out["rank"] = torch.equal(before.detach(), x), (rank, world)
    a, valid = features[share, 0], y[share] != 255
    out["masked"] = common.masked_mean(a, valid & (a > 0), valid).item()
    return out


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(2, on_a_rank)


def test_two_ranks_are_one(ranks: list[dict]):
    """Averaged over ranks, as DDP does it, losses and gradients are those of the global batch."""
    assert [r["rank"] for r in ranks] == [(0, 2), (1, 2)]
    features, y, weight = world_batch()
    for kind in KINDS:
        w = weight.clone().requires_grad_()
        z = torch.einsum("ca,bahw->bchw", w, features)
        found = cross_entropies(z.detach().numpy(), y.numpy())
        values = [ce for ce, _ in found] if kind[0] == "ce" else hard(found, *kind[1:])
        np.testing.assert_allclose(mean([r[kind][0] for r in ranks]), mean(values), rtol=1e-10)
        kept = set(values)
        p = torch.zeros((), dtype=torch.float64)
        for ce, (b, i, j) in found:
            if ce in kept:
                p = p - z[b, :, i, j].log_softmax(0)[y[b, i, j]]
        (p / len(values)).backward()
        averaged = (ranks[0][kind][1] + ranks[1][kind][1]) / 2
        torch.testing.assert_close(averaged, w.grad, rtol=1e-9, atol=1e-12)
    a, valid = features[:, 0], y != 255
    mine = sum(v for v in a[valid].tolist() if v > 0) / int(valid.sum())
    assert mean([r["masked"] for r in ranks]) == pytest.approx(mine, rel=1e-10)


def test_rank_sum_and_rank_mean(ranks: list[dict]):
    for r in ranks:
        assert r["sum"].tolist() == [0.0, 3.0, 6.0]
        assert r["mean"].tolist() == [0.0, 1.5, 3.0]
        assert r["same input"], "rank_sum changed its input"
        assert not r["sum"].requires_grad
        assert not r["mean"].requires_grad


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [(0.0, [1, 1, 1, 1, 1]), (0.5, [0, 0.5, 1, 1, 1]), (1.0, [0, 0.25, 0.5, 0.75, 1])],
)
def test_ramp(ramp, expected):
    """Weights at steps 0, 5, 10, 15, 20 of 20."""
    run = types.SimpleNamespace(args=types.SimpleNamespace(ramp=ramp, iters=20))
    assert [common.Run.ramp(run, step) for step in range(0, 21, 5)] == expected
