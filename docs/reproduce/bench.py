"""Times training steps against their networks' bare passes, loading, and evaluation; prints tables.

    python tests/bench.py                       # all methods, each step beside its limit
    python tests/bench.py --method mkd --compile --backbone resnet101 --crop-size 321
    python tests/bench.py --fa                  # share of MKD's feature augmentation in its step,
                                                # on CPU at 2 + 2 images for want of memory
    python tests/bench.py --data --images DIR   # loading, of JPEGs made here or of your own
    python tests/bench.py --eval                # whole images and sliding windows

A command, not a test: it asserts nothing. What is compared runs in turns (A B A B) in one process,
and medians are printed. Batches lie on the device already; the optimiser is part of a step.
"""

import argparse
import collections
import contextlib
import copy
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the repo's root
import common
import data
import mkd
import segkc
import speed
from networks import build_network

MODULES = dict(speed=speed, mkd=mkd, segkc=segkc)
CLASSES, STEP, ITERS = 21, 500, 1000  # classes of VOC; the middle of a run
UNITS = dict(speed=" (≤ 3.3)", mkd=" (≤ 5.8)", segkc="")  # targets, see setup
CUDA = torch.cuda.is_available()
# glibc: give nothing back, else what runs in turns pays for the memory that the other one freed
KEEP = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a, flag = p.add_argument, "store_true"
    a("--method", choices=(*MODULES, "all"), default="all")
    a("--backbone", help="unset: resnet50, on CUDA and for --fa resnet101")
    a("--junior", default="resnet18", help="of SegKC, whose senior is --backbone")
    a("--crop-size", type=int, help="unset: 161, on CUDA and for --fa 321")
    a("--batch-size", type=int, help="labelled images, as many unlabelled; unset: 4, on CUDA 8")
    a("--steps", type=int, default=5, help="rounds that a median is taken of")
    a("--amp", choices=("bf16", "fp16", "off"), help="unset: bf16 where the GPU has it, else off")
    a("--compile", action=flag, help="also the step with --compile against the step without")
    a("--fa", action=flag, help="time MKD's feature augmentation instead")
    a("--data", action=flag, help="time loading and device augmentation instead")
    a("--eval", action=flag, help="time evaluation instead")
    a("--images", type=Path, metavar="DIR", help="JPEGs for --data; unset: makes its own")
    a("--peak", choices=(*MODULES, "supervised"), help=argparse.SUPPRESS)  # a child, see peak()
    return p


# ------------------------------------------------------------------------------------ measuring


def alternate(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call, run in turns; the first rounds warm up."""
    warm, repeat = (3, 3) if CUDA else (1, 1)
    spent = {name: [] for name in calls}
    for k in range(warm + rounds):
        for name, call in calls.items():
            wait()
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            wait()
            if k >= warm:
                spent[name].append((time.perf_counter() - begin) / repeat)
    return {name: statistics.median(s) for name, s in spent.items()}


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def host_syncs(step: Callable) -> collections.Counter | None:
    """How often each line of ours makes the host wait for the GPU; None on CPU."""
    if not CUDA:
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    seen = [w for w in seen if "called a synchronizing" in str(w.message)]
    return collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen)


def peak(name: str, opts: argparse.Namespace) -> int:
    """Peak bytes of a step, from a fresh process. CUDA: max_memory_allocated of the third step.

    CPU: growth of the resident peak since the imports, with an allocator that returns every freed
    block of 256 KB or more at once, so that it follows the live tensors.
    """
    flags = "backbone junior crop_size batch_size amp".split()
    words = [f"--{f.replace('_', '-')}={getattr(opts, f)}" for f in flags if getattr(opts, f)]
    env = {k: v for k, v in os.environ.items() if k not in KEEP}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": "0"}
    words = [sys.executable, __file__, f"--peak={name}", *words]
    return int(subprocess.check_output(words, env=env))


def peak_child(opts: argparse.Namespace) -> None:
    before = resident_peak()
    step = setup(opts.peak, opts).step
    for _ in range(3):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()  # the first steps try out cuDNN's algorithms
        step()
    print(torch.cuda.max_memory_allocated() if CUDA else resident_peak() - before)


def resident_peak() -> int:
    """Bytes. VmHWM, as ru_maxrss starts from what the parent had when it started this process."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(v.split()[1]) * 1024 for v in lines if v.startswith("VmHWM"))
    return common.peak_memory(torch.device("cpu"))


# ---------------------------------------------------------------------------------------- steps


def start(method: str, opts: argparse.Namespace, *more: str) -> common.Run:
    """The Run of a script with the flags of `opts`; reads and writes no file."""
    flags = "--dataset shapes --weights none --optimizer sgd --lr 1e-4 --ramp 0 --threshold 0.95"
    flags += f" --iters {ITERS} --crop-size {opts.crop_size} --batch-size {opts.batch_size}"
    pair = f" --senior {opts.backbone} --junior {opts.junior}"
    flags += pair if method == "segkc" else f" --backbone {opts.backbone}"
    flags += " --teacher-mode train --fa all" * (method == "mkd")  # the default but on shapes
    flags += f" --amp {opts.amp}" if opts.amp else ""
    with contextlib.redirect_stdout(io.StringIO()):
        return common.Run(MODULES[method].parse_args([*flags.split(), *more]))


def images(n: int, run: common.Run) -> Tensor:
    """[n, 3, H, W] in [0, 1], channels last as the loader's."""
    side = run.args.crop_size
    return torch.rand(n, side, side, 3, device=run.device).permute(0, 3, 1, 2)


def make_batch(run: common.Run) -> dict:
    """What data.train_batches yields, of random pixels: on the device, an eighth is padding."""
    b, side, r = run.args.batch_size, run.args.crop_size, data.rng(0, "bench")
    valid = torch.ones(b, side, side, dtype=torch.bool)
    valid[:, side - side // 8 :] = False
    y = torch.randint(CLASSES, (b, side, side)).where(valid, data.IGNORE)
    strong, box = (
        torch.tensor([[draw() for _ in range(b)] for _ in range(2)])
        for draw in (lambda: data.strong_params(r), lambda: data.cutmix_box(side, r))
    )
    batch = dict(y=y, x_valid=valid, u_valid=valid, strong=strong.float(), box=box)
    batch = {k: v.to(run.device) for k, v in batch.items()}
    return batch | dict(x=images(b, run), u=images(b, run), order=[2, 0, 3, 1])


def setup(name: str, opts: argparse.Namespace, *more: str) -> SimpleNamespace:
    """step(), limit() and unit() of a method; of "supervised", with as many images, step() alone.

    `limit` is what the method asks of its networks: forwards without gradient in the step's mode,
    forwards with gradient, and their backwards from a given one. `unit` is a forward and backward
    of B images of each of the n networks with gradient.
    """
    run = start("speed" if name == "supervised" else name, opts, *more)
    args, b = run.args, opts.batch_size
    names = dict(mkd=[args.backbone] * 2, segkc=[vars(args).get("senior"), args.backbone])
    names = names.get(name, [args.backbone])
    nets = [run.place(build_network(k, CLASSES, args.output_stride, args.decoder)) for k in names]
    batch, x1, x2, x3 = make_batch(run), *(images(n * b, run) for n in (1, 2, 3))

    # what a script's main() makes of its networks
    model, frozen, weak, outputs = nets[0], nets, x3, lambda z: [z]
    given = (model, model)
    if name == "mkd":
        model, frozen, weak = mkd.Students(*nets), copy.deepcopy(nets), x2
        outputs = lambda out: [z for z, _, _ in out]  # noqa: E731
        for teacher in frozen:
            teacher.requires_grad_(False)
        width = nets[0].classifier.in_channels
        stats = nn.ModuleList(mkd.ClassStatistics(CLASSES, width) for _ in range(4)).to(run.device)
        given = (nets, frozen, stats, model)
    if name == "segkc":
        model, weak = segkc.Pair(*nets).to(run.device), x1
        outputs = lambda out: [t for z, _, g in out for t in (z, g)]  # noqa: E731
        given = (dict(junior=nets[1], senior=nets[0]), model)
    encoders = [list(net.backbone.parameters()) for net in nets]
    known = {id(p) for encoder in encoders for p in encoder}
    heads = [p for p in model.parameters() if id(p) not in known]
    optimizer = run.optimizer([{"params": p, "lr": args.lr} for p in (*encoders, heads)])

    def step() -> None:
        run.set_lr(optimizer, STEP)
        if name == "supervised":
            terms = run.supervised(model, {"x": x2, "y": batch["y"].repeat(2, 1, 1)})
        else:
            terms = getattr(MODULES[name], f"{name}_step")(args, run, *given, batch, STEP)
        run.update(terms["loss"], optimizer)

    def learn(net: nn.Module, x: Tensor, outputs: Callable = lambda z: [z]) -> None:
        net.zero_grad(set_to_none=True)
        with run.autocast():
            out = outputs(net(x))
        torch.autograd.backward(out, [torch.full_like(t, 1e-6) for t in out])

    def limit() -> None:
        for net in frozen:
            net.train(name == "mkd")  # its teachers are in train mode, and end at stride 4
            with torch.no_grad(), run.autocast():
                net.parts(weak) if name == "mkd" else net(weak)
            net.train()
        learn(model, x2, outputs)

    def unit() -> None:
        for net in nets:
            learn(net, x1)

    return SimpleNamespace(step=step, limit=limit, unit=unit, run=run, n=len(nets))


def bench_steps(opts: argparse.Namespace) -> None:
    columns = "method|networks|step ms|limit ms|limit ÷ step|units|images/s|peak MB|host syncs"
    heading(*columns.split("|"), *["compiled ÷ eager step"] * opts.compile)
    peaks, sites = {}, collections.Counter()
    for name in MODULES if opts.method == "all" else [opts.method]:
        it = setup(name, opts)
        t = alternate(dict(step=it.step, limit=it.limit, unit=it.unit), opts.steps)
        syncs, ratio = host_syncs(it.step), []
        sites.update(syncs or {})
        if opts.compile:
            other = setup(name, opts, "--compile")
            both = alternate(dict(eager=it.step, compiled=other.step), opts.steps)
            ratio = [f"{both['compiled'] / both['eager']:.3f}"]
            del other
        del it.step, it.limit, it.unit  # before others need the memory
        peaks[name] = peak(name, opts)
        row(
            name,
            f"{opts.backbone}, {opts.junior}" if name == "segkc" else opts.backbone,
            f"{t['step'] * 1e3:.1f}",
            f"{t['limit'] * 1e3:.1f}",
            f"{t['limit'] / t['step']:.3f} (≥ 0.92)",
            f"{t['step'] / t['unit'] * it.n:.2f}" + UNITS[name],
            f"{2 * opts.batch_size / t['step']:.2f}",
            f"{peaks[name] / 2**20:.0f}",
            "n/a" if syncs is None else syncs.total(),
            *ratio,
        )
    print("\nunit: forward and backward of B images of one network (segkc: the mean of its two)")
    how = "max_memory_allocated" if CUDA else "growth of the resident set since the imports"
    print(f"peak: {how}, each in a process of its own")
    for site, n in sites.most_common():
        print(f"host sync: {site}, {n} a step")
    if "speed" in peaks:
        plain = peak("supervised", opts)
        print(f"peak of SPEED ÷ of a supervised step on {2 * opts.batch_size} images", end=" ")
        print(f"({plain / 2**20:.0f} MB): {peaks['speed'] / plain:.3f} (≤ 1.15)")


def bench_fa(opts: argparse.Namespace) -> None:
    """ClassStatistics.update and augment for four networks, students' z with a backward."""
    it = setup("mkd", opts)
    side = -(-opts.crop_size // 4)
    n, device = 2 * opts.batch_size, it.run.device
    f = torch.randn(n, side, side, 256, device=device).permute(0, 3, 1, 2)
    f = f.to(torch.bfloat16) if it.run.args.amp == "bf16" else f
    z = torch.randn(n, CLASSES, side, side, device=device)
    label = torch.randint(CLASSES, (n, side, side), device=device)
    stats, weight = mkd.ClassStatistics(CLASSES, 256).to(device), torch.randn(CLASSES, 256, 1, 1)
    weight, gradient = weight.to(device), torch.ones_like(z)

    def augmentation() -> None:
        for student in (True, True, False, False):
            own = z.clone().requires_grad_(student)
            stats.update(f, label)
            out = mkd.augment(own, label, weight, stats.var, 0.75)
            if student:
                out.backward(gradient)

    t = alternate(dict(step=it.step, fa=augmentation), opts.steps)
    print(f"feature augmentation, four networks, N = {label.numel()}, C = 21, A = 256:", end=" ")
    print(f"{t['fa'] * 1e3:.1f} ms; its step {t['step'] * 1e3:.1f} ms; {t['fa'] / t['step']:.2%}")


# ------------------------------------------------------------------------------ data, evaluation


def photo(key: int, width: int, height: int) -> Image.Image:
    """Noise of all scales over gradients: as JPEG of quality 90 about a photograph's size."""
    r, total = np.random.default_rng(key), np.zeros((height, width, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(r.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layer = coarse.resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer) - 127.5) / cells**0.6
    total += 127.5 + r.normal(0, 8, (height, width, 1))
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def make_items(folder: Path, n: int, sizes: list[tuple[int, int]], own: Path | None) -> list:
    """n items with a mask; images are JPEGs of `sizes` made here, or those of the folder `own`."""
    found = sorted(p for p in own.rglob("*") if p.suffix in (".jpg", ".jpeg")) if own else []
    if own and not found:
        raise SystemExit(f"error: {own}: holds no .jpg; give another --images")
    items = []
    for k in range(n):
        size = Image.open(found[k % len(found)]).size if found else sizes[k % len(sizes)]
        image, mask = (folder / f"{size[0]}-{k}.{kind}" for kind in ("jpg", "png"))
        if found:
            image = found[k % len(found)]
        else:
            photo(k, *size).save(image, quality=90)
        blobs = np.random.default_rng(k).integers(0, CLASSES, (6, 8), dtype=np.uint8)
        Image.fromarray(blobs).resize(size, Image.Resampling.NEAREST).save(mask)
        items.append(data.Item(image.stem, image, mask))
    return items


def watch(owner: object, name: str, key: str, spent: dict[str, float]) -> None:
    """CPU seconds within owner.name go to spent[key], but those of watched calls inside."""
    inner = getattr(owner, name)

    def outer(*args: object, **more: object) -> object:
        before, begin = sum(spent.values()), time.thread_time()
        try:
            return inner(*args, **more)
        finally:
            spent[key] += time.thread_time() - begin - (sum(spent.values()) - before)

    setattr(owner, name, outer)


def bench_data(opts: argparse.Namespace, folder: Path) -> None:
    spent, b = collections.Counter(), 8
    watch(ImageFile.ImageFile, "load", "decode", spent)
    watch(data, "weak_view", "geometry", spent)

    def load(split: data.Split, crop: int, labeled_only: bool, step: int) -> np.ndarray:
        """ms a sample: total, decode, geometry, the rest."""
        args = argparse.Namespace(seed=0, crop_size=crop, batch_size=b, iters=ITERS)
        args.scale, args.labeled_only = (0.5, 2.0), labeled_only
        batches, begin = data.TrainBatches(split, args), time.thread_time()
        spent.clear()
        batches.load(step)
        total, parts = time.thread_time() - begin, [spent["decode"], spent["geometry"]]
        return np.array([total, *parts, total - sum(parts)]) * 1e3 / b

    sets = [("VOC", (500, 375), 321, 120), ("Cityscapes", (2048, 1024), 801, 12)]
    sets = [("own", (0, 0), opts.crop_size, 0)] if opts.images else sets
    heading(*"images|crop|sample|a second and core|ms|decode|geometry|rest".split("|"))
    for name, size, crop, target in sets:
        items = make_items(folder, 2 * b, [size], opts.images)
        split = data.Split(items[:b], items[b:], [], data.VOC_CLASSES, "", "")
        kb = statistics.mean(i.image.stat().st_size for i in items) / 1e3
        rounds = range(opts.steps + 1)  # the first warms up
        pairs = [[load(split, crop, only, k) for only in (True, False)] for k in rounds]
        x, u = np.median([(x, both - x) for x, both in pairs[1:]], 0)
        for kind, t in (("labelled", x), ("unlabelled", u)):
            goal = f" (≥ {target})" if target and kind == "unlabelled" else ""
            ms = (f"{v:.2f}" for v in t)
            row(f"{name}, {kb:.0f} KB", crop, kind, f"{1e3 / t[0]:.1f}{goal}", *ms)
    print("\ntime of the core, files cached; unlabelled: batches of both less of labelled alone")
    for crop in [s[2] for s in sets]:
        batch = make_batch(start("speed", argparse.Namespace(**vars(opts) | {"crop_size": crop})))

        def augmentation(batch: dict = batch) -> None:
            strong = data.strong_views(batch["u"], batch["strong"], batch["order"])
            for image in (batch["x"], batch["u"], *strong):
                data.normalize(image)

        ms = alternate({"": augmentation}, opts.steps)[""] * 1e3
        print(f"strong_views and normalize on the device, crop {crop}: {ms:.1f} ms a batch")


def bench_eval(opts: argparse.Namespace, folder: Path) -> None:
    items = make_items(folder, 256 if CUDA else 8, [(500, 375), (375, 500)], None)
    split = data.Split([], [], items, data.VOC_CLASSES, "", "")
    heading("evaluation", "images/s", "bare forwards, images/s", "loop ÷ bare forwards")
    for mode in ("whole", "slide"):
        run = start("speed", opts, "--eval-mode", mode, "--workers", "4" if CUDA else "0")
        net, seen = run.place(build_network(run.args.backbone, CLASSES)), []

        def loop(net: nn.Module = net, run: common.Run = run) -> None:
            common.evaluate({"net": net}, split, run.args, run.device)

        @torch.no_grad()
        def bare(net: nn.Module = net, run: common.Run = run, seen: list = seen) -> None:
            net.eval()
            for image in seen:
                with run.autocast():
                    net(image)

        hook = net.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(*args))
        loop()
        hook.remove()
        t = alternate({"loop": loop, "bare": bare}, opts.steps)
        speeds = (f"{len(items) / t[k]:.2f}" for k in ("loop", "bare"))
        row(mode, *speeds, f"{t['loop'] / t['bare']:.3f}" + " (≤ 1.15)" * (not CUDA))


def heading(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def machine() -> str:
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    with contextlib.suppress(OSError):
        lines = [] if CUDA else Path("/proc/cpuinfo").read_text().splitlines()
        name = next((v.split(": ")[1] for v in lines if v.startswith("model name")), name)
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads"


def main() -> None:
    opts = make_parser().parse_args()
    if not CUDA and not opts.peak and KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    large = CUDA or opts.fa
    opts.backbone = opts.backbone or ("resnet101" if large else "resnet50")
    opts.crop_size = opts.crop_size or (321 if large else 161)
    opts.batch_size = opts.batch_size or (8 if CUDA else 2 if opts.fa else 4)
    if opts.peak:
        peak_child(opts)
        return
    amp = opts.amp or ("bf16" if CUDA and torch.cuda.is_bf16_supported(False) else "off")
    print(f"{machine()}, amp {amp}; {opts.backbone}, crop {opts.crop_size},", end=" ")
    print(f"batch {opts.batch_size} + {opts.batch_size}, median of {opts.steps}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if opts.fa:
            bench_fa(opts)
        if opts.data:
            bench_data(opts, Path(folder))
        if opts.eval:
            bench_eval(opts, Path(folder))
    if not (opts.fa or opts.data or opts.eval):
        bench_steps(opts)


if __name__ == "__main__":
    common.launch(main)
