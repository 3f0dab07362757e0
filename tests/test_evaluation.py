"""Evaluation against loops: sizes, whole images, windows, geometry, confusion, IoU."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import blobs, noise, save
from helpers import nearest
from PIL import Image
from torch import Tensor, nn

import common
import data

CPU = torch.device("cpu")
SIZES = [(48, 40), (33, 50), (12, 64), (48, 40)]  # width, height; smaller than a window, too


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
def net() -> common.Segmenter:
    """Random weights, with normalisation statistics of their own, in train mode."""
    torch.manual_seed(0)
    net = common.build_network("resnet18", 4)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(4, 3, 32, 32) * 0.5)
        net.classifier.weight *= 5
    return net


def options(mode: str = "whole", crop: int = 32, amp: str = "off") -> argparse.Namespace:
    return argparse.Namespace(eval_mode=mode, crop_size=crop, amp=amp, workers=0)


def normalized(item: data.Item, crop: int, grid: int = 16) -> Tensor:
    """[1, 3, H, W], zeros at the right and bottom until H and W are the crop plus n grids."""
    x = np.asarray(Image.open(item.image)).astype(np.float32) / 255
    x = (x - np.float32(data.MEAN)) / np.float32(data.STD)
    h, w = x.shape[:2]
    below, beside = ([n for n in range(grid) if (crop - s - n) % grid == 0] for s in (h, w))
    assert len(below) == len(beside) == 1
    full = np.zeros((1, 3, h + below[0], w + beside[0]), np.float32)
    full[0, :, :h, :w] = x.transpose(2, 0, 1)
    return torch.from_numpy(full)


def softmax(z: Tensor) -> np.ndarray:
    e = np.exp(z.double().numpy() - z.double().numpy().max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def windows_by_loops(net: nn.Module, x: Tensor, crop: int) -> np.ndarray:
    """Mean softmax of windows two thirds of a crop apart, the last shifted back to the border."""
    h, w = x.shape[-2:]
    x = F.pad(x, (0, max(0, crop - w), 0, max(0, crop - h)))
    total, count = np.zeros((1, 4, *x.shape[-2:])), np.zeros(x.shape[-2:])

    def starts(n: int) -> list[int]:
        found = [0]
        while found[-1] + crop < n:
            found.append(min(found[-1] + {32: 21, 33: 22}[crop], n - crop))
        return found

    for top in starts(x.shape[2]):
        for left in starts(x.shape[3]):
            part = x[:, :, top : top + crop, left : left + crop]
            total[:, :, top : top + crop, left : left + crop] += softmax(net(part))
            count[top : top + crop, left : left + crop] += 1
    return (total / count)[:, :, :h, :w]


@pytest.mark.parametrize(("mode", "crop"), [("whole", 32), ("whole", 33), ("slide", 33)])
@torch.no_grad()
def test_evaluate(mode, crop, source, net):
    """Guards: images left out or counted twice, padding counted, rows and columns swapped,
    windows cut short or written over, a size that is not congruent to the crop."""
    matrix = common.evaluate({"net": net}, source, options(mode, crop), CPU)["net"]
    assert net.training
    net.eval()
    expected = np.zeros((4, 4), int)
    for item in source.val:
        x = normalized(item, crop)
        scores = windows_by_loops(net, x, crop) if mode == "slide" else net(x).double().numpy()
        found = common.predict(net, x, options(mode, crop))
        np.testing.assert_allclose(found.numpy(), scores, rtol=1e-4, atol=1e-4)
        assert not torch.equal(common.predict(net, x, options(mode, crop, "bf16")), found)
        if mode == "whole":  # rounded in the network alone
            with torch.autocast("cpu", torch.bfloat16):
                rounded = net(x)
            assert torch.equal(common.predict(net, x, options(crop=crop, amp="bf16")), rounded)
        image, label = Image.open(item.image), np.asarray(Image.open(item.mask))
        prediction = scores[0].argmax(0)[: label.shape[0], : label.shape[1]]
        predicted = common.predict_image(net, image, options(mode, crop))
        np.testing.assert_array_equal(predicted, prediction)
        for i, j in np.ndindex(label.shape):
            if label[i, j] != 255:
                expected[label[i, j], prediction[i, j]] += 1
    assert expected.sum() == sum((w - 2) * h for w, h in SIZES)  # the border of 255 is left out
    assert (expected.sum(0) > 0).sum() > 1
    assert abs(matrix.numpy() - expected).sum() <= 2  # a tie to the last bit


def test_a_networks_score_does_not_depend_on_its_partner(source, net, monkeypatch):
    """Guards: a ViT beside a CNN whose patches do not cover the images, or padding for both."""
    other, seen = common.build_network("resnet18", 4), []
    monkeypatch.setattr(other.backbone, "grid", 14)
    other.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    both = common.evaluate({"junior": net, "senior": other}, source, options(crop=42), CPU)
    assert list(both) == ["junior", "senior"]
    assert set(seen) == {(42, 56), (56, 42), (70, 14)}  # the multiples of 14 above SIZES
    for name, one in (("junior", net), ("senior", other)):
        alone = common.evaluate({name: one}, source, options(crop=42), CPU)[name]
        assert torch.equal(both[name], alone)
    assert net.training
    assert other.training


# ----------------------------------------------------------------- geometry: aligned corners


class Coordinates(common.Segmenter):
    """Predicts for each pixel its row (axis 0) or column (1): all that it knows is its cells'.

    Cell i of a CNN is centred on pixel 16 i. The logit 2 y k - k^2 is linear in y, as is
    upsampling; the class of the largest one is the integer nearest to y.
    """

    def __init__(self, axis: int) -> None:
        nn.Module.__init__(self)
        self.axis, self.config = axis, dict(num_classes=255)
        self.backbone = nn.Identity()
        self.backbone.grid = 16
        self.unused = nn.Parameter(torch.zeros(1))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = [(n + 15) // 16 for n in x.shape[-2:]]
        y = 16 * torch.arange(cells[self.axis]).view((-1, 1) if self.axis == 0 else (1, -1))
        k = torch.arange(255).view(-1, 1, 1)
        z = (2 * y * k - k**2).float().expand(len(x), -1, *cells)
        return z, z, z


@pytest.mark.parametrize("crop", [65, 129, 321])
def test_an_image_is_not_drawn_out(crop: int, tmp_path):
    """Guards: an image padded to 16 k, whose map is up to 15 pixels off at the far edges."""
    items, sizes = [], [(17, 18), (33, 32), (34, 47), (64, 65), (81, 250), (128, 129), (241, 254)]
    for h, w in sizes:
        image, row = Image.new("RGB", (w, h)), np.arange(h)[:, None].repeat(w, 1)
        for axis, expected in ((0, row), (1, np.arange(w)[None].repeat(h, 0))):
            label = common.predict_image(Coordinates(axis), image, options(crop=crop))
            np.testing.assert_array_equal(label, expected)
        image.save(tmp_path / f"{h}.png")
        mask = save(tmp_path / f"{h}_mask.png", row.astype(np.uint8))
        items.append(data.Item(str(h), tmp_path / f"{h}.png", mask))
    split = data.Source("rows", [str(k) for k in range(255)], tmp_path, [], items)
    matrix = common.evaluate({"net": Coordinates(0)}, split, options(crop=crop), CPU)["net"]
    assert matrix.sum() == matrix.diagonal().sum() == sum(h * w for h, w in sizes)


@pytest.mark.parametrize("size", [(33, 17, 9, 5), (64, 50, 16, 13), (7, 20, 1, 20), (40, 40, 3, 4)])
def test_resize_mask_reads_the_pixel_nearest_to_a_cell(size):
    """With aligned corners: the first cell is the first pixel, the last the last."""
    height, width, h, w = size
    label = torch.randint(0, 256, (2, height, width))
    mask = label > 100
    assert torch.equal(common.resize_mask(label, (h, w)), nearest(label, (h, w)))
    assert torch.equal(common.resize_mask(mask, (h, w)), nearest(mask, (h, w)))


# ------------------------------------------------------------------------------------- scores


def test_iou_of():
    """By hand: class 0 has 3 of 3 + 2 + 1, class 1 has 4 of 4 + 1 + 2, 2 is guessed, 3 absent."""
    confusion = torch.tensor([[3, 2, 0, 0], [1, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    miou, iou = common.iou_of(confusion, list("abcd"))
    assert iou == dict(a=50, b=pytest.approx(400 / 7, abs=1e-4), c=None, d=None)
    assert miou == pytest.approx((50 + 400 / 7) / 2)
    confusion[0, 2] = 4  # a class that is in no label, but predicted, counts as zero
    miou, iou = common.iou_of(confusion, list("abcd"))
    assert iou == dict(a=30, b=pytest.approx(400 / 7, abs=1e-4), c=0, d=None)
    assert miou == pytest.approx((30 + 400 / 7) / 3)
