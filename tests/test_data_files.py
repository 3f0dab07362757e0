"""Files as users have them: what a file says of itself, what is left out, text of other systems."""

import io
import os
import shutil
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import batch_args, blobs, make_folder, noise, png, save, shared, truncate, write_lists
from PIL import EpsImagePlugin, Image

import data
from data import InputError, Item

CPU = torch.device("cpu")
FUZZ = int(os.environ.get("FUZZ", "300"))  # inputs in all


def refusal(call, *args: object) -> str:
    """The one line that a call refuses its input with."""
    with pytest.raises(InputError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def clean(call) -> object:
    """What `call` returns, or None for an InputError of one line. Anything else fails the test."""
    try:
        return call()
    except InputError as e:
        lines = str(e).splitlines()
    assert len(lines) == 1
    return None


def checked(root: Path, monkeypatch, capsys, dataset: str = "folder") -> tuple[int, list[str]]:
    """Exit status and lines of `python data.py` on a data set."""
    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", dataset, "--root", str(root)])
    status = 0
    try:
        data.main()
    except SystemExit as e:
        status = e.code
    return status, capsys.readouterr().out.strip().splitlines()


def load(root: Path, split: str = "full", dataset: str = "folder") -> data.Split:
    args = dict(dataset=dataset, root=root, split=split, split_seed=0, protocol="classic")
    return data.load_split(types.SimpleNamespace(**args))


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
    stored = noise(1, (48, 40))
    path = save_turned(tmp_path / f"x.{suffix}", stored, orientation)
    want = UPRIGHT[orientation](stored).astype(int)
    item = Item("x", path, None)
    for picture in (data.read_image(item), data.open_picture(path)):
        assert picture.mode == "RGB"
        got = np.asarray(picture)
        assert got.shape == want.shape
        assert abs(got - want).mean() < (6 if suffix == "jpg" else 1e-9)
    assert data._size(item) == want.shape[1::-1]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_masks_are_upright_and_go_with_their_image(tmp_path, orientation):
    """Image and mask each by its own note: train and val batches hold what the eye sees."""
    root = make_folder(tmp_path, labeled=1, unlabeled=1, val=1)
    stored, label = noise(1, (48, 40)), blobs(1, 3)
    shown = UPRIGHT[orientation](label)
    for part, name in (("train", "t00"), ("val", "v00")):
        (root / f"{part}/images/{name}.jpg").unlink()
        save_turned(root / f"{part}/images/{name}.png", stored, orientation)
        save(root / f"{part}/masks/{name}.png", shown)
    split = load(root)
    batch = next(data.val_batches(data.ValBatches(split.val, 3, 8), 0, 1, 0, CPU))
    height, width = shown.shape
    assert [tuple(size) for size in batch["size"]] == [(height, width)]
    assert np.array_equal(batch["label"][0, :height, :width], shown)
    pixels = torch.from_numpy(UPRIGHT[orientation](stored).copy()).permute(2, 0, 1)[None] / 255
    assert torch.allclose(batch["image"][:, :, :height, :width], data.normalize(pixels), atol=1e-5)
    args = batch_args(crop_size=48, batch_size=1, scale=(1.0, 1.0), labeled_only=True)
    raw = data.TrainBatches(split, args)[0]
    top, left, bottom, right = raw["x_rect"][0].tolist()
    y = raw["y"][0, top:bottom, left:right].numpy()
    assert np.array_equal(y, shown) or np.array_equal(y[:, ::-1], shown)
    save_turned(root / "val/masks/v00.png", label, orientation)  # a mask with a note of its own
    mask = data.read_mask(split.val[0], data._size(split.val[0]), 3)
    assert np.array_equal(mask, shown)


def test_check_names_turned_pictures(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path)
    save_turned(root / "train/images/t05.jpg", noise(5), 3)
    status, lines = checked(root, monkeypatch, capsys)
    assert status == 0
    assert any("t05.jpg: turned upright, by its EXIF orientation 3" in line for line in lines)
    save_turned(root / "train/images/t01.jpg", noise(1), 6)  # its mask is as stored
    status, lines = checked(root, monkeypatch, capsys)
    assert status == 1
    assert any("t01.png: (48, 40) pixels, its upright image (40, 48)" in line for line in lines)


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
    "LA.png": png(4, 4, 16, 4, b"\xff\xff" * 8),
    "L.png": png(4, 4, 16, 0, b"\x0f\xff" * 4),
    "RGB.tif": tiff16(4, 4),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_a_channel(tmp_path, name):
    """Guards: values up to 4095 that Pillow cuts to their upper byte, so that all is black."""
    path = tmp_path / name
    path.write_bytes(DEEP[name])
    Image.open(path).load()  # Pillow says nothing
    item = Item("x", path, path)
    for reader in (data.read_image, data._size, lambda i: data.read_mask(i, (4, 4), 21)):
        assert f"{name}: no readable" in refusal(reader, item)
        assert "more than 8 bits a channel" in refusal(reader, item)


def transparent(mode: str, alpha: int) -> Image.Image:
    image = Image.new("RGBA", (8, 8), (90, 90, 90, 255))
    image.putpixel((3, 4), (90, 90, 90, alpha))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        if alpha < 255:
            image.info["transparency"] = 0
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels(tmp_path, mode):
    """Guards: hidden colours that no viewer shows."""
    path = tmp_path / "x.png"
    transparent(mode, 255).save(path)
    assert abs(np.asarray(data.open_picture(path)).astype(int) - 90).max() <= 8
    transparent(mode, 254).save(path)
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
    root = binary(make_folder(tmp_path))
    line = refusal(data.look_at_masks, load(root))
    assert f"{root}/train/masks: the labelled masks hold nothing but 0 and 255" in line
    assert "save a foreground as 1" in line
    status, lines = checked(root, monkeypatch, capsys)
    assert "in no mask: road, car; was such a class saved as 255?" in lines
    (root / "classes.txt").write_text("sky\n")  # one class: 255 is no class of its own
    data.look_at_masks(load(root))
    (root / "classes.txt").write_text("sky\nroad\n")
    data.look_at_masks(load(binary(root, 1)))


def test_labelled_masks_are_read_until_one_holds_a_class(tmp_path):
    root = make_folder(tmp_path)
    save(root / "train/masks/t00.png", np.zeros((40, 48), np.uint8))
    truncate(root / "train/masks/t02.png")
    data.look_at_masks(load(root))  # t01 holds class 1
    save(root / "train/masks/t01.png", np.zeros((40, 48), np.uint8))
    assert "t02.png: no readable mask" in refusal(data.look_at_masks, load(root))


BAD_VAL = {
    "v01.png: value 3": lambda root: save(root / "val/masks/v01.png", blobs(1, 3) + 1),
    "v01.png: (48, 39)": lambda root: save(root / "val/masks/v01.png", blobs(1, 3)[1:]),
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


def test_built_in_masks_are_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read_mask", lambda *_: pytest.fail("read"))
    data.look_at_masks(load(tmp_path, "1/16", "shapes"))


# ------------------------------------------------------------------- files that are not used


def test_what_is_left_out_is_named(tmp_path, monkeypatch, capsys):
    """Guards: half of the masks renamed, and trained on the other half without a word."""
    root = make_folder(tmp_path)
    assert load(root).notes == []
    (root / "train/masks/t02.png").rename(root / "train/masks/t02_mask.png")
    (root / "train/masks/t03.png").rename(root / "train/masks/t03.tif")
    for name in ("a", "b", "c", "d"):
        (root / f"train/images/{name}.heic").touch()
    (root / "train/images/._t00.jpg").touch()
    save(root / "val/images/more/v02.jpg", noise(2))
    save(root / "val/masks/v07.png", blobs(0, 3))
    split = load(root)
    assert len(split.labeled) == 2
    images, masks = f"no {' '.join(data.SUFFIXES)} file", "no .png file"
    why = f"{images}; {masks}; no image has its stem"
    assert split.notes == [f"{root}: 9 files left out ({why}); data.py lists them"]
    status, lines = checked(root, monkeypatch, capsys)
    assert status == 1
    for name in "t02_mask.png t03.tif a.heic b.heic c.heic d.heic more v07.png ._t00.jpg".split():
        assert sum(f"/{name}: not used: " in line for line in lines) == 1
    assert "8 faults" in lines[-1]  # a hidden file is none


def test_images_in_neither_list_are_named(tmp_path):
    root = make_folder(tmp_path / "f")
    split = load(root, write_lists(tmp_path / "l", ["t00", "t01"], ["t05"]))
    assert split.notes == [
        f"lists of {tmp_path}/l: 5 training images are in neither list and left out"
    ]


def test_no_mask_of_a_stem_says_what_is_left_out(tmp_path):
    root = make_folder(tmp_path)
    for mask in (root / "train/masks").iterdir():
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    said = "--split full: 0 labelled images; there are 0 masks (4 files are left out)"
    assert said in refusal(load, root)


def test_a_listed_mask_that_is_not_there(tmp_path):
    """Guards: other masks than the list names, without a word."""
    root = make_folder(tmp_path / "f")
    lists = write_lists(tmp_path / "l", ["train/images/t00.jpg train/other/t00.png"], ["t05"])
    assert "t00: labelled image; there is no" in refusal(load, root, lists)


# ------------------------------------------------------------------- text of other systems


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_text_files_in_each_coding(tmp_path, code, end):
    root = make_folder(tmp_path / "f")
    (root / "classes.txt").write_bytes(("sky\nroad\ncar" + end).encode(code))
    lists = tmp_path / "l"
    lists.mkdir()
    (lists / "labeled.txt").write_bytes(end.join(["t00", "t01", ""]).encode(code))
    windows = "train\\images\\t05.jpg train\\masks\\t05.png"
    (lists / "unlabeled.txt").write_bytes(end.join([windows, "", "t06"]).encode(code))
    split = load(root, str(lists))
    assert split.classes == ["sky", "road", "car"]
    assert [i.id for i in split.labeled] == ["t00", "t01"]
    assert [i.id for i in split.unlabeled] == ["t05", "t06"]


CLASSES = {
    "sky\n\nroad\ncar\n": "line 2 is blank or repeats ''",
    "\nsky\nroad\ncar\n": "line 1 is blank or repeats ''",
    "sky\nroad\nsky\n": "line 3 is blank or repeats 'sky'",
    " \n": "0 classes",
}


@pytest.mark.parametrize("text", CLASSES)
def test_class_names_that_would_shift(tmp_path, text):
    root = make_folder(tmp_path)
    (root / "classes.txt").write_text(text)
    assert f"{root}/classes.txt: {CLASSES[text]}" in refusal(load, root)


LINES = {
    "C:\\data\\t00.jpg": "'C:/data/t00.jpg' leads out of",
    "C:t00": "'C:t00' leads out of",
    "..\\t00.jpg": "'../t00.jpg' leads out of",
    "t00\u200b": "'t00\\u200b' is not in folder",  # looks like t00
}


@pytest.mark.parametrize("line", LINES)
def test_lines_say_what_differs(tmp_path, line):
    root = make_folder(tmp_path / "f")
    lists = write_lists(tmp_path / "l", [line], ["t05"])
    assert LINES[line] in refusal(load, root, lists)


# ------------------------------------------------------------------- shared memory


@pytest.mark.parametrize("ranks", [1, 2])
def test_shared_memory(tmp_path, monkeypatch, ranks):
    """Guards: workers that wait for memory without end. The need, and one byte less."""
    split = load(make_folder(tmp_path))  # 48 x 40: sixteen images a val batch, 4 bytes a pixel
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm")
    args = batch_args(crop_size=321, batch_size=8, workers=6)
    need = (8 // ranks * 321**2 * 7 + 16 * 48 * 40 * 4 + 2**16) * 13 * ranks
    for free in (need, need - 1):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if free == need:
            data.check_shared_memory(args, ranks, split)
            continue
        line = refusal(data.check_shared_memory, args, ranks, split)
        assert line.startswith(
            f"/dev/shm has {free / 2**20:.1f} MB free, the workers' batches take"
        )
        for word in ("--workers 0", "docker run --shm-size 1g"):
            assert word in line
    data.check_shared_memory(batch_args(crop_size=321, batch_size=8), ranks, split)  # no workers
    monkeypatch.setattr(os.path, "isdir", lambda path: False)  # not Linux
    data.check_shared_memory(args, ranks, split)


# ------------------------------------------------------------------- fuzz


def fuzz(check, strategies, share: float) -> None:
    """Calls `check` with that share of FUZZ examples of `strategies(hypothesis.strategies)`."""
    hypothesis = pytest.importorskip("hypothesis")
    settings = hypothesis.settings(
        max_examples=max(1, round(FUZZ * share)),
        deadline=None,
        database=None,
        derandomize="FUZZ" not in os.environ,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    given = hypothesis.given(strategies(hypothesis.strategies))
    settings(given(lambda drawn: check(drawn)))()


WORDS = ["t00", "t01", "t05", "t99", "v00", "train/images/t02.jpg", "train/masks/t02.png", "/"]
WORDS += ["train/images/t06.jpg", "val/images/v01.jpg", "..", "../x", "/etc/passwd", "./", "."]
WORDS += ["train/images/../images/t03.jpg", "a" * 300, "a/" * 2500, "\0", "~", "$HOME", "t00.jpg"]
WORDS += ["train\\images\\t00.jpg", "\ufeff", "\u2028", "C:x", "//", "train/images", "t00/"]


def test_fuzz_lists(tmp_path):
    """Guards: a traceback, or a wrong run, over list files."""
    root = make_folder(tmp_path / "root")
    source = data.load_source("folder", root)

    def strategies(st: object) -> object:
        word = st.sampled_from(WORDS) | st.text(max_size=8)
        line = st.lists(word, max_size=3).map(" ".join)
        text = st.lists(line, max_size=5).map("\n".join).map(lambda t: t.encode("utf-8", "replace"))
        return st.tuples(text | st.binary(max_size=60), text | st.just(b"t05\nt06\n"))

    def check(drawn: tuple[bytes, bytes]) -> None:
        for name, content in zip(("labeled", "unlabeled"), drawn, strict=True):
            (tmp_path / f"{name}.txt").write_bytes(content)
        split = clean(lambda: data.make_split(source, str(tmp_path), 0, "classic"))
        if split is None:
            return
        both = [i.image.resolve() for i in (*split.labeled, *split.unlabeled)]
        assert len(set(both)) == len(both) > 1
        assert all(p.is_relative_to(root.resolve()) and p.is_file() for p in both)
        assert not set(both) & {i.image.resolve() for i in source.val}
        assert all(i.mask.resolve().is_relative_to(root.resolve()) for i in split.labeled)

    fuzz(check, strategies, 0.25)


def test_fuzz_split(tmp_path):
    """Guards: a --split that is taken for another one."""
    source = data.load_source("folder", make_folder(tmp_path))

    def strategies(st: object) -> object:
        number = st.integers(-3, 12).map(str) | st.text("0123456789٣²e.+-_ /", max_size=12)
        words = st.text(st.characters(exclude_categories=("C", "Z")), max_size=300)
        return st.tuples(number, number).map("/".join) | number | words

    def check(text: str) -> None:
        split = clean(lambda: data.make_split(source, text, 0, "classic"))
        if split is not None:
            assert 1 <= len(split.labeled) <= 4
            assert len(split.labeled) + len(split.unlabeled) == 8
            if text != "full":
                n, of = (int(t) for t in (text.split("/") if "/" in text else (text, "4")))
                assert len(split.labeled) == -(-4 * n // of)

    fuzz(check, strategies, 0.2)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_fuzz_pictures(tmp_path):
    """Guards: a traceback, or a label that is no class, over the contents of pictures."""
    good, path = {}, tmp_path / "m.png"
    exif = Image.Exif()
    exif[274] = 6
    for form, picture, note in (("PNG", blobs(0, 3), None), ("JPEG", noise(0), exif)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, form, exif=note)
        good[form] = file.getvalue()
    modes = ("L", "P", "1", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK")
    formats = ("PNG", "TIFF", "JPEG", "GIF", "BMP", "WEBP", "PPM")

    def strategies(st: object) -> object:
        at = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)
        whole = st.sampled_from(tuple(good))
        damaged = st.tuples(st.just("damaged"), at, st.integers(1, 2**12), whole)
        picture = st.tuples(st.sampled_from(modes), st.sampled_from(formats), st.integers(0, 255))
        size = st.tuples(st.just("size"), st.integers(1, 60), st.integers(1, 60))
        return damaged | picture | size | st.tuples(st.just("bytes"), st.binary(max_size=90))

    def check(drawn: tuple) -> None:
        if drawn[0] == "damaged":
            content = bytearray(good[drawn[3]])
            for place, value in drawn[1]:
                content[place % len(content)] = value
            path.write_bytes(content[: drawn[2]])
        elif drawn[0] == "bytes":
            path.write_bytes(drawn[1])
        elif drawn[0] == "size":
            Image.new("L", drawn[1:], 1).save(path)
        else:
            try:
                Image.new("L", (48, 40), drawn[2]).convert(drawn[0]).save(path, drawn[1])
            except (OSError, ValueError):  # not every mode goes with every format
                return
        item = Item("m", path, path)
        data._size.cache_clear()
        image = clean(lambda: data.read_image(item))
        size = clean(lambda: data._size(item))
        assert image is None or (image.mode, image.size) == ("RGB", size)
        mask = clean(lambda: data.read_mask(item, (48, 40), 3))
        if mask is not None:
            assert mask.size == (48, 40)
            assert set(np.unique(mask).tolist()) <= {0, 1, 2, 255}

    fuzz(check, strategies, 0.35)


# ------------------------------------------------------------------- published lists

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


def listed(path: Path) -> list[str]:
    """The images of a published list."""
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def make_voc(root: Path, lists: Path) -> None:
    """A VOC tree of empty files, with all names that the published lists hold."""
    names = {part: [Path(i).stem for i in listed(lists / f"1464/{part}.txt")] for part in PARTS}
    val = [Path(i).stem for i in listed(lists / "val.txt")]
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    for id in {*names["labeled"], *names["unlabeled"], *val}:
        (root / f"JPEGImages/{id}.jpg").touch()
        folder = "SegmentationClassAug" if id in names["unlabeled"] else "SegmentationClass"
        (root / f"{folder}/{id}.png").touch()
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name, ids in (("train", names["labeled"]), ("val", val)):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(ids))


def make_city(root: Path, lists: Path) -> None:
    """A Cityscapes tree of empty files, as make_voc."""
    images = listed(lists / "val.txt")
    for part in PARTS:
        images += listed(lists / f"1_2/{part}.txt")
    for image in images:
        mask = image.replace("leftImg8bit.png", "gtFine_labelTrainIds.png")
        for path in (root / image, root / mask.replace("leftImg8bit/", "gtFine/")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


PARTS = ("labeled", "unlabeled")


@pytest.mark.parametrize("dataset", ["pascal", "cityscapes"])
def test_hashes_of_the_published_lists(dataset, tmp_path):
    """The README's table: whoever runs on these lists sees these hashes."""
    lists = shared("data/published_splits") / dataset
    {"pascal": make_voc, "cityscapes": make_city}[dataset](tmp_path, lists)
    source = data.load_source(dataset, tmp_path)
    for name, want in PUBLISHED.items():
        if name.startswith(dataset):
            split = data.make_split(source, str(lists.parent / name), 0, "classic")
            assert (len(split.labeled), len(split.unlabeled), split.hash) == want
            assert split.line.endswith(f"lists {split.hash}")
            assert split.notes == []
