"""Data sets, splits, geometry, device augmentation, batches."""

import itertools
import random
import shutil
import signal
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import procs
import pytest
import torch
import torchvision.datasets
import torchvision.transforms.functional as TF
from datasets import VOC_TRAIN, VOC_VAL, batch_args, blobs, make_folder, make_pascal, noise, save
from helpers import boxes_of
from PIL import Image

import data
from data import InputError, Item, Source

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
        assert sum(share) == pytest.approx(1)  # none is outside
        assert all(near(s, 0.25, len(values)) for s in share)  # uniform
    assert abs(np.corrcoef(draws[jitter, :4].T) - np.eye(4)).max() < 0.08


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
]


@pytest.mark.parametrize(("size", "crop", "scale"), WEAK)
def test_weak_view_is_a_crop_of_the_scaled_image(size, crop, scale):
    image, mask = Image.fromarray(noise(1, size)), Image.fromarray(blobs(1, 21, size))
    flips = set()
    for k in range(30):
        u, y, rect = data.weak_view(image, mask, crop, scale, data.rng(k, "t"))
        part, label, tie, flip = whole_then_crop(image, mask, crop, scale, data.rng(k, "t"))
        flips.add(bool(flip))
        assert u.shape == (*y.shape, 3) == (crop, crop, 3)
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


def test_cutmix_box():
    """Guards: an area drawn anew with each shape that does not fit, so that large ones are rare."""
    n, crop = 6000, 1000  # whole pixels change the area by 1 % at most
    boxes = np.array([data.cutmix_box(crop, data.rng(i, "box")) for i in range(n)])
    empty = (boxes == 0).all(1)
    assert near(empty.mean(), 0.5, n)
    top, left, bottom, right = boxes[~empty].T
    h, w = bottom - top, right - left
    assert min(h.min(), w.min()) > 0
    assert min(top.min(), left.min()) == 0
    assert max(bottom.max(), right.max()) == crop
    # whole pixels: sides are rounded down, at most by one
    assert 0.3 < ((h + 1) / w).min() < 0.32
    assert 3.1 < (h / (w + 1)).max() < 1 / 0.3
    area = np.sort(h * w / crop**2)
    want = (area - 0.02) / 0.38  # distribution function of U(0.02, 0.4)
    steps = np.arange(1, len(area) + 1) / len(area)
    assert abs(want - steps).max() < 1.63 / len(area) ** 0.5 + 0.01  # Kolmogorov-Smirnov, 1 %
    assert near((area > 0.38).mean(), 0.02 / 0.38, len(area))


# --------------------------------------------------------------------------- splits


def fake_source(name: str, train: int, fine: int = 0, val: int = 10) -> Source:
    """A data set without files: published counts can be drawn from it."""

    def items(part: str, n: int) -> list[Item]:
        ids = [f"{part}_{i:06d}" for i in range(n)]
        return [Item(i, Path(f"/x/{i}.jpg"), Path(f"/x/{i}.png")) for i in ids]

    source = Source(name, ["a", "b"], Path("/x"), items("t", train), items("v", val))
    source.fine = {i.id for i in source.train[::7][:fine]}
    assert len(source.fine) == fine
    return source


@pytest.fixture
def files_exist(monkeypatch):
    monkeypatch.setattr("os.path.isfile", lambda path: True)


VOC = {"name": "pascal", "train": 10582, "fine": 1464}
CITY = {"name": "cityscapes", "train": 2975}
COUNTS = [  # protocol, split, source, labelled, of them with fine masks (None: by chance)
    ("classic", "1/16", VOC, 92, 92),
    ("classic", "full", VOC, 1464, 1464),
    ("blended", "1/16", VOC, 662, None),
    ("blended", "1/8", VOC, 1323, None),
    ("priority", "1/8", VOC, 1323, 1323),
    ("priority", "1/4", VOC, 2646, 1464),
    ("classic", "1/16", CITY, 186, 0),
    ("classic", "1/2", CITY, 1488, 0),
]


@pytest.mark.usefixtures("files_exist")
@pytest.mark.parametrize(("protocol", "split", "of", "labeled", "fine"), COUNTS)
def test_published_counts(protocol, split, of, labeled, fine):
    source = fake_source(**of)
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
    assert f"{labeled} labelled, {len(made.unlabeled)} unlabelled" in made.line
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
    for less, more in itertools.pairwise(("5", "1/16", "1/8", "1/4", "1/2")):
        assert draws[0, less] < draws[0, more]
    assert draws[0, "1/4"] != draws[1, "1/4"]
    first = data.make_split(source, "1/4", 0, protocol)
    random.Random(5).shuffle(source.train)  # as another file system may list them
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the state that must not matter
    assert data.make_split(source, "1/4", 0, protocol) == first
    assert first.hash != data.make_split(source, "1/4", 1, protocol).hash


SPLIT_ERRORS = ["nonsense", "0", "0/4", "1/0", "-1/4", "1/16.0", "41", "9999999", "5/4", "1e1"]


@pytest.mark.usefixtures("files_exist")
@pytest.mark.parametrize("split", SPLIT_ERRORS)
def test_split_that_is_none(split):
    with pytest.raises(InputError, match=f"--split {split}") as e:
        data.make_split(fake_source("folder", 40), split, 0, "classic")
    assert "\n" not in str(e.value)


def voc_line(id: str) -> str:
    return f"JPEGImages/{id}.jpg SegmentationClass/{id}.png"


def by_lists(source: Source, folder: Path, labeled: list[str], unlabeled: list[str]) -> data.Split:
    return data.make_split(source, datasets.write_lists(folder, labeled, unlabeled), 0, "classic")


def test_list_formats(tmp_path):
    source = data.load_source("pascal", make_pascal(tmp_path / "voc"))
    labeled, unlabeled = VOC_TRAIN[:3], VOC_TRAIN[3:]
    bare = by_lists(source, tmp_path / "a", labeled, unlabeled)
    pairs = by_lists(source, tmp_path / "b", *[[*map(voc_line, i)] for i in (labeled, unlabeled)])
    assert [i.id for i in pairs.labeled] == labeled
    assert [i.id for i in pairs.unlabeled] == unlabeled
    assert pairs.labeled == bare.labeled
    assert [i.image for i in pairs.unlabeled] == [i.image for i in bare.unlabeled]
    assert pairs.hash == bare.hash
    # a pair names VOC's folder also for ids that have a mask of SBD's alone
    sbd = by_lists(source, tmp_path / "c", [voc_line(VOC_TRAIN[6])], unlabeled[:1])
    assert sbd.labeled[0].mask == source.root / f"SegmentationClassAug/{VOC_TRAIN[6]}.png"
    # and one that names SegmentationClassAug gets that
    line = voc_line(VOC_TRAIN[0]).replace("Class/", "ClassAug/")
    aug = by_lists(source, tmp_path / "d", [line], unlabeled[:1])
    assert aug.labeled[0].mask == source.root / f"SegmentationClassAug/{VOC_TRAIN[0]}.png"


@pytest.mark.parametrize("raw", [False, True])
def test_cityscapes_list(tmp_path, raw):
    """Published lists name the labelTrainIds; a user who has only labelIds gets those."""
    source = data.load_source("cityscapes", datasets.make_cityscapes(tmp_path / "city", raw))
    stems = [f"aachen_{i:06d}_000019" for i in range(5)]
    image = "leftImg8bit/train/aachen/{0}_leftImg8bit.png"
    names = [f"{image} gtFine/train/aachen/{{0}}_gtFine_labelTrainIds.png".format(s) for s in stems]
    made = by_lists(source, tmp_path / "l", names[:2], names[2:])
    assert made.labeled == [i for i in source.train if i.id in stems[:2]]
    kind = "labelIds" if raw else "labelTrainIds"
    assert [i.mask.name for i in made.labeled] == [f"{s}_gtFine_{kind}.png" for s in stems[:2]]
    assert by_lists(source, tmp_path / "b", stems[:2], stems[2:]).hash == made.hash


def test_train_and_val_may_use_the_same_names(tmp_path):
    """A listed train image must not get the mask of the val image of the same name."""
    root = make_folder(tmp_path / "root")
    for file in [*(root / "val").glob("*/v00.*")]:
        file.rename(file.with_name(file.name.replace("v00", "t00")))
    source = data.load_source("folder", root)
    for name in ("train/images/t00.jpg", "t00"):
        made = by_lists(source, tmp_path / "l", [name], ["t05"])
        assert made.labeled[0].mask == root / "train/masks/t00.png"


LIST_ERRORS = [  # labelled lines, unlabelled lines, what the message must contain
    ([VOC_TRAIN[0]], [VOC_TRAIN[1], VOC_TRAIN[0]], VOC_TRAIN[0]),  # overlap
    ([voc_line(VOC_TRAIN[0])], [VOC_TRAIN[0]], VOC_TRAIN[0]),  # overlap, in two formats
    ([voc_line(VOC_VAL[1])], VOC_TRAIN[:2], VOC_VAL[1]),
    (["JPEGImages/../../x.jpg"], VOC_TRAIN[:2], "leads out"),
    (["C:x.jpg"], VOC_TRAIN[:2], "leads out"),
    (["JPEGImages/\0.jpg"], VOC_TRAIN[:2], "leads out"),
    ([], VOC_TRAIN[:2], "labeled.txt: an empty file"),
    (VOC_TRAIN[:2], [], "unlabeled.txt"),
    ([voc_line("2007_999999")], VOC_TRAIN[:2], "2007_999999"),
    ([VOC_TRAIN[0]] * 2, VOC_TRAIN[1:2], VOC_TRAIN[0]),  # twice
    (["/etc/passwd"], VOC_TRAIN[:2], "/etc/passwd"),
    ([f"JPEGImages/{VOC_TRAIN[0]}.jpg /etc/passwd"], VOC_TRAIN[1:2], "/etc/passwd"),
    (VOC_TRAIN[:2], ["JPEGImages/" + "a" * 300 + ".jpg"], "aaa"),  # no file system has such names
]


@pytest.mark.parametrize(("labeled", "unlabeled", "said"), LIST_ERRORS)
def test_list_errors_name_the_id(tmp_path, labeled, unlabeled, said):
    source = data.load_source("pascal", make_pascal(tmp_path / "voc"))
    with pytest.raises(InputError) as e:
        by_lists(source, tmp_path / "l", labeled, unlabeled)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


LOST = {"leftImg8bit/val": "val", "gtFine/val": "val", "leftImg8bit/train": "(un)?labelled"}


@pytest.mark.parametrize("where", LOST)
def test_files_that_are_lost_are_found_before_training(where, tmp_path):
    root = datasets.make_cityscapes(tmp_path / "city")
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
    with pytest.raises(InputError, match=f"{VOC_VAL[0]}: val and val; list it once"):
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


def test_lists_with_other_masks_are_other_lists(tmp_path):
    """Guards: a run that goes on with other labels of the same images, as the hash is the same."""
    root = make_folder(tmp_path / "f")
    save(root / "train/others/t00.png", np.ones((40, 48), np.uint8))
    source, hashes = data.load_source("folder", root), []
    for k, mask in enumerate(("train/masks/t00.png", "train/others/t00.png", "")):
        made = by_lists(source, tmp_path / f"l{k}", [f"train/images/t00.jpg {mask}"], ["t06"])
        hashes.append(made.hash)
    assert hashes[0] == hashes[2] != hashes[1]


def test_masks_of_unlabelled_images_are_never_opened(tmp_path):
    split = split_of(make_folder(tmp_path), "2")
    (tmp_path / f"train/masks/{split.unlabeled[0].id}.png").write_bytes(b"broken")
    batches = data.train_batches(split, batch_args(iters=4), 0, 1, 0, CPU)
    seen = {id for batch in batches for id in batch["u_id"]}
    assert seen == {i.id for i in split.unlabeled}


# --------------------------------------------------------------------------- data sets


def test_pascal_layouts(tmp_path):
    root = make_pascal(tmp_path / "voc")
    for place in (root, root / "VOCdevkit", root / "VOCdevkit/VOC2012"):
        source = data.load_source("pascal", place)
        assert [i.id for i in source.train] == VOC_TRAIN  # val's masks lie beside theirs
        assert [i.id for i in source.val] == VOC_VAL
        assert source.fine == set(VOC_TRAIN[:5])
    folders = [i.mask.parent.name for i in source.train + source.val]
    own, aug = "SegmentationClass", "SegmentationClassAug"
    assert folders == [own] * 5 + [aug] * 3 + [own] * 2


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


def test_palette_masks_keep_their_indices(tmp_path):
    label = blobs(0, 21)
    for ids in (label, label % 4):  # the latter is written with two bits a pixel
        datasets.save_palette(tmp_path / "p.png", ids)
        assert np.array_equal(read(tmp_path / "p.png"), ids)
    save(tmp_path / "l.png", label)
    assert np.array_equal(read(tmp_path / "l.png"), label)
    assert data.palette()[[8, 15, 20]].tolist() == [[64, 0, 0], [192, 128, 128], [0, 64, 128]]


LABEL = blobs(0, 3)
BAD_MASKS = {  # values or the file, what the message says
    "RGB": (np.stack([LABEL] * 3, 2), "RGB"),
    "16 bit": (LABEL.astype(np.uint16), "more than 8 bits"),
    # Pillow reads its 1 as 17: also a class, where there are 21
    "4 bit": (datasets.png(4, 4, 4, 0, b"\x01\x10"), "PNG ['L;4']"),
    "size": (LABEL[:-1], "(48, 39)"),
    "turned": (LABEL.T, "(40, 48)"),
    "value": (np.where(LABEL == 2, 3, LABEL).astype(np.uint8), "value 3"),
    "value 254": (np.where(LABEL == 2, 254, LABEL).astype(np.uint8), "value 254"),
    "text": (b"no picture", "no readable mask"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks(tmp_path, name):
    (content, said), path = BAD_MASKS[name], tmp_path / "m.png"
    path.write_bytes(content) if isinstance(content, bytes) else save(path, content)
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


def test_steps_and_seeds_differ(folder):
    split = split_of(folder)
    streams = [data.TrainBatches(split, batch_args(seed=seed)) for seed in (0, 1)]
    for a, b in itertools.combinations([stream[k] for stream in streams for k in (0, 1)], 2):
        assert (a["x_id"], a["u_id"]) != (b["x_id"], b["u_id"])
        assert not any(torch.equal(a[name], b[name]) for name in "x y u strong cutmix".split())
    orders = {tuple(streams[0][step]["order"]) for step in range(12)}
    assert len(orders) > 4
    assert all(sorted(o) == [0, 1, 2, 3] for o in orders)


def test_the_two_views_and_the_images_of_a_batch_differ(folder):
    batch = data.TrainBatches(split_of(folder), batch_args(batch_size=8))[0]
    for name in ("strong", "cutmix"):
        rows = [tuple(r) for r in batch[name].flatten(2).flatten(0, 1).tolist() if any(r)]
        rows = [r for r in rows if r[:4] != (1, 1, 1, 0)]
        assert len(rows) > 4
        assert len(set(rows)) == len(rows)


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize(("start", "workers"), [(1, 0), (11, 0), (0, 1), (5, 4)])
def test_any_start_step_and_any_workers(folder, start, workers):
    """Without what came before: in a new object."""
    here = list(data.train_batches(split_of(folder), batch_args(), 0, 1, 0, CPU))
    args = batch_args(workers=workers)
    there = list(data.train_batches(split_of(folder), args, 0, 1, start, CPU))
    assert len(there) == 12 - start
    procs.assert_same(here[start:], there)


def test_what_reaches_the_device(folder):
    split, args = split_of(folder), batch_args(scale=(0.5, 0.7))
    raw = data.TrainBatches(split, args)[3]
    batch = next(data.train_batches(split, args, 0, 1, 3, CPU))
    held = sum(t.nbytes for t in raw.values() if torch.is_tensor(t)) - raw["strong"].nbytes
    assert held == len(raw["x"]) * 32**2 * 11  # as check_shared_memory counts
    for name in ("x", "u"):
        assert batch[name].dtype == torch.float32
        assert torch.equal(batch[name], raw[name].permute(0, 3, 1, 2).float() / 255)
        image = (raw[name] != torch.tensor(data.FILL)).any(3)  # no pixel of noise is the filling
        assert torch.equal(batch[f"{name}_valid"], image)
    assert batch["y"].dtype == torch.int64
    assert torch.equal(batch["y"], raw["y"].long())
    assert (batch["y"][~batch["x_valid"]] == 255).all()
    assert raw["cutmix"].any()
    for view, masks in enumerate(batch["cutmix"]):
        for mask, (top, left, bottom, right) in zip(masks, boxes_of(args, raw, view), strict=True):
            inside = torch.zeros(32, 32, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert torch.equal(mask, inside)
    padded = data.normalize(batch["x"]).permute(0, 2, 3, 1)[~batch["x_valid"]]
    assert len(padded) > 0
    assert padded.abs().max() < 0.02  # padding is zero for the network


def test_without_unlabelled_images_the_labelled_batches_are_the_same(folder):
    split, args = split_of(folder), batch_args()
    full = next(data.train_batches(split, args, 0, 1, 2, CPU))
    args.labeled_only = True
    alone = next(data.train_batches(split, args, 0, 1, 2, CPU))
    assert alone.keys() == set("step positions x y x_id x_valid".split())
    procs.assert_same(alone, {k: full[k] for k in alone})


def shapes_split(n: int) -> data.Split:
    """The same n built-in images as labelled and as unlabelled ones."""
    items = [Item(str(i), i, data.BUILT_IN) for i in range(n)]
    return data.Split(items, items, [], data.SHAPES_CLASSES, "", "", [])


def picked(split: data.Split, steps: int) -> list[np.ndarray]:
    """[steps, B] indices of the labelled images and of the unlabelled ones that a run takes."""
    batches = data.TrainBatches(split, batch_args(iters=steps))
    rows = [(b["x_id"], b["u_id"]) for b in (batches[k] for k in range(steps))]
    return [np.array(ids).astype(int) for ids in zip(*rows, strict=True)]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 9, 23])
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
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    assert len(pairs) > 500  # of 960: not always the same


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("broken", ["images/t01.jpg", "masks/t01.png", "images/t06.jpg"])
def test_a_broken_file_ends_the_epoch_with_its_name(tmp_path, broken, workers):
    root = make_folder(tmp_path)
    name = datasets.truncate(root / f"train/{broken}").name
    args = batch_args(batch_size=2, iters=20, workers=workers)
    with pytest.raises(InputError, match=name):
        list(data.train_batches(split_of(root), args, 0, 1, 0, CPU))
    data._end_workers()  # as at the program's end; a later collection would wait for them


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
@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 1), (20, 0)])
def test_every_val_image_once_whatever_the_ranks(mixed_sizes, world, workers):
    dataset = data.ValBatches(mixed_sizes.val, 3, 16)
    alone = {tuple(b["id"]): b for b in data.val_batches(dataset, 0, 1, 0, CPU)}
    shares = [list(data.val_batches(dataset, rank, world, workers, CPU)) for rank in range(world)]
    ids = sorted(id for share in shares for b in share for id in b["id"])
    assert ids == [f"v{i}" for i in range(9)]
    for batch in (b for share in shares for b in share):
        procs.assert_same(batch, alone[tuple(batch["id"])])


@pytest.mark.parametrize("most", [1, 2, 3])
def test_every_val_image_once_where_a_size_leaves_a_part_of_a_batch(mixed_sizes, most, monkeypatch):
    """Guards: an image counted twice to fill a batch. Five images are of one padded size."""
    monkeypatch.setattr(data, "VAL_IMAGES", most)
    batches = data.ValBatches(mixed_sizes.val, 3, 16).batches
    assert sorted(item.id for b in batches for item in b) == [f"v{i}" for i in range(9)]
    assert max(map(len, batches)) == most


@pytest.mark.parametrize(("grid", "crop"), [(16, 321), (16, 0), (14, 518)])
def test_val_batches_hold_the_images(mixed_sizes, grid, crop):
    """Padded to the smallest size that is congruent to the crop and not below the image's own."""
    dataset, seen = data.ValBatches(mixed_sizes.val, 3, grid, crop), 0
    for batch in data.val_batches(dataset, 0, 1, 0, CPU):
        height, width = batch["image"].shape[-2:]
        assert (height - crop) % grid == (width - crop) % grid == 0
        for id, image, label in zip(batch["id"], batch["image"], batch["label"], strict=True):
            w, h = Image.open(mixed_sizes.root / f"val/images/{id}.png").size
            assert 0 <= height - h < grid
            assert 0 <= width - w < grid
            want = np.full((height, width), 255)
            want[:h, :w] = blobs(int(id[1:]), 3, (w, h))
            assert np.array_equal(label, want)
            pixels = torch.from_numpy(noise(int(id[1:]), (w, h)).copy()).permute(2, 0, 1) / 255
            assert torch.allclose(image[:, :h, :w], data.normalize(pixels[None])[0], atol=1e-5)
            image[:, :h, :w] = 0
            assert image.abs().max() < 0.02  # padding is the mean colour
            seen += 1
    assert seen == 9


def test_val_batches_bound_their_pixels(mixed_sizes, monkeypatch):
    assert len(data.ValBatches(mixed_sizes.val, 3, 16)) < 9
    for pixels in (1, 2**12, 2**21):
        monkeypatch.setattr(data, "VAL_PIXELS", pixels)
        dataset = data.ValBatches(mixed_sizes.val, 3, 16)
        for k in range(len(dataset)):
            b, h, w, _ = dataset[k]["image"].shape
            assert b == 1 or b * h * w <= pixels


# --------------------------------------------------------------------------- built-in shapes


def test_shapes_data_set(tmp_path):
    """Guards: other pictures in other workers, or after other ones."""
    source, pictures = data.load_source("shapes", tmp_path), []
    assert (len(source.train), len(source.val), len(source.classes)) == (512, 128, 6)
    items = [*source.train[::16], *source.val[::16]]
    for item in items + items[::-1]:
        data.draw_shapes.cache_clear()
        image = data.read_image(item)
        label = data.read_mask(item, image.size, 6)
        assert (image.size, image.mode, label.size) == ((96, 96), "RGB", (96, 96))
        assert np.max(label) < 6
        pictures.append(image.tobytes() + label.tobytes())
    assert pictures == pictures[::-1]
    assert len(set(pictures)) == 40


def test_shapes_have_all_classes_and_colour_tells_none():
    """Mean colours of the classes agree within 4 standard errors, about 14 of 255 levels."""
    means = np.full((256, 5, 3), np.nan)  # of each class in each image, where it has 20 pixels
    for i, c in itertools.product(range(256), range(5)):
        image, label = data.draw_shapes(i)
        if (label == c + 1).sum() >= 20:
            means[i, c] = image[label == c + 1].mean(0)
    n = (~np.isnan(means[..., 0])).sum(0)
    assert n.min() > 75
    assert n.max() < 1.4 * n.min()
    assert np.isnan(means[..., 0]).all(1).mean() < 0.05  # hardly an image without an object
    mean, error = np.nanmean(means, 0), np.nanstd(means, 0) / n[:, None] ** 0.5
    assert error.max() < 5
    assert (abs(mean - np.median(mean, 0)) / error).max() < 4, mean.round().tolist()


# --------------------------------------------------------------------------- command line


def test_download_merges_the_masks(tmp_path, monkeypatch):
    """Both archives faked: VOC's masks as they are, SBD's for the images that VOC has none of."""
    voc, extra = tmp_path / "VOCdevkit/VOC2012", "2009_000001"

    def fake_sbd(root, **_):
        (Path(root) / "cls").mkdir(parents=True)
        for id in (*VOC_TRAIN[3:7], VOC_VAL[0], extra):
            (Path(root) / f"cls/{id}.mat").touch()

    def loadmat(path):
        cell = np.empty((1, 1), object)
        cell[0, 0] = blobs(int(Path(path).stem[-6:]) + 50, 21)
        return {"GTcls": {"Segmentation": cell}}

    make_pascal(tmp_path)
    shutil.rmtree(voc / "SegmentationClassAug")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", lambda root, **_: None)
    monkeypatch.setattr(torchvision.datasets, "SBDataset", fake_sbd)
    monkeypatch.setitem(sys.modules, "scipy", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "scipy.io", types.SimpleNamespace(loadmat=loadmat))
    data.download(tmp_path)
    source = data.load_source("pascal", tmp_path)
    assert [i.id for i in source.train] == sorted([*VOC_TRAIN[:7], extra])
    for item in source.train:
        key = VOC_TRAIN.index(item.id) if item.id in VOC_TRAIN[:5] else int(item.id[-6:]) + 50
        assert np.array_equal(data.read_mask(item, (48, 40), 21), blobs(key, 21))


# --------------------------------------------------------------------------- real data


def test_voc_sample():
    source = data.load_source("pascal", datasets.shared("data/voc_sample"))
    assert (len(source.train), len(source.val), len(source.fine)) == (64, 20, 40)
    assert data.check(source)[0] == []
