"""Files as users have them: what a file says of itself, what is left out, text of other systems."""

import contextlib
import itertools
import os
import shutil
import struct
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import batch_args, blobs, make_folder, noise, png, save, truncate, write_lists
from PIL import EpsImagePlugin, Image

import data
from data import InputError, Item

CPU = torch.device("cpu")
FUZZ = int(os.environ.get("FUZZ", "400"))  # damaged pictures


def refusal(call, *args: object) -> str:
    """The one line that a call refuses its input with."""
    with pytest.raises(InputError) as e:
        call(*args)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def clean(call, *args: object) -> object:
    """What a call returns, or None if it refuses its input. Anything else fails the test."""
    try:
        return call(*args)
    except InputError:
        return refusal(call, *args) and None


def checked(root: Path, monkeypatch, capsys) -> tuple[int, list[str]]:
    """Exit status and lines of `python data.py` on a folder."""
    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", "folder", "--root", str(root)])
    status = 0
    try:
        data.main()
    except SystemExit as e:
        status = e.code
    return status, capsys.readouterr().out.strip().splitlines()


def load(root: Path, split: str = "full") -> data.Split:
    return data.make_split(data.load_source("folder", root), split, 0, "classic")


# ------------------------------------------------------------------- EXIF orientation

UPRIGHT = {  # how a stored picture is shown, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def save_turned(path: Path, stored: np.ndarray, orientation: int) -> Path:
    """Writes a picture whose EXIF note says how it is turned, without loss where there is a way."""
    exif = Image.Exif()
    exif[274] = orientation
    more = {"lossless": True} if path.suffix == ".webp" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stored).save(path, exif=exif, **more)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_upright(tmp_path, suffix, orientation):
    path = save_turned(tmp_path / f"x.{suffix}", noise(1), orientation)
    want = UPRIGHT[orientation](noise(1)).astype(int)
    got = np.asarray(data.read_image(Item("x", path, None)))
    assert got.shape == want.shape
    assert abs(got - want).mean() < (6 if suffix == "jpg" else 1e-9)
    assert data._size(Item("x", path, None)) == want.shape[1::-1]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_masks_are_upright_and_go_with_their_image(tmp_path, orientation):
    """Image and mask each by its own note: train and val batches hold what the eye sees."""
    root = make_folder(tmp_path, labeled=1, unlabeled=1, val=1)
    shown = UPRIGHT[orientation](blobs(1, 3))
    for part, name in (("train", "t00"), ("val", "v00")):
        (root / f"{part}/images/{name}.jpg").unlink()
        save_turned(root / f"{part}/images/{name}.png", noise(1), orientation)
        save(root / f"{part}/masks/{name}.png", shown)
    save_turned(root / "val/masks/v00.png", blobs(1, 3), orientation)  # a note of its own
    split, (height, width) = load(root), shown.shape
    batch = next(data.val_batches(data.ValBatches(split.val, 3, 8), 0, 1, 0, CPU))
    assert np.array_equal(batch["label"][0, :height, :width], shown)
    pixels = UPRIGHT[orientation](noise(1)).transpose(2, 0, 1) / 255
    image = data.normalize(torch.tensor(pixels.copy())[None].float())
    assert torch.allclose(batch["image"][:, :, :height, :width], image, atol=1e-5)
    args = batch_args(crop_size=48, batch_size=1, scale=(1.0, 1.0), labeled_only=True)
    raw = data.TrainBatches(split, args)[0]
    y = raw["y"][raw["x_valid"]].view(height, width).numpy()
    assert np.array_equal(y, shown) or np.array_equal(y[:, ::-1], shown)


# ------------------------------------------------------------------- what a pixel is


def tiff16(width: int, height: int) -> bytes:
    """An RGB TIFF of 16 bits a channel, which Pillow cannot write."""
    pixels = np.full((height, width, 3), 4095, "<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, height)]
    tags += [(279, 4, 1, len(pixels))]
    bits = struct.pack("<HHH", 16, 16, 16)
    folder = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    header = b"II*\0" + struct.pack("<I", 14 + len(pixels)) + bits
    return header + pixels + folder + bytes(4)


DEEP = {
    "RGB.png": png(4, 4, 16, 2, b"\x0f\xff" * 12),
    "RGBA.png": png(4, 4, 16, 6, b"\xff\xff" * 16),
    "L.png": png(4, 4, 16, 0, b"\x0f\xff" * 4),
    "RGB.tif": tiff16(4, 4),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_a_channel(tmp_path, name):
    """Guards: values up to 4095 that Pillow cuts to their upper byte, so that all is black."""
    path = tmp_path / name
    path.write_bytes(DEEP[name])
    item = Item("x", path, path)
    for reader in (data.read_image, data._size, lambda i: data.read_mask(i, (4, 4), 21)):
        assert f"{name}: no readable" in refusal(reader, item)
        assert "more than 8 bits a channel" in refusal(reader, item)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels(tmp_path, mode):
    """Guards: hidden colours that no viewer shows."""
    path, image = tmp_path / "x.png", Image.new(mode.replace("P", "L"), (8, 8), 90)
    image.convert(mode) if mode == "P" else image.putalpha(255)
    image.save(path)
    assert (np.asarray(data.open_picture(path))[..., 0] == 90).all()
    if mode == "P":
        image.save(path, transparency=90)
    else:
        image.putpixel((3, 4), (*image.getpixel((3, 4))[:-1], 254))
        image.save(path)
    assert "x.png: no readable image (transparent pixels" in refusal(data.open_picture, path)


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "BMP"])
def test_masks_are_png_whatever_their_name(tmp_path, form):
    """Guards: JPEG changes ids at the edges, TIFF may store them inverted."""
    path = tmp_path / "m.png"
    Image.fromarray(blobs(0, 2)).save(path, form)
    line = refusal(data.read_mask, Item("m", path, path), (48, 40), 2)
    assert f"({form} [" in line
    assert "save the class ids as an 8-bit PNG" in line


def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """Guards: PIL knows PostScript by its first bytes, and starts a shell command to draw it."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(a))
    path = tmp_path / "mask.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\n%%EOF\n")
    for read in (data.read_image, lambda i: data.read_mask(i, (48, 40), 3), data._size):
        assert "mask.png" in refusal(read, Item("mask", path, path))
    assert not called


# ------------------------------------------------------------------- values of masks

HINT = "if 0 is void and all ids are one too high"


def test_ids_one_too_high_get_a_hint(tmp_path):
    label = blobs(0, 3)
    label[label < 3] += 1  # 1 to 3
    path = save(tmp_path / "m.png", label)
    line = refusal(data.read_mask, Item("m", path, path), (48, 40), 3)
    assert "value 3, but classes are 0 to 2" in line
    assert HINT in line
    label[0, 9] = 7
    save(path, label)
    assert HINT not in refusal(data.read_mask, Item("m", path, path), (48, 40), 3)


def binary(root: Path, value: int = 255) -> Path:
    for mask in root.glob("*/masks/*"):
        save(mask, (blobs(0, 3) == 1).astype(np.uint8) * value)
    return root


def test_masks_of_0_and_255_alone(tmp_path, monkeypatch, capsys):
    """Guards: two classes, masks 0/255, "mIoU 100": every labelled pixel is background."""
    root = make_folder(tmp_path)
    for mask in root.glob("*/masks/*"):
        save(mask, (blobs(0, 3) == 1).astype(np.uint8) * 255)
    line = refusal(data.look_at_masks, load(root))
    assert f"{root}/train/masks: the labelled masks hold nothing but 0 and 255" in line
    _, lines = checked(root, monkeypatch, capsys)
    assert "in no mask: road, car; was such a class saved as 255?" in lines
    save(root / "train/masks/t01.png", blobs(0, 3))  # one that holds a class is enough
    truncate(root / "train/masks/t02.png")  # none is read after it
    data.look_at_masks(load(root))
    (root / "train/masks/t01.png").unlink()
    assert "t02.png: no readable mask" in refusal(data.look_at_masks, load(root))
    (root / "train/masks/t02.png").unlink()
    (root / "classes.txt").write_text("sky\n")  # one class: 255 is no class of its own
    data.look_at_masks(load(root))
    for mask in root.glob("val/masks/*"):
        save(mask, np.full_like(blobs(0, 3), 255))
    assert f"{root}/val/masks: only 255" in refusal(data.look_at_masks, load(root))


BAD_VAL = {
    "v01.png: value 3": lambda root: save(root / "val/masks/v01.png", blobs(1, 3) + 1),
    "v01.png: no readable mask": lambda root: truncate(root / "val/masks/v01.png"),
    "v01.jpg: no readable image": lambda root: (root / "val/images/v01.jpg").write_text("text"),
}


@pytest.mark.parametrize("said", BAD_VAL)
def test_bad_val_files_are_found_before_training(tmp_path, monkeypatch, said, capsys):
    root = make_folder(tmp_path)
    BAD_VAL[said](root)
    assert said in refusal(data.look_at_masks, load(root))
    assert any(said in line for line in checked(root, monkeypatch, capsys)[1])
    clock = iter(range(0, 1000, 11))  # eleven seconds a look
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    data.look_at_masks(load(root))  # v00 took all of the ten seconds


# ------------------------------------------------------------------- files that are not used


def test_check_lists_all_faults(tmp_path, monkeypatch, capsys):
    """Guards: half of the masks renamed, and trained on the other half without a word."""
    root = make_folder(tmp_path, unlabeled=6)
    assert load(root).notes == []
    first = load(root, "1/16").line  # of a run
    assert checked(root, monkeypatch, capsys) == (0, ["folder: 0 faults", first])
    (root / "train/masks/t02.png").rename(root / "train/masks/t02_mask.png")
    (root / "train/masks/t03.png").rename(root / "train/masks/t03.tif")
    (root / "train/images/a.heic").touch()
    (root / "train/images/._t00.jpg").touch()
    save(root / "val/images/more/v02.jpg", noise(2))
    save(root / "val/masks/v07.png", blobs(0, 3))
    split = load(root)
    assert len(split.labeled) == 2
    why = f"no image has its stem; not a {' '.join(data.SUFFIXES)} file; not a .png file"
    assert split.notes == [f"{root}: 6 files left out ({why}); run data.py"]
    truncate(root / "train/images/t04.jpg")  # an unlabelled one
    save_turned(root / "train/images/t05.jpg", noise(5), 3)
    save_turned(root / "train/images/t01.jpg", noise(1), 6)  # its mask is as stored
    status, lines = checked(root, monkeypatch, capsys)
    assert (status, lines[-1]) == (1, "folder: 7 faults")  # a hidden file is none
    for said in (
        *[f"/{name}: not used: " for name in "t02_mask.png t03.tif a.heic more v07.png".split()],
        "/._t00.jpg: not used: ",
        "t04.jpg: no readable image",
        "t05.jpg: turned upright, by its EXIF orientation 3",
        "t01.png: (48, 40) pixels, its upright image (40, 48)",
    ):
        assert sum(said in line for line in lines) == 1, said


def test_what_the_lists_leave_out(tmp_path):
    root = make_folder(tmp_path / "f")
    split = load(root, write_lists(tmp_path / "l", ["t00", "t01"], ["t05"]))
    said = "5 training images are in neither list and left out"
    assert split.notes == [f"lists of {tmp_path}/l: {said}"]
    # other masks than the list names, without a word
    lists = write_lists(tmp_path / "l", ["train/images/t00.jpg train/other/t00.png"], ["t05"])
    assert "t00: labelled image; there is no" in refusal(load, root, lists)
    for mask in (root / "train/masks").iterdir():
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    said = "--split full: 0 labelled images; there are 0 masks (4 files are left out)"
    assert said in refusal(load, root)


# ------------------------------------------------------------------- text of other systems


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_text_files_in_each_coding(tmp_path, code, end):
    root = make_folder(tmp_path / "f")
    (root / "classes.txt").write_bytes(("sky\nroad\ncar" + end).encode(code))
    (tmp_path / "labeled.txt").write_bytes(end.join(["t00", "t01", ""]).encode(code))
    windows = "train\\images\\t05.jpg train\\masks\\t05.png"
    (tmp_path / "unlabeled.txt").write_bytes(end.join([windows, "", "t06"]).encode(code))
    split = load(root, str(tmp_path))
    assert split.classes == ["sky", "road", "car"]
    assert [i.id for i in split.labeled] == ["t00", "t01"]
    assert [i.id for i in split.unlabeled] == ["t05", "t06"]


TEXTS = [  # classes.txt, a line of labeled.txt, what is said
    ("sky\n\nroad\ncar\n", "t00", "f/classes.txt: line 2 is blank or repeats ''"),
    ("\nsky\nroad\ncar\n", "t00", "f/classes.txt: line 1 is blank or repeats ''"),
    ("sky\nroad\nsky\n", "t00", "f/classes.txt: line 3 is blank or repeats 'sky'"),
    (" \n", "t00", "f/classes.txt: an empty file"),
    ("sky", "C:\\data\\t00.jpg", "'C:/data/t00.jpg' leads out of"),
    ("sky", "..\\t00.jpg", "'../t00.jpg' leads out of"),
    ("sky", "t00\u200b", "'t00\\u200b' is not in folder"),  # looks like t00
]


@pytest.mark.parametrize(("classes", "line", "said"), TEXTS)
def test_texts_that_are_refused(tmp_path, classes, line, said):
    """Guards: shifted class names; messages that show what looks right."""
    root = make_folder(tmp_path / "f")
    (root / "classes.txt").write_text(classes)
    assert said in refusal(load, root, write_lists(tmp_path / "l", [line], ["t05"]))


@pytest.mark.parametrize(("world", "ranks", "local"), [(1, 1, 8), (2, 2, 2), (4, 2, 2)])
def test_shared_memory(tmp_path, monkeypatch, world, ranks, local):
    """Guards: workers that wait without end; a lone LOCAL_WORLD_SIZE. One byte less is refused."""
    split = load(make_folder(tmp_path))  # 48 x 40: sixteen images a val batch, 4 bytes a pixel
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm")
    args = batch_args(crop_size=321, batch_size=8, workers=6)
    need = (8 // world * 321**2 * 11 + 16 * 48 * 40 * 4 + 2**16) * 13 * ranks
    usage = types.SimpleNamespace(free=need)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data.check_shared_memory(args, world, local, split)
    usage.free -= 1
    line = refusal(data.check_shared_memory, args, world, local, split)
    assert line.startswith(f"/dev/shm has {need / 2**20:.1f} MB free, the workers' batches take")
    assert "--workers 0, or start the container by docker run --shm-size 1g" in line
    args.labeled_only = True  # x alone: 5 of 11 bytes
    usage.free = (8 // world * 321**2 * 5 + 16 * 48 * 40 * 4 + 2**16) * 13 * ranks
    data.check_shared_memory(args, world, local, split)
    monkeypatch.setattr(data, "_size", lambda _: (2048, 1024))  # one image is a val batch
    usage.free = (8 // world * 321**2 * 5 + 4 * 2**21 + 2**16) * 13 * ranks
    data.check_shared_memory(args, world, local, split)
    usage.free = 0
    data.check_shared_memory(batch_args(), 1, 1, split)  # no workers
    monkeypatch.setattr(os.path, "isdir", lambda path: False)  # not Linux
    data.check_shared_memory(args, world, local, split)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_fuzz_pictures(tmp_path):
    """Guards: a traceback, or a label that is no class, over the contents of pictures."""
    r, files, good = np.random.default_rng(0), [], 0
    modes, forms = "L P 1 RGB RGBA LA I;16 I F CMYK", "PNG TIFF JPEG GIF BMP WEBP PPM"
    for mode, form, n in itertools.product(modes.split(), forms.split(), (3, 9)):
        with contextlib.suppress(OSError, ValueError):  # not every mode goes with every format
            Image.fromarray(blobs(0, n)).convert(mode).save(tmp_path / "x", form)
            files.append((tmp_path / "x").read_bytes())
    for k in range(len(files) + FUZZ):  # as they are, then damaged
        content = np.frombuffer(files[k % len(files)], np.uint8).copy()
        if k >= len(files):
            content[r.integers(len(content), size=3)] = r.integers(256, size=3)
            content = content[: r.integers(1, 2 * len(content))]
        path = tmp_path / f"{k}.png"
        path.write_bytes(content.tobytes())
        item = Item("m", path, path)
        image = clean(data.read_image, item)
        assert image is None or (image.mode, image.size) == ("RGB", clean(data._size, item))
        mask = clean(data.read_mask, item, (48, 40), 3)
        if mask is not None:
            assert mask.size == (48, 40)
            assert set(np.unique(mask).tolist()) <= {0, 1, 2, 255}
            good += 1
    assert 1 < good < FUZZ


PUBLISHED = {  # list: labelled, unlabelled, the hash that a run's first line shows
    "pascal/92": (92, 10490, "70dc4c8b"),
    "pascal/183": (183, 10399, "4a794416"),
    "pascal/366": (366, 10216, "1f631eb7"),
    "pascal/732": (732, 9850, "4fde96d9"),
    "pascal/1464": (1464, 9118, "52420add"),
    "pascal/1_16": (662, 9920, "0e89cbe7"),
    "pascal/u2pl_1_16": (662, 9920, "2a3ef0fc"),
    "cityscapes/1_16": (186, 2789, "2da379b2"),
    "cityscapes/1_2": (1488, 1487, "4d44927d"),
}


@pytest.mark.parametrize("dataset", ["pascal", "cityscapes"])
def test_hashes_of_the_published_lists(dataset, monkeypatch):
    """The README's table: whoever runs on these lists sees these hashes."""
    lists, root = datasets.shared("data/published_splits") / dataset, Path("/data")
    whole = lists / ("1464" if dataset == "pascal" else "1_2")
    names = {"val": lists / "val.txt", "own": whole / "labeled.txt", "aug": whole / "unlabeled.txt"}
    items = {part: [] for part in names}
    for part, path in names.items():
        folder = "SegmentationClassAug" if part == "aug" else "SegmentationClass"
        for image in (line.split()[0] for line in path.read_text().splitlines()):
            mask = image.replace("JPEGImages", folder).replace(".jpg", ".png")
            mask = mask.replace("leftImg8bit/", "gtFine/")
            mask = mask.replace("leftImg8bit.png", "gtFine_labelTrainIds.png")
            id = Path(image).stem.removesuffix("_leftImg8bit")
            items[part].append(Item(id, root / image, root / mask))
    files = {p for part in items.values() for i in part for p in (i.image, i.mask)}
    monkeypatch.setattr(os.path, "isfile", lambda path: path in files)
    fine = {i.id for i in items["own"]} if dataset == "pascal" else set()
    train = items["own"] + items["aug"]
    source = data.Source(dataset, ["a"], root, train, items["val"], fine)
    for name, want in PUBLISHED.items():
        if name.startswith(dataset):
            split = data.make_split(source, str(lists.parent / name), 0, "classic")
            assert (len(split.labeled), len(split.unlabeled), split.hash) == want
            assert split.notes == []
