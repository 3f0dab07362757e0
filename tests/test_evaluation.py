"""Evaluation against loops: confusion, IoU, whole images, sliding windows, flips and scales."""

import argparse
import math

import numpy as np
import procs
import pytest
import torch
import torch.nn.functional as F
from datasets import blobs, noise, save
from PIL import Image
from torch import Tensor

import common
import data

CPU = torch.device("cpu")
SIZES = [(48, 40), (33, 50), (20, 64), (48, 40)]  # width, height; smaller than a window, too


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> data.Source:
    """Pictures of several sizes, 4 classes, of which the masks have three."""
    root = tmp_path_factory.mktemp("evaluation")
    for part in ("train", "val"):
        for k, size in enumerate(SIZES):
            save(root / part / f"images/{part}{k}.png", noise(k, size))
            save(root / part / f"masks/{part}{k}.png", blobs(k, 3, size))
    (root / "classes.txt").write_text("sky\nroad\ncar\nbus\n")
    return data.load_source("folder", root)


@pytest.fixture
def net() -> procs.Tiny:
    """Random weights, with normalisation statistics of their own, in train mode."""
    torch.manual_seed(0)
    net = procs.Tiny(4)
    for _ in range(3):
        net(torch.randn(4, 3, 32, 32) * 0.5)
    with torch.no_grad():
        net.classifier.weight *= 20
    return net


def options(mode: str = "whole", tta: bool = False) -> argparse.Namespace:
    return argparse.Namespace(eval_mode=mode, tta=tta, crop_size=32, amp="off", workers=0)


def normalized(item: data.Item) -> Tensor:
    """[1, 3, H, W], filled up with zeros at the right and bottom to multiples of 16."""
    x = np.asarray(Image.open(item.image)).astype(np.float32) / 255
    x = (x - np.float32(data.MEAN)) / np.float32(data.STD)
    h, w = x.shape[:2]
    full = np.zeros((1, 3, math.ceil(h / 16) * 16, math.ceil(w / 16) * 16), np.float32)
    full[0, :, :h, :w] = x.transpose(2, 0, 1)
    return torch.from_numpy(full)


def softmax(z: Tensor) -> np.ndarray:
    e = np.exp(z.double().numpy() - z.double().numpy().max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def windows_by_loops(net: procs.Tiny, x: Tensor) -> np.ndarray:
    """Mean softmax of 32x32 windows 21 apart, the last shifted back to the border."""
    h, w = x.shape[-2:]
    x = F.pad(x, (0, max(0, 32 - w), 0, max(0, 32 - h)))
    total, count = np.zeros((1, 4, *x.shape[-2:])), np.zeros(x.shape[-2:])

    def starts(n: int) -> list[int]:
        found = [0]
        while found[-1] + 32 < n:
            found.append(min(found[-1] + 21, n - 32))
        return found

    for top in starts(x.shape[2]):
        for left in starts(x.shape[3]):
            part = x[:, :, top : top + 32, left : left + 32]
            assert part.shape[-2:] == (32, 32)
            total[:, :, top : top + 32, left : left + 32] += softmax(net(part))
            count[top : top + 32, left : left + 32] += 1
    return (total / count)[:, :, :h, :w]


def scores_by_loops(net: procs.Tiny, x: Tensor, mode: str, tta: bool) -> np.ndarray:
    """What `predict` says of an image [1, 3, H, W], in double precision."""
    if not tta:
        return windows_by_loops(net, x) if mode == "slide" else net(x).double().numpy()
    total = 0
    for scale in (0.75, 1.0, 1.25):
        size = [max(1, round(s * scale / 16)) * 16 for s in x.shape[-2:]]
        scaled = F.interpolate(x, size, mode="bilinear", align_corners=False).numpy()
        for flip in (False, True):
            view = torch.from_numpy(scaled[..., ::-1].copy() if flip else scaled)
            p = windows_by_loops(net, view) if mode == "slide" else softmax(net(view))
            p = torch.from_numpy(p[..., ::-1].copy() if flip else p)
            p = F.interpolate(p, x.shape[-2:], mode="bilinear", align_corners=True)
            total = total + p.numpy()
    return total


MODES = [("whole", False), ("slide", False), ("whole", True), ("slide", True)]


@pytest.mark.parametrize(("mode", "tta"), MODES)
@torch.no_grad()
def test_predict(mode, tta, source, net):
    """Guards: windows cut short or written over, flips not flipped back, scales off the grid."""
    net.eval()
    for item in source.val:
        x = normalized(item)
        scores = common.predict(net, x, options(mode, tta))
        assert scores.shape == (1, 4, *x.shape[-2:])
        expected = scores_by_loops(net, x, mode, tta)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "tta"), MODES[:2])
@torch.no_grad()
def test_evaluate(mode, tta, source, net):
    """Guards: images left out or counted twice, padding counted, rows and columns swapped."""
    matrix = common.evaluate({"net": net}, source, options(mode, tta), CPU)["net"]
    assert net.training
    net.eval()
    expected = np.zeros((4, 4), int)
    for item in source.val:
        label = np.asarray(Image.open(item.mask))
        scores = scores_by_loops(net, normalized(item), mode, tta)[0]
        for i, j in np.ndindex(label.shape):
            if label[i, j] != 255:
                expected[label[i, j], scores[:, i, j].argmax()] += 1
    assert expected.sum() == sum((w - 2) * h for w, h in SIZES)  # the border of 255 is left out
    assert (expected.sum(0) > 0).sum() > 1
    assert abs(matrix.numpy() - expected).sum() <= 2  # a tie to the last bit


def test_confusion_matrix_has_labels_in_rows():
    label, prediction = torch.tensor([[0, 0, 1, 255]]), torch.tensor([[2, 2, 1, 1]])
    expected = [[0, 0, 2], [0, 1, 0], [0, 0, 0]]
    assert common.confusion_matrix(prediction, label, 3).tolist() == expected


def test_iou_of():
    """By hand: class 0 has 3 of 3 + 2 + 1, class 1 has 4 of 4 + 1 + 2, 2 is guessed, 3 absent."""
    confusion = torch.tensor([[3, 2, 0, 0], [1, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    miou, iou = common.iou_of(confusion)
    assert iou == [pytest.approx(50), pytest.approx(400 / 7), None, None]
    assert miou == pytest.approx((50 + 400 / 7) / 2)
    confusion[0, 2] = 4  # a class that is in no label, but predicted, counts as zero
    miou, iou = common.iou_of(confusion)
    assert iou == [pytest.approx(30), pytest.approx(400 / 7), 0, None]
    assert miou == pytest.approx((30 + 400 / 7) / 3)


def test_a_networks_score_does_not_depend_on_its_partner(source, net, monkeypatch):
    """Guards: a ViT beside a CNN whose patches do not cover the images, or padding for both."""
    other, seen = procs.Tiny(4), []
    monkeypatch.setattr(other.backbone, "grid", 14)
    other.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    both = common.evaluate({"junior": net, "senior": other}, source, options(), CPU)
    assert list(both) == ["junior", "senior"]
    assert seen
    assert all(h % 14 == w % 14 == 0 for h, w in seen)
    assert not all(h % 112 == w % 112 == 0 for h, w in seen)  # of both grids
    for name, one in (("junior", net), ("senior", other)):
        alone = common.evaluate({name: one}, source, options(), CPU)[name]
        assert torch.equal(both[name], alone)
    assert net.training
    assert other.training
