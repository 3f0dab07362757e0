"""What the methods share and no paper describes: networks, weights, ranks, evaluation, run folder.

Dimension key: B images, C classes, A channels, N tokens, H and W pixels, h and w cells of a map.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation as ConvNormReLU
from tqdm import tqdm

import data
from data import COUNT, POSITIVE, SHARE, STEPS, WEIGHT, InputError

CNNS = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
DINOV2 = {"dinov2_vits14": (384, 6), "dinov2_vitb14": (768, 12)}  # width, attention heads
DPT_WIDTHS = {384: ((48, 96, 192, 384), 64), 768: ((96, 192, 384, 768), 128)}  # maps, features
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"
BACKBONES = (*CNNS, *DINOV2)
PATCH, TABLE, DEPTH = 14, 37, 12  # of DINOv2: pixels, the position table's side, blocks
TAKEN = (2, 5, 8, 11)  # blocks whose maps are returned
FREE = ("out", "root", "workers", "save_every", "overwrite", "resume_edited")  # free on resume
REMEDY = "the last good checkpoint stays; try a lower --lr, or --amp bf16 or off"
_process = Namespace(signal=0, until=0.0, training=False, evaluating=False)  # for `launch`, signals

# ---------------------------------------------------------------------------------- networks


class CNN(IntermediateLayerGetter):
    """torchvision's, with its keys: image [B, 3, H, W] to stride-4 and last map (16 or 8)."""

    grid = 16  # evaluation pads images to the crop modulo this

    def __init__(self, name: str, output_stride: int) -> None:
        net = getattr(models, name)(weights=None)
        if name == "mobilenet_v2":  # without the last 1x1 to 1280 channels, a classifier's input
            super().__init__(net.features, {"3": "low", "17": "deep"})
            self.channels = (24, 320)
        else:
            super().__init__(net, {"layer1": "low", "layer4": "deep"})
            self.channels = (64, 512) if name in ("resnet18", "resnet34") else (256, 2048)
        # A stage that would pass the output stride keeps the resolution: stride 1, 3x3 kernels
        # spread by the dilation; the convolution that had the stride by the one before it.
        stride = 1
        for stage in self.children():
            layers = [m for m in stage.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
            if any(m.stride in (2, (2, 2)) for m in layers):
                stride *= 2
            if stride > output_stride:
                for conv in layers:
                    dilation = stride // output_stride // (2 if conv.stride == (2, 2) else 1)
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (dilation, dilation)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(super().forward(x).values())


class Block(nn.Module):
    """DINOv2's: x + gamma1 attention(norm x), then x + gamma2 mlp(norm x); x [B, N, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
        self.attn["proj"] = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width)})
        self.mlp["fc2"] = nn.Linear(4 * width, width)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, width / heads] each
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.ls1["gamma"] * self.attn["proj"](heads.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.ls2["gamma"] * self.mlp["fc2"](hidden)


class DINOv2(nn.Module):
    """Oquab et al., 2023: image [B, 3, H, W], of whole patches, to four [B, width, H/14, W/14]."""

    grid = PATCH

    def __init__(self, name: str) -> None:
        super().__init__()
        width, heads = DINOV2[name]
        self.channels = (width,) * len(TAKEN)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TABLE**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width), False)  # of DINOv2's own training
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def positions(self, h: int, w: int) -> Tensor:
        """Positions of h x w patches, [1, 1 + h w, width]: bicubic but for the class token's."""
        if (h, w) == (TABLE, TABLE):
            return self.pos_embed
        table = self.pos_embed[:, 1:].view(1, TABLE, TABLE, -1).permute(0, 3, 1, 2).float()
        scale = ((h + 0.1) / TABLE, (w + 0.1) / TABLE)  # as published: never rounded down
        table = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=False)
        table = table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], table], 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = x.shape[-2] // PATCH
        w = x.shape[-1] // PATCH
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # [B, h w, width]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = x + self.positions(h, w)
        maps = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in TAKEN:
                maps.append(self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (h, w)))
        return maps


class Fusion(nn.Module):
    """DPT's: adds a refined skip, refines the sum, upsamples it, 1 x 1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        conv = functools.partial(nn.Conv2d, width, width, 3, padding=1)
        self.skip = nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), conv())
        self.refine = nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), conv())
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if skip is not None:
            x = x + (skip + self.skip(skip))
        x = x + self.refine(x)
        return self.out(F.interpolate(x, size, mode="bilinear", align_corners=True))


class DPTDecoder(nn.Module):
    """Ranftl et al., 2021: maps [B, width, h, w] to the classifier's input [B, A, 8h, 8w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        steps, channels = DPT_WIDTHS[width]
        self.project = nn.ModuleList(nn.Conv2d(width, s, 1) for s in steps)
        up_4 = nn.ConvTranspose2d(steps[0], steps[0], 4, 4)
        up_2 = nn.ConvTranspose2d(steps[1], steps[1], 2, 2)
        down_2 = nn.Conv2d(steps[3], steps[3], 3, 2, 1)
        self.resize = nn.ModuleList([up_4, up_2, nn.Identity(), down_2])
        self.reduce = nn.ModuleList(nn.Conv2d(s, channels, 3, padding=1, bias=False) for s in steps)
        self.fuse = nn.ModuleList(Fusion(channels) for _ in steps)
        # the deepest fusion has no skip: its unit never runs, but it is in the published count
        self.fuse[3].skip.requires_grad_(False)
        self.head = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())

    def forward(self, maps: list[Tensor]) -> Tensor:
        skips = []
        for k, level in enumerate(maps):
            skips.append(self.reduce[k](self.resize[k](self.project[k](level))))
        x = self.fuse[3](skips[3], None, skips[2].shape[-2:])
        x = self.fuse[2](x, skips[2], skips[1].shape[-2:])
        x = self.fuse[1](x, skips[1], skips[0].shape[-2:])
        h, w = skips[0].shape[-2:]
        return self.head(self.fuse[0](x, skips[0], (2 * h, 2 * w)))


def upsample(z: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as the baselines: [B, C, h, w] to [B, C, *size] in float32."""
    return F.interpolate(z.float(), size, mode="bilinear", align_corners=True)


class DeepLabDecoder(nn.Module):
    """Chen et al., 2018, DeepLabV3+: maps to the classifier's input [B, 256, h, w] at stride 4."""

    def __init__(self, low: int, deep: int, dilation: int) -> None:
        super().__init__()
        self.aspp = ASPP(deep, [rate * dilation for rate in (6, 12, 18)], 256)
        self.aspp.project = self.aspp.project[:3]  # without its dropout
        self.reduce = ConvNormReLU(low, 48, 1)
        self.fuse = nn.Sequential(ConvNormReLU(304, 256, 3), ConvNormReLU(256, 256, 3))

    def forward(self, maps: list[Tensor]) -> Tensor:
        low = self.reduce(maps[0])
        deep = upsample(self.aspp(maps[-1]), low.shape[-2:]).to(low.dtype)
        return self.fuse(torch.cat([deep, low], 1))


class Segmenter(nn.Module):
    """A backbone, a decoder and a 1x1 classifier; `build_network(**config)` builds it again."""

    def __init__(self, backbone: str, num_classes: int, output_stride: int, decoder: str) -> None:
        super().__init__()
        self.config = dict(backbone=backbone, num_classes=num_classes)
        self.config.update(output_stride=output_stride, decoder=decoder)
        self.layout = torch.contiguous_format
        vit = backbone in DINOV2
        self.backbone = DINOv2(backbone) if vit else CNN(backbone, output_stride)
        low, *_, deep = self.backbone.channels
        if decoder == "dpt":
            self.decoder = DPTDecoder(deep)
            width = DPT_WIDTHS[deep][1]
        else:
            self.decoder = DeepLabDecoder(low, deep, 1 if vit else 16 // output_stride)
            width = 256
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def place(self, device: torch.device) -> "Segmenter":
        """Moves the network to a device, in the memory layout that trains faster there."""
        # on a CPU channels_last makes the weight gradients of full convolutions slower
        depthwise = any(m.groups > 1 for m in self.modules() if isinstance(m, nn.Conv2d))
        if device.type == "cuda" or depthwise:
            self.layout = torch.channels_last
        return self.to(device, memory_format=self.layout)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image [B, 3, H, W] to logits z [B, C, h, w], the classifier's input f, the last map."""
        maps = self.backbone(x.contiguous(memory_format=self.layout))
        f = self.decoder(maps)
        return self.classifier(f), f, maps[-1]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits [B, C, H, W] at input size, float32; with `features` also f and the last map."""
        z, f, deep = self.parts(x)
        z = upsample(z, x.shape[-2:])
        return (z, f, deep) if features else z

    def head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of decoder and classifier."""
        heads = [*self.decoder.parameters(), *self.classifier.parameters()]
        return [p for p in heads if p.requires_grad]


def build_network(
    backbone: str, num_classes: int, output_stride: int = 16, decoder: str = "deeplab"
) -> Segmenter:
    """The network of --backbone, --output-stride and --decoder, or of a best.pt's `config`."""
    if backbone not in BACKBONES:
        raise InputError(f"backbone {backbone!r}: unknown; one of {', '.join(BACKBONES)}")
    if decoder == "dpt" and backbone not in DINOV2:
        raise InputError(f"--decoder dpt: needs a DINOv2 backbone, not {backbone}; use deeplab")
    return Segmenter(backbone, num_classes, output_stride, decoder)


# ------------------------------------------------------------------------------------- weights


def first_line(e: BaseException) -> str:
    """What an exception says, or its name."""
    return (str(e) or type(e).__name__).splitlines()[0]


def load_checkpoint(path: Path, remedy: str = "give a state_dict") -> dict:
    """A dict of tensors and plain values, never code; InputError on anything else."""
    # beside tensors, files hold flags and numbers: these types do nothing when they are read
    scalar = np.float64(0).__reduce__()[0]
    safe = [Namespace, np.dtype]
    safe += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    safe += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001 - the readers raise all kinds on broken bytes
        kind = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(e))
        why = f"holds a {kind[1]}" if kind else f"{type(e).__name__}: {first_line(e)}"
        raise InputError(f"{path}: not a loadable checkpoint ({why}); {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}; {remedy}")
    return found


def load_weights(net: Segmenter, name: str, weights: str, classes: list[str] | None = None) -> str:
    """Loads imagenet, none or a file: all of a best.pt with these `classes`, else the backbone.

    Returns a line that says what was loaded. InputError for another architecture's file.
    """
    if weights == "none":
        return f"{name}: random weights"
    found = download_weights(name) if weights == "imagenet" else load_checkpoint(Path(weights))
    whole = classes and found.get("classes") == classes and found.get("config") == net.config
    part = net if whole else net.backbone
    own = part.state_dict()
    state = find_part(found, own)
    same = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in same and not k.endswith("num_batches_tracked")]
    others = [k for k in state if k not in own]
    counts = f"{len(same)} keys matched, {len(missing)} missing, {len(others)} unexpected"
    what = f"the whole network of step {found.get('step')}" if whole else "the backbone"
    line = f"{name}: weights {weights}: {what}, {counts}"
    stages = {key.split(".")[0] for key in own}
    # a classifier's have other first names, and none is a bare tensor like a ViT's register_tokens
    wrong = missing + [k for k in others if "." not in k or k.split(".")[0] in stages]
    if wrong:
        raise InputError(f"{line}; {wrong[0]} differs: another architecture; give a file of {name}")
    part.load_state_dict(same, strict=False)
    return line


def find_part(found: dict, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `found`, or of a dict in it, that match most keys of `own`, prefix removed."""
    first = next(iter(own))
    best = {}
    dicts = [found]
    for state in dicts:  # it grows while it is walked
        dicts += [value for value in state.values() if isinstance(value, dict)]
        named = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
        for prefix in ["", *sorted(k.removesuffix(first) for k in named if k.endswith(first))]:
            part = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
            best = max(best, part, key=lambda part: len(part.keys() & own.keys()))
    return best


def download_weights(name: str) -> dict:
    """The published file of a backbone; torch.hub keeps it."""
    url = DINOV2_URL.format(name)
    if name in CNNS:
        url = models.get_model_weights(name)["IMAGENET1K_V1"].url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001 - of the network, the disk, or on broken bytes
        why = f"no {url} ({first_line(e)}); clear {torch.hub.get_dir()}, or give a FILE or none"
        raise InputError(f"--weights imagenet: {why}") from None


# --------------------------------------------------------------------------- ranks and losses


def rank_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torchrun."""
    if "RANK" not in os.environ:  # a cluster's own WORLD_SIZE alone starts no group
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(local: int) -> torch.device:
    """The GPU of local rank `local`, or the CPU where there is none; RunError for a missing GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise RunError(f"LOCAL_RANK {local}: there is no such GPU; lower --nproc_per_node")
    torch.cuda.set_device(local)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", local)


def rank_sum(t: Tensor) -> Tensor:
    """Sum of a tensor over ranks, no gradient."""
    t = t.detach()
    if dist.is_initialized():
        t = t.clone()
        dist.all_reduce(t)
    return t


def rank_mean(t: Tensor) -> Tensor:
    """Mean over ranks, no gradient: what a loss divides its sum by, as DDP averages gradients."""
    return rank_sum(t) / rank_world()[1] if dist.is_initialized() else t.detach()


def average_buffers(nets: Iterable[nn.Module]) -> None:
    """Batch norm statistics become their mean over ranks, for CPU, which has no SyncBN."""
    for buffer in (b for net in nets for b in net.buffers() if b.is_floating_point()):
        buffer.copy_(rank_mean(buffer))


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] to [B, h, w] = [B, *size]: cell i reads pixel round(i (H - 1) / (h - 1))."""
    mask = mask.index_select(1, _nearest(mask.shape[1], size[0], mask.device))
    return mask.index_select(2, _nearest(mask.shape[2], size[1], mask.device))


@functools.cache  # made once, not in each step
def _nearest(pixels: int, cells: int, device: torch.device) -> Tensor:
    gaps = max(1, cells - 1)  # round(a / b) = (2a // b + 1) // 2
    return (torch.arange(cells, device=device) * 2 * (pixels - 1) // gaps + 1) // 2


def masked_mean(a: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """This rank's part of sum(a keep) / max(sum(valid), 1): the mean over ranks is that of all."""
    return (a * keep).sum() / rank_mean(valid.sum()).clamp_min(1 / rank_world()[1])


def supervised_loss(z: Tensor, y: Tensor, kind: str, share: float, most: float = 0.7) -> Tensor:
    """CE over the labelled pixels of the global batch; z [B, C, H, W], y [B, H, W], 255 ignored.

    "ohem": only those whose true class has p <= most, but at least the `share` of lowest p.
    """
    ce = F.cross_entropy(z, y, ignore_index=data.IGNORE, reduction="none")  # [B, H, W]
    keep = y != data.IGNORE
    if kind == "ohem":
        p = torch.where(keep, torch.exp(-ce.detach()), 1.0)
        everyone = [p]
        if dist.is_initialized():
            everyone = [torch.empty_like(p) for _ in range(rank_world()[1])]
            dist.all_gather(everyone, p)
        everyone = torch.cat(everyone).flatten()
        kth = everyone.kthvalue(max(1, round(share * len(everyone)))).values
        keep = keep & (p <= kth.clamp_min(most))
    return masked_mean(ce, keep, keep)


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(net: Segmenter, image: Tensor, settings: Namespace) -> Tensor:
    """Image [B, 3, H, W] to scores [B, C, H, W]: logits, or if "slide" windows' mean softmax."""
    dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
    with torch.autocast(image.device.type, dtype, enabled=settings.amp != "off"):
        if settings.eval_mode == "whole":
            return net(image)
        height, width = image.shape[-2:]
        crop = settings.crop_size
        image = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))
        total = image.new_zeros(len(image), net.config["num_classes"], *image.shape[-2:])
        count = image.new_zeros(image.shape[-2:])
        bottom = image.shape[-2] - crop
        right = image.shape[-1] - crop
        stride = crop * 2 // 3
        for top in (min(k, bottom) for k in range(0, bottom + stride, stride)):  # last: shifted in
            for left in (min(k, right) for k in range(0, right + stride, stride)):
                place = (..., slice(top, top + crop), slice(left, left + crop))
                total[place] += net(image[place]).softmax(1)
                count[place] += 1
        return (total / count)[:, :, :height, :width]


def confusion_matrix(prediction: Tensor, label: Tensor, C: int) -> Tensor:
    """[C, C] int64, row = label, column = prediction; ignored pixels are left out."""
    cell = torch.where(label == data.IGNORE, C * C, label * C + prediction)
    return torch.bincount(cell.flatten(), minlength=C * C + 1)[:-1].view(C, C)


def iou_of(confusion: Tensor, classes: list[str]) -> tuple[float, dict[str, float | None]]:
    """mIoU over classes present in labels or predictions, IoU per class (None: absent), percent."""
    hits = confusion.diagonal().double()
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)  # 0 / 0 is nan
    values = [None if math.isnan(v) else round(v, 4) for v in iou.tolist()]
    return round(iou.nanmean().item(), 4), dict(zip(classes, values, strict=True))


def absent_note(iou: dict[str, float | None]) -> str:
    """' over 19 of 21 classes (absent: a, b)': those in no val label or prediction; else ''."""
    absent = [name for name, value in iou.items() if value is None]
    note = f" over {len(iou) - len(absent)} of {len(iou)} classes (absent: {', '.join(absent)})"
    return note if absent else ""


@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # it would tune anew for each size
def evaluate(
    nets: dict[str, Segmenter], split: data.Split, args: Namespace, device: torch.device
) -> dict[str, Tensor]:
    """Confusion matrices [C, C] over the val images, each once over all ranks. Ends in train()."""
    rank, world = rank_world()
    C = len(split.classes)
    total = {name: torch.zeros(C, C, dtype=torch.int64, device=device) for name in nets}
    every = nn.ModuleDict(nets).eval()
    for grid in {net.backbone.grid for net in nets.values()}:
        alike = {name: net for name, net in nets.items() if net.backbone.grid == grid}
        batches = data.ValBatches(split.val, C, grid, args.crop_size)
        for batch in data.val_batches(batches, rank, world, args.workers or 0, device):
            for name, net in alike.items():
                prediction = predict(net, batch["image"], args).argmax(1)  # [b, H, W]
                total[name] += confusion_matrix(prediction, batch["label"], C)
    every.train()
    return {name: rank_sum(t) for name, t in total.items()}


def predict_image(net: Segmenter, image: Image.Image, settings: Namespace) -> np.ndarray:
    """Class ids [H, W] uint8 of a PIL image by a network in eval mode, padded as in evaluation."""
    size = data.padded_size(image.size, net.backbone.grid, settings.crop_size)
    padded = Image.new("RGB", size, data.FILL)
    padded.paste(image.convert("RGB"))
    x = torch.from_numpy(np.array(padded)).to(next(net.parameters()).device)  # [H, W, 3]
    x = data.normalize(x[None].permute(0, 3, 1, 2).float() / 255)
    label = predict(net, x, settings).argmax(1)[0, : image.height, : image.width]
    return label.byte().cpu().numpy()


def load_best(path: str | Path, device: str = "cpu") -> tuple[Segmenter, list[str], Namespace]:
    """The network of a best.pt in eval mode, its classes, and the settings of its evaluation."""
    saved = load_checkpoint(Path(path))
    try:
        net = build_network(**saved["config"])
        net.load_state_dict(saved["net"])
        settings = Namespace(**saved["eval"])
        classes = list(saved["classes"])
    except (InputError, AttributeError, KeyError, RuntimeError, TypeError) as e:
        raise InputError(f"{path}: not a best.pt of ours ({first_line(e)}); give one") from None
    return net.place(torch.device(device)).eval(), classes, settings


def test(args: Namespace, device: torch.device) -> None:
    """--test-only: evaluates a best.pt on the val images, or predicts the pictures of --predict."""
    net, classes, _ = load_best(args.test_only, str(device))
    if net.config["backbone"] in DINOV2 and args.crop_size % PATCH:
        raise InputError(f"--crop-size {args.crop_size}: a DINOv2 needs a multiple of {PATCH}")
    if args.predict:
        raise SystemExit(predict_pictures(net, args))
    source = data.load_source(args.dataset, args.root)
    if source.classes != classes:
        what = f"its classes {classes} are not {source.classes}; give its own data set"
        raise InputError(f"{args.test_only}: {what}")
    miou, iou = iou_of(evaluate({"net": net}, source, args, device)["net"], classes)
    for name, value in iou.items():
        say(f"{name:>20} {'absent' if value is None else f'{value:6.2f}'}")
    how = f"{net.config['backbone']}, {args.eval_mode}, amp {args.amp}"
    say(f"mIoU {miou:.2f}{absent_note(iou)} on {len(source.val)} images · {how}")


def predict_pictures(net: Segmenter, args: Namespace) -> int:
    """--predict: class ids [H, W] and an overlay of each; returns 1 if one was unreadable."""
    pictures = [args.predict]
    if args.predict.is_dir():
        pictures = sorted(p for p in args.predict.iterdir() if p.is_file() and p.name[0] != ".")
    if not pictures or not pictures[0].exists():
        raise InputError(f"--predict {args.predict}: no picture there; give a file or a folder")
    folder = args.save_predictions
    if folder.resolve() == pictures[0].parent.resolve():
        raise InputError(f"--save-predictions {folder}: holds the pictures; give another folder")
    names = sorted(f"{path.stem}{end}.png" for path in pictures for end in ("", "_overlay"))
    clash = next((a for a, b in zip(names, names[1:], strict=False) if a == b), None)
    if clash:
        raise InputError(f"{args.predict}: two pictures would both be {clash}; rename one")
    unreadable = 0
    for path in tqdm(pictures, unit="image", disable=None):
        try:
            image = data.open_picture(path)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            unreadable += 1
            continue
        label = predict_image(net, image, args)
        overlay = Image.blend(image, Image.fromarray(data.palette()[label]), 0.5)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(folder / f"{path.stem}.png")
            overlay.save(folder / f"{path.stem}_overlay.png")
    print(f"{folder}: {len(pictures) - unreadable} predicted")
    return int(unreadable > 0)


# --------------------------------------------------------------------------------------- flags


def make_parser(script: str, description: str) -> ArgumentParser:
    """A parser with the flags that all scripts share; a script adds its own and calls `parse`."""
    sources = [Path(f).read_bytes() for f in (script, __file__, data.__file__)]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:12]
    p = ArgumentParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    p.set_defaults(method=Path(script).stem, sources=digest, labeled_only=False)
    g = p.add_argument_group("data")
    data.add_flags(g)
    g.add_argument("--crop-size", type=STEPS, help="side of the square training crop, pixels")
    g.add_argument("--scale", type=POSITIVE, nargs=2, metavar=("MIN", "MAX"), help="scale factor")
    g.add_argument("--batch-size", type=STEPS, help="labelled images per step; as many unlabelled")
    g.add_argument("--workers", type=COUNT, help="loaders per rank; unset: 4 (shapes: 0)")
    g = p.add_argument_group("network")
    g.add_argument("--backbone", choices=BACKBONES, help="encoder")
    g.add_argument("--weights", help="imagenet (DINOv2: its own), none, or a state-dict file")
    g.add_argument("--decoder", choices=("deeplab", "dpt"), default="deeplab", help="dpt: DINOv2")
    g.add_argument("--output-stride", type=int, choices=(8, 16), default=16, help="CNN's last map")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=STEPS, help="passes over the unlabelled images")
    g.add_argument("--iters", type=STEPS, help="steps; overrides --epochs")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="SGD has momentum 0.9")
    g.add_argument("--lr", type=POSITIVE, help="of the backbone at step 0; falls as (1 - t/T)^0.9")
    g.add_argument("--head-lr-mult", type=POSITIVE, help="the rest's learning rate over --lr")
    g.add_argument("--weight-decay", type=WEIGHT, help="L2 (sgd) or decoupled (adamw)")
    g.add_argument("--sup-loss", choices=("ce", "ohem"), default="ce", help="ohem: hard pixels")
    g.add_argument("--ohem-share", type=SHARE, default=0.156, help="least share of pixels for OHEM")
    g.add_argument("--threshold", type=SHARE, help="tau: pseudo-label confidence threshold, 0 to 1")
    g.add_argument("--ramp", type=SHARE, help="share of the run in which unsupervised terms rise")
    g.add_argument("--amp", choices=("bf16", "fp16", "off"), help="unset: bf16 if the GPU has it")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks")
    g.add_argument("--seed", type=COUNT, default=0, help="of weights, batches and augmentation")
    g = p.add_argument_group("evaluation and output")
    g.add_argument("--eval-mode", choices=("whole", "slide"), default="whole", help="or crops")
    g.add_argument("--eval-every", type=STEPS, help="steps between evaluations; unset: an epoch")
    g.add_argument("--save-every", type=STEPS, help="steps between saves, besides evaluations")
    g.add_argument("--log-every", type=STEPS, default=20, help="steps between log lines")
    g.add_argument("--out", type=Path, help="unset: in runs/, by script, data, split and seed")
    g.add_argument("--overwrite", action="store_true", help="start anew over what --out holds")
    g.add_argument("--resume-edited", action="store_true", help="resume despite edited code")
    g.add_argument("--test-only", type=Path, metavar="CKPT", help="evaluate a best.pt and stop")
    g.add_argument("--predict", type=Path, metavar="PICTURES", help="file or folder to label")
    g.add_argument("--save-predictions", type=Path, metavar="DIR", help="folder for its PNGs")
    return p


def parse(p: ArgumentParser, argv: list[str] | None, **method: dict) -> Namespace:
    """Parses over the presets of data set and backbone, then of `method`: all=, <data set>=dict."""
    words = sys.argv[1:] if argv is None else argv  # --help waits for the presets
    first = p.parse_known_args([word for word in words if word not in ("-h", "--help")])[0]
    saved = load_checkpoint(first.test_only) if first.test_only else {}
    name = first.dataset or saved.get("dataset")
    if first.test_only and name not in tuple(data.PRESETS):
        raise InputError(f"{first.test_only}: names no data set of ours; give --dataset too")
    dataset = data.find_dataset(name, first.root)
    vit = any(v in DINOV2 for v in vars(first).values() if isinstance(v, str))
    preset = data.PRESETS[dataset] | (data.DINOV2_PRESETS[dataset] if vit else {})
    rate = {"lr": preset["lr"]} if vit else {}  # a script's own is for CNNs
    preset |= method.get("all", {}) | method.get(dataset, {}) | rate
    if isinstance(saved.get("eval"), dict):  # evaluate as in its run, unless a flag says otherwise
        for name, value in saved["eval"].items():
            words = [f"--{name.replace('_', '-')}", str(value), *words]
    p.set_defaults(dataset=dataset, **preset)
    args = p.parse_args(words)
    told = [args.test_only, args.predict, args.save_predictions]
    if any(told[1:]) and not all(told):
        raise InputError("--predict, --save-predictions: give both, and --test-only CKPT")
    if args.crop_size < 32 or vit and args.crop_size % PATCH:
        raise InputError(f"--crop-size {args.crop_size}: give 32 or more; DINOv2: 42, 56, 70, ...")
    if dataset == "shapes" and not name:
        say(f"NOTE: no PASCAL VOC 2012 under {args.root}: this run uses the built-in shapes")
        say(f"NOTE: to fetch it: python data.py --dataset pascal --root {args.root} --download")
    return args


def settle(args: Namespace, split: data.Split, world: int, device: torch.device) -> None:
    """Fills the flags left open and refuses what cannot work; InputError names the flag."""
    if args.batch_size % (2 * world):
        what = f"--batch-size {args.batch_size} on {world} ranks"
        raise InputError(f"{what}: images are paired; give a multiple of {2 * world}")
    if len(split.unlabeled) < 2 and not args.labeled_only:
        raise InputError(f"--split {args.split}: fewer than 2 unlabelled; give --labeled-only")
    epoch = max(1, len(split.unlabeled or split.labeled) // args.batch_size)
    args.iters = args.iters or args.epochs * epoch
    args.eval_every = args.eval_every or epoch
    args.save_every = args.save_every or args.eval_every
    if args.workers is None:
        args.workers = 0 if args.dataset == "shapes" else min(4, os.cpu_count())
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    args.amp = args.amp or ("bf16" if bf16 else "off")
    if args.out is None:
        method = args.method + ("-labeled" if args.labeled_only else "")
        where = "folder-" + args.root.resolve().name if args.dataset == "folder" else args.dataset
        name = args.split.strip("/").replace("/", "-")
        args.out = Path("runs") / f"{method}-{where}-{name}-s{args.seed}"
    data.check_shared_memory(args, world, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), split)
    data.look_at_masks(split)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # torchrun's restarts go on
    if args.overwrite and first and rank_world()[0] == 0 and (args.out / "latest.pt").exists():
        with writing(args.out):  # renamed until the first step: till then nothing is lost
            os.replace(args.out / "latest.pt", args.out / "latest.old.pt")
    if args.compile:  # a part in training, in eval and at each size share one cache, of 8
        torch._dynamo.config.cache_size_limit = 64


# ------------------------------------------------------------------------------ the run folder


class RunError(Exception):
    """A run that cannot go on. The message is one line; what was saved stays as it is."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """RunError that names `path` where it cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        why = f"cannot be written ({first_line(e)})"
        raise RunError(f"{path}: {why}; give another place or free space") from None


def say(line: str) -> None:
    """Prints a line on rank 0."""
    if rank_world()[0] == 0:
        print(line, flush=True)


def flags_of(args: Namespace, split: data.Split) -> dict:
    """The flags that make a run what it is, and the hash of its lists, as plain values."""
    flags = {k: v for k, v in vars(args).items() if k not in FREE}
    return json.loads(json.dumps(flags | {"lists": split.hash}, default=str))


def resume(args: Namespace, split: data.Split, state: dict[str, object]) -> int:
    """Loads latest.pt into `state`, returns its step, else 0. InputError if its run was another."""
    latest = args.out / "latest.pt"
    again = "give another --out, or --overwrite"
    if not latest.exists():
        if (args.out / "best.pt").exists() and not args.overwrite:
            raise InputError(f"{args.out}: holds best.pt, but no latest.pt to go on from; {again}")
        return 0
    saved = load_checkpoint(latest, again)
    was = saved.get("flags")
    if not isinstance(was, dict):
        raise InputError(f"{latest}: not a latest.pt of ours; {again}")
    now = flags_of(args, split)
    differ = {k: f"{k} was {was.get(k)}, is {now[k]}" for k in now if was.get(k) != now[k]}
    edited = differ.pop("sources", None)
    if differ:
        raise InputError(f"{args.out}: other flags ({'; '.join(differ.values())}); {again}")
    if edited and not args.resume_edited:
        raise InputError(f"{args.out}: the code was edited since; {again}, or --resume-edited")
    try:
        for name, value in state.items():
            value.load_state_dict(saved[name])
        for optimizer in (value for value in state.values() if isinstance(value, Optimizer)):
            for p, s in optimizer.state.items():  # in the layout of p: a GPU has another
                s.update({k: torch.empty_like(p).copy_(v) for k, v in s.items() if v.dim() > 0})
        start = int(saved["step"])
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # noqa: BLE001 - any, on values that only look like a checkpoint
        raise InputError(f"{latest}: not of this script ({first_line(e)}); {again}") from None
    say(f"{latest}: going on from step {start} of {args.iters}")
    return start


class Log:
    """log.jsonl and args.json of a run. Rank 0 writes; all ranks know the evaluations."""

    def __init__(self, args: Namespace, start: int) -> None:
        """Takes over the lines up to step `start`; drops later ones, and files of an old run."""
        self.args = args
        self.rows: list[Tensor] = []  # terms that no line holds yet, [terms] each, on the device
        self.path = args.out / "log.jsonl"
        lines = []
        if start > 0 and self.path.exists():
            for text in self.path.read_text("utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a torn last line
                    lines.append(json.loads(text))
        lines = [line for line in lines if line["step"] <= start]
        self.evals = {line["step"]: line for line in lines if line["kind"] == "eval"}
        if dist.is_initialized():
            dist.barrier()  # until every rank has read what rank 0 now writes over
        self.clock = time.perf_counter()
        _process.training = True
        if rank_world()[0] > 0:
            return
        about = dict(command=shlex.join(sys.argv), python=sys.version, torch=torch.__version__)
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError):
            about["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
            if start == 0:
                (args.out / "best.pt").unlink(missing_ok=True)
                (args.out / "latest.old.pt").unlink(missing_ok=True)
            text = json.dumps(vars(args) | about, default=str, indent=1)
            (args.out / "args.json").write_text(text + "\n", "utf-8")
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
            os.replace(temporary, self.path)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def owes_evaluation(self, start: int) -> bool:
        """Whether the run was killed after the save at step `start`, before its evaluation."""
        due = start % self.args.eval_every == 0 or start == self.args.iters
        return start > 0 and due and start not in self.evals

    def add(self, losses: dict[str, Tensor]) -> None:
        """Keeps a step's scalars, on the device, until a line is due."""
        self.names = list(losses)
        self.rows.append(torch.stack([v.detach().float() for v in losses.values()]))

    def check(self, done: int) -> None:
        """Averages the kept scalars over ranks; one that is not finite ends the run."""
        rows = rank_mean(torch.stack(self.rows))  # [steps, terms]
        self.rows = list(rows)
        for step, row in enumerate(rows.tolist(), done - len(rows) + 1):
            for name, value in zip(self.names[::-1], row[::-1], strict=True):  # the total is last
                if not math.isfinite(value):
                    raise RunError(f"step {step}: {name} is {value}; {REMEDY}")

    def train(self, done: int, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
        """The line after step `done`: means of all terms since the line before, over all ranks."""
        self.check(done)
        if scaler.is_enabled() and scaler.get_scale() < 1:
            raise RunError(f"step {done}: gradients are not finite, fp16 skips them; {REMEDY}")
        terms = dict(zip(self.names, torch.stack(self.rows).mean(0).tolist(), strict=True))
        terms["lr"] = optimizer.param_groups[0]["lr"]
        line = {"step": done} | {name: float(f"{v:.6g}") for name, v in terms.items()}
        now = time.perf_counter()
        images = self.args.batch_size * (1 if self.args.labeled_only else 2)  # x and u
        line["images_s"] = round(len(self.rows) * images / (now - self.clock), 2)
        if torch.cuda.is_available():
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.rows = []
        self.clock = now
        self.write("train", line)

    def write(self, kind: str, line: dict, note: str = "") -> None:
        """A line of log.jsonl and of the terminal."""
        if rank_world()[0] == 0:
            with writing(self.path):
                self.file.write(json.dumps({"kind": kind} | line) + "\n")
                self.file.flush()
        said = " ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float))
        say(f"{kind} {line['step']}/{self.args.iters} {said}{note}")

    def close(self, stopped: int = 0) -> None:
        """The last line of a finished run, or of one that signal `stopped` ends: status 128 + n."""
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still be writing
        if stopped:
            say(f"signal {stopped}: saved; the same command, without --overwrite, goes on")
            raise SystemExit(128 + stopped)
        last = self.evals[max(self.evals)]
        best = max(self.evals.values(), key=lambda line: line["miou"])
        line = f"mIoU last {last['miou']:.2f}{absent_note(last['iou'])}"
        say(f"{line} · best {best['miou']:.2f} at step {best['step']} · {self.args.out}")


def save(state: dict[str, object], split: data.Split, log: Log, done: int) -> None:
    """latest.pt with all state after step `done`; what is not finite ends the run instead."""
    if log.rows:
        log.check(done)
    for net in (value for value in state.values() if isinstance(value, nn.Module)):
        finite = [t.isfinite().all() for t in net.state_dict().values() if t.is_floating_point()]
        if not torch.stack(finite).all():
            raise RunError(f"step {done}: a weight is not finite; {REMEDY}")
    if rank_world()[0] == 0:
        saved = {name: value.state_dict() for name, value in state.items()}
        saved |= {"flags": flags_of(log.args, split), "step": done}
        save_file(saved, log.args.out / "latest.pt")


def validate(
    nets: dict[str, Segmenter], split: data.Split, device: torch.device, log: Log, done: int
) -> None:
    """Evaluates `nets` after step `done`; the mIoU of the first decides on best.pt."""
    begin = time.perf_counter()
    args = log.args
    _process.evaluating = True
    confusions = evaluate(nets, split, args, device)
    _process.evaluating = False
    name, net = next(iter(nets.items()))
    miou, iou = iou_of(confusions.pop(name), split.classes)
    others = {f"miou_{n}": iou_of(m, split.classes)[0] for n, m in confusions.items()}
    line = {"step": done, "miou": miou} | others | {"iou": iou}
    best = max((old["miou"] for old in log.evals.values()), default=-1.0)
    # before the log line: a run killed in between evaluates again when it goes on
    if miou > best and rank_world()[0] == 0:
        saved = dict(net=net.state_dict(), config=net.config, classes=list(split.classes))
        saved |= dict(dataset=args.dataset, mean=data.MEAN, std=data.STD, step=done)
        saved["eval"] = dict(crop_size=args.crop_size, eval_mode=args.eval_mode, amp=args.amp)
        save_file(saved | {"miou": miou}, args.out / "best.pt")
    log.evals[done] = line
    log.write("eval", line, absent_note(iou))
    log.clock += time.perf_counter() - begin  # images/s is of training


def save_file(state: dict, path: Path) -> None:
    """torch.save beside `path`, then a rename: a reader finds the old file or the new."""
    temporary = path.with_suffix(".tmp")
    with writing(path):
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)


def catch_signals() -> None:
    """SIGTERM and Ctrl-C ask for a save; a second, or one in an evaluation, ends at once."""
    # a thread waits for them: Python's own handlers would wait until the main one is out of C
    woken, alarm = socket.socketpair()
    alarm.setblocking(False)
    signal.set_wakeup_fd(alarm.detach(), warn_on_full_buffer=False)

    def wait() -> None:
        while True:
            number = woken.recv(1)[0]
            echo = number == _process.signal == signal.SIGTERM and time.monotonic() < _process.until
            if echo or number not in (signal.SIGTERM, signal.SIGINT):  # or a loader's worker ended
                continue
            if _process.signal or _process.evaluating:
                print(f"signal {number}: ended at once; the last checkpoint stays", flush=True)
                os._exit(128 + number)
            _process.signal = number
            _process.until = time.monotonic() + 1  # torchrun repeats a cluster's SIGTERM

    threading.Thread(target=wait, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)


def stop_signal(due: bool) -> int:
    """The signal to stop at, or 0. Ranks agree on it where a log line is `due`, on the CPU."""
    if rank_world()[1] == 1:
        return _process.signal
    number = torch.tensor(_process.signal if due else 0)
    if due:
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def launch(main: Callable[[], None]) -> None:
    """Runs a script, ends the process without atexit; status 2: bad input, 1: a failed run."""
    status, line = 1, ""
    rank, world = rank_world()
    try:
        main()
        status = 0
    except (InputError, RunError) as e:
        status = 2 if isinstance(e, InputError) else 1
        line = str(e)
        if status == 2 and rank > 0 and not _process.training:  # all ranks see it: rank 0 says so,
            time.sleep(5)  # torchrun ends the others
    except SystemExit as e:
        status = int(e.code or 0)
    except KeyboardInterrupt:  # later ones are caught, see `catch_signals`
        status = 128 + signal.SIGINT
        line = "interrupted before the first step"
    except BaseException as e:
        told = first_line(e)
        if isinstance(e, MemoryError) or re.search("(of|enough|allocate|shared) memory", told):
            line = f"{told}; lower --batch-size, --crop-size or --workers, or --eval-mode slide"
        else:
            traceback.print_exc()
    if line:
        print(f"[rank {rank}] error: {line}" if world > 1 else f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: other ranks may wait in a collective, workers for its data
