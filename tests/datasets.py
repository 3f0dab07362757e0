"""Tiny data sets on disk, in the layouts that users have. Each maker returns its root."""

import argparse
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data

SIZE = (48, 40)  # width, height of every picture
VOC_TRAIN = [f"2007_{i:06d}" for i in range(8)]  # the first five have masks of VOC's own
VOC_VAL = [f"2008_{i:06d}" for i in range(2)]
CITIES = {"train": ("aachen", 5), "val": ("munster", 2)}


def noise(key: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture [H, W, 3] uint8 that differs from key to key and is smooth enough for JPEG."""
    r = np.random.default_rng(key)
    coarse = Image.fromarray(r.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


def blobs(key: int, classes: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask [H, W] uint8 of class ids, with a border of 255 at the left."""
    r = np.random.default_rng(key + 10_000)
    coarse = Image.fromarray(r.integers(0, classes, (4, 5), dtype=np.uint8))
    label = np.array(coarse.resize(size, Image.Resampling.NEAREST))
    label[:, :2] = 255
    return label


def save(path: Path, array: np.ndarray) -> Path:
    """Writes a picture, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def truncate(path: Path) -> Path:
    """Cuts a file in the middle: its header still reads well."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def make_folder(root: Path, labeled: int = 4, unlabeled: int = 4, val: int = 2) -> Path:
    """Folder layout with 3 classes; train images t00, t01, ... of which the first have masks."""
    for i in range(labeled + unlabeled):
        save(root / f"train/images/t{i:02d}.jpg", noise(i))
        if i < labeled:
            save(root / f"train/masks/t{i:02d}.png", blobs(i, 3))
    for i in range(val):
        save(root / f"val/images/v{i:02d}.jpg", noise(100 + i))
        save(root / f"val/masks/v{i:02d}.png", blobs(100 + i, 3))
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    return root


def save_palette(path: Path, label: np.ndarray) -> None:
    """A palette PNG as VOC's: the file's pixels are class ids, its colours VOC's colour map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    image.putpalette(data.palette().flatten().tolist())
    image.save(path)


def make_pascal(root: Path) -> Path:
    """VOC layout: 8 train images of which 5 in train.txt, 2 val images, palette masks."""
    voc = root / "VOCdevkit/VOC2012"
    for i, id in enumerate(VOC_TRAIN + VOC_VAL):
        save(voc / f"JPEGImages/{id}.jpg", noise(i))
        if i < 5 or id in VOC_VAL:
            save_palette(voc / f"SegmentationClass/{id}.png", blobs(i, 21))
        save(voc / f"SegmentationClassAug/{id}.png", blobs(i, 21))
    lists = voc / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(VOC_TRAIN[:5]) + "\n")
    (lists / "val.txt").write_text("\n".join(VOC_VAL) + "\n")
    (lists / "trainval.txt").write_text("\n".join(VOC_TRAIN[:5] + VOC_VAL) + "\n")
    return root


def make_cityscapes(root: Path, raw: bool = False) -> Path:
    """Cityscapes layout, 5 train and 2 val images; `raw`: labelIds are the only masks."""
    for part, (city, n) in CITIES.items():
        for i in range(n):
            stem = f"{city}_{i:06d}_000019"
            key = i if part == "train" else 100 + i
            save(root / f"leftImg8bit/{part}/{city}/{stem}_leftImg8bit.png", noise(key))
            label, kind = blobs(key, 19), "labelTrainIds"
            if raw:
                ids = np.array([*data.CITYSCAPES_IDS, *[0] * (256 - 19)], np.uint8)
                label, kind = ids[label], "labelIds"  # 255 becomes raw id 0, "unlabeled"
            save(root / f"gtFine/{part}/{city}/{stem}_gtFine_{kind}.png", label)
    return root


def batch_args(**changes: object) -> argparse.Namespace:
    """The flags that data.TrainBatches reads."""
    flags = dict(seed=0, crop_size=32, batch_size=4, iters=12, workers=0, scale=(0.5, 2.0))
    flags["labeled_only"] = False
    return argparse.Namespace(**(flags | changes))


def write_lists(folder: Path, labeled: list[str], unlabeled: list[str]) -> str:
    """Writes labeled.txt and unlabeled.txt; returns what --split then gets."""
    folder.mkdir(exist_ok=True)
    (folder / "labeled.txt").write_text("\n".join(labeled) + "\n", encoding="utf-8")
    (folder / "unlabeled.txt").write_text("\n".join(unlabeled) + "\n", encoding="utf-8")
    return str(folder)


def png(width: int, height: int, bits: int, color: int, row: bytes) -> bytes:
    """A PNG of equal rows, of any depth and colour type: Pillow does not write them all."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + row) * height)), (b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        file += struct.pack(">I", len(content)) + kind + content
        file += struct.pack(">I", zlib.crc32(kind + content))
    return file


def shared(name: str) -> Path:
    """A folder of real data beside the repository; skips the test where it is not."""
    path = Path(__file__).resolve().parents[2] / "shared" / name
    if not path.is_dir():
        pytest.skip(f"{path} is not there: no real data on this machine")
    return path
