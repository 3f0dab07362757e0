"""Oracles of the losses that methods share or have alike, on one rank: test_ranks.py has more."""

import math

import numpy as np
import pytest
import torch
from helpers import F64, PADDINGS, draw, padded
from torch import Tensor

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


def ce_gradient(z: np.ndarray, y: np.ndarray, places: list[tuple], count: int) -> np.ndarray:
    """(softmax - onehot) / count at some places, exactly zero at others."""
    out = np.zeros_like(z)
    for b, i, j in places:
        e = np.exp(z[b, :, i, j])
        out[b, :, i, j] = e / e.sum() / max(count, 1)
        out[b, y[b, i, j], i, j] -= 1 / max(count, 1)
    return out


def hard(found: list[tuple], pixels: int, share: float, thresh: float = 0.7) -> list[tuple]:
    """OHEM: the pixels with p <= thresh, or the hardest `share` of all where those are fewer."""
    ordered = sorted(found, reverse=True)  # least probable first
    below = [pixel for pixel in ordered if math.exp(-pixel[0]) <= thresh]
    least = max(1, round(share * pixels))
    return below if len(below) >= least else ordered[:least]


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


# ----------------------------------------------------------------------------- supervised_loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [None, 0.0, 0.32, 0.6, 1.0])  # None: CE; of 126 pixels
@pytest.mark.parametrize("scale", [0.5, 4.0])  # nearly all below 0.7, or many above it
def test_supervised_loss(case: str, share: float | None, scale: float):
    """CE is the mean over labelled pixels, OHEM over the hard ones: values and gradients."""
    r = np.random.default_rng(2)
    y = labels(case, r)
    z = r.normal(size=(3, C, 7, 6)) * scale
    for b, i, j in np.ndindex(y.shape):  # mostly right, as in training
        if y[b, i, j] != 255 and r.random() < 0.8:
            z[b, y[b, i, j], i, j] += 2 * scale
    found = cross_entropies(z, y)
    kind = ("ce", 0.156) if share is None else ("ohem", share)
    kept = found if share is None else hard(found, y.size, share)
    z_t = torch.tensor(z, requires_grad=True)
    loss = common.supervised_loss(z_t, torch.from_numpy(y), *kind)
    loss.backward()
    np.testing.assert_allclose(loss.item(), mean([ce for ce, _ in kept]), **F64)
    mine = ce_gradient(z, y, [place for _, place in kept], len(kept))
    np.testing.assert_allclose(z_t.grad, mine, rtol=1e-9, atol=1e-14)
    if (case, share, scale) == ("none ignored", 0.6, 4.0):  # 0.7 decides below a share of 0.32
        assert 40 < len(hard(found, y.size, 0.0)) < len(kept) == 76


# ------------------------------------------------------------- pseudo-labels and distillation


def mkd_ce(z: Tensor, label: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    return mkd.pseudo_ce(z.log_softmax(1), label, keep, valid)


@pytest.mark.parametrize("loss", [mkd_ce, segkc.cps_loss])
@pytest.mark.parametrize("case", PADDINGS)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_ce_with_pseudo_labels(loss, case: str, share: float):
    """The sum over kept pixels by the number of valid ones."""
    r = np.random.default_rng(0)
    z, valid = r.normal(size=(2, C, 4, 6)) * 2, padded(case, 2, 4, 6)
    label, keep = r.integers(0, C, (2, 4, 6)), r.random((2, 4, 6)) < share
    found = [(ce, p) for ce, p in cross_entropies(z, label) if valid[p] and keep[p]]
    z_t, n = torch.tensor(z, requires_grad=True), int(valid.sum())
    keep = torch.from_numpy(keep) & valid
    theirs = loss(z_t, torch.from_numpy(label), keep, valid)
    theirs.backward()
    np.testing.assert_allclose(theirs.item(), sum(ce for ce, _ in found) / max(n, 1), **F64)
    mine = ce_gradient(z, label, [place for _, place in found], n)
    np.testing.assert_allclose(z_t.grad, mine, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", PADDINGS)
@pytest.mark.parametrize("t", [1.0, 0.5, 3.0])
def test_distillation(case: str, t: float):
    """L_logit and L_kd: KL by loops; d/dz = t (q - p) / count, and L_kd never moves the senior."""
    teacher, z = draw(3, C, 6, 7), draw(3, C, 6, 7, seed=1)
    valid, total = padded(case, 3, 6, 7), 0.0
    for b, i, j in np.ndindex(3, 6, 7):
        if valid[b, i, j]:
            e_t, e = ([math.exp(v / t) for v in a[b, :, i, j].tolist()] for a in (teacher, z))
            p, q = ([v / sum(a) for v in a] for a in (e_t, e))
            total += sum(a * math.log(a / c) for a, c in zip(p, q, strict=True)) * t**2
    n = max(int(valid.sum()), 1)
    gradient = t * ((z / t).softmax(1) - (teacher / t).softmax(1)) / n * valid[:, None]
    for loss in (speed.logit_loss, segkc.distillation):
        z_t, senior = z.clone().requires_grad_(), teacher.clone().requires_grad_()
        theirs = loss(senior, z_t, valid, t)
        theirs.backward()
        np.testing.assert_allclose(theirs.item(), total / n, **F64)
        torch.testing.assert_close(z_t.grad, gradient, **F64)
    assert senior.grad is None
