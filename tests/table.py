"""Summarises finished runs from their folders.

python tests/table.py runs/*                      # a Markdown table
python tests/table.py runs/* --curves curves.png  # also: mIoU over steps, the mean of the seeds
python tests/table.py runs/*-s0 --grid grid.png   # also: image, truth, and what each run predicts
python tests/table.py runs/* --save results.jsonl # also: their results, to be read again
python tests/table.py results.jsonl               # the table of saved results
python tests/table.py results.jsonl --classes     # a second table: the last IoU of each class
python tests/table.py runs/* --at 600             # as they were at step 600, finished or not

Runs that differ by their seed alone (folders that end in -s0, -s1, ...) make a row: mean and
standard deviation of the last mIoU over seeds, and the mean of the best beside it.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the repo's root
import common
import data
from networks import build_network

HERE_ONLY = ("out", "root", "weights", "senior_weights", "test_only", "save_predictions")  # paths
COLORS = ("#444444", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf")


def read(run: Path, at: int | None = None) -> dict | None:
    """The record of a finished run, else None: its flags, {step: mIoU}, {class: last IoU}.

    `at`: as if it had ended with the evaluation at that step; None if there was none.
    """
    args = json.loads((run / "args.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = at or args["iters"]
    lines = [line for line in lines if line["kind"] == "eval" and line["step"] <= last]
    if not lines or lines[-1]["step"] != last:
        return None
    args = {k: v for k, v in args.items() if k not in HERE_ONLY}
    miou = {str(line["step"]): line["miou"] for line in lines}  # as JSON has it: keys are text
    return {"run": run.name, "args": args, "miou": miou, "iou": lines[-1]["iou"]}


def load(path: Path) -> dict[str, dict]:
    """{run: its record} of a file that --save wrote; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["run"]: record for record in map(json.loads, lines)}


def save(records: dict[str, dict], path: Path) -> None:
    """Writes a line a run to `path`. Other runs' lines stay."""
    records = load(path) | records
    path.write_text("".join(json.dumps(record) + "\n" for record in records.values()))


def table(rows: dict[str, list[dict]]) -> None:
    """Prints a row for each name."""
    print("| run | steps | seeds | last mIoU | best mIoU |\n|---|---|---|---|---|")
    for name, runs in rows.items():
        last = [list(r.values())[-1] for r in runs]
        best = statistics.mean(max(r.values()) for r in runs)
        spread = f" ± {statistics.stdev(last):.1f}" if len(last) > 1 else ""
        steps = ", ".join(map(str, sorted({max(r) for r in runs})))
        mean = f"{statistics.mean(last):.1f}{spread}"
        print(f"| `{name}` | {steps} | {len(last)} | {mean} | {best:.1f} |")


def class_table(rows: dict[str, list[dict]]) -> None:
    """Prints the last mIoU and IoU of each class, the mean of a row's runs; - where none has it."""
    classes = list(next(iter(rows.values()))[0])
    print("\n| run |", " | ".join(classes), "|\n|" + "---|" * (len(classes) + 1))
    for name, runs in rows.items():
        columns = ([r[c] for r in runs if r.get(c) is not None] for c in classes)
        values = [f"{statistics.mean(column):.1f}" if column else "-" for column in columns]
        print(f"| `{name}` |", " | ".join(values), "|")


def curves(rows: dict[str, list[dict]], path: Path, width: int = 640, height: int = 360) -> None:
    """Draws mIoU over steps: the mean of a row's runs at the steps that all of them evaluated."""
    lines = {}
    for name, runs in rows.items():
        steps = sorted(set.intersection(*(set(r) for r in runs)))
        lines[name] = [(s, statistics.mean(r[s] for r in runs)) for s in steps]
    points = [p for line in lines.values() for p in line]
    right, top = max(s for s, _ in points), 10 * (int(max(v for _, v in points) / 10) + 1)
    picture = Image.new("RGB", (width, height + 16 * len(lines)), "white")
    draw = ImageDraw.Draw(picture)

    def at(step: float, miou: float) -> tuple[float, float]:
        return 30 + (width - 60) * step / right, height - 25 - (height - 40) * miou / top

    for miou in range(0, top + 1, 10):
        draw.line([at(0, miou), at(right, miou)], "#dddddd")
        draw.text((8, at(0, miou)[1] - 6), str(miou), "black")
    for step in range(0, right + 1, max(1, right // 4)):
        draw.text((at(step, 0)[0] - 8, height - 20), str(step), "black")
    for k, (name, line) in enumerate(lines.items()):
        color = COLORS[k % len(COLORS)]
        draw.line([at(*p) for p in line], color, 2)
        draw.rectangle((30, height + 16 * k + 4, 40, height + 16 * k + 9), color)
        draw.text((46, height + 16 * k), f"{name}, seeds: {len(rows[name])}", "black")
    picture.save(path)


@torch.no_grad()
def grid(runs: list[Path], path: Path, rows: int = 4) -> None:
    """Draws the first val images, an image a row: image, truth, the prediction of each best.pt."""
    args = json.loads((runs[0] / "args.json").read_text())
    source = data.load_source(args["dataset"], Path(args["root"]))
    opts = argparse.Namespace(eval_mode="whole", tta=False, crop_size=args["crop_size"])
    pictures = [[] for _ in range(rows)]
    for run in runs:
        saved = torch.load(run / "best.pt", weights_only=True)
        net = build_network(**saved["config"]).eval()
        net.load_state_dict(saved["net"])
        for item, row in zip(source.val[:rows], pictures, strict=True):
            one = data.ValBatches([item], len(source.classes), net.backbone.grid)
            batch = next(data.val_batches(one, 0, 1, 0, torch.device("cpu")))
            prediction = common.predict(net, batch["image"], opts).argmax(1)
            h, w = batch["size"][0]
            three = (batch["image"], batch["label"], prediction)
            picture = common.picture(*(m[0, ..., :h, :w] for m in three))
            row.append(picture[:, 2 * w :] if row else picture)
    picture = np.concatenate([np.concatenate(row, 1) for row in pictures])
    Image.fromarray(picture).save(path)
    print(f"{path}: image, truth, {', '.join(r.name for r in runs)}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "runs", type=Path, nargs="+", help="folders, and .jsonl of --save; others are passed over"
    )
    p.add_argument("--save", type=Path, metavar="JSONL", help="keep the folders' results here")
    p.add_argument("--curves", type=Path, metavar="PNG", help="draw mIoU over steps")
    p.add_argument("--grid", type=Path, metavar="PNG", help="draw predictions of the runs")
    p.add_argument("--classes", action="store_true", help="print the last IoU of each class, too")
    p.add_argument("--at", type=int, metavar="STEP", help="take this evaluation for the last one")
    opts = p.parse_args()
    if opts.at and opts.grid:
        p.error("--grid draws best.pt, of any step; leave out --at")
    records, done = {}, []
    for run in opts.runs:
        if run.suffix == ".jsonl":
            records |= load(run)
        elif (run / "log.jsonl").is_file():
            record = read(run, opts.at)
            if record is None:
                why = f"not evaluated at step {opts.at}" if opts.at else "not finished"
                print(f"{run}: {why}, left out", file=sys.stderr)
                continue
            done.append(run)
            records[run.name] = record
    rows, class_rows = {}, {}
    for name, record in records.items():
        row = re.sub(r"-s\d+$", "", name)
        result = {int(step): miou for step, miou in record["miou"].items()}
        if opts.at and opts.at != max(result):  # of a file: its classes are of the last step
            if opts.at not in result:
                print(f"{name}: not evaluated at step {opts.at}, left out", file=sys.stderr)
                continue
            result = {step: miou for step, miou in result.items() if step <= opts.at}
            record = {}
        rows.setdefault(row, []).append(result)
        if "iou" in record:
            class_rows.setdefault(row, []).append({"mIoU": result[max(result)]} | record["iou"])
    if not rows:
        sys.exit("error: no finished run among these; give other folders, or --at")
    table(rows)
    if opts.classes and class_rows:
        class_table(class_rows)
    if opts.save:
        save({run.name: records[run.name] for run in done}, opts.save)
    if opts.curves:
        curves(rows, opts.curves)
    if opts.grid:
        grid(done, opts.grid)


if __name__ == "__main__":
    main()
