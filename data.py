"""Data for all three methods: data sets, splits, augmentation, loaders.

A training batch is a pure function of (seed, step, position in the global batch): any number of
workers or ranks, and any step to start from, gives the same pixels. Workers decode, scale, crop and
flip, and ship bytes; the strong colour views are made batched on the device (`strong_views`).

Dimension key: B images (b of a rank), C classes, H and W pixels, V = 2 strong views. Labels are
class ids, 255 = ignore.

    python data.py --dataset pascal --root data --download      # fetch VOC 2012 and SBD
    python data.py --dataset folder --root my_data              # check every file, list all faults
"""

import argparse
import atexit
import functools
import hashlib
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as the backbones expect
FILL = (124, 116, 104)  # padding is the mean colour: zero after normalisation, like a convolution's
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")  # PIL would run PostScript, too
SUFFIXES = ".jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .ppm .pgm .pnm".split()

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
CITYSCAPES_CLASSES = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky "
    "person rider car truck bus train motorcycle bicycle"
).split()
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SHAPES_CLASSES = "background ringed_disk checkered_square striped_triangle dotted_star".split()
SHAPES_CLASSES += ["grained_cross"]
ROOT = Path("data")  # default of --root
SHAPES_TRAIN, SHAPES_VAL, SHAPES_SIZE, BUILT_IN = 512, 128, 96, Path("built in")
VAL_IMAGES, VAL_PIXELS = 16, 2**21  # of a val batch, at most
PROTOCOLS = ("classic", "blended", "priority")

# fmt: off
CNN = dict(
    backbone="resnet101", weights="imagenet", optimizer="sgd", weight_decay=1e-4, batch_size=8,
    scale=(0.5, 2.0), ramp=0.0)
VIT = dict(optimizer="adamw", weight_decay=0.01, threshold=0.95)
# What the field trains each data set with; `epochs` counts passes over the unlabelled images.
PRESETS = {
    "pascal": dict(CNN, lr=1e-3, head_lr_mult=10.0, epochs=80, crop_size=321, threshold=0.95),
    "cityscapes": dict(
        CNN, lr=5e-3, head_lr_mult=1.0, epochs=240, crop_size=801, threshold=0.0, sup_loss="ohem",
        eval_mode="slide"),
    "shapes": dict(
        backbone="resnet18", weights="none", optimizer="adamw", lr=1e-3, head_lr_mult=1.0,
        weight_decay=1e-4, batch_size=8, epochs=7, crop_size=65, scale=(0.8, 1.25), threshold=0.95,
        ramp=0.5, eval_every=120),
}
DINOV2_PRESETS = {  # what a DINOv2 backbone changes; shapes train one from scratch
    "pascal": dict(VIT, lr=5e-6, head_lr_mult=40.0, batch_size=16, epochs=60, crop_size=518),
    "cityscapes": dict(VIT, lr=5e-6, head_lr_mult=40.0, batch_size=8, epochs=180, crop_size=798),
    "shapes": dict(VIT, lr=5e-4, head_lr_mult=1.0, batch_size=8, crop_size=70),
}
# fmt: on
PRESETS["folder"] = PRESETS["pascal"]
DINOV2_PRESETS["folder"] = DINOV2_PRESETS["pascal"]


class InputError(Exception):
    """Bad input. The message is one line that names the file, the value and the remedy."""


def rng(seed: int, stream: str, *key: int) -> Generator:
    """The random numbers of a place in a run: seed, stream, and e.g. step and position."""
    return np.random.default_rng((seed, zlib.crc32(stream.encode()), *key))


# --------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Item:
    """One image and where its mask is, if it has one. Built-in images have a number, no file."""

    id: str
    image: Path | int
    mask: Path | None


@dataclass
class Source:
    """A data set on disk (or built in) before it is split."""

    name: str
    classes: list[str]
    root: Path
    train: list[Item]
    val: list[Item]
    fine: set[str] = field(default_factory=set)  # VOC: ids with masks of VOC's own, not SBD's
    left: dict[Path, str] = field(default_factory=dict)  # files that are not used, and why


def _list(path: Path, blank: bool = False) -> list[str]:
    """The lines of a text file; `blank`: with blank ones, but for those at its end."""
    try:
        text = path.read_text("utf-8-sig").rstrip()  # -sig: without a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not found, or not UTF-8 text ({e}); give such a file") from None
    if not text:
        raise InputError(f"{path}: an empty file; give at least one line")
    return [line.strip() for line in text.splitlines() if blank or line.strip()]


def _pascal_root(root: Path) -> Path | None:
    places = (root / "VOCdevkit/VOC2012", root / "VOC2012", root)
    return next((p for p in places if os.path.isfile(p / "ImageSets/Segmentation/val.txt")), None)


def _pascal(root: Path) -> Source:
    voc = _pascal_root(root)
    if voc is None:
        what = "no VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt here; fetch PASCAL VOC 2012 by"
        raise InputError(f"{root}: {what} python data.py --dataset pascal --root {root} --download")
    lists = voc / "ImageSets/Segmentation"
    fine = set(_list(lists / "train.txt"))
    val = _list(lists / "val.txt")
    own = fine.union(val)  # ids with masks of VOC's own; the others' are SBD's
    train = own.union(p.stem for p in voc.glob("SegmentationClassAug/*.png")) - set(val)

    def item(id: str) -> Item:
        folder = "SegmentationClass" if id in own else "SegmentationClassAug"
        return Item(id, voc / f"JPEGImages/{id}.jpg", voc / f"{folder}/{id}.png")

    items = [item(id) for id in sorted(train)]
    return Source("pascal", VOC_CLASSES, voc, items, [item(id) for id in val], fine)


def _cityscapes(root: Path) -> Source:
    def items(part: str) -> list[Item]:
        found = []
        for image in sorted((root / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")):
            stem = image.name.removesuffix("_leftImg8bit.png")
            mask = root / f"gtFine/{part}/{image.parent.name}/{stem}_gtFine_labelTrainIds.png"
            if not mask.is_file():  # users may have the raw ids only: mapped when read
                mask = mask.with_name(f"{stem}_gtFine_labelIds.png")
            found.append(Item(stem, image, mask))
        return found

    source = Source("cityscapes", CITYSCAPES_CLASSES, root, items("train"), items("val"))
    if not source.train or not source.val:
        zips = "{leftImg8bit,gtFine}_trainvaltest.zip of https://www.cityscapes-dataset.com"
        raise InputError(f"{root}: no leftImg8bit/{{train,val}}/*/*_leftImg8bit.png; unpack {zips}")
    return source


def _folder(root: Path) -> Source:
    names = root / "classes.txt"
    classes = _list(names, blank=True)
    for k, name in enumerate(classes):
        if not name or name in classes[:k]:
            raise InputError(f"{names}: line {k + 1} is blank or repeats {name!r}; name each class")
    if len(classes) > IGNORE:
        raise InputError(f"{names}: {len(classes)} classes; name 1 to 255, one a line")
    source = Source("folder", classes, root, [], [])
    for part, items in (("train", source.train), ("val", source.val)):
        images = _files(root / part / "images", SUFFIXES, source.left)
        if not images:
            raise InputError(f"{root / part}/images: holds no image; put the {part} images there")
        masks = _files(root / part / "masks", [".png"], source.left)
        for stem in masks.keys() - images.keys():
            source.left[masks[stem]] = "no image has its stem"
        for stem, image in images.items():
            missing = root / f"val/masks/{stem}.png" if part == "val" else None  # val needs one
            items.append(Item(stem, image, masks.get(stem, missing)))
    return source


def _files(folder: Path, suffixes: list[str], left: dict[Path, str]) -> dict[str, Path]:
    """Files of a folder with one of the suffixes, by stem. What else is there goes to `left`."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*"), key=lambda f: (f.stem, f.suffix)):
        if path.name[0] == "." or path.is_dir() or path.suffix.lower() not in suffixes:
            left[path] = f"not a {' '.join(suffixes)} file"
        elif path.stem in found:
            raise InputError(f"{found[path.stem]} and {path.name}: one stem; rename one of them")
        else:
            found[path.stem] = path
    return found


def _shapes(root: Path) -> Source:
    train = [Item(f"train{i:03d}", i, BUILT_IN) for i in range(SHAPES_TRAIN)]
    val = [Item(f"val{i:03d}", 10_000 + i, BUILT_IN) for i in range(SHAPES_VAL)]
    return Source("shapes", SHAPES_CLASSES, root, train, val)


def find_dataset(name: str | None, root: Path) -> str:
    """Without a name: pascal if it is under root, else shapes; InputError if a root was given."""
    if name or _pascal_root(root):
        return name or "pascal"
    if root is not ROOT:  # the default itself, not a --root data that was given
        raise InputError(f"--root {root}: no PASCAL VOC 2012 here; give --dataset, e.g. folder")
    return "shapes"


def load_source(name: str, root: Path) -> Source:
    """Lists the images of a data set; opens none. InputError says what was looked for."""
    makers = dict(pascal=_pascal, cityscapes=_cityscapes, folder=_folder, shapes=_shapes)
    return makers[name](root)


@functools.cache
def draw_shapes(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a built-in image from its index alone: ([96, 96, 3] uint8, [96, 96] uint8 label)."""
    r, n = rng(0, "shapes", index), SHAPES_SIZE
    yy, xx = np.mgrid[:n, :n].astype(np.float32)
    label = np.zeros((n, n), np.uint8)
    image = np.broadcast_to(r.uniform(60, 195, 3), (n, n, 3))
    for _ in range(3):
        wave = np.sin((xx * r.normal() + yy * r.normal()) / 20 + r.uniform(0, 6))
        image = image + r.uniform(10, 35, 3) * wave[..., None]

    def form(kind: int, u: np.ndarray, v: np.ndarray, size: float) -> np.ndarray:
        rho, theta = np.hypot(u, v), np.arctan2(v, u)
        side = np.maximum(abs(u), abs(v))
        return (
            rho < size,  # disk
            side < 0.85 * size,  # square
            rho * np.cos((theta % (2 * np.pi / 3)) - np.pi / 3) < 0.62 * size,  # triangle
            rho < size * (0.75 + 0.35 * np.cos(5 * theta)),  # star
            (np.minimum(abs(u), abs(v)) < 0.36 * size) & (side < size),  # cross
        )[kind]

    def texture(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        speckle = r.choice([-1, 1], (n, n))
        k, turn = 2 * np.pi / r.uniform(6, 9), r.uniform(0, np.pi)
        a, b = k * (u * np.cos(turn) + v * np.sin(turn)), k * (v * np.cos(turn) - u * np.sin(turn))
        return (
            np.sin(k * np.hypot(u, v)),  # rings
            3 * np.sin(a) * np.sin(b),  # checkers
            np.sin(a),  # stripes
            np.cos(a) + np.cos(b) - 0.6,  # dots
            speckle[(u / 3 + n).astype(int) % n, (v / 3 + n).astype(int) % n],  # grain
        )[kind]

    plan = ["clutter"] * r.integers(1, 4) + ["object"] * r.integers(3, 5)
    plan += ["plain form"] * r.integers(0, 3) + ["formless"] * r.integers(0, 2)
    plan = [*r.permutation(plan), *["clutter"] * r.integers(0, 2)]
    for what in plan:  # the later cover the earlier
        angle, size = r.uniform(0, 2 * np.pi), r.uniform(17, 30)
        dx, dy = xx - r.uniform(0, n), yy - r.uniform(0, n)
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        kind = r.integers(5)
        if what in ("object", "plain form"):
            where = form(kind, u, v, size)
        else:
            long, thin = (1.2, 0.2) if what == "formless" else r.uniform(0.1, (1, 0.4))
            where = (abs(u) < long * size) & (abs(v) < thin * size)
        tone = texture(kind, u, v) if what in ("object", "formless") else u / size  # or a shade
        color, contrast = r.uniform(60, 200, 3), r.uniform(90, 160) + r.normal(0, 30, 3)
        tone = np.clip(0.5 + 1.5 * tone[where], 0, 1)
        tone -= tone.mean() if where.any() else 0  # so that no texture is lighter than another
        image[where] = color + contrast * tone[:, None]
        label[where] = kind + 1 if what == "object" else 0
    image = image + r.normal(0, r.uniform(2, 10), image.shape) + r.uniform(-20, 20, 3)
    return np.clip(image, 0, 255).astype(np.uint8), label


def _open(path: Path, what: str, decode: bool = True) -> tuple[Image.Image, int | None]:
    """A picture, upright, and the EXIF orientation that it was stored with (2 to 8: not upright).

    `decode` False: the header alone. InputError for what Pillow cannot read or would misread.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            stored = str([tile[3] for tile in image.tile])  # e.g. RGB;16B, that is read as RGB
            bits = getattr(image, "tag_v2", {}).get(258, 8)  # of a TIFF, for each channel
            if image.mode[0] in "IF" or re.search(";16[BLN]", stored) or np.max(bits) > 8:
                raise ValueError("more than 8 bits a channel; save it with 8")
            ids = image.format == "PNG" and image.mode in ("L", "P")
            if what == "mask" and (not ids or re.search("L;[24]", stored)):
                raise ValueError(f"{image.format} {stored}; save the class ids as an 8-bit PNG")
            noted = image.format != "PNG" or any("exif" in k or "xmp" in k for k in image.info)
            turn = image.getexif().get(274) if noted else 1  # it would decode a whole PNG
            if decode or image.format == "TIFF":  # the size of a TIFF is upright once it is loaded
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
            clear = decode and (image.mode[-1] in "aA" or "transparency" in image.info)
            if what == "image" and clear and image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("transparent pixels have no colour of their own; fill them")
            return image, turn
    except Exception as e:  # Pillow raises many kinds for broken files
        raise InputError(f"{path}: no readable {what} ({e}); replace or remove it") from None


@functools.cache  # each evaluation asks for it
def _size(item: Item) -> tuple[int, int]:
    """(width, height) of an upright image."""
    if isinstance(item.image, int):
        return SHAPES_SIZE, SHAPES_SIZE
    image, turn = _open(item.image, "image", decode=False)
    return image.size[::-1] if turn in (5, 6, 7, 8) and image.format != "TIFF" else image.size


def open_picture(path: Path) -> Image.Image:
    """A picture file as upright RGB. InputError if it cannot be decoded, or not as it is meant."""
    return _open(path, "image")[0].convert("RGB")


def read_image(item: Item) -> Image.Image:
    """The image of an item, as open_picture."""
    if isinstance(item.image, int):
        return Image.fromarray(draw_shapes(item.image)[0])
    return open_picture(item.image)


def read_mask(item: Item, size: tuple[int, int], num_classes: int) -> Image.Image:
    """The class-index mask of an item, mode L; size = (width, height) of its image."""
    if isinstance(item.image, int):
        return Image.fromarray(draw_shapes(item.image)[1])
    mask, _ = _open(item.mask, "mask")
    mask = Image.frombytes("L", mask.size, mask.tobytes())  # palette indices, not colours
    if item.mask.name.endswith("_labelIds.png"):
        train_ids = {raw: k for k, raw in enumerate(CITYSCAPES_IDS)}
        mask = mask.point([train_ids.get(raw, IGNORE) for raw in range(256)])
    if mask.size != size:
        raise InputError(f"{item.mask}: {mask.size} pixels, its upright image {size}; fix one")
    if bad := [v for v, n in enumerate(mask.histogram()) if n and num_classes <= v != IGNORE]:
        why = f"value {bad[0]}, but classes are 0 to {num_classes - 1} and 255 is ignored"
        remedy = "map it to one of these"
        if bad == [num_classes]:
            remedy = "if 0 is void and all ids are one too high, save 0 as 255 and id k as k - 1"
        raise InputError(f"{item.mask}: {why}; {remedy}")
    return mask


# --------------------------------------------------------------------------- splits


@dataclass
class Split:
    """Which images are labelled, which are not, and which are for validation."""

    labeled: list[Item]
    unlabeled: list[Item]
    val: list[Item]
    classes: list[str]
    hash: str  # of the labelled and unlabelled ids, and of masks that are not the data set's
    line: str  # says data set, protocol, counts and hash: the run's first log line
    notes: list[str]  # a line each: what the data folder holds that is left out, and why


def load_split(args: argparse.Namespace) -> Split:
    """The split that the flags of `add_flags` name. InputError says what is wrong."""
    source = load_source(args.dataset, args.root)
    return make_split(source, args.split, args.split_seed, args.protocol)


def make_split(source: Source, split: str, split_seed: int, protocol: str) -> Split:
    """Labelled and unlabelled images by a share (1/8, full), a count (92) or a folder of lists."""
    if os.path.isdir(split):
        labeled = _read_list(source, Path(split) / "labeled.txt")
        unlabeled = _read_list(source, Path(split) / "unlabeled.txt")
        said = f"lists of {split}"
    else:
        labeled, unlabeled = _draw(source, split, split_seed, protocol)
        said = f"{protocol} protocol, " if source.name == "pascal" else ""
        said += f"--split {split}, --split-seed {split_seed}"
    if source.fine and all(i.id in source.fine for i in source.train):
        said += " (no SBD: VOC's own images alone)"
        if protocol != "classic":
            raise InputError(f"{source.root}: {said}; add SBD: data.py --download, and --root")

    seen = {}
    for part, items in (("val", source.val), ("labelled", labeled), ("unlabelled", unlabeled)):
        for item in items:
            if item.image in seen:
                raise InputError(f"{item.id}: {seen[item.image]} and {part}; list it once")
            seen[item.image] = part
            files = (item.image,) if part == "unlabelled" else (item.image, item.mask)
            for file in files if source.name != "shapes" else ():
                if file is None or not os.path.isfile(file):
                    what = f"{part} image; there is no {file or 'mask'}"
                    raise InputError(f"{item.id}: {what}; add it or unlist the id")

    own = {(i.image, i.mask) for i in source.train}
    others = [i.mask for i in labeled if (i.image, i.mask) not in own]  # given by a list alone
    lines = [i.id for i in labeled] + ["--"] + [i.id for i in unlabeled]
    lines += [mask.relative_to(source.root).as_posix() for mask in others]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    line = (
        f"{source.name}: {said}: {len(labeled)} labelled, {len(unlabeled)} unlabelled, "
        f"{len(source.val)} val images, {len(source.classes)} classes, lists {digest}"
    )
    notes = []
    if source.left:
        why = "; ".join(sorted(set(source.left.values())))
        notes.append(f"{source.root}: {len(source.left)} files left out ({why}); run data.py")
    if unlisted := len({i.image for i in source.train} - seen.keys()):
        notes.append(f"{said}: {unlisted} training images are in neither list and left out")
    return Split(labeled, unlabeled, source.val, source.classes, digest, line, notes)


def _draw(source: Source, split: str, seed: int, protocol: str) -> tuple[list[Item], list[Item]]:
    pool = sorted((i for i in source.train if i.mask), key=lambda i: i.id)
    pool = [pool[k] for k in rng(seed, "split").permutation(len(pool))]
    if source.fine and protocol == "classic":
        pool = [i for i in pool if i.id in source.fine]
    elif protocol == "priority":
        pool.sort(key=lambda i: i.id not in source.fine)  # fine masks first
    m = re.fullmatch(r"(\d{1,9})(?:/([1-9]\d{0,5}))?", "1/1" if split == "full" else split)
    if m is None:
        raise InputError(f"--split {split}: give a share (1/8, full), a count or a folder of lists")
    n = math.ceil(len(pool) * int(m[1]) / int(m[2])) if m[2] else int(m[1])  # as published
    if not 0 < n <= len(pool):
        masks = f"there are {len(pool)} masks ({len(source.left)} files are left out)"
        raise InputError(f"--split {split}: {n} labelled images; {masks}, give 1 to {len(pool)}")
    chosen = {i.id for i in pool[:n]}
    rest = [i for i in source.train if i.id not in chosen]
    return sorted(pool[:n], key=lambda i: i.id), sorted(rest, key=lambda i: i.id)


def _read_list(source: Source, path: Path) -> list[Item]:
    """Items of a list: `image mask` paths relative to the root, or bare ids, one a line."""
    by_id = {i.id: i for i in (*source.val, *source.train)}  # of one id: the training image
    by_image = {i.image: i for i in source.train}
    items = []
    for line in _list(path):
        words = [line] if line in by_id else line.replace("\\", "/").split()
        for word in words:
            drive = re.match("[A-Za-z]:", word) and word not in by_id
            if drive or Path(word).is_absolute() or ".." in Path(word).parts or "\0" in word:
                raise InputError(f"{path}: {word!r} leads out of {source.root}; use relative paths")
        if "/" in words[0]:
            image = source.root / words[0]
            item = by_image.get(image) or Item(image.stem, image, None)
            mask = source.root / words[-1] if len(words) > 1 else None
            # VOC's lists name its own folder also for SBD's masks, Cityscapes' the train ids
            if mask and (source.name == "folder" or os.path.isfile(mask)):
                item = Item(item.id, image, mask)
        else:
            item = by_id.get(words[0])
        if item is None:
            where = f"{source.name} {source.root}"
            raise InputError(f"{path}: {words[0]!r} is not in {where}; remove it, or give a path")
        items.append(item)
    return items


def look_at_masks(split: Split) -> None:
    """InputError for a bad mask, or if none shows a class; looks at val masks for ten seconds."""

    def holds_a_class(item: Item) -> bool:
        mask = read_mask(item, _size(item), len(split.classes))
        return any(mask.histogram()[1:IGNORE])

    if isinstance(split.val[0].image, int):
        return
    if len(split.classes) > 1 and not any(holds_a_class(item) for item in split.labeled):
        what = "the labelled masks hold nothing but 0 and 255 (ignored); save a foreground as 1"
        raise InputError(f"{split.labeled[0].mask.parent}: {what}")
    end = time.monotonic() + 10
    shown = 0  # pixels
    for item in split.val:
        shown += sum(read_mask(item, _size(item), len(split.classes)).histogram()[:IGNORE])
        if time.monotonic() > end:
            break
    if shown == 0:
        raise InputError(f"{split.val[0].mask.parent}: only 255 (ignored); no mIoU of that")


# --------------------------------------------------------------------------- batches


def weak_view(
    image: Image.Image, mask: Image.Image | None, crop: int, scale: tuple, r: Generator
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int, int, int]]:
    """Random scale, crop, flip (u; x with its y). Only the crop is resampled.

    Returns [crop, crop, 3] uint8, the label [crop, crop] uint8 (None without mask; 255 = padding),
    and the rectangle (top, left, bottom, right) that holds image, the rest being padding.
    """
    factor = r.uniform(*scale)
    w = max(1, round(image.width * factor))
    h = max(1, round(image.height * factor))
    cw, ch = min(crop, w), min(crop, h)  # what the crop holds of the scaled image
    left = r.integers(w - cw + 1)
    top = r.integers(h - ch + 1)
    sx, sy = image.width / w, image.height / h
    right = min((left + cw) * sx, image.width)  # rounding must not lead out of the image
    bottom = min((top + ch) * sy, image.height)
    box = (left * sx, top * sy, right, bottom)
    flip = r.random() < 0.5
    rect = (0, crop - cw, ch, crop) if flip else (0, 0, ch, cw)

    def cut(picture: Image.Image, how: Image.Resampling, fill: int | tuple) -> np.ndarray:
        part = picture.resize((cw, ch), how, box)
        if flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        padded = Image.new(picture.mode, (crop, crop), fill)
        padded.paste(part, (rect[1], 0))
        return np.asarray(padded)

    u = cut(image, Image.Resampling.BILINEAR, FILL)
    y = None if mask is None else cut(mask, Image.Resampling.NEAREST, IGNORE)
    return u, y, rect


def strong_params(r: Generator) -> list[float]:
    """Draws brightness, contrast, saturation, hue, grey, blur sigma; off is the identity."""
    jitter = [*r.uniform(0.5, 1.5, 3), r.uniform(-0.25, 0.25)]
    jitter = jitter if r.random() < 0.8 else [1.0, 1.0, 1.0, 0.0]
    grey, sigma = float(r.random() < 0.2), r.uniform(0.1, 2.0)
    return [*jitter, grey, sigma if r.random() < 0.5 else 0.0]


def cutmix_box(crop: int, r: Generator) -> tuple[int, int, int, int]:
    """With p 0.5 a box of 2-40 % of the crop, aspect 0.3-1/0.3, fully inside; else an empty one."""
    if r.random() < 0.5:
        return 0, 0, 0, 0
    area = r.uniform(0.02, 0.4) * crop * crop  # drawn once: only the shape must fit
    while True:
        ratio = r.uniform(0.3, 1 / 0.3)
        w = int(math.sqrt(area / ratio))
        h = int(math.sqrt(area * ratio))
        if w <= crop and h <= crop:
            top = int(r.integers(crop - h + 1))
            left = int(r.integers(crop - w + 1))
            return top, left, top + h, left + w


def rect_masks(rects: list[tuple[int, int, int, int]], crop: int) -> Tensor:
    """Rectangles (top, left, bottom, right) as [len(rects), crop, crop] bool, True inside."""
    masks = np.zeros((len(rects), crop, crop), bool)
    for mask, (top, left, bottom, right) in zip(masks, rects, strict=True):
        mask[top:bottom, left:right] = True
    return torch.from_numpy(masks)


class TrainBatches(Dataset):
    """One rank's share of the global batch of a step; the step is the index.

    x [b, H, W, 3] uint8, y [b, H, W] uint8, x_valid [b, H, W] bool (True on image), x_id; unless
    labeled_only u, u_valid, u_id alike, `strong` [V, b, 6] (strong_params), `cutmix` [V, b, H, W]
    bool (True where a view is to be its partner's) and the `order` of the four jitter ops. `step`
    and `positions` in the global batch say which samples these are.
    """

    def __init__(self, split: Split, args: argparse.Namespace, rank=0, world=1) -> None:
        share = args.batch_size // world
        self.positions = list(range(rank * share, (rank + 1) * share))
        self.split, self.args = split, args

    def __getitem__(self, step: int) -> dict:
        batch = {"step": step, "positions": self.positions}
        self.views(batch, "x", self.pick(self.split.labeled, "labeled", step))
        if not self.args.labeled_only:
            self.views(batch, "u", self.pick(self.split.unlabeled, "unlabeled", step))
            crop = self.args.crop_size
            strong = [[strong_params(r) for r in self.rngs(f"strong{v}", step)] for v in (1, 2)]
            boxes = [cutmix_box(crop, r) for v in (1, 2) for r in self.rngs(f"box{v}", step)]
            batch["strong"] = torch.tensor(strong, dtype=torch.float32)
            batch["cutmix"] = rect_masks(boxes, crop).unflatten(0, (2, -1))
            batch["order"] = rng(self.args.seed, "order", step).permutation(4).tolist()
        return batch

    def rngs(self, stream: str, step: int) -> list[Generator]:
        """The random numbers of each sample of a step."""
        return [rng(self.args.seed, stream, step, p) for p in self.positions]

    def pick(self, items: list[Item], stream: str, step: int) -> list[Item]:
        """Epochs of shuffled images, incomplete last batches dropped; fewer than a batch repeat."""
        size, n = self.args.batch_size, len(items)
        epoch, k = divmod(step, max(1, n // size))
        order = rng(self.args.seed, stream, epoch).permutation(n)
        return [items[order[(k * size + p) % n]] for p in self.positions]

    def views(self, batch: dict, name: str, items: list[Item]) -> None:
        """Adds the weak views of x, with their labels y, or of u."""
        views = []
        for item, r in zip(items, self.rngs(name, batch["step"]), strict=True):
            image = read_image(item)
            mask = read_mask(item, image.size, len(self.split.classes)) if name == "x" else None
            views.append(weak_view(image, mask, self.args.crop_size, self.args.scale, r))
        batch[name] = torch.from_numpy(np.stack([view for view, _, _ in views]))
        if name == "x":
            batch["y"] = torch.from_numpy(np.stack([label for _, label, _ in views]))
        batch[f"{name}_valid"] = rect_masks([rect for _, _, rect in views], self.args.crop_size)
        batch[f"{name}_id"] = [item.id for item in items]


def _loaded(dataset: Dataset, steps: range, workers: int, device: torch.device) -> Iterator[dict]:
    pin = device.type == "cuda"
    loader = DataLoader(  # batch_size None: an item is a batch already
        dataset, None, sampler=steps, num_workers=workers, pin_memory=pin, worker_init_fn=_calm
    )
    atexit.register(_end_workers)
    try:
        yield from loader
        return
    except InputError as e:  # a worker's holds its traceback; the line stands at the end
        line = str(e).rpartition("InputError: ")[2].strip()
    raise InputError(line)  # out here it does not hold on to the workers


def _calm(_worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach the workers too, but the step under way needs them
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    # Python ends its children by SIGTERM and would wait for ever for these, which ignore it
    if hasattr(signal, "SIGCHLD"):  # else torch reports their death as an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; the host does not wait for the copy."""
    if device.type == "cuda":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def train_batches(
    split: Split, args: argparse.Namespace, rank: int, world: int, start: int, device: torch.device
) -> Iterator[dict]:
    """Yields this rank's TrainBatches from step `start` on, on the device.

    x and u are [b, 3, H, W] float in [0, 1], y is int64.
    """
    dataset = TrainBatches(split, args, rank, world)
    for batch in _loaded(dataset, range(start, args.iters), args.workers, device):
        for name, value in batch.items():
            if isinstance(value, Tensor):
                batch[name] = to_device(value, device)
        batch["y"] = batch["y"].long()
        for name in ("x",) if args.labeled_only else ("x", "u"):
            batch[name] = batch[name].permute(0, 3, 1, 2).float() / 255  # channels_last in memory
        yield batch


def padded_size(size: tuple[int, int], grid: int, crop: int) -> tuple[int, int]:
    """The (width, height) an image is evaluated at: the next that equals `crop` modulo `grid`."""
    # aligned corners then put the cells of a map as far apart as in a training crop
    width, height = size
    return width + (crop - width) % grid, height + (crop - height) % grid


class ValBatches(Dataset):
    """Every val image once, in batches of one padded size that do not depend on who reads them.

    image [b, H, W, 3] uint8, label [b, H, W] uint8, both padded at the right and bottom (label 255)
    to `padded_size`. id [b]. VAL_IMAGES and VAL_PIXELS bound b.
    """

    def __init__(self, items: list[Item], num_classes: int, grid: int, crop: int = 0) -> None:
        self.items, self.num_classes, self.grid, self.crop = items, num_classes, grid, crop
        buckets: dict[tuple[int, int], list[Item]] = {}
        for item in items:
            buckets.setdefault(padded_size(_size(item), grid, crop), []).append(item)
        self.batches = []
        for (w, h), members in buckets.items():
            n = max(1, min(VAL_IMAGES, VAL_PIXELS // (h * w)))
            self.batches += [members[i : i + n] for i in range(0, len(members), n)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> dict:
        items = self.batches[k]
        width, height = padded_size(_size(items[0]), self.grid, self.crop)
        image = np.full((len(items), height, width, 3), FILL, np.uint8)
        label = np.full((len(items), height, width), IGNORE, np.uint8)
        for b, item in enumerate(items):
            picture = read_image(item)
            w, h = picture.size
            image[b, :h, :w] = picture
            label[b, :h, :w] = read_mask(item, (w, h), self.num_classes)
        ids = [item.id for item in items]
        return {"id": ids, "image": torch.from_numpy(image), "label": torch.from_numpy(label)}


def val_batches(
    dataset: ValBatches, rank: int, world: int, workers: int, device: torch.device
) -> Iterator[dict]:
    """Yields a rank's share of the val batches: image [b, 3, H, W] normalised, label int64."""
    for batch in _loaded(dataset, range(rank, len(dataset), world), workers, device):
        image = to_device(batch["image"], device).permute(0, 3, 1, 2)
        batch["image"] = normalize(image.float() / 255)
        batch["label"] = to_device(batch["label"], device).long()
        yield batch


def check_shared_memory(args: argparse.Namespace, world: int, ranks: int, split: Split) -> None:
    """InputError if /dev/shm cannot hold the batches that workers of this machine's ranks keep."""
    if args.workers == 0 or not os.path.isdir("/dev/shm"):
        return
    width, height = _size(split.val[0])
    # bytes a pixel: x 3, y 1, x_valid 1; u 3, u_valid 1, cutmix 2
    ranks = min(world, ranks)  # plain python is one, whatever a cluster sets
    need = args.batch_size // world * args.crop_size**2 * (5 if args.labeled_only else 11)
    need += 4 * max(width * height, min(VAL_PIXELS, VAL_IMAGES * width * height))
    need = (need + 2**16) * (2 * args.workers + 1) * ranks  # two a worker wait
    free = shutil.disk_usage("/dev/shm").free
    if free < need:
        what = f"{free / 2**20:.1f} MB free, the workers' batches take {need / 2**20:.1f}"
        remedy = f"the container by docker run --shm-size {math.ceil(need / 2**30)}g"
        raise InputError(f"/dev/shm has {what}; give --workers 0, or start {remedy}")


# --------------------------------------------------------------------------- on the device


def normalize(x: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] to the backbones' zero mean and unit deviation: (x - mean) / std."""
    offset = tuple(-mean / std for mean, std in zip(MEAN, STD, strict=True))
    scale = tuple(1 / std for std in STD)
    return torch.addcmul(_channels(offset, x.device), x, _channels(scale, x.device))


@functools.cache  # a copy to the device is made once
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def strong_views(u: Tensor, strong: Tensor, order: list[int]) -> Tensor:
    """[V, B, 3, H, W] strong views of u [B, 3, H, W] in [0, 1] by strong [V, B, 6]."""
    views, b = strong.shape[:2]
    x = u.repeat(views, 1, 1, 1)  # [VB, 3, H, W]
    brightness, contrast, saturation, hue, grey, sigma = strong.reshape(-1, 6, 1, 1, 1).unbind(1)
    for op in order:  # the formulas are torchvision's
        if op == 0:
            x = (x * brightness).clamp(0, 1)
        elif op == 1:
            mean = _grey(x).mean((1, 2, 3), keepdim=True)
            x = torch.lerp(mean, x, contrast).clamp(0, 1)
        elif op == 2:
            x = torch.lerp(_grey(x), x, saturation).clamp(0, 1)
        else:
            x = _adjust_hue(x, hue)
    x = torch.lerp(x, _grey(x), grey)  # grey is 0 or 1
    return _gaussian_blur(x, sigma).view(views, b, *u.shape[1:])


def _grey(x: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, _channels((0.2989, 0.587, 0.114), x.device))


def _adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of x [B, 3, H, W] by `shift` [B, 1, 1, 1] of a circle; value, chroma stay."""
    value, largest = x.max(1, keepdim=True)  # largest: 0 red, 1 green, 2 blue
    chroma = value - x.amin(1, keepdim=True)
    # red: green - blue, from sector 0; green: blue - red, from 2; blue: red - green, from 4
    rise = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, largest) / chroma.clamp_min(1e-12)
    sector = rise + 2 * largest
    # a circle is 6 sectors; a channel is at value for 2, falls for 1, at value - chroma for 2
    k = (sector + 6 * shift + _channels((5.0, 3.0, 1.0), x.device)) % 6  # [B, 3, H, W]
    return value - chroma * (2 - (k - 2).abs()).clamp(0, 1)


def _gaussian_blur(x: Tensor, sigma: Tensor, radius: int = 6) -> Tensor:
    """Separable blur, a sigma per image [B, 1, 1, 1], 0 = none; borders are reflected."""
    k = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.exp(-0.5 * (k / sigma.clamp_min(1e-3)) ** 2)  # [B, 1, 1, 2 radius + 1]
    weight = (weight / weight.sum(-1, keepdim=True)).repeat_interleave(3, 0)
    maps = torch.nn.functional.pad(x, (radius,) * 4, mode="reflect")
    maps = maps.reshape(1, len(weight), *maps.shape[2:])  # an image's channels are groups
    maps = torch.nn.functional.conv2d(maps, weight, groups=len(weight))
    maps = torch.nn.functional.conv2d(maps, weight.transpose(2, 3), groups=len(weight))
    return maps.view(x.shape)


# ------------------------------------------------------------------ pictures and command line


def palette() -> np.ndarray:
    """VOC's colour map [256, 3] uint8: class bits spread over the channels; 255 is a light grey."""
    bits = np.arange(256)[:, None, None] >> np.arange(9).reshape(3, 3) & 1  # [id, bit, channel]
    colors = (bits << np.array([[7], [6], [5]])).sum(1).astype(np.uint8)
    colors[IGNORE] = 224
    return colors


def check(source: Source) -> tuple[list[str], list[str]]:
    """Opens every image and mask; returns all faults and all that is worth a look, a line each."""
    faults, notes, seen = [], [], set()
    for path, why in sorted(source.left.items()):
        lines = notes if path.name.startswith(".") else faults
        lines.append(f"{path}: not used: {why}; rename or remove it")
    for item in tqdm([*source.train, *source.val], unit="image", disable=None):
        try:
            image = read_image(item)
            if item.mask:
                mask = read_mask(item, image.size, len(source.classes))
                seen |= {v for v, n in enumerate(mask.histogram()) if n}
            turn = 1 if item.mask == BUILT_IN else _open(item.image, "image", decode=False)[1]
            if turn in range(2, 9):
                notes.append(f"{item.image}: turned upright, by its EXIF orientation {turn}")
        except InputError as e:
            faults.append(str(e))
    if absent := [name for k, name in enumerate(source.classes) if k not in seen]:
        notes.append(f"in no mask: {', '.join(absent)}; was such a class saved as 255?")
    return faults, notes


def download(root: Path) -> None:
    """Fetches VOC 2012 and SBD by torchvision; writes SBD's masks to SegmentationClassAug."""
    from scipy.io import loadmat  # SBD's masks are .mat files
    from torchvision.datasets import SBDataset, VOCSegmentation

    mat = root / "sbd/cls"
    VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
    SBDataset(str(root / "sbd"), mode="segmentation", download=not mat.is_dir())
    voc = _pascal_root(root)
    aug = voc / "SegmentationClassAug"
    aug.mkdir(exist_ok=True)
    own = _list(voc / "ImageSets/Segmentation/trainval.txt")
    extra = sorted({p.stem for p in mat.glob("*.mat")}.difference(own))
    for id in tqdm(extra, unit="mask", disable=None):
        label = loadmat(mat / f"{id}.mat")["GTcls"]["Segmentation"][0, 0].astype(np.uint8)
        Image.fromarray(label).save(aug / f"{id}.png")
    print(f"{voc}: {len(extra)} masks of SBD beside {len(own)} of VOC (published: 9118, 2913)")


def number(kind: type, least: float = 0, most: float = math.inf) -> Callable:
    """An argparse type: a finite int or float with least <= value <= most."""

    def parse_number(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is out of range: {least:g} to {most:g}")
        return value

    parse_number.__name__ = kind.__name__  # argparse says "invalid float value"
    return parse_number


COUNT, STEPS = number(int, most=2**63 - 1), number(int, least=1)
WEIGHT, POSITIVE, SHARE = number(float), number(float, least=1e-12), number(float, most=1)


def add_flags(group: argparse._ActionsContainer) -> None:
    """The flags of a data set and its split, for a parser or a group of it."""
    group.add_argument("--dataset", choices=tuple(PRESETS), help="unset: VOC at --root, or shapes")
    group.add_argument("--root", type=Path, default=ROOT, help="folder of the data set")
    group.add_argument("--protocol", choices=PROTOCOLS, default="classic", help="VOC's mask pool")
    group.add_argument("--split", default="1/16", help="labelled: share, full, count, list folder")
    group.add_argument("--split-seed", type=COUNT, default=0, help="draws a share or count")


def make_parser() -> argparse.ArgumentParser:
    """The flags of `python data.py`."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(p)
    p.add_argument("--download", action="store_true", help="first fetch VOC 2012 and SBD")
    return p


def main() -> None:
    args = make_parser().parse_args()
    if args.download:
        download(args.root)
    args.dataset = find_dataset(args.dataset, args.root)
    source = load_source(args.dataset, args.root)
    faults, notes = check(source)
    print(*notes, *faults, f"{args.dataset}: {len(faults)} faults", sep="\n")
    if faults:
        sys.exit(1)
    print(load_split(args).line)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError, ImportError, RuntimeError) as e:  # the last two: of --download
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
