"""Measures training steps, loading and evaluation, of random weights and pictures made here.

python docs/reproduce/bench.py                     # each method's step beside its bare passes
python docs/reproduce/bench.py --ops               # how many operations a step launches
python docs/reproduce/bench.py --quick             # both, for two networks; 150 s on an H100
python docs/reproduce/bench.py --method mkd --backbone mobilenet_v2 --crop-size 161 --compile
python docs/reproduce/bench.py --hours             # what the presets take on this GPU
python docs/reproduce/bench.py --data              # loading
python docs/reproduce/bench.py --eval              # whole images and sliding windows

Every step is one of a script's own main(); the benchmark stands in for the batches. What is
compared runs in turns (A B A B) in one process; medians over rounds are printed.

- limit: what a method asks of its networks: forwards without gradient in the step's mode, forwards
  with gradient, and their backwards from a given one. Views, losses and optimizer are the rest.
- strong views: their share of a step. images: labelled and unlabelled. peak:
  max_memory_allocated of a step. host syncs: times that a step makes the host wait for the GPU.
- operations (--ops): aten's that no other aten operation called, as torch.profiler sees them, but
  those that only make views or empty memory. The networks' are those in their forwards (SegKC's
  projections, too) and those of the autograd nodes that these made. The others go by time: batch
  (the device's part of data.train_batches), views (before the first forward, in MKD with the EMA
  of the teachers), targets (before the last forward), losses (up to the backward), backward,
  optimizer (and what is kept for the log).
"""

import argparse
import collections
import contextlib
import functools
import gc
import io
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # the scripts lie there
import common  # noqa: E402
import data  # noqa: E402
import mkd  # noqa: E402
import segkc  # noqa: E402
import speed  # noqa: E402

METHODS = {"speed": speed, "mkd": mkd, "segkc": segkc}
UNLABELED = {"pascal": 10582 - 92, "cityscapes": 2975 - 186}  # --split 1/16
CUDA = torch.cuda.is_available()
wait = torch.cuda.synchronize if CUDA else lambda: None
WARM, REPEAT = (3, 3) if CUDA else (1, 1)  # rounds that do not count; calls in a round
LARGE = dict(backbone="resnet101", junior="resnet50", crop_size=321, batch_size=8)
SMALL = dict(backbone="mobilenet_v2", junior="mobilenet_v2", crop_size=161, batch_size=8)
SIZE = LARGE if CUDA else dict(backbone="resnet50", crop_size=161, batch_size=4)  # unset flags
TERMINAL = sys.stdout  # the scripts' own is put aside
# glibc: give nothing back, else what runs in turns pays for the memory that the other one freed
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a = p.add_argument
    for what in ("--ops", "--quick", "--hours", "--data", "--eval"):
        a(what, action="store_true", help="see the top of the file")
    a("--method", choices=(*METHODS, "all"), default="all")
    a("--backbone", help="unset: resnet50, on CUDA resnet101; of SegKC the senior's")
    a("--junior", help="of SegKC; unset: resnet50")
    a("--crop-size", type=int, help="unset: 161, on CUDA 321")
    a("--batch-size", type=int, help="labelled images, as many unlabelled; unset: 4, on CUDA 8")
    a("--decoder", help="as the scripts'")
    a("--amp", help="as the scripts'")
    a("--compile", action="store_true", help="also the step with --compile against that without")
    a("--steps", type=int, default=10 if CUDA else 5, help="rounds that a median is taken of")
    return p


def make_split(width: int, height: int, unlabeled: int = 16) -> data.Split:
    """A split of 16 pictures with masks: shapes, as noisy as photographs."""
    folder, items = Path(tempfile.mkdtemp()), []
    for k in range(16):
        image, mask = (Image.fromarray(a).resize((width, height), 0) for a in data.draw_shapes(k))
        noise = np.random.default_rng(k).normal(0, 8, (height, width, 1))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        items.append(data.Item(str(k), folder / f"{k}.jpg", folder / f"{k}.png"))
        image.save(items[k].image, quality=90)
        mask.save(items[k].mask)
    many = (items * (unlabeled // 16 + 1))[:unlabeled]
    return data.Split(items, many, items, data.VOC_CLASSES, "", "", [])


# ------------------------------------------------------------------------------ a script's steps


def flags(method: str, opts: argparse.Namespace, size: dict, dataset: str = "pascal") -> list[str]:
    """A script's command line: the preset of a data set, but for `size`, but for what was given."""
    words = [f"--dataset={dataset}"] + ["--compile"] * opts.compile
    for name in ("backbone", "junior", "decoder", "crop_size", "batch_size", "amp"):
        value = getattr(opts, name) or size.get(name)
        if value and (name != "junior" or method == "segkc"):
            name = "senior" if name == "backbone" and method == "segkc" else name
            words.append(f"--{name.replace('_', '-')}={value}")
    return words


class Done(Exception):
    """Leaves a script's main()."""


def run_script(method: str, words: list[str], body: Callable) -> None:
    """Runs a script's main() with `body` in the place of its batches.

    `body(args, state, fresh)` is a generator: for each batch that it yields, the script makes a
    step. `state` holds the networks as a checkpoint does; `fresh` yields batches on the device.
    """
    gc.collect()  # the networks of the run before
    if CUDA:
        torch.cuda.empty_cache()
    state = {}
    real = data.train_batches

    def load_split(args):  # VOC's proportions; some crops are padded
        return make_split(args.crop_size * 4 // 3, args.crop_size, UNLABELED[args.dataset])

    def resume(args, split, own):
        state.update(own)
        return 0

    def train_batches(split, args, *more):
        yield from body(args, state, real(split, args, *more))
        raise Done

    words = [*words, "--weights=none", "--workers=0", "--lr=1e-4", f"--out={tempfile.mkdtemp()}"]
    words += [f"--{what}-every={10**9}" for what in ("log", "eval", "save")]
    with (
        contextlib.suppress(Done),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.multiple(data, load_split=load_split, train_batches=train_batches),
        mock.patch.multiple(common, resume=resume, catch_signals=lambda: None),
    ):
        METHODS[method].main(words)


def in_turns(result: dict, calls: dict, batch: dict, rounds: int) -> Iterator[dict]:
    """Median ms of each call, and of its ratio to the first; yields the batch for a call None."""
    spent = {name: [] for name in calls}
    for k, (name, call) in itertools.product(range(WARM + rounds), calls.items()):
        stance = contextlib.nullcontext()
        if "compiled" in calls and name != "compiled":
            stance = torch.compiler.set_stance("force_eager")
        with stance:
            wait()
            begin = time.perf_counter()
            for _ in range(REPEAT):
                if call is None:
                    yield batch
                else:
                    call()
            wait()
        if k >= WARM:
            spent[name].append((time.perf_counter() - begin) / REPEAT * 1e3)
    first = next(iter(calls))
    for name, times in spent.items():
        pairs = zip(times, spent[first], strict=True)
        result[name] = statistics.median(times)
        result[f"{name} ÷ {first}"] = statistics.median(a / b for a, b in pairs)


def autocast_of(args: argparse.Namespace) -> functools.partial:
    kind, dtype = "cuda" if CUDA else "cpu", torch.float16 if args.amp == "fp16" else torch.bfloat16
    return functools.partial(torch.autocast, kind, dtype, enabled=args.amp != "off")


def make_limit(method: str, args: argparse.Namespace, state: dict, batch: dict) -> Callable:
    """What a step asks of its networks, see the top."""
    x = {n: torch.cat([batch["x"]] * n) for n in (1, 2, 3)}  # n B images
    autocast = autocast_of(args)

    def limit() -> None:
        out = []
        with torch.no_grad(), autocast():
            if method == "speed":
                state["net"].eval()(x[3])
            elif method == "mkd":
                state["teacher1"].parts(x[2])
                state["teacher2"].parts(x[2])
            else:
                state["pair"].eval()
                state["pair"].senior(x[1])
                state["pair"].junior(x[1])
        with autocast():  # another one: it keeps cast weights, those of above without gradient
            if method == "speed":
                out += [state["net"].train()(x[2])]
            elif method == "mkd":
                out += [state["student1"].parts(x[2])[0], state["student2"].parts(x[2])[0]]
            else:
                for z, _, g in state["pair"].train()(x[2]):
                    out += [z, g]
        for net in (v for v in state.values() if isinstance(v, torch.nn.Module)):
            net.zero_grad(set_to_none=True)
        torch.autograd.backward(out, [torch.full_like(t, 1e-6) for t in out])

    return limit


@contextlib.contextmanager
def host_syncs(sites: collections.Counter) -> Iterator[None]:
    """Counts how often each line makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "called a synchronizing" in str(w.message)]
    sites.update(f"{Path(w.filename).name}:{w.lineno}" for w in waits)


def measure(method: str, words: list[str], rounds: int, what: str) -> dict:
    """A script's args, what in_turns found of its step; on CUDA "peak" in MB and "syncs".

    `what`: "time" also times limit and strong views, "ops" counts operations.
    """
    result = {"peak": "n/a", "syncs": collections.Counter()}

    def body(args, state, fresh):
        result["args"] = args
        batch = next(fresh)
        calls = {"step": None}
        if args.compile:
            calls["compiled"] = None
        if "time" in what:
            strong = batch["strong"] if method == "speed" else batch["strong"][:1]
            views = functools.partial(data.strong_views, batch["u"], strong, batch["order"])
            calls |= {"limit": make_limit(method, args, state, batch), "views": views}
        yield from in_turns(result, calls, batch, rounds)
        calls.clear()  # the limit has pictures
        if CUDA:
            with host_syncs(result["syncs"]):
                yield batch
            torch.cuda.reset_peak_memory_stats()
            yield batch
            result["peak"] = torch.cuda.max_memory_allocated() // 2**20
        if "ops" in what:
            with contextlib.ExitStack() as stack:
                for owner, name, label in RANGES:
                    call = inside(label, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, call))
                seen = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
                with record_function("batch"):
                    batch = next(fresh)
                yield batch
            result["ops"] = count_operations(seen.events())

    run_script(method, words, body)
    return result


# ------------------------------------------------------------------------------------ operations

RANGES = (
    (common.Segmenter, "forward", "networks"),
    (common.Segmenter, "parts", "networks"),
    (segkc.Pair, "forward", "networks"),
    (data.TrainBatches, "__getitem__", "loader"),
)


def inside(label: str, call: Callable) -> Callable:
    """The call within a range of the profiler."""

    def ranged(*args: object, **more: object) -> object:
        with record_function(label):
            return call(*args, **more)

    return ranged


@functools.cache
def only_view(name: str) -> bool:
    """Whether an aten operation itself returns its input's memory, as view, reshape, to."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    schemas = [getattr(packet, o)._schema for o in packet.overloads()] if packet else []
    aliases = [r.alias_info for schema in schemas for r in schema.returns if r.alias_info]
    return any(not alias.is_write for alias in aliases)


def launches(event: object) -> bool:
    """Whether an aten operation, or one that it calls, computes or copies."""
    if "empty" in event.name or "pin" in event.name:  # with workers another thread pins
        return False
    if event.name.startswith("aten::") and not only_view(event.name):
        return True
    return any(launches(child) for child in event.cpu_children)


def count_operations(events: list) -> dict[str, int]:
    """Operations by part, see the top."""
    events = sorted(events, key=lambda e: e.time_range.start)
    node = "autograd::engine::evaluate_function"
    forwards = [e.time_range.start for e in events if e.name == "networks"]
    backward = [e.time_range for e in events if e.name.startswith(node)]
    ends = {"views": forwards[0], "targets": forwards[-1], "losses": backward[0].start}
    ends |= {"backward": max(r.end for r in backward), "optimizer": float("inf")}
    counts = dict.fromkeys(["batch", *ends, "networks", "loader"], 0)
    by_networks = {-1: True}  # of an autograd node's number; -1: a parameter's gradient is added to
    for e in (e for e in events if e.name.startswith("aten::")):
        above = [e]
        while above[-1].cpu_parent:
            above.append(above[-1].cpu_parent)
        labels = {a.name for a in above[1:]}
        if e.sequence_nr >= 0:  # the last of the operations with a number made its node
            by_networks[e.sequence_nr] = "networks" in labels
        if any(label.startswith("aten::") for label in labels) or not launches(e):
            continue
        part = next(part for part, end in ends.items() if e.time_range.start < end)
        if above[-1].name.startswith(node):
            part = "networks" if by_networks[above[-1].sequence_nr] else "backward"
        part = next((p for p in ("loader", "batch", "networks") if p in labels), part)
        counts[part] += 1
    del counts["loader"]
    return counts


# ---------------------------------------------------------------------------------------- tables


def bench_steps(opts: argparse.Namespace, what: str) -> None:
    sites = collections.Counter()
    for size, method in itertools.product([LARGE, SMALL] if opts.quick else [SIZE], METHODS):
        if opts.method not in (method, "all"):
            continue
        r = measure(method, flags(method, opts, size), opts.steps, what)
        cells = {"method": method} | about(r)
        if "time" in what:
            cells["step ms"] = f"{r['step']:.1f}"
            cells["limit ms"] = f"{r['limit']:.1f}"
            cells["limit ÷ step"] = f"{r['limit ÷ step']:.3f}"
            cells["strong views"] = f"{r['views ÷ step']:.1%}"
            cells["images/s"] = f"{2e3 * r['args'].batch_size / r['step']:.2f}"
            cells |= {"peak MB": r["peak"], "host syncs": r["syncs"].total()}
            if opts.compile:
                cells["compiled ÷ eager"] = f"{r['compiled ÷ step']:.3f}"
        if "ops" in what:
            inner = r["ops"].pop("networks")
            cells |= r["ops"] | {"sum": sum(r["ops"].values()), "networks' own": inner}
        sites.update(r["syncs"])
        row(cells)
    for site, n in sites.items():
        print(f"host sync: {site}, {n}")


def bench_hours(opts: argparse.Namespace) -> None:
    headline = ["--senior=dinov2_vitb14", "--junior=dinov2_vits14", "--decoder=dpt"]
    runs = [(method, name, []) for name in UNLABELED for method in METHODS]
    for method, name, more in [*runs, ("segkc", "pascal", headline)]:
        if opts.method not in (method, "all"):
            continue
        cells = {"data set": name, "method": method}
        try:
            r = measure(method, [*flags(method, opts, {}, name), *more], opts.steps, "")
            iters = r["args"].iters
            cells |= about(r) | {"steps": iters, "step ms": f"{r['step']:.1f}"}
            cells |= {"hours": f"{iters * r['step'] / 3.6e6:.1f}", "peak MB": r["peak"]}
        except torch.OutOfMemoryError:
            cells["networks"] = f"out of memory {' '.join(more)}"
        row(cells)
    print("\n--split 1/16, this device alone, without loading and evaluations")


def bench_data(opts: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    for name, size, crop in (("VOC", (500, 375), 321), ("Cityscapes", (2048, 1024), 801)):
        split, calls, r = make_split(*size), {}, {}
        kb = sum(item.image.stat().st_size for item in split.labeled) / 16e3
        args = argparse.Namespace(seed=0, batch_size=8, iters=10**6, scale=(0.5, 2.0))
        args.crop_size, args.workers = opts.crop_size or crop, cores
        for what in ("x", "both"):
            args.labeled_only = what == "x"
            batches = data.TrainBatches(split, argparse.Namespace(**vars(args)))
            calls[what] = map(batches.__getitem__, itertools.count()).__next__
        list(in_turns(r, calls, {}, opts.steps))
        x, u = r["x"] / 8, (r["both"] - r["x"]) / 8
        batches = data.train_batches(split, args, 0, 1, 0, common.pick_device(0))
        list(itertools.islice(batches, 3 * cores))  # what was loaded while others started
        begin = time.perf_counter()
        list(itertools.islice(batches, 6 * cores))
        wait()
        rate = 6 * cores * 16 / (time.perf_counter() - begin)
        cells = {"pictures": f"{name}, JPEG, {kb:.0f} KB", "crop": args.crop_size}
        cells |= {"labelled ms": f"{x:.2f}", "unlabelled ms": f"{u:.2f}"}
        row(cells | {"unlabelled/s": f"{1e3 / u:.0f}", f"images/s, {cores} workers": f"{rate:.0f}"})


def bench_eval(opts: argparse.Namespace) -> None:
    split = make_split(500, 375)
    split.val = split.val * (16 if CUDA else 1)

    def body(args, state, fresh):
        net, device, r = state["net"], next(state["net"].parameters()).device, {}
        args.workers = 4 if CUDA else 0
        loop = functools.partial(common.evaluate, {"net": net}, split, args, device)

        @torch.no_grad()
        def bare():
            net.eval()
            for image in images:
                with autocast_of(args)():
                    net(image)

        for args.eval_mode in ("whole", "slide"):
            images = []
            hook = net.register_forward_pre_hook(lambda _, x, seen=images: seen.append(*x))
            loop()
            hook.remove()
            yield from in_turns(r, {"loop": loop, "bare": bare}, {}, opts.steps)
            rates = {k: f"{len(split.val) * 1e3 / r[k]:.2f}" for k in ("loop", "bare")}
            cells = {"evaluation": args.eval_mode, "images/s": rates["loop"]}
            cells |= {"bare forwards, images/s": rates["bare"]}
            row(cells | {"bare ÷ loop": f"{r['bare ÷ loop']:.3f}"})

    run_script("speed", flags("speed", opts, SIZE), body)


def about(result: dict) -> dict[str, object]:
    args = result["args"]
    nets = ", ".join(v for v in (vars(args).get("senior"), args.backbone) if v)
    images = f"{args.batch_size} + {args.batch_size}"
    return {"networks": nets, "crop": args.crop_size, "images": images, "amp": args.amp}


def row(cells: dict[str, object], heading: list = []) -> None:  # noqa: B006 - kept over calls
    """A row of a Markdown table; the first one brings its heading."""
    lines = [cells.values()]
    if not heading:
        heading += cells
        lines = [cells, ["---"] * len(cells), cells.values()]
    for line in lines:
        print("|", " | ".join(map(str, line)), "|", flush=True, file=TERMINAL)


def machine() -> str:
    name = torch.cuda.get_device_name() if CUDA else platform.machine()
    if not CUDA and os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((v.split(": ")[1] for v in lines if v.startswith("model name")), name)
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    said = f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch"
    return f"{said} {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, commit {commit}"


def main() -> None:
    opts = make_parser().parse_args()
    if not CUDA and KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    print(f"{machine()}; medians of {opts.steps}\n", flush=True)
    modes = {"hours": bench_hours, "data": bench_data, "eval": bench_eval}
    what = "time ops" if opts.quick else "ops" if opts.ops else "time"
    run = functools.partial(bench_steps, what=what)
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        next((call for name, call in modes.items() if getattr(opts, name)), run)(opts)


if __name__ == "__main__":
    common.launch(main)
