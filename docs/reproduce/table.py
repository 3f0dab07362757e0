"""Prints the table of finished runs, from their folders or from what run_table.py kept of them.

python docs/reproduce/table.py docs/results/shapes.jsonl              # a Markdown table
python docs/reproduce/table.py docs/results/shapes.jsonl --classes    # and the IoU of each class
python docs/reproduce/table.py runs/shapes/* --curves curves.png      # and mIoU over steps
python docs/reproduce/table.py runs/shapes/*-s0 --grid grid.png       # and what the runs predict

Runs whose names differ by the seed alone (they end in -s0, -s1, ...) make a row. A row has the
mean and the standard deviation of the mIoU at the last step, and the mean of the best mIoU. The
difference to labelled-only is taken seed by seed: of row `speed-16` to row `labeled-16`, or else to
row `labeled`. --against cutmix compares with that row instead.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]  # the scripts lie here
# in args.json: paths of one machine, and what run_table.py keeps itself
NOT_KEPT = ("out", "root", "weights", "senior_weights", "test_only", "predict", "save_predictions")
NOT_KEPT += ("command", "torch")


class TableError(Exception):
    """The message is one line: what is wrong, and what to do."""


# ------------------------------------------------------------------------------------- results


def read_run(folder: Path) -> dict | None:
    """The record of a finished run: flags, {step: mIoU}, {class: IoU at the last step}.

    None if there is no evaluation at the last step.
    """
    try:
        args = json.loads((folder / "args.json").read_text())
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        last = args["iters"]
    except (OSError, ValueError, KeyError):  # not begun, or killed while it wrote
        return None
    evaluations = {line["step"]: line for line in lines if line["kind"] == "eval"}
    if last not in evaluations:
        return None
    args = {name: value for name, value in args.items() if name not in NOT_KEPT}
    miou = {str(step): line["miou"] for step, line in evaluations.items()}  # JSON's keys are text
    return {"run": folder.name, "args": args, "miou": miou, "iou": evaluations[last]["iou"]}


def load(path: Path) -> dict[str, dict]:
    """{run: its record} of a .jsonl file; empty if there is no file."""
    if not path.exists():
        return {}
    records = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["run"]] = record
        except (ValueError, KeyError, TypeError):
            raise TableError(f"{path}:{number}: no record of a run; remove this line") from None
    return records


def save(record: dict, path: Path) -> None:
    """Adds a record to a .jsonl file. It is on the disk when this returns."""
    records = load(path) | {record["run"]: record}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w") as file:
        for each in records.values():
            file.write(json.dumps(each) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


# -------------------------------------------------------------------------------------- tables


def row_of(run: str) -> str:
    """The row of a run: its name without the seed."""
    return re.sub(r"-s\d+$", "", run)


def last_miou(record: dict) -> float:
    """mIoU at the last step."""
    return record["miou"][max(record["miou"], key=int)]


def group(records: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """{row: {seed: record}}; the seed is the end of the run's name, "" if it has none."""
    rows = {}
    for run, record in records.items():
        row = row_of(run)
        rows.setdefault(row, {})[run[len(row) :]] = record
    return rows


def baseline_of(row: str, rows: dict, against: str) -> str | None:
    """The row that `row` is compared with: `against` with the longest end that they share.

    With `labeled`, cutmix-long-16 has labeled-long-16, else labeled-16, else labeled.
    """
    parts = row.split("-")
    for start in range(1, len(parts) + 1):
        name = "-".join([against, *parts[start:]])
        if name in rows:
            return None if name == row else name
    return None


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; of one value, itself."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def difference(row: str, rows: dict[str, dict[str, dict]], against: str) -> str:
    """Mean difference to the row's baseline, and in brackets that of each seed both have."""
    base = baseline_of(row, rows, against)
    seeds = [seed for seed in sorted(rows[row]) if base and seed in rows[base]]
    if not seeds:
        return ""
    steps = [last_miou(rows[row][seed]) - last_miou(rows[base][seed]) for seed in seeds]
    return f"{statistics.mean(steps):+.1f} ({' '.join(f'{step:+.1f}' for step in steps)})"


def print_table(records: dict[str, dict], against: str = "labeled") -> None:
    """A line for each row."""
    rows = group(records)
    print(f"| run | steps | seeds | last mIoU | best mIoU | − `{against}` (by seed) | minutes |")
    print("|---|---|---|---|---|---|---|")
    for row, runs in rows.items():
        lasts = [last_miou(record) for record in runs.values()]
        bests = [max(record["miou"].values()) for record in runs.values()]
        steps = sorted({max(map(int, record["miou"])) for record in runs.values()})
        minutes = [record["minutes"] for record in runs.values() if "minutes" in record]
        cells = [f"`{row}`", ", ".join(map(str, steps)), str(len(runs)), spread(lasts)]
        cells += [f"{statistics.mean(bests):.1f}", difference(row, rows, against)]
        cells += [f"{statistics.mean(minutes):.1f}" if minutes else ""]
        print("| " + " | ".join(cells) + " |")


def print_classes(records: dict[str, dict]) -> None:
    """The IoU of each class at the last step, the mean of a row's runs."""
    rows = group({run: record for run, record in records.items() if "iou" in record})
    classes = list(
        dict.fromkeys(c for runs in rows.values() for r in runs.values() for c in r["iou"])
    )
    print("\n| run |", " | ".join(classes), "|\n|" + "---|" * (len(classes) + 1))
    for row, runs in rows.items():
        cells = []
        for name in classes:
            values = [record["iou"].get(name) for record in runs.values()]
            values = [value for value in values if value is not None]  # None: in no val image
            cells.append(f"{statistics.mean(values):.1f}" if values else "-")
        print(f"| `{row}` |", " | ".join(cells), "|")


# ------------------------------------------------------------------------------------ pictures


def pyplot():
    """matplotlib's pyplot, for files alone; TableError if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TableError("pictures need matplotlib: pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(records: dict[str, dict], path: Path) -> None:
    """mIoU over steps: thick the mean of a row at the steps all its runs have, thin each run."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row, runs in group(records).items():
        curves = [{int(s): v for s, v in record["miou"].items()} for record in runs.values()]
        steps = sorted(set.intersection(*map(set, curves)))
        mean = [statistics.mean(curve[step] for curve in curves) for step in steps]
        count = f"{len(curves)} seed" + "s" * (len(curves) > 1)
        (line,) = axes.plot(steps, mean, linewidth=2, label=f"{row}, {count}", marker=".")
        for curve in curves if len(curves) > 1 else ():
            color = line.get_color()
            axes.plot(curve.keys(), curve.values(), linewidth=0.7, alpha=0.4, color=color)
    axes.set_xlabel("step")
    axes.set_ylabel("mIoU, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\n{path}: mIoU over steps")


def draw_grid(folders: list[Path], path: Path, count: int) -> None:
    """The first val images, one a line: image, truth, the prediction of each run's best.pt."""
    plt = pyplot()
    sys.path.insert(0, str(REPO))
    import common
    import data

    args = json.loads((folders[0] / "args.json").read_text())
    source = data.load_source(args["dataset"], Path(args["root"]))
    items, colors = source.val[:count], data.palette()
    images = [data.read_image(item) for item in items]
    columns = {"image": images, "truth": []}
    for item, image in zip(items, images, strict=True):
        mask = data.read_mask(item, image.size, len(source.classes))
        columns["truth"].append(colors[mask])
    for folder in folders:
        net, _, settings = common.load_best(folder / "best.pt")
        predictions = [common.predict_image(net, image, settings) for image in images]
        columns[row_of(folder.name)] = [colors[prediction] for prediction in predictions]
    height = sum(image.height / image.width for image in images)
    size = (2 * len(columns), 2 * height + 0.3)
    ratios = [image.height / image.width for image in images]
    figure, axes = plt.subplots(
        len(items),
        len(columns),
        figsize=size,
        squeeze=False,
        height_ratios=ratios,
        layout="constrained",
    )
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize="small")
        for line, picture in enumerate(pictures):
            axes[line, column].imshow(picture, interpolation="nearest")
            axes[line, column].set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"\n{path}: {', '.join(columns)}")


# ------------------------------------------------------------------------------------ commands


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", type=Path, nargs="+", help="folders of runs, and .jsonl files")
    p.add_argument("--against", default="labeled", metavar="ROW", help="compare with this row")
    p.add_argument("--classes", action="store_true", help="print the IoU of each class, too")
    p.add_argument("--curves", type=Path, metavar="PNG", help="draw mIoU over steps")
    p.add_argument(
        "--grid", type=Path, metavar="PNG", help="draw predictions of the folders' best.pt"
    )
    p.add_argument("--images", type=int, default=4, help="val images in --grid (default: 4)")
    opts = p.parse_args()
    records, folders = {}, []
    for path in opts.runs:
        if path.suffix == ".jsonl":
            if not path.is_file():
                raise TableError(f"{path}: no such file; give a .jsonl of run_table.py")
            records |= load(path)
        elif path.is_dir():
            record = read_run(path)
            if record is None:
                print(f"{path}: no finished run, left out", file=sys.stderr)
                continue
            records[path.name] = record
            folders.append(path)
    if not records:
        raise TableError("no finished run among these; give folders of runs, or .jsonl files")
    if opts.grid and not folders:
        raise TableError("--grid needs folders of runs: a .jsonl file holds no network")
    print_table(records, opts.against)
    if opts.classes:
        print_classes(records)
    if opts.curves:
        draw_curves(records, opts.curves)
    if opts.grid:
        draw_grid(folders, opts.grid, opts.images)


if __name__ == "__main__":
    try:
        main()
    except TableError as e:
        sys.exit(f"error: {e}")
