"""Data sets, splits, geometry, device augmentation, batches."""

import itertools
import random
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.transforms.functional as TF
from datasets import (
    VOC_TRAIN,
    VOC_VAL,
    batch_args,
    blobs,
    make_cityscapes,
    make_folder,
    make_pascal,
    noise,
    png,
    save,
    save_palette,
    shared,
    truncate,
    write_lists,
)
from PIL import Image

import data
from data import InputError, Item, Source

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def deadline():
    """Turns a hang into a failure."""

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------- strong views


def reference_view(image: torch.Tensor, params: list[float], order: list[int]) -> torch.Tensor:
    """One strong view of [3, H, W] by torchvision, step by step."""
    brightness, contrast, saturation, hue, grey, sigma = (float(p) for p in params)
    jitter = (
        lambda t: TF.adjust_brightness(t, brightness),
        lambda t: TF.adjust_contrast(t, contrast),
        lambda t: TF.adjust_saturation(t, saturation),
        lambda t: TF.adjust_hue(t, hue),
    )
    for op in order:
        image = jitter[op](image)
    if grey:
        image = TF.rgb_to_grayscale(image, 3)
    return TF.gaussian_blur(image, [13, 13], [sigma, sigma]) if sigma else image


def colours(b: int, h: int, w: int) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] with every kind of colour: any, greys, primaries."""
    x = torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(b))
    x[:, :, 0] = x[:, :1, 0]  # greys: no hue
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    x[:, :, 1, :8] = corners.T
    x[:, 0, 2] = x[:, 1, 2]  # two channels alike: on the edge of two hue sectors
    x[:, 2, 3] = x[:, 1, 3]
    return (x * 255).round() / 255


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]])
def test_strong_chain_agrees_with_torchvision(order):
    u = colours(8, 24, 32)
    strong = [[data.strong_params(data.rng(7, "v", v, b)) for b in range(8)] for v in (1, 2)]
    got = data.strong_views(u, torch.tensor(strong, dtype=torch.float32), order)
    assert got.shape == (2, 8, 3, 24, 32)
    for v, b in itertools.product(range(2), range(8)):
        want = reference_view(u[b], strong[v][b], order)
        assert (got[v, b] - want).abs().max() < 1e-4, (v, b)  # 6/255 are allowed
    assert (got[0] - got[1]).abs().max() > 0.1


def near(share: float, p: float, n: int) -> bool:
    """Whether a share of n draws agrees with probability p, within four standard errors."""
    return abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_strong_params_are_drawn_as_the_notation_says():
    n = 4000
    draws = np.array([data.strong_params(data.rng(0, "view1", i, 0)) for i in range(n)])
    jitter = (draws[:, :4] != [1, 1, 1, 0]).all(1)
    grey, blur = draws[:, 4] == 1, draws[:, 5] > 0
    assert set(draws[:, 4]) == {0, 1}
    assert np.array_equal(jitter, (draws[:, :4] != [1, 1, 1, 0]).any(1))  # all four or none
    for on, p in ((jitter, 0.8), (grey, 0.2), (blur, 0.5)):
        assert near(on.mean(), p, n)
    for a, b, p in ((jitter, grey, 0.16), (jitter, blur, 0.4), (grey, blur, 0.1)):
        assert near((a & b).mean(), p, n)  # independent of each other
    ranges = [(0.5, 1.5)] * 3 + [(-0.25, 0.25), None, (0.1, 2.0)]
    for k, on in ((0, jitter), (1, jitter), (2, jitter), (3, jitter), (5, blur)):
        (low, high), values = ranges[k], draws[on, k]
        share = np.histogram(values, 4, (low, high))[0] / len(values)
        assert values.min() >= low
        assert values.max() <= high
        assert all(near(s, 0.25, len(values)) for s in share)  # uniform
    corners = np.corrcoef(draws[jitter, :4].T)
    assert abs(corners - np.eye(4)).max() < 0.08


# --------------------------------------------------------------------------- weak view


def whole_then_crop(image, mask, crop, scale, r):
    """weak_view the slow way: scales the whole picture, then cuts; the same draws.

    Also returns which pixels of the label are ties: their centres lie on the edge of two pixels.
    """
    factor = r.uniform(*scale)
    w, h = (max(1, round(s * factor)) for s in image.size)
    cw, ch = min(crop, w), min(crop, h)
    left, top = r.integers(w - cw + 1), r.integers(h - ch + 1)
    flip = r.random() < 0.5
    out, ties = [], []
    for start, n, step in ((top, ch, image.size[1] / h), (left, cw, image.size[0] / w)):
        centre = (start + np.arange(n) + 0.5) * step
        ties.append(abs(centre - centre.round()) < 1e-6)
    tie = ties[0][:, None] | ties[1]
    for picture, how in ((image, Image.Resampling.BILINEAR), (mask, Image.Resampling.NEAREST)):
        part = picture.resize((w, h), how).crop((left, top, left + cw, top + ch))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part
        out.append(np.asarray(part))
    return (*out, tie[:, ::-1] if flip else tie, flip)


WEAK = [  # image size, crop, scale
    ((120, 90), 64, (0.5, 2.0)),  # with padding at some scales, without at others
    ((120, 90), 64, (1.0, 1.0)),
    ((90, 120), 33, (0.5, 2.0)),
    ((200, 30), 64, (0.5, 2.0)),  # wide and low: padding below, not at the side
    ((30, 200), 64, (0.5, 2.0)),
    ((20, 17), 64, (0.5, 2.0)),  # always smaller than the crop
    ((64, 64), 64, (0.8, 1.25)),
]


@pytest.mark.parametrize(("size", "crop", "scale"), WEAK)
def test_weak_view_is_a_crop_of_the_scaled_image(size, crop, scale):
    image, mask = Image.fromarray(noise(1, size)), Image.fromarray(blobs(1, 21, size))
    flips = set()
    for k in range(30):
        u, y, rect = data.weak_view(image, mask, crop, scale, data.rng(k, "t"))
        part, label, tie, flip = whole_then_crop(image, mask, crop, scale, data.rng(k, "t"))
        flips.add(bool(flip))
        assert u.shape == (crop, crop, 3)
        assert y.shape == (crop, crop)
        assert u.dtype == y.dtype == np.uint8
        top, left, bottom, right = rect
        assert (bottom - top, right - left) == label.shape
        assert top == 0
        assert (right == crop) if flip else (left == 0)  # the padding is flipped too
        inside = u[top:bottom, left:right]
        error = abs(inside.astype(int) - part)
        assert error.max() <= 2  # grey levels: Pillow rounds after each of two passes
        assert error.mean() < 0.25
        assert (tie | (y[top:bottom, left:right] == label)).all()
        outside = np.ones((crop, crop), bool)
        outside[top:bottom, left:right] = False
        assert (y[outside] == 255).all()
        assert (u[outside] == data.FILL).all()
    assert flips == {False, True}


def test_weak_view_draws_scales_flips_and_places_evenly():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    mask = Image.fromarray(ramp)
    image, n = Image.fromarray(np.stack([ramp, ramp.T, ramp], 2)), 400
    slope, flips, left, top = [], 0, [], []
    for k in range(n):
        u, y, _ = data.weak_view(image, mask, 50, (0.5, 2.0), data.rng(k, "w"))
        assert (y != 255).all()
        span = int(y[0, -1]) - int(y[0, 0])
        flips += span < 0
        slope.append(abs(span) / 49)  # source pixels per pixel: 1 / scale
        free = 200 - 50 * slope[-1]
        left.append(min(y[0, 0], y[0, -1]) / free)
        top.append(u[0, 0, 1] / free)
    assert near(flips / n, 0.5, n)
    scale = 1 / np.array(slope)
    assert scale.min() < 0.55
    assert scale.max() > 1.9
    assert abs(scale.mean() - 1.25) < 4 * 0.433 / n**0.5
    for place in (left, top):
        assert abs(np.mean(place) - 0.5) < 0.07
        assert min(place) < 0.05
        assert max(place) > 0.9


# --------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("crop", [64, 321])
def test_cutmix_box(crop):
    n = 3000
    boxes = np.array([data.cutmix_box(crop, data.rng(i, "box")) for i in range(n)])
    empty = (boxes == 0).all(1)
    assert near(empty.mean(), 0.5, n)
    top, left, bottom, right = boxes[~empty].T
    h, w = bottom - top, right - left
    assert min(h.min(), w.min()) > 0
    assert min(top.min(), left.min()) == 0
    assert max(bottom.max(), right.max()) == crop
    # whole pixels: sides are rounded down, at most by one
    assert (h * w <= 0.4 * crop**2).all()
    assert ((h + 1) * (w + 1) > 0.02 * crop**2).all()
    assert ((h + 1) / w > 0.3).all()
    assert (h / (w + 1) < 1 / 0.3).all()
    area, aspect = h * w / crop**2, h / w
    assert area.min() < 0.03
    assert area.max() > 0.38
    assert aspect.min() < 0.4
    assert aspect.max() > 2.5


def test_areas_of_boxes_are_uniform():
    """Guards: an area drawn anew with each shape that does not fit, so that large ones are rare."""
    n, crop = 6000, 1000  # whole pixels change the area by 1 % at most
    boxes = np.array([data.cutmix_box(crop, data.rng(i, "area")) for i in range(n)])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / crop**2
    area = np.sort(area[area > 0])
    want = (area - 0.02) / 0.38  # distribution function of U(0.02, 0.4)
    steps = np.arange(1, len(area) + 1) / len(area)
    assert abs(want - steps).max() < 1.63 / len(area) ** 0.5 + 0.01  # Kolmogorov-Smirnov, 1 %
    assert near((area > 0.38).mean(), 0.02 / 0.38, len(area))


def test_rect_mask():
    rects = [(0, 0, 0, 0), (1, 2, 4, 7), (0, 0, 6, 9), (5, 0, 6, 1)]
    got = data.rect_mask(torch.tensor(rects), 6, 9)
    assert got.dtype == torch.bool
    for one, (top, left, bottom, right) in zip(got, rects, strict=True):
        for row, col in itertools.product(range(6), range(9)):
            assert one[row, col] == (top <= row < bottom and left <= col < right)


# --------------------------------------------------------------------------- splits


def fake_source(name: str, train: int, fine: int = 0, val: int = 10) -> Source:
    """A data set without files: published counts can be drawn from it."""

    def items(part: str, n: int) -> list[Item]:
        ids = [f"{part}_{i:06d}" for i in range(n)]
        return [Item(i, Path(f"/x/{i}.jpg"), Path(f"/x/{i}.png")) for i in ids]

    source = Source(name, ["a", "b"], Path("/x"), items("t", train), items("v", val))
    source.fine = {i.id for i in source.train[::7][:fine]}
    return source


@pytest.fixture
def files_exist(monkeypatch):
    monkeypatch.setattr("os.path.isfile", lambda path: True)


VOC = {"name": "pascal", "train": 10582, "fine": 1464}
CITY = {"name": "cityscapes", "train": 2975}
COUNTS = [  # protocol, split, source, labelled, of them with fine masks (None: by chance)
    ("classic", "1/16", VOC, 92, 92),
    ("classic", "1/8", VOC, 183, 183),
    ("classic", "1/2", VOC, 732, 732),
    ("classic", "full", VOC, 1464, 1464),
    ("classic", "92", VOC, 92, 92),
    ("blended", "1/16", VOC, 662, None),
    ("blended", "1/8", VOC, 1323, None),
    ("blended", "1/2", VOC, 5291, None),
    ("priority", "1/16", VOC, 662, 662),
    ("priority", "1/8", VOC, 1323, 1323),
    ("priority", "1/4", VOC, 2646, 1464),
    ("priority", "1/2", VOC, 5291, 1464),
    ("classic", "1/16", CITY, 186, 0),
    ("classic", "1/8", CITY, 372, 0),
    ("classic", "1/2", CITY, 1488, 0),
]


@pytest.mark.usefixtures("files_exist")
@pytest.mark.parametrize(("protocol", "split", "of", "labeled", "fine"), COUNTS)
def test_published_counts(protocol, split, of, labeled, fine):
    source = fake_source(**of)
    source.fine = {i.id for i in source.train[::7][: of.get("fine", 0)]}
    assert len(source.fine) == of.get("fine", 0)
    made = data.make_split(source, split, 0, protocol)
    ids = {i.id for i in made.labeled}
    assert len(ids) == len(made.labeled) == labeled
    assert ids | {i.id for i in made.unlabeled} == {i.id for i in source.train}
    assert len(made.unlabeled) == of["train"] - labeled
    share = len(ids & source.fine)
    if fine is None:  # at random: in proportion, within five standard errors
        p = 1464 / 10582
        assert abs(share / labeled - p) < 5 * (p * (1 - p) / labeled) ** 0.5
    else:
        assert share == fine
    for word in (source.name, f"{labeled} labelled", f"{len(made.unlabeled)} unlabelled"):
        assert word in made.line
    assert made.hash in made.line
    assert (protocol in made.line) == (source.name == "pascal")


@pytest.mark.usefixtures("files_exist")
@pytest.mark.parametrize("protocol", data.PROTOCOLS)
def test_draws_are_nested_and_depend_on_the_seed_alone(protocol):
    source = fake_source("pascal", 1000, 140)
    draws = {}
    for seed, split in itertools.product((0, 1), ("5", "1/16", "1/8", "1/4", "1/2")):
        made = data.make_split(source, split, seed, protocol)
        draws[seed, split] = {i.id for i in made.labeled}
    for seed in (0, 1):
        for less, more in itertools.pairwise(("5", "1/16", "1/8", "1/4", "1/2")):
            assert draws[seed, less] < draws[seed, more]
    assert draws[0, "1/4"] != draws[1, "1/4"]
    first = data.make_split(source, "1/4", 0, protocol)
    random.Random(5).shuffle(source.train)  # as another file system may list them
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the state that must not matter
    again = data.make_split(source, "1/4", 0, protocol)
    assert [i.id for i in first.labeled] == [i.id for i in again.labeled]
    assert [i.id for i in first.unlabeled] == [i.id for i in again.unlabeled]
    assert first.hash == again.hash
    assert first.hash != data.make_split(source, "1/4", 1, protocol).hash


@pytest.mark.usefixtures("files_exist")
def test_images_without_a_mask_are_never_drawn():
    source = fake_source("folder", 40)
    source.train = [i if k % 4 else Item(i.id, i.image, None) for k, i in enumerate(source.train)]
    made = data.make_split(source, "full", 0, "classic")
    assert len(made.labeled) == 30
    assert [i.id for i in made.unlabeled] == [i.id for i in source.train[::4]]


SPLIT_ERRORS = ["nonsense", "0", "0/4", "1/0", "-1/4", "1/16.0", "41", "9999999", "5/4", "1e1"]


@pytest.mark.usefixtures("files_exist")
@pytest.mark.parametrize("split", SPLIT_ERRORS)
def test_split_that_is_none(split):
    with pytest.raises(InputError, match=f"--split {split}") as e:
        data.make_split(fake_source("folder", 40), split, 0, "classic")
    assert "\n" not in str(e.value)


def voc_line(id: str) -> str:
    return f"JPEGImages/{id}.jpg SegmentationClass/{id}.png"


def test_list_formats(tmp_path):
    source = data.load_source("pascal", make_pascal(tmp_path / "voc"))
    labeled, unlabeled = VOC_TRAIN[:3], VOC_TRAIN[3:]
    both = [[voc_line(i) for i in ids] for ids in (labeled, unlabeled)]
    pairs = write_lists(tmp_path / "a", *both)
    bare = write_lists(tmp_path / "b", labeled, unlabeled)
    one, two = (data.make_split(source, s, 0, "classic") for s in (pairs, bare))
    assert [i.id for i in one.labeled] == labeled
    assert [i.id for i in one.unlabeled] == unlabeled
    assert one.labeled == two.labeled
    assert [i.image for i in one.unlabeled] == [i.image for i in two.unlabeled]
    assert one.hash == two.hash
    # a pair names VOC's folder also for ids that have a mask of SBD's alone
    sbd = write_lists(tmp_path / "c", [voc_line(VOC_TRAIN[6])], unlabeled[:1])
    mask = data.make_split(source, sbd, 0, "classic").labeled[0].mask
    assert mask == source.root / f"SegmentationClassAug/{VOC_TRAIN[6]}.png"
    # and one that names SegmentationClassAug gets that
    line = voc_line(VOC_TRAIN[0]).replace("Class/", "ClassAug/")
    aug = write_lists(tmp_path / "d", [line], unlabeled[:1])
    mask = data.make_split(source, aug, 0, "classic").labeled[0].mask
    assert mask == source.root / f"SegmentationClassAug/{VOC_TRAIN[0]}.png"


@pytest.mark.parametrize("raw", [False, True])
def test_cityscapes_list(tmp_path, raw):
    """Published lists name the labelTrainIds; a user who has only labelIds gets those."""
    source = data.load_source("cityscapes", make_cityscapes(tmp_path / "city", raw))
    stems = [f"aachen_{i:06d}_000019" for i in range(5)]
    names = [
        f"leftImg8bit/train/aachen/{s}_leftImg8bit.png "
        f"gtFine/train/aachen/{s}_gtFine_labelTrainIds.png"
        for s in stems
    ]
    made = data.make_split(source, write_lists(tmp_path / "l", names[:2], names[2:]), 0, "classic")
    assert [i.id for i in made.labeled] == stems[:2]
    assert made.labeled == [i for i in source.train if i.id in stems[:2]]
    kind = "labelIds" if raw else "labelTrainIds"
    assert all(i.mask.name.endswith(f"_{kind}.png") for i in made.labeled)
    bare = data.make_split(source, write_lists(tmp_path / "b", stems[:2], stems[2:]), 0, "classic")
    assert bare.hash == made.hash


def test_train_and_val_may_use_the_same_names(tmp_path):
    """A listed train image must not get the mask of the val image of the same name."""
    root = make_folder(tmp_path / "root")
    for file in [*(root / "val").glob("*/v00.*")]:
        file.rename(file.with_name(file.name.replace("v00", "t00")))
    source = data.load_source("folder", root)
    listed = write_lists(tmp_path / "l", ["train/images/t00.jpg"], ["train/images/t05.jpg"])
    made = data.make_split(source, listed, 0, "classic")
    assert made.labeled[0].mask == root / "train/masks/t00.png"
    bare = data.make_split(source, write_lists(tmp_path / "b", ["t00"], ["t05"]), 0, "classic")
    assert bare.labeled[0] == made.labeled[0]


LIST_ERRORS = [  # labelled lines, unlabelled lines, what the message must contain
    ([VOC_TRAIN[0]], [VOC_TRAIN[1], VOC_TRAIN[0]], VOC_TRAIN[0]),  # overlap
    ([voc_line(VOC_TRAIN[0])], [VOC_TRAIN[0]], VOC_TRAIN[0]),  # overlap, in two formats
    ([voc_line(VOC_VAL[1])], VOC_TRAIN[:2], VOC_VAL[1]),
    (VOC_TRAIN[:2], [VOC_VAL[0]], VOC_VAL[0]),
    ([], VOC_TRAIN[:2], "labeled.txt"),  # empty
    (VOC_TRAIN[:2], [], "unlabeled.txt"),
    ([voc_line("2007_999999")], VOC_TRAIN[:2], "2007_999999"),
    (VOC_TRAIN[:2], [voc_line("2007_999999")], "2007_999999"),
    ([VOC_TRAIN[0]] * 2, VOC_TRAIN[1:2], VOC_TRAIN[0]),  # twice
    (["/etc/passwd"], VOC_TRAIN[:2], "/etc/passwd"),
    ([f"JPEGImages/{VOC_TRAIN[0]}.jpg /etc/passwd"], VOC_TRAIN[1:2], "/etc/passwd"),
    ([f"JPEGImages/../../{VOC_TRAIN[0]}.jpg"], VOC_TRAIN[1:2], "JPEGImages/../../"),
    (VOC_TRAIN[:2], [f"JPEGImages/{VOC_TRAIN[3]}.jpg ../x.png"], "../x.png"),
    (VOC_TRAIN[:2], ["JPEGImages/" + "a" * 300 + ".jpg"], "aaa"),  # no file system has such names
]


@pytest.mark.parametrize(("labeled", "unlabeled", "said"), LIST_ERRORS)
def test_list_errors_name_the_id(tmp_path, labeled, unlabeled, said):
    source = data.load_source("pascal", make_pascal(tmp_path / "voc"))
    with pytest.raises(InputError) as e:
        data.make_split(source, write_lists(tmp_path / "l", labeled, unlabeled), 0, "classic")
    assert said in str(e.value)
    assert "\n" not in str(e.value)


LOST = {"leftImg8bit/val": "val", "gtFine/val": "val", "leftImg8bit/train": "(un)?labelled"}


@pytest.mark.parametrize("where", LOST)
def test_files_that_are_lost_are_found_before_training(where, tmp_path):
    root = make_cityscapes(tmp_path / "city")
    source = data.load_source("cityscapes", root)
    lost = min(root.glob(f"{where}/*/*"))
    lost.unlink()
    with pytest.raises(InputError, match=f"{LOST[where]} image; there is no .*{lost.name}"):
        data.make_split(source, "2", 0, "classic")


def test_val_image_that_is_listed_twice(tmp_path):
    """Guards: an image that counts twice in mIoU."""
    root = make_pascal(tmp_path / "voc")
    path = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_text(path.read_text() + VOC_VAL[0] + "\n")
    with pytest.raises(InputError, match=f"{VOC_VAL[0]}: a val and a val image"):
        data.make_split(data.load_source("pascal", root), "2", 0, "classic")


def test_voc_without_sbd(tmp_path):
    """Guards: the blended protocol's name over the classic one's images."""
    root = make_pascal(tmp_path / "voc")
    voc = root / "VOCdevkit/VOC2012"
    for path in (voc / "SegmentationClassAug").iterdir():
        path.unlink()
    source = data.load_source("pascal", root)
    assert "no SBD" in data.make_split(source, "2", 0, "classic").line
    for protocol in ("blended", "priority"):
        with pytest.raises(InputError, match=f"{protocol} protocol.*no SBD.*--download"):
            data.make_split(source, "2", 0, protocol)


def test_lists_with_other_masks_are_other_write_lists(tmp_path):
    """Guards: a run that goes on with other labels of the same images, as the hash is the same."""
    root = make_folder(tmp_path / "f")
    save(root / "train/others/t00.png", np.ones((40, 48), np.uint8))
    source, hashes = data.load_source("folder", root), []
    for k, mask in enumerate(("train/masks/t00.png", "train/others/t00.png", "")):
        place = write_lists(
            tmp_path / f"l{k}", [f"train/images/t00.jpg {mask}".strip()], ["t06", "t07"]
        )
        hashes.append(data.make_split(source, place, 0, "classic").hash)
    assert hashes[0] == hashes[2] != hashes[1]


def test_list_folder_without_write_lists(tmp_path):
    source = data.load_source("folder", make_folder(tmp_path / "f"))
    with pytest.raises(InputError, match="labeled.txt"):
        data.make_split(source, str(tmp_path), 0, "classic")
    (tmp_path / "labeled.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="labeled.txt"):
        data.make_split(source, str(tmp_path), 0, "classic")


def test_masks_of_unlabelled_images_are_never_opened(tmp_path):
    root = make_pascal(tmp_path / "voc")
    source = data.load_source("pascal", root)
    split = data.make_split(source, "3", 0, "priority")
    for k, item in enumerate(split.unlabeled):
        for mask in (root / "VOCdevkit/VOC2012").glob(f"SegmentationClass*/{item.id}.png"):
            mask.unlink() if k % 2 else mask.write_bytes(b"broken")
    split = data.make_split(source, "3", 0, "priority")
    seen = set()
    for batch in data.train_batches(split, batch_args(iters=4), 0, 1, 0, CPU):
        seen |= set(batch["u_id"])
    assert seen == {i.id for i in split.unlabeled}


# --------------------------------------------------------------------------- data sets


def test_pascal_layouts(tmp_path):
    root = make_pascal(tmp_path / "voc")
    sources = [
        data.load_source("pascal", place)
        for place in (root, root / "VOCdevkit", root / "VOCdevkit/VOC2012")
    ]
    for source in sources:
        assert [i.id for i in source.train] == VOC_TRAIN  # val's masks lie beside theirs
        assert [i.id for i in source.val] == VOC_VAL
        assert source.fine == set(VOC_TRAIN[:5])
        assert len(source.classes) == 21
    folders = [i.mask.parent.name for i in sources[0].train]
    assert folders == ["SegmentationClass"] * 5 + ["SegmentationClassAug"] * 3
    assert all(i.mask.parent.name == "SegmentationClass" for i in sources[0].val)


def test_default_data_set(tmp_path):
    assert data.find_dataset(None, data.ROOT) == "shapes"
    for given in (tmp_path, Path("data")):  # also when it is the default's name
        with pytest.raises(InputError, match="no PASCAL VOC 2012 here; give --dataset"):
            data.find_dataset(None, given)
    assert data.find_dataset(None, make_pascal(tmp_path / "voc")) == "pascal"
    assert data.find_dataset("folder", tmp_path / "voc") == "folder"


def test_every_raw_cityscapes_id(tmp_path):
    """Ids to train ids as the data set's own labels.py has them."""
    evaluated = "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33".split()
    path = save(tmp_path / "x_gtFine_labelIds.png", np.arange(256, dtype=np.uint8)[None])
    mask = np.asarray(data.read_mask(Item("x", path, path), (256, 1), 19))[0]
    assert [int(mask[int(i)]) for i in evaluated] == list(range(19))
    assert (mask == 255).sum() == 256 - 19


def test_images_of_one_stem(tmp_path):
    """Guards: a pair that is not side by side in the order of the file names."""
    root = make_folder(tmp_path)
    for name in ("t00.bmp", "t00.c.png"):
        save(root / "train/images" / name, noise(0))
    with pytest.raises(InputError, match="t00.bmp and t00.jpg: one stem"):
        data.load_source("folder", root)


MISSING = {"pascal": "val.txt", "cityscapes": "leftImg8bit", "folder": "classes.txt"}


@pytest.mark.parametrize("name", MISSING)
def test_root_without_the_data(tmp_path, name):
    with pytest.raises(InputError) as e:
        data.load_source(name, tmp_path)
    assert str(tmp_path) in str(e.value)
    assert MISSING[name] in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("lost", ["train/images", "val/images", "val/masks"])
def test_folder_without_a_part(tmp_path, lost):
    root = make_folder(tmp_path)
    for file in (root / lost).iterdir():
        file.unlink()
    with pytest.raises(InputError, match=lost):
        data.make_split(data.load_source("folder", root), "2", 0, "classic")


# --------------------------------------------------------------------------- files


def read(path: Path, classes: int = 21, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    return np.asarray(data.read_mask(Item("x", path, path), size, classes))


def test_palette_is_vocs():
    """Colours as the development kit lists them; 255 is ours."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 15: (192, 128, 128)}
    known |= {20: (0, 64, 128), 255: (224, 224, 224)}
    assert {k: tuple(data.palette()[k].tolist()) for k in known} == known


def test_palette_masks_keep_their_indices(tmp_path):
    label = blobs(0, 21)
    save_palette(tmp_path / "p.png", label)
    assert np.array_equal(read(tmp_path / "p.png"), label)
    save(tmp_path / "l.png", label)
    assert np.array_equal(read(tmp_path / "l.png"), label)
    small = label % 4  # written with two bits a pixel
    save_palette(tmp_path / "small.png", small)
    assert np.array_equal(read(tmp_path / "small.png"), small)


def bad_mask(name: str, folder: Path) -> tuple[Path, str]:
    label, path = blobs(0, 3), folder / "m.png"
    if name == "RGB":
        return save(path, np.stack([label] * 3, 2)), "RGB"
    if name == "16 bit":
        return save(path, label.astype(np.uint16)), "more than 8 bits"
    if name == "4 bit":  # Pillow reads its 1 as 17: also a class, where there are 21
        path.write_bytes(png(4, 4, 4, 0, b"\x01\x10"))
        return path, "PNG ['L;4']"
    if name == "size":
        return save(path, label[:-1]), "(48, 39)"
    if name == "turned":
        return save(path, label.T), "(40, 48)"
    if name == "value":
        label[5, 5] = 3
        return save(path, label), "value 3"
    if name == "value 254":
        label[5, 5] = 254
        return save(path, label), "value 254"
    if name == "binary":
        return save(path, (label > 0).astype(np.uint8) * 200), "value 200"
    if name == "truncated":
        noisy = np.random.default_rng(0).integers(0, 3, (40, 48), dtype=np.uint8)
        return truncate(save(path, noisy)), "no readable mask"
    path.write_text("no picture")
    return path, "no readable mask"


BAD_MASKS = "RGB,16 bit,4 bit,size,turned,value,value 254,binary,truncated,text".split(",")


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks(tmp_path, name):
    path, said = bad_mask(name, tmp_path)
    with pytest.raises(InputError) as e:
        read(path, 3)
    assert said in str(e.value)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------- training batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder"), labeled=9, unlabeled=11)


def split_of(root: Path, split: str = "full") -> data.Split:
    return data.make_split(data.load_source("folder", root), split, 0, "classic")


def same(a: dict, b: dict) -> bool:
    """Whether two batches are bit-identical."""
    assert a.keys() == b.keys()
    return all(
        torch.equal(v, b[k]) and v.dtype == b[k].dtype if torch.is_tensor(v) else v == b[k]
        for k, v in a.items()
    )


def joined(parts: list[dict]) -> dict:
    """The shares of all ranks as one global batch."""
    whole = {}
    for name, first in parts[0].items():
        values = [p[name] for p in parts]
        if name in ("order", "step"):
            assert all(v == first for v in values)
            whole[name] = first
        elif torch.is_tensor(first):
            whole[name] = torch.cat(values, 1 if name in ("strong", "box") else 0)
        else:
            whole[name] = [id for v in values for id in v]
    return whole


KEYS = set("x y x_rect x_id u u_rect u_id strong box order".split())


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_global_batch(folder, world):
    split, args = split_of(folder), batch_args(batch_size=8, iters=5)
    alone = data.TrainBatches(split, args)
    ranks = [data.TrainBatches(split, args, rank, world) for rank in range(world)]
    for step in range(5):
        whole = alone[step]
        assert whole.keys() == KEYS | {"step", "positions"}
        assert (whole["step"], whole["positions"]) == (step, list(range(8)))
        assert whole["x"].shape == whole["u"].shape == (8, 32, 32, 3)
        assert whole["x"].dtype == whole["y"].dtype == torch.uint8
        assert whole["strong"].shape == (2, 8, 6)
        assert whole["box"].shape == (2, 8, 4)
        shares = [rank[step] for rank in ranks]
        assert all(len(s["x"]) == 8 // world for s in shares)
        assert same(joined(shares), whole)


def test_steps_and_seeds_differ(folder):
    split = split_of(folder)
    batches = [
        data.TrainBatches(split, batch_args(seed=seed))[step] for seed in (0, 1) for step in (0, 1)
    ]
    for a, b in itertools.combinations(batches, 2):
        for name in KEYS - {"order"}:
            differ = (
                not torch.equal(a[name], b[name])
                if torch.is_tensor(a[name])
                else a[name] != b[name]
            )
            assert differ or name.endswith("_rect"), name
    orders = {tuple(data.TrainBatches(split, batch_args())[s]["order"]) for s in range(12)}
    assert len(orders) > 4
    assert all(sorted(o) == [0, 1, 2, 3] for o in orders)


def test_the_two_views_and_the_images_of_a_batch_differ(folder):
    batch = data.TrainBatches(split_of(folder), batch_args(batch_size=8))[0]
    for name in ("strong", "box"):
        rows = [tuple(r) for r in batch[name].flatten(0, 1).tolist() if any(r[:4])]
        rows = [r for r in rows if r[:4] != (1, 1, 1, 0)]
        assert len(rows) > 4
        assert len(set(rows)) == len(rows)


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(folder, workers):
    split = split_of(folder)
    here = list(data.train_batches(split, batch_args(iters=6), 0, 1, 0, CPU))
    there = list(data.train_batches(split, batch_args(iters=6, workers=workers), 0, 1, 0, CPU))
    assert len(here) == len(there) == 6
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize(("start", "workers"), [(0, 0), (1, 0), (5, 0), (11, 0), (5, 2)])
def test_any_start_step(folder, start, workers):
    """Without what came before: in a new object."""
    batches = data.TrainBatches(split_of(folder), batch_args())
    want = [batches[step] for step in range(start, 12)]
    split, args = split_of(folder), batch_args(workers=workers)
    got = list(data.train_batches(split, args, 0, 1, start, CPU))
    assert len(got) == 12 - start
    for a, b in zip(want, got, strict=True):
        assert a["u_id"] == b["u_id"]
        assert torch.equal(a["u"], (b["u"] * 255).round().byte().permute(0, 2, 3, 1))
        assert all(torch.equal(a[k], b[k]) for k in ("strong", "box", "x_rect"))


def test_what_reaches_the_device(folder):
    split, args = split_of(folder), batch_args(scale=(0.5, 0.7))
    raw = data.TrainBatches(split, args)[3]
    batch = next(data.train_batches(split, args, 0, 1, 3, CPU))
    assert (batch["step"], batch["positions"]) == (3, [0, 1, 2, 3])
    for name in ("x", "u"):
        assert batch[name].dtype == torch.float32
        assert torch.equal(batch[name], raw[name].permute(0, 3, 1, 2).float() / 255)
        rects = zip(raw[f"{name}_rect"].tolist(), batch[f"{name}_valid"], strict=True)
        for (top, left, bottom, right), valid in rects:
            assert valid.sum() == (bottom - top) * (right - left)
            assert valid[top:bottom, left:right].all()
    assert batch["y"].dtype == torch.int64
    assert torch.equal(batch["y"], raw["y"].long())
    assert (batch["y"][~batch["x_valid"]] == 255).all()
    assert raw["box"].any()
    for box, cutmix in zip(raw["box"].flatten(0, 1), batch["cutmix"].flatten(0, 1), strict=True):
        top, left, bottom, right = box.tolist()
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(cutmix, inside)
    padded = data.normalize(batch["x"]).permute(0, 2, 3, 1)[~batch["x_valid"]]
    assert len(padded) > 0
    assert padded.abs().max() < 0.02  # padding is zero for the network


def test_normalize_is_imagenets():
    x = torch.rand(2, 3, 5, 4)
    want = TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(data.normalize(x), want, atol=1e-6)


def test_without_unlabelled_images_the_labelled_batches_are_the_same(folder):
    split, args = split_of(folder), batch_args()
    full = next(data.train_batches(split, args, 0, 1, 2, CPU))
    args.labeled_only = True
    alone = next(data.train_batches(split, args, 0, 1, 2, CPU))
    assert alone.keys() == set("step positions x y x_rect x_id x_valid".split())
    assert same(alone, {k: full[k] for k in alone})


def shapes_split(n: int) -> data.Split:
    """The same n built-in images as labelled and as unlabelled ones."""
    items = [Item(str(i), i, data.BUILT_IN) for i in range(n)]
    return data.Split(items, items, [], data.SHAPES_CLASSES, "", "", [])


def picked(split: data.Split, steps: int) -> list[np.ndarray]:
    """[steps, B] indices of the labelled images and of the unlabelled ones that a run takes."""
    batches = data.TrainBatches(split, batch_args(iters=steps))
    rows = [(b["x_id"], b["u_id"]) for b in (batches[k] for k in range(steps))]
    return [np.array(ids).astype(int) for ids in zip(*rows, strict=True)]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 7, 8, 9, 23])
def test_a_batch_never_repeats_an_image(n):
    epoch = max(1, n // 4)
    for rows in picked(shapes_split(n), 20 * epoch):
        for row in rows:
            assert len(set(row)) == min(n, 4)
        for e in range(20 if n >= 4 else 0):  # nor does an epoch
            images = rows[e * epoch : (e + 1) * epoch].flatten()
            assert len(set(images)) == len(images)
        times = np.bincount(rows.flatten(), minlength=n)
        assert times.min() > 0  # the images of the incomplete last batch get their turn
        assert times.max() <= 2 * times.mean()


def test_labelled_and_unlabelled_orders_are_independent():
    a, b = (rows.flatten() for rows in picked(shapes_split(32), 240))
    assert near((a == b).mean(), 1 / 32, len(a))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5
    epochs = a.reshape(30, 32)
    assert len({tuple(e) for e in epochs}) == 30  # each epoch in an order of its own
    assert (
        len(set(zip(a.tolist(), b.tolist(), strict=True))) > 500
    )  # of 960: not always the same pairs


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("broken", ["image", "mask", "unlabelled image"])
def test_a_broken_file_ends_the_epoch_with_its_name(tmp_path, broken, workers):
    root = make_folder(tmp_path)
    if broken == "mask":
        name = save(root / "train/masks/t01.png", np.full((40, 48), 9, np.uint8)).name
    else:
        name = truncate(root / f"train/images/{'t01' if broken == 'image' else 't06'}.jpg").name
    args = batch_args(batch_size=2, iters=20, workers=workers)
    with pytest.raises(InputError, match=name):
        list(data.train_batches(split_of(root), args, 0, 1, 0, CPU))


# --------------------------------------------------------------------------- evaluation batches


@pytest.fixture(scope="module")
def mixed_sizes(tmp_path_factory) -> data.Source:
    """Nine val images of five sizes."""
    root = make_folder(tmp_path_factory.mktemp("val"), val=0)
    sizes = [(48, 40), (40, 48), (48, 40), (50, 50), (33, 20), (48, 33), (16, 16)]
    sizes += [(48, 40), (50, 50)]
    for i, size in enumerate(sizes):
        save(root / f"val/images/v{i}.png", noise(i, size))
        save(root / f"val/masks/v{i}.png", blobs(i, 3, size))
    return data.load_source("folder", root)


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (3, 1), (20, 0)])
def test_every_val_image_once_whatever_the_ranks(mixed_sizes, world, workers):
    dataset = data.ValBatches(mixed_sizes.val, 3, 16)
    alone = {tuple(b["id"]): b for b in data.val_batches(dataset, 0, 1, 0, CPU)}
    shares = [list(data.val_batches(dataset, rank, world, workers, CPU)) for rank in range(world)]
    ids = sorted(id for share in shares for b in share for id in b["id"])
    assert ids == [f"v{i}" for i in range(9)]
    for batch in (b for share in shares for b in share):
        assert same(batch, alone[tuple(batch["id"])])


@pytest.mark.parametrize("most", [1, 2, 3])
def test_every_val_image_once_where_a_size_leaves_a_part_of_a_batch(mixed_sizes, most):
    """Guards: an image counted twice to fill a batch. Five images are of one padded size."""
    batches = data.ValBatches(mixed_sizes.val, 3, 16, most=most).batches
    assert sorted(item.id for b in batches for item in b) == [f"v{i}" for i in range(9)]
    assert max(map(len, batches)) == most


def test_val_batches_hold_the_images(mixed_sizes):
    dataset, seen = data.ValBatches(mixed_sizes.val, 3, 16), 0
    for batch in data.val_batches(dataset, 0, 1, 0, CPU):
        height, width = batch["image"].shape[-2:]
        assert height % 16 == width % 16 == 0
        fields = (batch[k] for k in ("id", "size", "image", "label"))
        for id, (h, w), image, label in zip(*fields, strict=True):
            key = int(id[1:])
            want = blobs(key, 3, (w, h))
            assert want.shape == (h, w)
            assert height - h < 16
            assert width - w < 16
            assert torch.equal(label[:h, :w], torch.from_numpy(want).long())
            assert (label[h:] == 255).all()
            assert (label[:, w:] == 255).all()
            pixels = torch.from_numpy(noise(key, (w, h)).copy()).permute(2, 0, 1)[None] / 255
            assert torch.allclose(image[:, :h, :w], data.normalize(pixels)[0], atol=1e-5)
            for padding in (image[:, h:], image[:, :, w:]):
                assert padding.abs().sum() == 0 or padding.abs().max() < 0.02
            seen += 1
    assert seen == 9


@pytest.mark.parametrize(("grid", "crop"), [(16, 321), (16, 65), (16, 0), (14, 518), (16, 64)])
def test_val_sizes_are_congruent_to_the_crop(mixed_sizes, grid, crop):
    """The smallest size that is not below the image's own."""
    dataset, seen = data.ValBatches(mixed_sizes.val, 3, grid, crop), 0
    for batch in data.val_batches(dataset, 0, 1, 0, CPU):
        sizes = np.array(batch["size"])  # [b, 2]
        for padded, sides in zip(batch["image"].shape[2:], sizes.T, strict=True):
            assert (padded - crop) % grid == 0
            assert all(0 <= padded - side < grid for side in sides)
            seen += 1
        for label, (h, w) in zip(batch["label"], batch["size"], strict=True):
            assert (label[h:] == 255).all()
            assert (label[:, w:] == 255).all()
    assert seen > 2


def test_crops_of_presets_put_cells_on_whole_pixels():
    for name, preset in data.PRESETS.items():
        assert preset["crop_size"] % 16 == 1, name
        assert data.DINOV2_PRESETS[name]["crop_size"] % 14 == 0


def test_val_batches_bound_their_pixels(mixed_sizes, monkeypatch):
    assert len(data.ValBatches(mixed_sizes.val, 3, 16, most=1)) == 9
    assert len(data.ValBatches(mixed_sizes.val, 3, 16)) < 9
    for pixels in (1, 2**12, 2**21):
        monkeypatch.setattr(data, "VAL_PIXELS", pixels)
        dataset = data.ValBatches(mixed_sizes.val, 3, 16)
        for k in range(len(dataset)):
            b, h, w, _ = dataset[k]["image"].shape
            assert b == 1 or b * h * w <= pixels


# --------------------------------------------------------------------------- built-in shapes


def test_shapes_are_drawn_from_their_index_alone():
    """Guards: other pictures in other workers, or after other ones."""
    first = [data.draw_shapes(i) for i in (3, 511, 10_127)]
    data.draw_shapes.cache_clear()
    np.random.seed(5)  # noqa: NPY002 - the state that must not matter
    for i, drawn in ((10_127, first[2]), (0, None), (511, first[1]), (3, first[0])):
        again = data.draw_shapes(i)
        assert drawn is None or all(np.array_equal(a, b) for a, b in zip(again, drawn, strict=True))


def test_shapes_data_set(tmp_path):
    source = data.load_source("shapes", tmp_path)
    assert (len(source.train), len(source.val), len(source.classes)) == (512, 128, 6)
    items = [*source.train, *source.val]
    assert len({i.id for i in items}) == len({i.image for i in items}) == 640
    pictures = set()
    for item in (*source.train[::16], *source.val[::16]):
        image = data.read_image(item)
        label = np.asarray(data.read_mask(item, image.size, 6))
        assert image.size == (96, 96)
        assert image.mode == "RGB"
        assert label.max() < 6
        pictures.add(image.tobytes())
    assert len(pictures) == 40


def shapes_statistics() -> np.ndarray:
    """Mean colour of each class in each train image, [512, 6, 3]; NaN where under 20 pixels."""
    means = np.full((512, 6, 3), np.nan)
    for i in range(512):
        image, label = data.draw_shapes(i)
        for c in range(6):
            if (label == c).sum() >= 20:
                means[i, c] = image[label == c].mean(0)
    return means


def test_shapes_have_all_classes_and_colour_tells_none():
    """Mean colours of the classes agree within 4 standard errors, about 10 of 255 levels."""
    means = shapes_statistics()
    n = (~np.isnan(means[:, 1:, 0])).sum(0)
    assert n.min() > 150  # of 512 images
    assert n.max() < 1.3 * n.min()
    assert (np.isnan(means[:, 1:, 0]).all(1)).mean() < 0.05  # hardly an image without an object
    mean, error = np.nanmean(means[:, 1:], 0), np.nanstd(means[:, 1:], 0) / n[:, None] ** 0.5
    assert error.max() < 3.5
    away = abs(mean - np.median(mean, 0)) / error
    assert away.max() < 4, mean.round().tolist()


# --------------------------------------------------------------------------- command line


def command(monkeypatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
    data.main()


def test_check_lists_all_faults(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "f")
    command(monkeypatch, "--dataset", "folder", "--root", root)
    line = data.make_split(data.load_source("folder", root), "1/16", 0, "classic").line
    assert capsys.readouterr().out.splitlines() == ["folder: 0 faults", line]  # a run's first line
    truncate(root / "train/images/t01.jpg")
    truncate(root / "train/images/t06.jpg")  # an unlabelled one
    save(root / "train/masks/t02.png", np.full((40, 48), 3, np.uint8))
    save(root / "val/masks/v01.png", blobs(0, 3)[1:])
    (root / "train/masks/t03.png").rename(root / "train/masks/t03_mask.png")  # no image's
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "--dataset", "folder", "--root", root)
    assert e.value.code == 1
    lines = capsys.readouterr().out.strip().splitlines()
    for name in ("t01.jpg", "t06.jpg", "t02.png", "v01.png", "t03_mask.png"):
        assert sum(name in line for line in lines) == 1
    assert len(lines) == 6
    assert "5 faults" in lines[-1]


def test_download_merges_the_masks(tmp_path, monkeypatch):
    """Both archives faked: VOC's masks as they are, SBD's for the images that VOC has none of."""
    voc, extra = tmp_path / "VOCdevkit/VOC2012", "2009_000001"

    def fake_voc(root, **_):
        make_pascal(Path(root))
        shutil.rmtree(voc / "SegmentationClassAug")

    def fake_sbd(root, **_):
        (Path(root) / "cls").mkdir(parents=True)
        for id in (*VOC_TRAIN[3:7], VOC_VAL[0], extra):
            (Path(root) / f"cls/{id}.mat").touch()

    def loadmat(path):
        cell = np.empty((1, 1), [("Segmentation", object)])
        cell["Segmentation"][0, 0] = blobs(int(Path(path).stem[-6:]) + 50, 21)
        return {"GTcls": cell}

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", fake_voc)
    monkeypatch.setattr(torchvision.datasets, "SBDataset", fake_sbd)
    io = types.ModuleType("scipy.io")
    io.loadmat = loadmat
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", io)
    data.download(tmp_path)
    source = data.load_source("pascal", tmp_path)
    assert [i.id for i in source.train] == sorted([*VOC_TRAIN[:7], extra])
    for item in source.train:
        key = VOC_TRAIN.index(item.id) if item.id in VOC_TRAIN[:5] else int(item.id[-6:]) + 50
        assert np.array_equal(data.read_mask(item, (48, 40), 21), blobs(key, 21))


# --------------------------------------------------------------------------- real data


def test_camvid():
    source = data.load_source("folder", shared("data/camvid"))
    assert (len(source.train), len(source.val), len(source.classes)) == (367, 101, 11)
    split = data.make_split(source, "1/8", 0, "classic")
    assert (len(split.labeled), len(split.unlabeled)) == (46, 321)
    batch = next(data.train_batches(split, batch_args(crop_size=160), 0, 1, 0, CPU))
    assert batch["x"].shape == (4, 3, 160, 160)
    assert len(batch["y"].unique()) > 4
    assert set(batch["y"].unique().tolist()) <= {*range(11), 255}
    val = next(data.val_batches(data.ValBatches(source.val[:2], 11, 16), 0, 1, 0, CPU))
    assert [tuple(size) for size in val["size"]] == [(360, 480)] * 2
    assert len(val["label"].unique()) > 4


def test_voc_sample(capsys):
    root = shared("data/voc_sample")
    source = data.load_source("pascal", root)
    assert (len(source.train), len(source.val), len(source.fine)) == (64, 20, 40)
    assert data.find_dataset(None, root) == "pascal"
    assert data.check(source)[0] == []
    for protocol, n in (("classic", 10), ("blended", 16), ("priority", 16)):
        assert len(data.make_split(source, "1/4", 0, protocol).labeled) == n
