"""Measures training steps, loading and evaluation, of random weights and pictures made here.

python docs/reproduce/bench.py                     # each method's step beside its bare passes
python docs/reproduce/bench.py --ops               # how many operations a step launches
python docs/reproduce/bench.py --quick             # both, for two networks: 150 s on an H100
python docs/reproduce/bench.py --method mkd --backbone mobilenet_v2 --crop-size 161 --compile
python docs/reproduce/bench.py --hours             # what the presets take on this GPU
python docs/reproduce/bench.py --data --images DIR # loading, of JPEGs made here or of your own
python docs/reproduce/bench.py --eval              # whole images and sliding windows

Every step is one of a script's own main(): the benchmark stands in for the batches. What is
compared runs in turns (A B A B) in one process; medians are printed. A batch lies on the device.

- limit: what a method asks of its networks and no more: forwards without gradient in the step's
  mode, forwards with gradient, their backwards from a given one. 1 would be a step without losses,
  views and optimizer. Ratios are medians over rounds.
- strong views: their share of the step. Images: labelled and unlabelled. Peak: on CUDA
  max_memory_allocated of a step, on a CPU what the resident set of a process of its own grows by.
- operations (--ops): top-level aten operations as torch.profiler sees them: those that no other
  aten operation called. Left out are those that only make a view or empty memory. Networks' are
  those inside their forward (and SegKC's projections), and in the backward those of autograd nodes
  that these made. The others, by time: batch (the device's part of data.train_batches), views
  (before the first forward; in MKD with the EMA of the teachers), targets (between the first and
  the last), losses (after the last, up to the backward), backward, optimizer (and what is logged).
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
from torch import nn
from torch.profiler import record_function

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # the scripts lie there
import common  # noqa: E402
import data  # noqa: E402
import mkd  # noqa: E402
import segkc  # noqa: E402
import speed  # noqa: E402

METHODS = {"speed": speed, "mkd": mkd, "segkc": segkc}
UNLABELED = {"pascal": 10582 - 92, "cityscapes": 2975 - 186}  # at 1/16
STEP = 500  # of the batches
SIZES = (("resnet101", "resnet50", 321, 8), ("mobilenet_v2", "mobilenet_v2", 161, 8))
CUDA = torch.cuda.is_available()
WARM, REPEAT = (3, 3) if CUDA else (1, 1)  # rounds before those that count; calls in a round
# glibc: give nothing back, else what runs in turns pays for the memory that the other one freed
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": "0"}  # for the peak
OPS = ("batch", "views", "targets", "losses", "backward", "optimizer", "networks")


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--method", choices=(*METHODS, "all"), default="all")
    a("--backbone", help="unset: resnet50, on CUDA resnet101; SegKC's senior")
    a("--junior", help="of SegKC; unset: resnet50")
    a("--decoder", choices=("deeplab", "dpt"))
    a("--crop-size", type=int, help="unset: 161, on CUDA 321")
    a("--batch-size", type=int, help="labelled images, as many unlabelled; unset: 4, on CUDA 8")
    a("--steps", type=int, default=10 if CUDA else 5, help="rounds that a median is taken of")
    a("--amp", choices=("bf16", "fp16", "off"), help="unset: bf16 where the GPU has it, else off")
    a("--compile", action="store_true", help="also the step with --compile against that without")
    a("--images", type=Path, metavar="DIR", help="JPEGs for --data; unset: makes its own")
    for what in ("ops", "quick", "hours", "data", "eval"):
        a(f"--{what}", action="store_true", help="see above")
    return p


# ---------------------------------------------------------------------------- pictures and batches


def photo(key: int, width: int, height: int) -> Image.Image:
    """Noise of all scales over gradients: as JPEG of quality 90 about a photograph's size."""
    r = np.random.default_rng(key)
    total = 127.5 + r.normal(0, 8, (height, width, 1))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(r.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layer = coarse.resize((width, height), Image.Resampling.BICUBIC)
        total = total + (np.asarray(layer) - 127.5) / cells**0.6
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def make_split(size: tuple[int, int], unlabeled: int = 16, own: Path | None = None) -> data.Split:
    """A split of 16 pictures with masks, of `size` (width, height) or from the folder `own`."""
    folder = Path(tempfile.mkdtemp())
    found = sorted(p for p in own.rglob("*") if p.suffix in (".jpg", ".jpeg")) if own else []
    if own and not found:
        raise data.InputError(f"{own}: holds no .jpg; give another --images")
    items = []
    for k in range(16):
        image = found[k % len(found)] if found else folder / f"{k}.jpg"
        if not found:
            photo(k, *size).save(image, quality=90)
        mask = Image.fromarray(np.random.default_rng(k).integers(0, 19, (6, 8), dtype=np.uint8))
        mask = mask.resize(Image.open(image).size, Image.Resampling.NEAREST)
        mask.save(folder / f"{k}.png")
        items.append(data.Item(str(k), image, folder / f"{k}.png"))
    many = (items * (unlabeled // 16 + 1))[:unlabeled]
    return data.Split(items, many, items, data.VOC_CLASSES, "", "", [])


# ------------------------------------------------------------------------------ a script's run


def flags(method: str, opts: argparse.Namespace, dataset: str = "pascal") -> list[str]:
    """A script's command line: the preset of a data set, but for what `opts` says."""
    words = [f"--dataset={dataset}"]
    for name in ("backbone", "junior", "decoder", "crop_size", "batch_size", "amp"):
        value = getattr(opts, name)
        if value is None or name == "junior" and method != "segkc":
            continue
        flag = "senior" if name == "backbone" and method == "segkc" else name.replace("_", "-")
        words.append(f"--{flag}={value}")
    return words + ["--compile"] * opts.compile


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
    found = {}
    real = data.train_batches

    def load_split(args: argparse.Namespace) -> data.Split:
        # VOC's proportions; some crops are padded
        return make_split((args.crop_size * 4 // 3, args.crop_size), UNLABELED[args.dataset])

    def resume(args: argparse.Namespace, split: data.Split, state: dict) -> int:
        found.update(state)
        return 0

    def train_batches(
        split: data.Split,
        args: argparse.Namespace,
        rank: int,
        world: int,
        start: int,
        *more: object,
    ) -> Iterator[dict]:
        yield from body(args, found, real(split, args, rank, world, STEP, *more))
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


def measure(method: str, words: list[str], opts: argparse.Namespace, what: str) -> dict:
    """Figures of a script's steps. `what` is of "time", "peak" and "ops", one or several."""
    result = {"spent": collections.defaultdict(list)}

    def body(args: argparse.Namespace, state: dict, fresh: Iterator[dict]) -> Iterator[dict]:
        result.update(args=args)
        before = resident_peak()
        batch = next(fresh)
        views = 2 if method == "speed" else 1
        calls = {"step": None}
        if "time" in what:
            calls["limit"] = make_limit(method, args, state, batch["x"].device)
            calls["strong"] = functools.partial(
                data.strong_views, batch["u"], batch["strong"][:views], batch["order"]
            )
        if args.compile:
            calls["compiled"] = None
        yield from in_turns(result["spent"], calls, batch, opts.steps)
        calls.clear()  # the limit has pictures
        result["peak"] = resident_peak() - before
        if CUDA:
            with host_syncs() as result["syncs"]:
                yield batch
            torch.cuda.reset_peak_memory_stats()
            yield batch
            result["peak"] = torch.cuda.max_memory_allocated()
        if "ops" in what:
            with contextlib.ExitStack() as stack:
                for owner, name, label in RANGES:
                    call = inside(label, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, call))
                activities = [torch.profiler.ProfilerActivity.CPU]
                profile = stack.enter_context(torch.profiler.profile(activities=activities))
                with record_function("batch"):
                    batch = next(fresh)
                yield batch
            result["ops"] = count_operations(profile.events())

    run_script(method, words, body)
    return result


def in_turns(spent: dict, calls: dict, batch: dict, rounds: int) -> Iterator[dict]:
    """Adds the seconds of each call to spent[its name]; yields a batch where the call is None."""
    for k in range(WARM + rounds):
        for name, call in calls.items():
            stance = contextlib.nullcontext()
            if "compiled" in calls:
                eager = "default" if name == "compiled" else "force_eager"
                stance = torch.compiler.set_stance(eager)
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
                    spent[name].append((time.perf_counter() - begin) / REPEAT)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def autocast_of(args: argparse.Namespace, device: torch.device) -> functools.partial:
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    return functools.partial(torch.autocast, device.type, dtype, enabled=args.amp != "off")


def make_limit(
    method: str, args: argparse.Namespace, state: dict, device: torch.device
) -> Callable[[], None]:
    """What a step asks of its networks, on random pictures."""
    side = args.crop_size
    autocast = autocast_of(args, device)

    def images(n: int) -> torch.Tensor:
        shape = (n * args.batch_size, side, side, 3)  # channels last in memory, as a batch is
        return torch.rand(shape, device=device).permute(0, 3, 1, 2)

    both = images(2)
    if method == "speed":
        learning = blind = [state["net"]]
        weak = images(3)
    elif method == "mkd":
        learning = [state["student1"], state["student2"]]
        blind = [state["teacher1"].parts, state["teacher2"].parts]
        weak = images(2)
    else:
        learning = [state["pair"]]
        blind = [state["pair"].senior, state["pair"].junior]
        weak = images(1)

    def limit() -> None:
        for net in learning:
            net.train(method == "mkd")
        with torch.no_grad(), autocast():
            for net in blind:
                net(weak)
        out = []
        for net in learning:
            net.train()
            net.zero_grad(set_to_none=True)
            with autocast():
                if method == "speed":
                    out.append(net(both))
                elif method == "mkd":
                    out.append(net.parts(both)[0])
                else:
                    for z, _, g in net(both):
                        out += [z, g]
        torch.autograd.backward(out, [torch.full_like(t, 1e-6) for t in out])

    return limit


@contextlib.contextmanager
def host_syncs() -> Iterator[collections.Counter]:
    """Counts how often each line makes the host wait for the GPU."""
    sites = collections.Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield sites
        torch.cuda.set_sync_debug_mode("default")
    for w in seen:
        if "called a synchronizing" in str(w.message):
            sites[f"{Path(w.filename).name}:{w.lineno}"] += 1


def resident_peak() -> int:
    """Bytes; 0 where there is no /proc."""
    with contextlib.suppress(OSError):  # ru_maxrss would start from what the parent had
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def peak_on_cpu(method: str, words: list[str]) -> int:
    """Growth of the resident peak in a process whose allocator gives all back at once."""
    env = {k: v for k, v in os.environ.items() if k not in KEEP} | GIVE_BACK
    child = [sys.executable, __file__, "--peak", method, *words]
    return int(subprocess.check_output(child, env=env))


# ------------------------------------------------------------------------------------ operations

RANGES = (
    (common.Segmenter, "forward", "network"),
    (common.Segmenter, "parts", "network"),
    (segkc.Pair, "forward", "network"),
    (data.TrainBatches, "__getitem__", "loader"),
)


def inside(label: str, call: Callable) -> Callable:
    """The call within a range of the profiler."""

    @functools.wraps(call)
    def ranged(*args: object, **more: object) -> object:
        with record_function(label):
            return call(*args, **more)

    return ranged


@functools.cache
def only_views(name: str) -> bool:
    """Whether an aten operation returns its input's memory by itself, as view, reshape and to."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    for overload in packet.overloads() if packet else ():
        for returned in getattr(packet, overload)._schema.returns:
            if returned.alias_info is not None and not returned.alias_info.is_write:
                return True
    return False


def launches(event: object) -> bool:
    """Whether an aten operation, or one that it calls, computes or copies."""
    if "empty" in event.name or "pin" in event.name:  # a worker pins batches
        return False
    if event.name.startswith("aten::") and not only_views(event.name):
        return True
    return any(launches(child) for child in event.cpu_children)


def count_operations(events: list) -> collections.Counter:
    """Top-level aten operations by part, see the top."""
    events = sorted(events, key=lambda e: e.time_range.start)
    passes = [e.time_range.start for e in events if e.name == "network"]
    nodes = "autograd::engine::evaluate_function"
    backward = [e.time_range for e in events if e.name.startswith(nodes)]
    ends = dict(views=passes[0], targets=passes[-1], losses=backward[0].start)
    ends |= dict(backward=max(r.end for r in backward), optimizer=float("inf"))

    # of the operations with a sequence number, the last one made the autograd node of that number
    by_networks = {}
    counts = collections.Counter(dict.fromkeys(OPS, 0))
    for e in (e for e in events if e.name.startswith("aten::")):
        above = [e]
        while above[-1].cpu_parent:
            above.append(above[-1].cpu_parent)
        names = {a.name for a in above[1:]}
        by_networks[e.sequence_nr] = "network" in names
        if any(name.startswith("aten::") for name in names) or not launches(e):
            continue
        part = next(part for part, end in ends.items() if e.time_range.start < end)
        if above[-1].name.startswith(nodes):  # -1: adds to a parameter's gradient
            number = above[-1].sequence_nr
            part = "networks" if number < 0 or by_networks[number] else "backward"
        for label, name in (("network", "networks"), ("batch", "batch"), ("loader", "loader")):
            part = name if label in names else part
        counts[part] += 1
    return counts


# ---------------------------------------------------------------------------------------- tables


def bench_steps(opts: argparse.Namespace, what: str) -> None:
    columns = ["method", "networks", "crop", "images"]
    if "time" in what:
        columns += ["step ms", "limit ms", "limit ÷ step", "strong views", "images/s"]
        columns += ["peak MB", "host syncs"] + ["compiled ÷ eager"] * opts.compile
    if "ops" in what:
        columns += [*OPS[:-1], "sum", "networks' own"]
    heading(*columns)
    sites = collections.Counter()
    sizes = SIZES if opts.quick else SIZES[:1] if CUDA else [("resnet50", "resnet50", 161, 4)]
    methods = METHODS if opts.method == "all" else [opts.method]
    for size, method in itertools.product(sizes, methods):
        given = argparse.Namespace(**vars(opts))
        for name, value in zip(
            ("backbone", "junior", "crop_size", "batch_size"), size, strict=True
        ):
            setattr(given, name, getattr(opts, name) or value)
        words = flags(method, given)
        r = measure(method, words, opts, what)
        args = r["args"]
        cells = [method, networks(args), args.crop_size, f"{args.batch_size} + {args.batch_size}"]
        if "time" in what:
            step, limit = ms(r, "step"), ms(r, "limit")
            share = ratio(r, "strong", "step")
            cells += [f"{step:.1f}", f"{limit:.1f}", f"{ratio(r, 'limit', 'step'):.3f}"]
            cells += [f"{share:.1%}", f"{2e3 * args.batch_size / step:.2f}"]
            peak = r["peak"] if CUDA else peak_on_cpu(method, words)
            cells += [f"{peak / 2**20:.0f}", r["syncs"].total() if CUDA else "n/a"]
            sites.update(r.get("syncs", {}))
            if args.compile:
                cells.append(f"{ratio(r, 'compiled', 'step'):.3f}")
        if "ops" in what:
            outside = [r["ops"][part] for part in OPS[:-1]]
            cells += [*outside, sum(outside), r["ops"]["networks"]]
        row(*cells)
    for site, n in sites.items():
        print(f"host sync: {site}, {n}")


def bench_hours(opts: argparse.Namespace) -> None:
    """Presets as they are, but for the flags that are given."""
    runs = [(method, dataset, []) for dataset in UNLABELED for method in METHODS]
    pair = ["--senior=dinov2_vitb14", "--junior=dinov2_vits14", "--decoder=dpt"]
    heading(
        "data set", "method", "networks", "crop", "images", "steps", "step ms", "hours", "peak MB"
    )
    for method, dataset, more in [*runs, ("segkc", "pascal", pair)]:
        if opts.method not in (method, "all"):
            continue
        try:
            r = measure(method, [*flags(method, opts, dataset), *more], opts, "")
        except torch.OutOfMemoryError:
            row(dataset, method, " ".join(more), "out of memory", *[""] * 5)
            continue
        args = r["args"]
        size = (args.crop_size, f"{args.batch_size} + {args.batch_size}", args.iters)
        hours = args.iters * ms(r, "step") / 3.6e6
        peak = f"{r['peak'] / 2**20:.0f}" if CUDA else "n/a"
        row(dataset, method, networks(args), *size, f"{ms(r, 'step'):.1f}", f"{hours:.1f}", peak)
    print("\none GPU, split 1/16, without evaluations")


def bench_data(opts: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    device = common.pick_device(0)
    heading("pictures", "crop", "labelled ms", "unlabelled ms", "unlabelled/s, one core",
            f"images/s, {cores} workers")  # fmt: skip
    sets = [("VOC", (500, 375), 321), ("Cityscapes", (2048, 1024), 801)]
    for name, size, crop in [("own", None, 321)] if opts.images else sets:
        split = make_split(size, own=opts.images)
        kb = statistics.mean(item.image.stat().st_size for item in split.labeled) / 1e3
        args = argparse.Namespace(seed=0, batch_size=8, iters=10**6, scale=(0.5, 2.0))
        args.crop_size = opts.crop_size or crop
        args.workers = cores
        spent = collections.defaultdict(list)
        for k in range(1 + opts.steps):  # the first warms up
            for both in (False, True):
                begin = time.thread_time()
                data.TrainBatches(split, args, unlabeled=both)[k]
                spent[both].append((time.thread_time() - begin) * 1e3 / 8)
        x = statistics.median(spent[False][1:])
        u = statistics.median(b - a for a, b in list(zip(*spent.values(), strict=True))[1:])
        batches = data.train_batches(split, args, 0, 1, 0, device)
        for _ in range(3 * cores):  # what was loaded while the others started
            next(batches)
        begin = time.perf_counter()
        for _ in range(6 * cores):
            next(batches)
        wait()
        rate = 6 * cores * 16 / (time.perf_counter() - begin)
        del batches
        row(f"{name}, {kb:.0f} KB", args.crop_size, f"{x:.2f}", f"{u:.2f}", f"{1e3 / u:.1f}",
            f"{rate:.0f}")  # fmt: skip
    print("\nfiles cached; ms of a core for a picture, with its strong views' parameters")


def bench_eval(opts: argparse.Namespace) -> None:
    device = common.pick_device(0)
    split = make_split((500, 375))
    split.val = split.val * (16 if CUDA else 1)
    heading("evaluation", "images/s", "bare forwards, images/s", "loop ÷ bare forwards")
    for mode in ("whole", "slide"):
        words = [*flags("speed", opts), f"--eval-mode={mode}"]
        args = speed.parse_args(words + ["--backbone=resnet50"] * (not opts.backbone and not CUDA))
        common.settle(args, split, 1, device)
        args.workers = args.workers if CUDA else 0
        net = common.build_network(args.backbone, 21).place(device).eval()
        autocast = autocast_of(args, device)
        seen = []
        hook = net.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(*inputs))
        loop = functools.partial(common.evaluate, {"net": net}, split, args, device)
        loop()
        hook.remove()

        @torch.no_grad()
        def bare(net: nn.Module = net, seen: list = seen, autocast: Callable = autocast) -> None:
            with autocast():
                for image in seen:
                    net(image)

        r = {"spent": collections.defaultdict(list)}
        list(in_turns(r["spent"], {"loop": loop, "bare": bare}, {}, opts.steps))
        rates = [f"{len(split.val) * 1e3 / ms(r, name):.2f}" for name in ("loop", "bare")]
        row(mode, *rates, f"{ratio(r, 'loop', 'bare'):.3f}")


def ms(result: dict, name: str) -> float:
    return statistics.median(result["spent"][name]) * 1e3


def ratio(result: dict, name: str, other: str) -> float:
    """Median over rounds."""
    pairs = zip(result["spent"][name], result["spent"][other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def networks(args: argparse.Namespace) -> str:
    senior = vars(args).get("senior")
    return f"{senior}, {args.backbone}" if senior else args.backbone


def heading(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def machine() -> str:
    name = torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = [] if CUDA else Path("/proc/cpuinfo").read_text().splitlines()
        name = next((v.split(": ")[1] for v in lines if v.startswith("model name")), name)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if CUDA:
        versions += f", cuDNN {torch.backends.cudnn.version()}"
    git = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()
        versions += f", commit {commit}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}"


def main() -> None:
    if not CUDA and sys.argv[1:2] != ["--peak"] and KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        if sys.argv[1:2] == ["--peak"]:  # a child, see peak_on_cpu
            print(measure(sys.argv[2], sys.argv[3:], argparse.Namespace(steps=2), "peak")["peak"])
            return
        opts = make_parser().parse_args()
        print(f"{machine()}; medians of {opts.steps} rounds\n", flush=True)
        if opts.hours:
            bench_hours(opts)
        if opts.data:
            bench_data(opts)
        if opts.eval:
            bench_eval(opts)
        if opts.quick:
            bench_steps(opts, "time ops")
        elif not (opts.hours or opts.data or opts.eval):
            bench_steps(opts, "ops" if opts.ops else "time")


if __name__ == "__main__":
    common.launch(main)
