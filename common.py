"""What the methods share and no paper is about: flags, process group, evaluation, runs.

Dimension key: B images, C classes, H and W pixels, h and w cells of a feature map.
"""

import argparse
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import COUNT, POSITIVE, SHARE, STEPS, WEIGHT, InputError
from networks import BACKBONES, Segmenter, build_network, load_checkpoint, upsample

# --------------------------------------------------------------------------- flags


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share; a script adds its own and calls `parse`.

    The name of the file `script` is the method's, so that a copy of it has runs of its own.
    """
    formatter, flag = argparse.ArgumentDefaultsHelpFormatter, argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(description=description, formatter_class=formatter)
    p.set_defaults(method=Path(script).stem)
    a = p.add_argument_group("data").add_argument
    data.add_flags(a)
    a("--crop-size", type=STEPS, help="side of the square training crop, pixels")
    a("--scale", type=POSITIVE, nargs=2, metavar=("MIN", "MAX"), help="random scale in training")
    a("--batch-size", type=STEPS, help="labelled images a step, all ranks; as many unlabelled")
    a("--workers", type=COUNT, help="loader processes a rank; unset: 4, for shapes 0")
    a = p.add_argument_group("network").add_argument
    a("--backbone", choices=BACKBONES, help="encoder")
    a("--weights", help="imagenet (DINOv2: its own), none, or a state-dict file")
    a("--decoder", choices=("deeplab", "dpt"), default="deeplab", help="dpt: for DINOv2 alone")
    a("--output-stride", type=int, choices=(8, 16), default=16, help="of a CNN backbone, pixels")
    a = p.add_argument_group("optimisation").add_argument
    a("--epochs", type=STEPS, help="passes over the unlabelled images")
    a("--iters", type=STEPS, help="steps; overrides --epochs")
    a("--optimizer", choices=("sgd", "adamw"), help="SGD has momentum 0.9")
    a("--lr", type=POSITIVE, help="backbone's learning rate at step 0; falls as (1 - t/T)^0.9")
    a("--head-lr-mult", type=POSITIVE, help="all but the backbone learns this many times faster")
    a("--weight-decay", type=WEIGHT, help="L2 (sgd) or decoupled (adamw)")
    a("--sup-loss", choices=("ce", "ohem"), default="ce", help="labelled loss; ohem: hard pixels")
    a("--ohem-least", type=STEPS, default=200_000, help="pixels of a batch that OHEM always keeps")
    a("--threshold", type=SHARE, help="tau: confidence a label needs, 0 to 1; MKD: of L_st")
    a("--ramp", type=SHARE, help="share of the run in which unlabelled terms grow from 0 to full")
    a("--labeled-only", action=flag, default=False, help="the supervised baseline, same steps")
    a("--amp", choices=("bf16", "fp16", "off"), help="unset: bf16 where the GPU has it, else off")
    a("--compile", action=flag, default=False, help="torch.compile the networks")
    a("--seed", type=COUNT, default=0, help="of weights, batches and augmentation")
    a = p.add_argument_group("evaluation and output").add_argument
    a("--eval-mode", choices=("whole", "slide"), default="whole", help="slide: crop-size windows")
    a("--eval-every", type=STEPS, help="steps; unset: once an epoch")
    a("--save-every", type=STEPS, help="steps between checkpoints; unset: once an epoch")
    a("--log-every", type=STEPS, default=20, help="steps that a train line averages over")
    a("--tta", action=flag, default=False, help="evaluate with flips and scales 0.75, 1, 1.25")
    a("--out", type=Path, help="unset: runs/<script>-<dataset>-<split>-s<seed>")
    a("--resume", choices=("auto", "none"), default="auto", help="auto: go on from latest.pt")
    a("--overwrite", action=flag, default=False, help="start anew over what --out holds")
    a("--test-only", type=Path, metavar="CKPT", help="evaluate a best.pt and stop")
    a("--save-predictions", type=Path, metavar="DIR", help="PNGs, with --test-only")
    return p


def parse(
    p: argparse.ArgumentParser, argv: list[str] | None, **method: dict[str, object]
) -> argparse.Namespace:
    """Parses in two goes: data set and backbone choose the presets that other flags default to.

    `method` overrides presets by data set name or "all", e.g. `all=dict(threshold=0.0)`.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--root", type=Path, default=data.ROOT)
    first.add_argument("--test-only", type=Path)
    for name in ("--dataset", "--backbone", "--senior", "--junior"):
        first.add_argument(name, default="")
    known = first.parse_known_args(argv)[0]
    saved = load_checkpoint(known.test_only) if known.test_only else {}
    if known.test_only and not known.dataset:
        known.dataset = saved.get("dataset")
        if known.dataset not in tuple(data.PRESETS):
            raise InputError(f"{known.test_only}: names no data set of ours; give --dataset too")
    dataset = data.find_dataset(known.dataset, known.root)
    if dataset in data.PRESETS:  # else the second go says so
        vit = any(b.startswith("dinov2") for b in (known.backbone, known.senior, known.junior))
        preset = data.PRESETS[dataset] | (data.DINOV2_PRESETS[dataset] if vit else {})
        rate = {"lr": preset["lr"]} if vit else {}  # a script's own is for CNNs
        preset |= method.get("all", {}) | method.get(dataset, {}) | rate
        if isinstance(saved.get("eval"), dict):  # as best.pt was evaluated
            # as text, so that argparse checks it like a flag
            preset |= {k: str(saved["eval"].get(k)) for k in ("crop_size", "eval_mode")}
            preset["tta"] = saved["eval"].get("tta") is True
        p.set_defaults(dataset=dataset, **preset)
    return p.parse_args(argv)


# -------------------------------------------------------------------------- ranks and precision


def rank_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torchrun."""
    if "RANK" not in os.environ:  # a cluster's own WORLD_SIZE alone starts no group
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))


def start_process(args: argparse.Namespace) -> torch.device:
    """Joins torchrun's process group if there is one; settles --amp and --workers, seeds torch."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local}" if cuda else "cpu")
    if cuda:
        if local >= (count := torch.cuda.device_count()):  # not for a rank that is shown its own
            what = f"LOCAL_RANK {local}: no such GPU, this process sees {count}"
            remedy = "give a lower --nproc_per_node, or CUDA_VISIBLE_DEVICES= for CPU ranks"
            raise RunError(f"{what}; {remedy}")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ and not dist.is_initialized():
        # gloo beside nccl carries the vote on signals, which must not wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        limit, (rank, world) = timedelta(minutes=10), rank_world()
        # torchrun's store outlives a restart: without a prefix, gloo reads dead ranks' addresses
        store = next(dist.rendezvous("env://", timeout=limit))[0]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        args.workers = 0 if args.dataset == "shapes" else min(4, cores)
    if args.amp is None:
        args.amp = "bf16" if cuda and torch.cuda.is_bf16_supported(False) else "off"
    torch.manual_seed(args.seed)
    return device


def end_process() -> None:
    """Leaves the process group, after the slowest rank."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The precision of forward passes; losses, softmax and EMA stay outside, in float32."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


def rank_sum(t: Tensor) -> Tensor:
    """Sum of a tensor over ranks, no gradient."""
    t = t.detach()
    if dist.is_initialized():
        t = t.clone()
        dist.all_reduce(t)
    return t


def rank_mean(t: Tensor) -> Tensor:
    """Mean of a tensor over ranks, no gradient.

    A loss is a sum over this rank's pixels divided by `rank_mean` of the pixel count: DDP then
    averages the ranks' gradients to that of the global mean, also where the counts differ.
    """
    return rank_sum(t) / rank_world()[1]


def average_buffers(nets: Iterable[nn.Module]) -> None:
    """Batch norm statistics become their mean over ranks, for CPU, which has no SyncBN.

    Without it ranks would evaluate, and predict pseudo-labels, with different networks.
    """
    buffers = [b for net in nets for b in net.buffers() if b.is_floating_point()]
    if not buffers:  # DINOv2 with DPT
        return
    flat = rank_mean(torch.cat([b.flatten() for b in buffers]))
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest cells of a bool map: [B, H, W] to [B, *size]."""
    return F.interpolate(mask[:, None].float(), size, mode="nearest")[:, 0] > 0.5


def masked_mean(a: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """sum(a keep) / max(sum(valid), 1) over all ranks: few confident pixels make a small loss."""
    return (a * keep).sum() / rank_mean(valid.sum()).clamp_min(1)


def supervised_loss(
    z: Tensor, y: Tensor, kind: str, least: int = 200_000, thresh: float = 0.7
) -> Tensor:
    """CE over the labelled pixels of the global batch; z [B, C, H, W], y [B, H, W], 255 ignored.

    kind "ohem" keeps the pixels whose true class has a probability of at most `thresh`, or the
    `least` pixels of the global batch with the lowest where those would be fewer.
    """
    ce = F.cross_entropy(z, y, ignore_index=data.IGNORE, reduction="none")  # [B, H, W]
    keep = y != data.IGNORE
    if kind == "ohem":
        p = torch.where(keep, torch.exp(-ce.detach()), 1.0)
        everyone = [p]
        if dist.is_initialized():
            everyone = [torch.empty_like(p) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, p)
        everyone = torch.cat(everyone).flatten()
        kth = everyone.kthvalue(min(least, len(everyone))).values
        keep = keep & (p <= kth.clamp_min(thresh))
    return masked_mean(ce, keep, keep)


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(net: Segmenter, image: Tensor, args: argparse.Namespace) -> Tensor:
    """Scores [B, C, H, W] whose argmax is the prediction; image [B, 3, H, W] on the net's grid.

    Whole image: logits. Sliding windows: mean softmax. --tta: softmax summed over flips, scales.
    """
    slide = args.eval_mode == "slide"
    if not args.tta:
        return _slide(net, image, args.crop_size) if slide else net(image)
    total, grid = 0, net.backbone.grid
    for scale in (0.75, 1.0, 1.25):
        size = [max(1, round(s * scale / grid)) * grid for s in image.shape[-2:]]
        scaled = F.interpolate(image, size, mode="bilinear", align_corners=False)
        for flips in ([], [-1]):
            view = scaled.flip(flips)
            p = _slide(net, view, args.crop_size) if slide else net(view).softmax(1)
            total = total + upsample(p.flip(flips), image.shape[-2:])
    return total


def _slide(net: Segmenter, image: Tensor, crop: int) -> Tensor:
    """Mean softmax of windows of the crop size, 2/3 of it apart, the last shifted inside."""
    height, width = image.shape[-2:]
    image = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))
    stride = crop * 2 // 3
    tops, lefts = (
        [min(i * stride, n - crop) for i in range(math.ceil((n - crop) / stride) + 1)]
        for n in image.shape[-2:]
    )
    total, count = None, image.new_zeros(image.shape[-2:])
    for top, left in itertools.product(tops, lefts):
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        p = net(image[:, :, rows, columns]).softmax(1)
        total = p.new_zeros(*p.shape[:2], *image.shape[-2:]) if total is None else total
        total[:, :, rows, columns] += p
        count[rows, columns] += 1
    return (total / count)[:, :, :height, :width]


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """[C, C] int64, row = label, column = prediction; ignored pixels are left out."""
    cell = torch.where(label == data.IGNORE, classes**2, label * classes + prediction)
    return torch.bincount(cell.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)


def iou_of(confusion: Tensor) -> tuple[float, list[float | None]]:
    """mIoU over classes present in labels or predictions, IoU per class (None: absent), percent."""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    pairs = zip(confusion.diagonal().tolist(), union.tolist(), strict=True)
    iou = [100 * i / u if u else None for i, u in pairs]
    present = [v for v in iou if v is not None]
    return sum(present) / max(len(present), 1), iou


@torch.no_grad()
def evaluate(
    nets: dict[str, Segmenter],
    split: data.Source | data.Split,
    args: argparse.Namespace,
    device: torch.device,
    write: Callable[[dict, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Confusion matrices [C, C] of networks over the val images, each once over all ranks.

    Batches are made of the whole set, then dealt to the ranks: as their content does not depend
    on the number of ranks, neither does rounding. Each network sees images padded to its own grid,
    so that its score does not depend on its partners. `write` gets the first one's predictions.
    """
    (rank, world), classes = rank_world(), len(split.classes)
    first = next(iter(nets.values()))
    total = {n: torch.zeros(classes, classes, dtype=torch.int64, device=device) for n in nets}
    tuning, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # sizes vary
    modes = {net: net.training for net in nets.values()}
    for grid in dict.fromkeys(net.backbone.grid for net in nets.values()):
        alike = {name: net.eval() for name, net in nets.items() if net.backbone.grid == grid}
        batches = data.ValBatches(split.val, classes, grid)
        for batch in data.val_batches(batches, rank, world, args.workers, device):
            for name, net in alike.items():
                with autocast(args.amp, device):
                    prediction = predict(net, batch["image"], args).argmax(1)  # [b, H, W]
                total[name] += confusion_matrix(prediction, batch["label"], classes)
                if write and net is first:
                    write(batch, prediction)
    for net, mode in modes.items():
        net.train(mode)
    torch.backends.cudnn.benchmark = tuning
    return {name: rank_sum(t) for name, t in total.items()}


def picture(image: Tensor, *labels: Tensor) -> np.ndarray:
    """A normalised image [3, H, W] and class maps [H, W], side by side as [H, n W, 3] uint8."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    rgb = ((image.cpu() * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
    colors = [data.palette()[m.cpu().numpy()] for m in labels]
    return np.concatenate([rgb.numpy(), *colors], 1)


def save_predictions(folder: Path) -> Callable[[dict, Tensor], None]:
    """A `write` for `evaluate`: <id>.png holds class ids, <id>_overlay.png image and colours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: cannot be made ({e.strerror}); give another folder") from None

    def write(batch: dict, prediction: Tensor) -> None:
        fields = (batch[k] for k in ("image", "size", "id"))
        for label, image, (h, w), name in zip(prediction, *fields, strict=True):
            two = picture(image[:, :h, :w], label[:h, :w])
            rgb, colors = Image.fromarray(two[:, :w]), Image.fromarray(two[:, w:])
            try:
                Image.fromarray(label[:h, :w].byte().cpu().numpy()).save(folder / f"{name}.png")
                Image.blend(rgb, colors, 0.5).save(folder / f"{name}_overlay.png")
            except OSError as e:
                raise RunError(f"{folder}: cannot be written ({e.strerror}); free space") from None

    return write


def check_crop(net: Segmenter, crop: int) -> None:
    """InputError unless crops, and windows, are of a size that the network takes."""
    patch = net.backbone.patch
    if crop < 32 or crop % patch:
        needs = f"{net.config['backbone']} needs at least 32 pixels and a multiple of {patch}"
        raise InputError(f"--crop-size {crop}: {needs}, e.g. {-(-max(crop, 32) // patch) * patch}")


def test(args: argparse.Namespace) -> None:
    """--test-only: evaluates the network of a best.pt on the val images of --dataset."""
    device = start_process(args)
    saved, source = load_checkpoint(args.test_only), data.load_source(args.dataset, args.root)
    try:
        net = build_network(**saved["config"])
        net.load_state_dict(saved["net"])
        classes = list(saved["classes"])
    except (InputError, AttributeError, KeyError, RuntimeError, TypeError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"{args.test_only}: no best.pt of ours ({reason}); give one") from None
    if classes != source.classes:
        counts = f"its {len(classes)} classes are not the {len(source.classes)} of {args.dataset}"
        raise InputError(f"{args.test_only}: {counts}; evaluate it on its own data set")
    check_crop(net, args.crop_size)
    net = net.place(device)
    write = save_predictions(args.save_predictions) if args.save_predictions else None
    miou, iou = iou_of(evaluate({"net": net}, source, args, device, write)["net"])
    if rank_world()[0] == 0:
        for name, value in zip(source.classes, iou, strict=True):
            print(f"{name:>20} {'absent' if value is None else f'{value:6.2f}'}")
        how = args.eval_mode + " with flips and scales" * args.tta
        how = f"{saved['config']['backbone']}, {how}, amp {args.amp}"
        print(f"mIoU {miou:.2f} on {len(source.val)} images · {how} · {args.test_only}")
    end_process()


# ------------------------------------------------------------------------------------- the run


class RunError(Exception):
    """A run that cannot go on. The message is one line; what was saved stays as it is."""


class Run:
    """A run's process and folder: device, split, log, checkpoints. Nothing here is learnt."""

    # flags that the parts of a resumed run need not share, as they do not change its result
    FREE = ("out", "root", "workers", "save_every", "resume", "overwrite")

    def __init__(self, args: argparse.Namespace) -> None:
        """Joins the process group, reads the split, and settles the flags that depend on them."""
        self.args = args
        self.rank, self.world = rank_world()
        share = args.batch_size // self.world
        if args.batch_size % self.world or share % 2:
            why = f"on {self.world} ranks: each needs an even share, as CutMix pairs neighbours"
            what = f"--batch-size {args.batch_size} {why}"
            raise InputError(f"{what}; give a multiple of {2 * self.world}")
        if args.scale[0] > args.scale[1]:
            raise InputError(f"--scale {args.scale[0]} {args.scale[1]}: give the smaller one first")
        if args.save_predictions:
            raise InputError("--save-predictions: goes with --test-only CKPT")
        self.positions = range(self.rank * share, (self.rank + 1) * share)  # in the global batch
        source = data.load_source(args.dataset, args.root)
        self.split = data.make_split(source, args.split, args.split_seed, args.protocol)
        if len(self.split.unlabeled) < 2 and not args.labeled_only:
            left = f"leaves {len(self.split.unlabeled) or 'no'} unlabelled image, CutMix pairs two"
            raise InputError(f"--split {args.split}: {left}; label fewer, or --labeled-only")
        pixels = args.batch_size * args.crop_size**2
        if args.sup_loss == "ohem" and args.ohem_least > pixels / 2:  # void, padding count not
            batch = f"a batch of {args.batch_size} crops of {args.crop_size} ({pixels})"
            why = f"--ohem-least {args.ohem_least}: over half of {batch}, so it is nearly CE"
            raise InputError(f"{why}; lower it, to {max(1, pixels // 25)} for Cityscapes' share")
        self.device = start_process(args)
        self.autocast = functools.partial(autocast, args.amp, self.device)  # of forward passes
        epoch = max(1, len(self.split.unlabeled or self.split.labeled) // args.batch_size)
        args.iters = args.iters or args.epochs * epoch
        args.eval_every, args.save_every = args.eval_every or epoch, args.save_every or epoch
        folder = os.path.isdir(args.split)
        name = Path(args.split).resolve().name if folder else args.split.replace("/", "-")
        method = args.method + "-labeled" * args.labeled_only
        where = "folder-" + args.root.resolve().name if args.dataset == "folder" else args.dataset
        args.out = args.out or Path(f"runs/{method}-{where}-{name}-s{args.seed}")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.state = {"scaler": self.scaler}  # what a checkpoint holds; `resume` adds to it
        self.rows, self.names = [], []  # train terms that no log line holds yet, on the device
        self.best, self.best_step, self.last = -1.0, 0, -1.0
        self.board = self.vote = None
        self.signal = 0
        self.kept = f"the last good checkpoint in {args.out} stays; try a lower --lr or"
        self.say(self.split.line)

    def say(self, line: str) -> None:
        """Prints a line on rank 0, above the bar if there is one."""
        if self.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def put(self, t: Tensor) -> Tensor:
        """A tensor of the host on the device, without waiting for it."""
        cuda = self.device.type == "cuda"
        return (t.pin_memory() if cuda else t).to(self.device, non_blocking=True)

    def place(self, net: Segmenter) -> Segmenter:
        """Moves a network to the device; SyncBN over CUDA ranks; --compile."""
        check_crop(net, self.args.crop_size)
        if self.device.type == "cuda" and self.world > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net = net.place(self.device)
        if self.args.compile:
            # the parts, in training, eval and at each size, share one cache, of 8 by default;
            # torch 2.6 has no newer name for its limit
            torch._dynamo.config.cache_size_limit = 64
            for part in net.children():  # not the whole: MKD calls `parts`, the others forward
                part.compile()
        return net

    def distribute(self, net: nn.Module) -> nn.Module:
        """DDP over the ranks, or the network itself without torchrun."""
        if not dist.is_initialized():
            return net
        ids = [self.device] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        return ddp(net, device_ids=ids, gradient_as_bucket_view=True)

    def optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        """SGD with momentum 0.9 or AdamW over the script's parameter groups."""
        # on CPU a fused step would not skip what the scaler skips; None, not False: torch's choice
        more = dict(weight_decay=self.args.weight_decay, fused=self.args.amp != "fp16" or None)
        if self.args.optimizer == "adamw":
            return torch.optim.AdamW(groups, **more)
        return torch.optim.SGD(groups, momentum=0.9, **more)

    def supervised(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        """The loss of --labeled-only: L = CE(model(x), y), or OHEM."""
        with self.autocast():
            z = model(data.normalize(batch["x"]))
        return {"loss": supervised_loss(z, batch["y"], self.args.sup_loss, self.args.ohem_least)}

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """zero_grad, backward, step; the scaler does nothing unless --amp fp16."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The polynomial schedule: lr (1 - t/T)^0.9 with t = `step` from 0."""
        poly = (1 - step / self.args.iters) ** 0.9
        self.lr = self.args.lr * poly
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * poly

    def ramp(self, step: int) -> float:
        """Weight of the unlabelled terms at `step`: linear from 0 to 1 over --ramp of the run."""
        steps = self.args.ramp * self.args.iters
        return min(1.0, step / max(1.0, steps)) if steps else 1.0

    def batches(self, start: int) -> Iterator[dict]:
        """This rank's share of the training batches from step `start` on, see data.TrainBatches."""
        batches = data.TrainBatches(self.split, self.args, self.rank, self.world)
        return data.train_batches(batches, start, self.args.workers, self.device)

    # ---- start and resume

    def resume(self, **state: object) -> int:
        """Takes what a checkpoint shall hold; returns the step to go on from, 0 in a new folder.

        Goes on from latest.pt in --out if its flags and lists agree with this run's.
        """
        self.state |= state
        args, out, step, log_bytes, old = self.args, self.args.out, 0, 0, []
        found = [out / n for n in ("latest.pt", "latest.prev.pt") if (out / n).exists()]
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # else torchrun's restart
        goes_on = bool(found) and not (args.overwrite and first)
        held = (found or (out / "best.pt").exists()) and first and not args.overwrite
        if held and (args.resume == "none" or not (found or self._stopped_early())):
            what = "a run" if found else "a run's best.pt, but no latest.pt to go on from"
            raise InputError(f"{out}: holds {what}; give another --out, or --overwrite")
        if goes_on:
            saved, old = self._load(found)
            try:
                for name, value in self.state.items():
                    value.load_state_dict(saved[name])
                self.names, self.rows = saved["names"], [r.to(self.device) for r in saved["rows"]]
                self.best, self.best_step, self.last = saved["best"]
                step, log_bytes = int(saved["step"]), int(saved["log_bytes"])
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # noqa: BLE001 - any, on values that only look like a checkpoint
                reason = str(e).splitlines()[0][:120]
                why = f"not of this script ({reason})"
                raise InputError(f"{found[0]}: {why}; give another --out or --overwrite") from None
        if step == args.iters:
            self.say(f"{out}: finished before, no step is left; --overwrite starts anew")
        if dist.is_initialized():
            dist.barrier()  # until every rank has read what rank 0 may now overwrite
        self.since = step
        if self.rank == 0:
            rest = []
            if not goes_on:
                old, rest = found, [out / "best.pt"]
                if args.overwrite:
                    rest += [*out.glob("preview/[0-9]*.png"), *out.glob("events.out.tfevents.*")]
            self._open_log(log_bytes, step, old, rest)
        quiet = self.rank > 0 or None  # None: where stderr is no terminal
        self.bar = tqdm(total=args.iters, initial=step, disable=quiet, unit="step")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: setattr(self, "signal", number))
        self.clock = time.perf_counter()
        return step

    def _flags(self) -> dict:
        flags = json.loads(json.dumps(vars(self.args), default=str))  # as args.json has them
        return {k: v for k, v in flags.items() if k not in self.FREE} | {"lists": self.split.hash}

    def _load(self, found: list[Path]) -> tuple[dict, list[Path]]:
        """latest.pt, or the one before it where that cannot be read; InputError if flags differ.

        Also the unreadable one, which the next save would keep in place of the good one.
        """
        broken = []
        try:
            saved, path = load_checkpoint(found[0]), found[0]
        except InputError as e:
            if len(found) == 1:
                raise
            self.say(f"{e}; going back to {found[1]}")
            saved, path, broken = load_checkpoint(found[1]), found[1], found[:1]
        was, now = saved.get("flags"), self._flags()
        if not isinstance(was, dict):
            raise InputError(f"{path}: no latest.pt of ours; give another --out, or --overwrite")
        differ = [f"{k} was {was.get(k)}, is {v}" for k, v in now.items() if was.get(k) != v]
        if differ:
            what = f"holds a run with other flags ({'; '.join(differ)})"
            raise InputError(f"{path.parent}: {what}; give the same, another --out, or --overwrite")
        self.say(f"going on from {path}, step {saved.get('step')}")
        return saved, broken

    def _stopped_early(self) -> bool:
        """Whether the run in --out, without checkpoint, was killed before it had to save one."""
        try:
            was = json.loads((self.args.out / "args.json").read_text())
            log = (self.args.out / "log.jsonl").read_text().splitlines()
            done = json.loads(log[-1])["step"] if log else 0
            return done <= min(was["save_every"], was["iters"] - 1)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _open_log(self, size: int, step: int, old: list[Path], rest: list[Path]) -> None:
        """Makes the folder, without `old`, opens log.jsonl at byte `size`, then removes `rest`.

        TensorBoard forgets what is after `step`.
        """
        out = self.args.out
        try:
            (out / "preview").mkdir(parents=True, exist_ok=True)
            self.file = open(out / "log.jsonl", "ab", buffering=0)  # noqa: SIM115
            self._lock()
            for path in old:  # before the log, so that none goes on from a checkpoint without it
                path.unlink(missing_ok=True)
            flags = json.dumps(vars(self.args), default=str, indent=1)
            (out / "args.json").write_text(flags + "\n")
            self.file.truncate(min(size, self.file.tell()))
            for path in rest:
                path.unlink(missing_ok=True)
            self.file.seek(0, os.SEEK_END)
        except OSError as e:
            raise RunError(f"{out}: cannot be written ({e.strerror}); give another --out") from None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out, purge_step=step + 1)

    def _lock(self) -> None:
        """Keeps log.jsonl, and so the folder, to this process (not its workers) till it ends."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            what = "another process is writing this run; wait, or give another --out"
            raise InputError(f"{self.args.out}: {what}") from None
        except OSError:  # a file system without locks
            pass

    # ---- after a step

    def step_done(self, step: int, nets: dict[str, Segmenter], terms: dict[str, Tensor]) -> None:
        """After step `step` (from 0): logs, evaluates and saves where due, stops at a signal.

        `terms` are scalars that stay on the device until a log line is due. `nets` are evaluated;
        the first is for inference: its mIoU decides on best.pt.
        """
        self.names = list(terms)
        self.rows.append(torch.stack([t.detach().float() for t in terms.values()]))
        if self.world > 1 and self.device.type == "cpu":
            average_buffers(nets.values())
        done, args = step + 1, self.args
        last, stop = done == args.iters, self._stop()
        self.bar.update()
        if done % args.log_every == 0 or last:
            self._train_line(done)
        if done % args.eval_every == 0 or last:
            self._eval_line(done, nets)
        if done % args.save_every == 0 or last or stop:
            self._save(done)
        if stop and not last:
            command = "the same command" + " without --overwrite" * args.overwrite
            self.say(f"signal {stop}: saved step {done}; {command} goes on from there")
            self._close()
            raise SystemExit(128 + stop)

    def _check(self, done: int, nets: Iterable[nn.Module] = ()) -> None:
        """Averages the pending terms over ranks; a term or weight not finite ends the run."""
        for t in (t for net in nets for t in net.state_dict().values() if t.is_floating_point()):
            if not t.isfinite().all():
                raise RunError(f"step {done}: a weight is not finite; {self.kept} --amp off")
        if not self.rows:
            return
        rows = rank_mean(torch.stack(self.rows))
        self.rows = list(rows)
        bad = (~rows.isfinite()).nonzero().tolist()
        if bad:  # the first column is the total: name the term that spoils it, if there is one
            row, term = next((b for b in bad if b[0] == bad[0][0] and b[1] > 0), bad[0])
            what = f"{self.names[term]} is {rows[row, term]:.0f}"
            raise RunError(f"step {done - len(rows) + row + 1}: {what}; {self.kept} --amp off")

    def _train_line(self, done: int) -> None:
        self._check(done)
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            what = "gradients are not finite, --amp fp16 has left out their steps"
            raise RunError(f"step {done}: {what}; {self.kept} --amp bf16 or off")
        means = torch.stack(self.rows).mean(0).tolist()
        self.rows = []
        now, images = time.perf_counter(), self.args.batch_size * (2 - self.args.labeled_only)
        terms = dict(zip(self.names, means, strict=True)) | {"lr": self.lr}
        line = {"step": done} | {k: float(f"{v:.6g}") for k, v in terms.items()}
        line["images_s"] = round((done - self.since) * images / max(now - self.clock, 1e-9), 2)
        line["memory_gb"] = round(peak_memory(self.device) / 2**30, 3)
        self.clock, self.since = now, done
        self._write("train", line)

    def _write(self, kind: str, line: dict) -> None:
        """A line of log.jsonl, of TensorBoard, and of the terminal or its bar."""
        if self.rank:
            return
        rest = (json.dumps({"kind": kind} | line) + "\n").encode()
        try:
            while rest:  # a write may take a part, and the next one then say why
                rest = rest[self.file.write(rest) :]
        except OSError as e:
            raise RunError(f"{self.file.name}: cannot be written ({e.strerror})") from None
        scalars = {k: v for k, v in line.items() if isinstance(v, float)}
        for name, value in scalars.items() if self.board else ():
            self.board.add_scalar(f"{kind}/{name}", value, line["step"])
        said = " ".join(f"{k} {v:.4g}" for k, v in scalars.items())
        if self.bar.disable or kind == "eval":
            self.say(f"{kind} {line['step']}/{self.args.iters} {said}")
        else:
            self.bar.set_postfix_str(said)

    def _eval_line(self, done: int, nets: dict[str, Segmenter]) -> None:
        begin, line = time.perf_counter(), {"step": done}
        self._check(done, nets.values())
        first, classes, rows = next(iter(nets.values())), list(self.split.classes), []

        def keep(batch: dict, prediction: Tensor) -> None:
            for k, (h, w) in enumerate(batch["size"][: 4 - len(rows)]):
                maps = (batch["image"][k], batch["label"][k], prediction[k])
                rows.append(picture(*(m[..., :h, :w] for m in maps)))

        write = keep if self.rank == 0 else None
        matrices = evaluate(nets, self.split, self.args, self.device, write)
        results = {name: iou_of(m) for name, m in matrices.items()}
        self.last, iou = next(iter(results.values()))
        line["miou"] = round(self.last, 4)
        line |= {f"miou_{n}": round(r[0], 4) for n, r in [*results.items()][1:]}
        line["iou"] = {c: v and round(v, 4) for c, v in zip(classes, iou, strict=True)}
        if self.last > self.best:
            self.best, self.best_step = self.last, done
            if self.rank == 0:
                best = {"net": first.state_dict(), "config": first.config, "classes": classes}
                best |= {"dataset": self.args.dataset, "mean": data.MEAN, "std": data.STD}
                best["eval"] = {k: getattr(self.args, k) for k in ("crop_size", "eval_mode", "tta")}
                save_file(best | {"step": done, "miou": self.last}, self.args.out / "best.pt")
        self._write("eval", line)
        if self.rank == 0:
            self._preview(rows, self.args.out / f"preview/{done:06d}.png")
        self.clock += time.perf_counter() - begin  # images/s is of training

    def _preview(self, rows: list[np.ndarray], path: Path) -> None:
        """A picture of images of the first val batches, one a row: image, truth, prediction."""
        width = max(row.shape[1] for row in rows)
        rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0))) for r in rows]
        try:
            Image.fromarray(np.concatenate(rows)).save(path)
        except OSError as e:
            raise RunError(f"{path}: cannot be written ({e.strerror}); free space") from None

    def _save(self, done: int) -> None:
        """latest.pt with all state; the one before it stays as latest.prev.pt."""
        self._check(done, [v for v in self.state.values() if isinstance(v, nn.Module)])
        if self.rank:
            return
        state = {name: value.state_dict() for name, value in self.state.items()}
        state |= {"flags": self._flags(), "step": done, "log_bytes": self.file.tell()}
        state |= {"best": (self.best, self.best_step, self.last)}
        state |= {"names": self.names, "rows": self.rows}
        save_file(state, self.args.out / "latest.pt", keep=self.args.out / "latest.prev.pt")

    def _stop(self) -> int:
        """The signal to stop at, the same on all ranks, or 0.

        Ranks vote at each step, on the host: the vote that is read is the one of the step before,
        so none waits for another's device.
        """
        if not dist.is_initialized():
            return self.signal
        before, flag = self.vote, torch.tensor([self.signal])
        self.vote = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True))
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def _close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()
        end_process()

    def finish(self) -> None:
        """The last line, and the end of the process group."""
        last, best = f"{self.last:.2f}", f"{self.best:.2f} at step {self.best_step}"
        self.say(f"mIoU last {last} · best {best} · {self.args.out}")
        self._close()


# ----------------------------------------------------------------------------- files and exit


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on CUDA, the most that the process took on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1024 if sys.platform == "linux" else 1  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save_file(state: dict, path: Path, keep: Path | None = None) -> None:
    """Writes beside `path`, then renames: a reader finds the old file or the new, never half.

    The old file is kept as `keep`, if given. RunError when it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        raise RunError(
            f"{path}: cannot be saved ({reason}); is the disk full? What was saved before is intact"
        ) from None


def launch(main: Callable[[], None]) -> None:
    """Runs a script. Bad input ends it with a line and status 2, a failed run with status 1.

    Exits at once: other ranks may wait in a collective for this one, workers for its data.
    """
    status, (rank, world) = 0, rank_world()
    who = f"[rank {rank}] " * (world > 1)
    try:
        main()
    except (InputError, RunError) as e:
        status = 2 if isinstance(e, InputError) else 1
        # without a group all ranks see the same bad input; a GPU may be missing to one alone
        if rank == 0 or dist.is_initialized() or status == 1:
            print(f"{who}error: {e}", file=sys.stderr)
        else:
            time.sleep(5)  # torchrun ends all ranks at the first exit: rank 0's line comes first
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt:  # later ones are caught, see Run.resume
        status = 128 + signal.SIGINT
        print("interrupted before the first step", file=sys.stderr)
    except BaseException as e:
        status = 1
        if isinstance(e, RuntimeError) and "out of memory" in str(e):  # of a GPU
            told = ". ".join(str(e).splitlines()[0].split(". ")[:2])  # the second has the size
            remedy = "give a smaller --batch-size or --crop-size, in evaluation --eval-mode slide"
            print(f"{who}error: {told}; free the GPU, or {remedy}", file=sys.stderr)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
