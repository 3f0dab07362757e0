"""Prints the Markdown table of finished runs from their log.jsonl: python tests/table.py runs/*

Runs that differ by their seed alone (folders that end in -s0, -s1, ...) make a row: mean and
standard deviation of the last mIoU over seeds, and the mean of the best beside it.
"""

import json
import re
import statistics
import sys
from pathlib import Path


def read(run: Path) -> tuple[int, float, float] | None:
    """(steps, last mIoU, best mIoU) of a finished run, else None."""
    args = json.loads((run / "args.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    if not evals or evals[-1]["step"] != args["iters"]:
        return None
    return args["iters"], evals[-1]["miou"], max(e["miou"] for e in evals)


def main(folders: list[str]) -> None:
    rows: dict[str, list] = {}
    for run in sorted(Path(f) for f in folders if (Path(f) / "log.jsonl").is_file()):
        result = read(run)
        if result is None:
            print(f"{run}: not finished, left out", file=sys.stderr)
            continue
        rows.setdefault(re.sub(r"-s\d+$", "", run.name), []).append(result)
    print("| run | steps | seeds | last mIoU | best mIoU |\n|---|---|---|---|---|")
    for name, results in rows.items():
        steps, last, best = zip(*results, strict=True)
        spread = f" ± {statistics.stdev(last):.1f}" if len(last) > 1 else ""
        mean = f"{statistics.mean(last):.1f}{spread}"
        every = ", ".join(map(str, sorted(set(steps))))
        print(f"| `{name}` | {every} | {len(last)} | {mean} | {statistics.mean(best):.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
