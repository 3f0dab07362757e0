"""Makes VOC animals from PASCAL VOC 2012, in the layout of --dataset folder.

python data.py --dataset pascal --root data --download       # VOC and SBD
python docs/reproduce/voc_animals.py data/VOCdevkit/VOC2012 data/voc_animals 2

1600 training and 445 validation photographs that show a cat, cow, dog, horse or sheep: the ids in
voc_animals_train.txt and voc_animals_val.txt beside this file. Masks have six classes, where 0 is
anything else and 255 is VOC's void. The sides are divided by FACTOR. Masks are VOC's own
(SegmentationClass) where there is one, else SBD's (SegmentationClassAug). Research use only.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CLASSES = {"background": 0, "cat": 8, "cow": 10, "dog": 12, "horse": 13, "sheep": 17}  # ids in VOC
IDS = np.zeros(256, np.uint8)  # from VOC's ids to ours
IDS[list(CLASSES.values())] = range(len(CLASSES))
IDS[255] = 255


class Fault(Exception):
    """A file that cannot be used. The message is one line."""


def open_picture(path: Path) -> Image.Image:
    """A picture, read to its end."""
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, SyntaxError) as e:  # SyntaxError: a broken PNG
        reason = getattr(e, "strerror", None) or e
        raise Fault(f"{path}: cannot be read ({reason})") from None
    return picture


def convert(voc: Path, name: str, out: Path, factor: int) -> None:
    """Writes image and mask of one id."""
    image = open_picture(voc / f"JPEGImages/{name}.jpg").convert("RGB")
    mask_path = voc / f"SegmentationClass/{name}.png"
    if not mask_path.exists():
        mask_path = voc / f"SegmentationClassAug/{name}.png"
    mask = open_picture(mask_path)
    if mask.mode not in ("P", "L"):
        raise Fault(f"{mask_path}: its mode is {mask.mode}; give a mask of class ids (P or L)")
    if mask.size != image.size:
        raise Fault(f"{mask_path}: it is {mask.size}, its image is {image.size}")
    size = (round(image.width / factor), round(image.height / factor))
    mask = Image.fromarray(IDS[np.asarray(mask.resize(size, Image.Resampling.NEAREST))])
    image.resize(size, Image.Resampling.LANCZOS).save(out / f"images/{name}.jpg", quality=86)
    mask.save(out / f"masks/{name}.png")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("voc", type=Path, help="VOCdevkit/VOC2012")
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("factor", type=int, nargs="?", default=2, help="divides the sides (default: 2)")
    opts = p.parse_args()
    if opts.factor < 1:
        p.error(f"FACTOR {opts.factor}: give 1 or more")
    if not (opts.voc / "JPEGImages").is_dir():
        sys.exit(f"error: {opts.voc}: no JPEGImages here; give the folder VOCdevkit/VOC2012")
    faults = 0
    for part in ("train", "val"):
        out = opts.out / part
        (out / "images").mkdir(parents=True, exist_ok=True)
        (out / "masks").mkdir(parents=True, exist_ok=True)
        names = (HERE / f"voc_animals_{part}.txt").read_text().split()
        for name in tqdm(names, desc=part, disable=None):
            try:
                convert(opts.voc, name, out, opts.factor)
            except Fault as e:
                faults += 1
                print(f"error: {e}", file=sys.stderr)
    if faults:
        sys.exit(
            f"error: {faults} photographs are missing in {opts.out}; mend them and run it again"
        )
    (opts.out / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    print(f"{opts.out}: python data.py --dataset folder --root {opts.out} checks it")


if __name__ == "__main__":
    main()
