"""How well runs predict the unlabelled training images, beside the val images.

Labels of those images, if there are any, are only compared with. This tells pseudo-labels that do
not get better from pseudo-labels that get better without helping on other scenes.

python tests/unlabeled.py 1/16 runs/*                       # a Markdown table, of latest.pt
python tests/unlabeled.py 1/16 runs/* --save results.jsonl  # also: what it shows, run by run
python tests/unlabeled.py 1/16 results.jsonl                # the table again
python tests/unlabeled.py 1/16 runs/* --against labeled     # also: how far above that row, by seed

The first word is the --split whose unlabelled images are meant, for all runs alike; those without a
mask are left out. Runs that differ by their seed alone make a row: mean and standard deviation of
mIoU and pixel accuracy, in percent.
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the repo's root
import torch

import common
import data
from networks import Segmenter, build_network, load_checkpoint

STATE = {"net": "", "student1": "", "pair": "junior."}  # where latest.pt has it: SPEED, MKD, SegKC
COLUMNS = ("unlabeled_miou", "unlabeled_accuracy", "val_miou", "val_accuracy")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Rows = dict[str, dict[str, dict]]  # {name: {seed: record}}


def last_network(run: Path) -> Segmenter:
    """The network for inference as latest.pt has it; best.pt tells how it is built."""
    saved = load_checkpoint(run / "latest.pt")
    state, prefix = next((saved[name], prefix) for name, prefix in STATE.items() if name in saved)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    net = build_network(**load_checkpoint(run / "best.pt")["config"])
    net.load_state_dict(state)
    return net.place(DEVICE)


def measure(run: Path, split: str) -> dict:
    """The record of a run: mIoU and pixel accuracy on either set of images."""
    flags = json.loads((run / "args.json").read_text())
    args, record = argparse.Namespace(**flags | {"workers": 0}), {"run": run.name, "split": split}
    source = data.load_source(args.dataset, Path(args.root))
    unlabeled = data.make_split(source, split, args.split_seed, args.protocol).unlabeled
    net = last_network(run)
    for name, items in (("unlabeled", [i for i in unlabeled if i.mask]), ("val", source.val)):
        images = dataclasses.replace(source, val=items)
        matrix = common.evaluate({"net": net}, images, args, DEVICE)["net"]
        right = 100 * matrix.diagonal().sum().item() / matrix.sum().item()
        record |= {f"{name}_images": len(items), f"{name}_accuracy": right}
        record[f"{name}_miou"] = common.iou_of(matrix)[0]
    return record


def heading(rows: Rows) -> str:
    """The first two lines of either table; all records are of the same images."""
    first = next(iter(next(iter(rows.values())).values()))
    left, right = (f"{first[f'{name}_images']} {name} images" for name in ("unlabeled", "val"))
    names = f"| run | seeds | {left}: mIoU | accuracy | {right}: mIoU | accuracy |"
    return f"{names}\n|{'---|' * 6}"


def table(rows: Rows) -> None:
    """Prints a row for each name."""
    print(heading(rows))
    for name, runs in rows.items():
        cells = []
        for column in COLUMNS:
            values = [r[column] for r in runs.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| `{name}` | {len(runs)} |", " | ".join(cells), "|")


def differences(rows: Rows, against: str) -> None:
    """Prints how far each row is above the row `against`: the mean over seeds of both, and each."""
    print(f"\nAbove `{against}`: mean (seed by seed)\n\n{heading(rows)}")
    for name, runs in rows.items():
        pairs = [(runs[seed], r) for seed, r in rows[against].items() if seed in runs]
        if name == against or not pairs:
            continue
        cells = []
        for column in COLUMNS:
            values = [mine[column] - other[column] for mine, other in pairs]
            each = " ".join(f"{v:+.1f}" for v in values)
            cells.append(f"{statistics.mean(values):+.1f} ({each})")
        print(f"| `{name}` | {len(pairs)} |", " | ".join(cells), "|")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("split", help="--split whose unlabelled images are meant")
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, files of --save")
    p.add_argument("--save", type=Path, metavar="FILE.jsonl", help="write what the table shows")
    p.add_argument("--against", metavar="RUN", help="a row; print how far the others are above it")
    args = p.parse_args()
    records = []
    for path in args.runs:
        if path.is_dir():
            records.append(measure(path, args.split))
        else:
            records += [json.loads(line) for line in path.read_text().splitlines()]
    if any(r["split"] != args.split for r in records):
        raise data.InputError(f"{args.runs}: some are of another split than {args.split}")
    if args.save:
        args.save.write_text("".join(json.dumps(r) + "\n" for r in records))
    rows: Rows = {}
    for r in records:
        name, seed = re.fullmatch(r"(.*?)(?:-s(\d+))?", r["run"]).groups()
        rows.setdefault(name, {})[seed or ""] = r
    table(rows)
    if args.against and args.against not in rows:
        raise data.InputError(f"--against {args.against}: is no row; give one of {', '.join(rows)}")
    if args.against:
        differences(rows, args.against)


if __name__ == "__main__":
    common.launch(main)
