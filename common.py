"""What the methods share and no paper is about: networks, weights, ranks, evaluation, run folder.

State-dict keys and shapes of a backbone are those of its published file (torchvision's, DINOv2's).
Dimension key: B images, C classes, H and W pixels, h and w cells of a feature map.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import ASPP
from tqdm import tqdm

import data
from data import COUNT, POSITIVE, SHARE, STEPS, WEIGHT, InputError

CNNS = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
DINOV2 = {"dinov2_vits14": (384, 6), "dinov2_vitb14": (768, 12)}  # width, attention heads
DPT_WIDTHS = {384: ((48, 96, 192, 384), 64), 768: ((96, 192, 384, 768), 128)}  # maps, features
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"
BACKBONES = (*CNNS, *DINOV2)

# --------------------------------------------------------------------------- CNN backbones


class CNN(nn.Sequential):
    """torchvision's backbone as a row of its own stages: its state-dict keys are torchvision's.

    forward: image [B, 3, H, W] to the stride-4 map and the last map (stride 16 or 8).
    """

    grid = 16  # evaluation pads images to the crop modulo this

    def __init__(self, name: str, output_stride: int) -> None:
        net = getattr(models, name)(weights=None)
        if name == "mobilenet_v2":  # without the last 1x1 to 1280 channels, a classifier's input
            stages = list(net.features[:18].named_children())
            low, stride_16, stride_32 = "3", range(7, 14), range(14, 18)
            channels = (24, 320)
        else:  # without pooling and classifier
            stages = list(net.named_children())[:-2]
            low, stride_16, stride_32 = "layer1", ["layer3"], ["layer4"]
            channels = (64, 512) if name in ("resnet18", "resnet34") else (256, 2048)
        super().__init__(OrderedDict(stages))
        self.low = low
        self.channels = channels
        for stride, names in ((16, stride_16), (32, stride_32)):
            if stride > output_stride:
                for stage in names:
                    _dilate(self.get_submodule(str(stage)), stride // output_stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        for name, stage in self.named_children():
            x = stage(x)
            if name == self.low:
                low = x
        return [low, x]


def _dilate(stage: nn.Module, dilation: int) -> None:
    """A stage that would halve the resolution keeps it: stride 1, 3x3 kernels spread by `dilation`.

    The convolution that had the stride keeps the spread before it, as in torchvision's ResNets.
    """
    for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
        spread = dilation // 2 if conv.stride == (2, 2) else dilation
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (spread, spread)


# ------------------------------------------------------------------ DINOv2 (Oquab et al., 2023)

PATCH, TABLE, DEPTH = 14, 37, 12  # pixels, the position table's side, blocks
TAKEN = (2, 5, 8, 11)  # blocks whose maps are returned


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, width / heads]
        return self.proj(x.transpose(1, 2).reshape(b, n, width))


class Block(nn.Module):
    """x + gamma1 attention(norm x), then x + gamma2 mlp(norm x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        mlp = dict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


class DINOv2(nn.Module):
    """Image [B, 3, H, W], H and W multiples of 14, to four maps [B, width, H/14, W/14]."""

    grid = PATCH

    def __init__(self, name: str) -> None:
        super().__init__()
        width, heads = DINOV2[name]
        self.channels = (width,) * len(TAKEN)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TABLE**2, width))
        # in the published file, used by DINOv2's own training alone
        self.mask_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, PATCH, PATCH)))
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
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # [B, h w, width]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = x + self.positions(h, w)
        maps = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in TAKEN:
                maps.append(self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (h, w)))
        return maps


# ---------------------------------------------------------------------- DPT (Ranftl et al., 2021)


class ResidualConvUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class Fusion(nn.Module):
    """RefineNet-style: adds a refined skip, refines the sum, upsamples it, 1 x 1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.skip = ResidualConvUnit(width)
        self.refine = ResidualConvUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = x if skip is None else x + self.skip(skip)
        x = F.interpolate(self.refine(x), size, mode="bilinear", align_corners=True)
        return self.out(x)


class DPTDecoder(nn.Module):
    """Four maps [B, width, h, w] to the classifier's input [B, features, 8h, 8w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        steps, features = DPT_WIDTHS[width]
        self.project = nn.ModuleList(nn.Conv2d(width, s, 1) for s in steps)
        up_4 = nn.ConvTranspose2d(steps[0], steps[0], 4, 4)
        up_2 = nn.ConvTranspose2d(steps[1], steps[1], 2, 2)
        down_2 = nn.Conv2d(steps[3], steps[3], 3, 2, 1)
        self.resize = nn.ModuleList([up_4, up_2, nn.Identity(), down_2])
        self.reduce = nn.ModuleList(nn.Conv2d(s, features, 3, padding=1, bias=False) for s in steps)
        self.fuse = nn.ModuleList(Fusion(features) for _ in steps)
        # the deepest fusion has no skip; the published design counts its unit, and so do we
        self.fuse[3].skip.requires_grad_(False)
        self.head = nn.Sequential(nn.Conv2d(features, features, 3, padding=1), nn.ReLU())

    def forward(self, maps: list[Tensor]) -> Tensor:
        skips = []
        for k, features in enumerate(maps):
            skips.append(self.reduce[k](self.resize[k](self.project[k](features))))
        x = self.fuse[3](skips[3], None, skips[2].shape[-2:])
        x = self.fuse[2](x, skips[2], skips[1].shape[-2:])
        x = self.fuse[1](x, skips[1], skips[0].shape[-2:])
        height, width = skips[0].shape[-2:]
        return self.head(self.fuse[0](x, skips[0], (2 * height, 2 * width)))


# -------------------------------------------------------------------------- segmentation networks


def conv_bn_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """A convolution without bias that keeps the size, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def upsample(z: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as the baselines: [B, C, h, w] to [B, C, *size] in float32."""
    return F.interpolate(z.float(), size, mode="bilinear", align_corners=True)


class DeepLabDecoder(nn.Module):
    """DeepLabV3+ (Chen et al., 2018): ASPP, 48 low-level channels, two 3x3 convolutions.

    Maps to the classifier's input [B, 256, h, w] at stride 4, on DINOv2's patches 14. ASPP is
    torchvision's without its dropout: a forward has no randomness of its own.
    """

    def __init__(self, low: int, deep: int, dilation: int) -> None:
        super().__init__()
        self.aspp = ASPP(deep, [rate * dilation for rate in (6, 12, 18)], 256)
        self.aspp.project = self.aspp.project[:3]
        self.reduce = conv_bn_relu(low, 48, 1)
        self.fuse = nn.Sequential(conv_bn_relu(256 + 48, 256, 3), conv_bn_relu(256, 256, 3))

    def forward(self, maps: list[Tensor]) -> Tensor:
        low = self.reduce(maps[0])
        deep = upsample(self.aspp(maps[-1]), low.shape[-2:]).to(low.dtype)
        return self.fuse(torch.cat([deep, low], 1))


class Segmenter(nn.Module):
    """A backbone, a decoder and a 1x1 classifier; what is not the backbone is the head.

    `config` is what `build_network` needs to build it again.
    """

    def __init__(self, backbone: str, num_classes: int, output_stride: int, decoder: str) -> None:
        super().__init__()
        self.config = dict(backbone=backbone, num_classes=num_classes)
        self.config.update(output_stride=output_stride, decoder=decoder)
        self.layout = torch.contiguous_format
        vit = backbone in DINOV2
        self.backbone = DINOv2(backbone) if vit else CNN(backbone, output_stride)
        low = self.backbone.channels[0]
        deep = self.backbone.channels[-1]
        if decoder == "dpt":
            self.decoder = DPTDecoder(deep)
        else:
            self.decoder = DeepLabDecoder(low, deep, 1 if vit else 16 // output_stride)
        width = DPT_WIDTHS[deep][1] if decoder == "dpt" else 256
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def place(self, device: torch.device) -> "Segmenter":
        """Moves the network to a device, in the memory layout that trains faster there.

        That is channels_last, but not for full convolutions on a CPU: there the gradient of a
        weight is made in the plain layout, and copying 10 to 60 million of them back costs more.
        """
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
        """Every trained parameter that is not the backbone's."""
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


def load_checkpoint(path: Path, remedy: str = "give a state_dict") -> dict:
    """A dict of tensors and plain values, never code; InputError on anything else."""
    # beside tensors, files hold flags and numbers: these types do nothing when they are read
    scalar = np.float64(0).__reduce__()[0]
    safe = [argparse.Namespace, np.dtype]
    safe += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    safe += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001 - the readers raise all kinds on broken bytes
        kind = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(e))
        why = f"holds a {kind[1]}" if kind else f"{type(e).__name__}: {e}".splitlines()[0]
        raise InputError(f"{path}: no loadable checkpoint ({why}); {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}; {remedy}")
    return found


def load_weights(net: Segmenter, name: str, weights: str, classes: list[str] | None = None) -> str:
    """Loads imagenet, none, or a file. Returns a line that says what was loaded.

    The whole network from a best.pt of ours with these `classes`; else the backbone, found in any
    file that holds it, under whatever wrapping and prefix. InputError when a backbone key is
    missing or of another shape.
    """
    if weights == "none":
        return f"{name}: random weights"
    found = download_weights(name) if weights == "imagenet" else load_checkpoint(Path(weights))
    if classes and found.get("classes") == classes and found.get("config") == net.config:
        try:
            net.load_state_dict(found["net"])
        except (KeyError, RuntimeError) as e:
            raise InputError(f"{weights}: a broken best.pt ({str(e).splitlines()[0]})") from None
        return f"{name}: weights {weights}: the whole network of step {found.get('step')}"
    own = net.backbone.state_dict()
    state = find_backbone(found, own)
    same = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in same and not k.endswith("num_batches_tracked")]
    others = [k for k in state if k not in own]
    line = f"{name}: weights {weights}: {len(same)} keys matched"
    line += f", {len(missing)} missing, {len(others)} unexpected"
    stages = {key.split(".")[0] for key in own}
    # a classifier's have other first names, and none is a bare tensor like a ViT's register_tokens
    wrong = missing + [k for k in others if "." not in k or k.split(".")[0] in stages]
    if wrong:
        sizes = [tuple(v[wrong[0]].shape) for v in (state, own) if wrong[0] in v]
        what = f"has shapes {sizes}" if len(sizes) == 2 else f"is only in one of them, {sizes}"
        raise InputError(f"{line}; {wrong[0]} {what}: another architecture; give a file of {name}")
    net.backbone.load_state_dict(same, strict=False)
    return line


def find_backbone(found: dict, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `found`, or of a dict in it, that match most keys of `own`, prefix removed."""
    first = next(iter(own))
    parts = []
    dicts = [found]
    for state in dicts:
        inner = [value for value in state.values() if isinstance(value, dict)]
        dicts += [value for value in inner if all(value is not seen for seen in dicts)]
        named = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
        prefixes = {k.removesuffix(first) for k in named if k.endswith(first)} | {""}
        for prefix in sorted(prefixes):
            part = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
            parts.append(part)
    return max(parts, key=lambda part: len(part.keys() & own.keys()))


def download_weights(name: str) -> dict:
    """The published file of a backbone; torch.hub keeps it."""
    try:
        if name in DINOV2:
            url = DINOV2_URL.format(name)
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        return models.get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as e:
        what = f"--weights imagenet: {name} cannot be fetched ({e})"
        raise InputError(f"{what}; give a FILE or none") from None


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
        what = f"LOCAL_RANK {local}: no such GPU, this process sees {torch.cuda.device_count()}"
        raise RunError(f"{what}; lower --nproc_per_node, or CUDA_VISIBLE_DEVICES= for CPU ranks")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    return device


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
    """A mask or label [B, H, W] at the pixels nearest to the cells of a map: [B, *size].

    Corners are aligned as in `upsample`: cell i of h reads pixel round(i (H - 1) / (h - 1)).
    """
    row = _nearest_pixels(mask.shape[1], size[0], mask.device)
    column = _nearest_pixels(mask.shape[2], size[1], mask.device)
    return mask[:, row][:, :, column]


def _nearest_pixels(pixels: int, cells: int, device: torch.device) -> Tensor:
    gaps = max(1, cells - 1)
    return (torch.arange(cells, device=device) * 2 * (pixels - 1) + gaps) // (2 * gaps)


def masked_mean(a: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """sum(a keep) / max(sum(valid), 1) over all ranks: few confident pixels make a small loss."""
    return (a * keep).sum() / rank_mean(valid.sum()).clamp_min(1)


def supervised_loss(
    z: Tensor, y: Tensor, kind: str, share: float = 0.156, thresh: float = 0.7
) -> Tensor:
    """CE over the labelled pixels of the global batch; z [B, C, H, W], y [B, H, W], 255 ignored.

    kind "ohem" keeps the pixels whose true class has a probability of at most `thresh`, or the
    `share` of the global batch's pixels with the lowest where those would be fewer.
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
        kth = everyone.kthvalue(max(1, round(share * len(everyone)))).values
        keep = keep & (p <= kth.clamp_min(thresh))
    return masked_mean(ce, keep, keep)


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(net: Segmenter, image: Tensor, settings: argparse.Namespace) -> Tensor:
    """Scores [B, C, H, W] whose argmax is the prediction; image [B, 3, H, W] on the net's grid.

    Whole image: logits. eval_mode "slide": mean softmax of windows of crop_size, 2/3 of it apart,
    the last one shifted inside. Precision is by settings.amp.
    """
    dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
    with torch.autocast(image.device.type, dtype, enabled=settings.amp != "off"):
        if settings.eval_mode == "whole":
            return net(image)
        height, width = image.shape[-2:]
        crop = settings.crop_size
        image = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))
        tops = _window_starts(image.shape[-2], crop)
        lefts = _window_starts(image.shape[-1], crop)
        total = image.new_zeros(len(image), net.config["num_classes"], *image.shape[-2:])
        count = image.new_zeros(image.shape[-2:])
        for top, left in itertools.product(tops, lefts):
            rows = slice(top, top + crop)
            columns = slice(left, left + crop)
            total[:, :, rows, columns] += net(image[:, :, rows, columns]).softmax(1)
            count[rows, columns] += 1
        return (total / count)[:, :, :height, :width]


def _window_starts(size: int, crop: int) -> list[int]:
    stride = crop * 2 // 3
    return [min(i * stride, size - crop) for i in range(math.ceil((size - crop) / stride) + 1)]


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """[C, C] int64, row = label, column = prediction; ignored pixels are left out."""
    cell = torch.where(label == data.IGNORE, classes**2, label * classes + prediction)
    return torch.bincount(cell.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)


def iou_of(confusion: Tensor) -> tuple[float, list[float | None]]:
    """mIoU over classes present in labels or predictions, IoU per class (None: absent), percent."""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    pairs = list(zip(confusion.diagonal().tolist(), union.tolist(), strict=True))
    iou = [round(100 * i / u, 4) if u else None for i, u in pairs]
    present = [100 * i / u for i, u in pairs if u]
    return round(sum(present) / max(len(present), 1), 4), iou


def absent_note(iou: dict[str, float | None]) -> str:
    """Over how many of the classes a mIoU is, where some are in no val label or prediction."""
    absent = [name for name, value in iou.items() if value is None]
    if not absent:
        return ""
    return f" over {len(iou) - len(absent)} of {len(iou)} classes (absent: {', '.join(absent)})"


@torch.no_grad()
def evaluate(
    nets: dict[str, Segmenter], split: data.Split, args: argparse.Namespace, device: torch.device
) -> dict[str, Tensor]:
    """Confusion matrices [C, C] of networks over the val images, each once over all ranks.

    Batches do not depend on the number of ranks, so neither does rounding. Images are padded to
    each network's own grid, to a size congruent to the crop: with aligned corners, cells then lie
    as far apart as in training. Networks are left in train mode.
    """
    rank, world = rank_world()
    classes = len(split.classes)
    total = {n: torch.zeros(classes, classes, dtype=torch.int64, device=device) for n in nets}
    tuning = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # it would tune anew for each size
    for grid in {net.backbone.grid for net in nets.values()}:
        alike = {name: net.eval() for name, net in nets.items() if net.backbone.grid == grid}
        batches = data.ValBatches(split.val, classes, grid, args.crop_size)
        for batch in data.val_batches(batches, rank, world, args.workers, device):
            for name, net in alike.items():
                prediction = predict(net, batch["image"], args).argmax(1)  # [b, H, W]
                total[name] += confusion_matrix(prediction, batch["label"], classes)
    for net in nets.values():
        net.train()
    torch.backends.cudnn.benchmark = tuning
    return {name: rank_sum(t) for name, t in total.items()}


@torch.no_grad()
def predict_image(net: Segmenter, image: Image.Image, settings: argparse.Namespace) -> np.ndarray:
    """Class ids [H, W] uint8 of a PIL image by a network in eval mode, padded as in evaluation."""
    batches = data.ValBatches([], 1, net.backbone.grid, settings.crop_size)
    height, width = batches.padded(image.size)
    padded = Image.new("RGB", (width, height), data.FILL)
    padded.paste(image.convert("RGB"))
    x = torch.from_numpy(np.array(padded)).to(next(net.parameters()).device)  # [H, W, 3]
    x = data.normalize(x[None].permute(0, 3, 1, 2).float() / 255)
    label = predict(net, x, settings).argmax(1)[0, : image.height, : image.width]
    return label.byte().cpu().numpy()


def load_best(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[Segmenter, list[str], argparse.Namespace]:
    """The network of a best.pt in eval mode, its class names, and the settings of its evaluation.

    InputError for any other file.
    """
    saved = load_checkpoint(Path(path))
    try:
        net = build_network(**saved["config"])
        net.load_state_dict(saved["net"])
        settings = argparse.Namespace(**saved["eval"])
        classes = list(saved["classes"])
    except (InputError, AttributeError, KeyError, RuntimeError, TypeError) as e:
        why = str(e).splitlines()[0]
        raise InputError(f"{path}: no best.pt of ours ({why}); give one") from None
    return net.place(torch.device(device)).eval(), classes, settings


def test(args: argparse.Namespace, device: torch.device) -> None:
    """--test-only: evaluates a best.pt on the val images, or predicts --predict; on rank 0.

    An unreadable picture of --predict is named, and the exit status then is 1.
    """
    net, classes, _ = load_best(args.test_only, device)
    if net.config["backbone"] in DINOV2 and args.crop_size % PATCH:
        what = f"{args.test_only} holds a DINOv2; give a multiple of {PATCH}"
        raise InputError(f"--crop-size {args.crop_size}: {what}")
    if rank_world()[0] > 0:
        return
    if args.predict:
        items = list_pictures(args)
    else:
        source = data.load_source(args.dataset, args.root)
        items = source.val
        if source.classes != classes:
            what = f"its {len(classes)} classes are not the {len(source.classes)} of {source.name}"
            raise InputError(f"{args.test_only}: {what}; evaluate it on its own data set")
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    unreadable = 0
    for item in tqdm(items, unit="image", disable=None):
        try:
            image = data.read_image(item)
        except InputError as e:
            if not args.predict:
                raise
            print(f"error: {e}", file=sys.stderr)
            unreadable += 1
            continue
        label = predict_image(net, image, args)
        if args.save_predictions:
            save_prediction(image, label, args.save_predictions, item.id)
        if not args.predict:
            truth = np.array(data.read_mask(item, image.size, len(classes)), np.int64)
            truth = torch.from_numpy(truth)
            confusion += confusion_matrix(torch.from_numpy(label), truth, len(classes))
    if args.predict:
        print(f"{args.save_predictions}: {len(items) - unreadable} predicted")
        raise SystemExit(int(unreadable > 0))
    miou, values = iou_of(confusion)
    iou = dict(zip(classes, values, strict=True))
    for name, value in iou.items():
        print(f"{name:>20} {'absent' if value is None else f'{value:6.2f}'}")
    how = f"{net.config['backbone']}, {args.eval_mode}, amp {args.amp}"
    print(f"mIoU {miou:.2f}{absent_note(iou)} on {len(items)} images · {how} · {args.test_only}")


def list_pictures(args: argparse.Namespace) -> list[data.Item]:
    """The pictures of --predict, a file or a folder; InputError where output would overwrite."""
    pictures = [args.predict]
    if args.predict.is_dir():
        pictures = sorted(p for p in args.predict.iterdir() if p.is_file() and p.name[0] != ".")
    if not pictures or not pictures[0].exists():
        raise InputError(f"--predict {args.predict}: no picture there; give a file or a folder")
    folder = args.save_predictions
    if folder.resolve() == pictures[0].parent.resolve():
        raise InputError(f"--save-predictions {folder}: holds the pictures; give another folder")
    names = [f"{path.stem}{end}" for path in pictures for end in ("", "_overlay")]
    clashes = [name for name in names if names.count(name) > 1]
    if clashes:
        what = f"two pictures would both be {clashes[0]}.png"
        raise InputError(f"{args.predict}: {what}; rename one")
    return [data.Item(path.stem, path, None) for path in pictures]


def save_prediction(image: Image.Image, label: np.ndarray, folder: Path, name: str) -> None:
    """<name>.png holds class ids [H, W], <name>_overlay.png the RGB image under their colours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(folder / f"{name}.png")
        colors = Image.fromarray(data.palette()[label])
        Image.blend(image, colors, 0.5).save(folder / f"{name}_overlay.png")
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); free space") from None


# --------------------------------------------------------------------------------------- flags

# flags that the parts of a resumed run need not share, as they do not change its result
FREE = ("out", "root", "workers", "save_every", "overwrite", "resume_edited")


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share; a script adds its own and calls `parse`.

    The name of the file `script` is the method's, so that a copy of it has runs of its own.
    """
    sources = [Path(f).read_bytes() for f in (script, __file__, data.__file__)]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:12]
    p = argparse.ArgumentParser(description=description)
    p.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    p.set_defaults(method=Path(script).stem, sources=digest, labeled_only=False)
    g = p.add_argument_group("data")
    data.add_flags(g)
    g.add_argument("--crop-size", type=STEPS, help="side of the square training crop, pixels")
    g.add_argument("--scale", type=POSITIVE, nargs=2, metavar=("MIN", "MAX"), help="random scale")
    g.add_argument("--batch-size", type=STEPS, help="labelled images a step; as many unlabelled")
    g.add_argument("--workers", type=COUNT, help="loader processes a rank; unset: 4, for shapes 0")
    g = p.add_argument_group("network")
    g.add_argument("--backbone", choices=BACKBONES, help="encoder")
    g.add_argument("--weights", help="imagenet (DINOv2: its own), none, or a state-dict file")
    g.add_argument(
        "--decoder", choices=("deeplab", "dpt"), default="deeplab", help="dpt: for DINOv2"
    )
    g.add_argument(
        "--output-stride", type=int, choices=(8, 16), default=16, help="CNN stride, pixels"
    )
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=STEPS, help="passes over the unlabelled images")
    g.add_argument("--iters", type=STEPS, help="steps; overrides --epochs")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="SGD has momentum 0.9")
    g.add_argument("--lr", type=POSITIVE, help="of the backbone at step 0; falls as (1 - t/T)^0.9")
    g.add_argument("--head-lr-mult", type=POSITIVE, help="the rest's learning rate over --lr")
    g.add_argument("--weight-decay", type=WEIGHT, help="L2 (sgd) or decoupled (adamw)")
    g.add_argument(
        "--sup-loss", choices=("ce", "ohem"), default="ce", help="ohem: hard pixels only"
    )
    g.add_argument("--ohem-share", type=SHARE, default=0.156, help="least share of pixels for OHEM")
    g.add_argument("--threshold", type=SHARE, help="tau: pseudo-label confidence threshold, 0 to 1")
    g.add_argument("--ramp", type=SHARE, help="share of the run in which unlabelled terms rise")
    g.add_argument("--amp", choices=("bf16", "fp16", "off"), help="unset: bf16 if the GPU has it")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks")
    g.add_argument("--seed", type=COUNT, default=0, help="of weights, batches and augmentation")
    g = p.add_argument_group("evaluation and output")
    g.add_argument("--eval-mode", choices=("whole", "slide"), default="whole", help="image at once")
    g.add_argument("--eval-every", type=STEPS, help="steps between evaluations; unset: an epoch")
    g.add_argument("--save-every", type=STEPS, help="steps between saves; unset: --eval-every")
    g.add_argument("--log-every", type=STEPS, default=20, help="steps between log lines")
    g.add_argument("--out", type=Path, help="unset: runs/<script>-<dataset>-<split>-s<seed>")
    g.add_argument("--overwrite", action="store_true", help="start anew over what --out holds")
    g.add_argument("--resume-edited", action="store_true", help="resume despite edited code")
    g.add_argument("--test-only", type=Path, metavar="CKPT", help="evaluate a best.pt and stop")
    g.add_argument(
        "--predict", type=Path, metavar="PICTURES", help="file or folder, with --test-only"
    )
    g.add_argument("--save-predictions", type=Path, metavar="DIR", help="PNGs, with --test-only")
    return p


def parse(
    p: argparse.ArgumentParser, argv: list[str] | None, **method: dict[str, object]
) -> argparse.Namespace:
    """Parses in two goes: data set and backbone choose the presets that other flags default to.

    `method` overrides presets by data set name or "all", e.g. `all=dict(threshold=0.0)`.
    """
    first = p.parse_known_args(argv)[0]
    saved = load_checkpoint(first.test_only) if first.test_only else {}
    name = first.dataset or saved.get("dataset")
    if first.test_only and name not in tuple(data.PRESETS):
        raise InputError(f"{first.test_only}: names no data set of ours; give --dataset too")
    dataset = data.find_dataset(name, first.root)
    vit = first.backbone in DINOV2 or vars(first).get("senior") in DINOV2
    preset = data.PRESETS[dataset] | (data.DINOV2_PRESETS[dataset] if vit else {})
    rate = {"lr": preset["lr"]} if vit else {}  # a script's own is for CNNs
    preset |= method.get("all", {}) | method.get(dataset, {}) | rate
    if isinstance(saved.get("eval"), dict):  # --test-only: as best.pt was evaluated, unless told
        # as text, which argparse checks like a flag
        preset |= {k: str(saved["eval"].get(k)) for k in ("crop_size", "eval_mode", "amp")}
    p.set_defaults(dataset=dataset, **preset)
    args = p.parse_args(argv)
    if args.save_predictions and not args.test_only:
        raise InputError("--save-predictions: goes with --test-only CKPT")
    if args.predict and not args.save_predictions:
        raise InputError("--predict: goes with --test-only CKPT --save-predictions DIR")
    patch = PATCH if vit else 1
    if args.crop_size < 32 or args.crop_size % patch:
        needs = f"give at least 32 pixels, for DINOv2 a multiple of {PATCH}"
        raise InputError(f"--crop-size {args.crop_size}: {needs}")
    if dataset == "shapes" and not name:
        fetch = f"python data.py --dataset pascal --root {args.root} --download"
        say(f"NOTE: no PASCAL VOC 2012 under {args.root}: this run uses the built-in shapes")
        say(f"NOTE: to train on VOC, first run: {fetch}")
    return args


def settle(args: argparse.Namespace, split: data.Split, world: int, device: torch.device) -> None:
    """Fills the flags left open and refuses what cannot work; InputError names the flag."""
    if args.batch_size % (2 * world):
        why = f"on {world} ranks: each needs an even share, as CutMix pairs neighbours"
        what = f"--batch-size {args.batch_size} {why}"
        raise InputError(f"{what}; give a multiple of {2 * world}")
    if args.scale[0] > args.scale[1]:
        raise InputError(f"--scale {args.scale[0]} {args.scale[1]}: give the smaller one first")
    if len(split.unlabeled) < 2 and not args.labeled_only:
        left = f"leaves {len(split.unlabeled) or 'no'} unlabelled image, CutMix pairs two"
        raise InputError(f"--split {args.split}: {left}; label fewer, or --labeled-only")
    epoch = max(1, len(split.unlabeled or split.labeled) // args.batch_size)
    args.iters = args.iters or args.epochs * epoch
    args.eval_every = args.eval_every or epoch
    args.save_every = args.save_every or args.eval_every
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        args.workers = 0 if args.dataset == "shapes" else min(4, cores)
    if args.amp is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        args.amp = "bf16" if bf16 else "off"
    if args.out is None:
        name = args.split.replace("/", "-")
        if os.path.isdir(args.split):
            name = Path(args.split).resolve().name
        method = args.method + ("-labeled" if args.labeled_only else "")
        where = "folder-" + args.root.resolve().name if args.dataset == "folder" else args.dataset
        args.out = Path(f"runs/{method}-{where}-{name}-s{args.seed}")
    data.check_shared_memory(args, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), split)
    data.look_at_masks(split)
    if args.compile:
        # a part in training, in eval and at each size share one cache, of 8 by default
        torch._dynamo.config.cache_size_limit = 64


# ------------------------------------------------------------------------------ the run folder


class RunError(Exception):
    """A run that cannot go on. The message is one line; what was saved stays as it is."""


def say(line: str) -> None:
    """Prints a line on rank 0."""
    if rank_world()[0] == 0:
        print(line, flush=True)


def flags_of(args: argparse.Namespace, split: data.Split) -> dict:
    """The flags that make a run what it is, and the hash of its lists, as plain values."""
    flags = {k: v for k, v in vars(args).items() if k not in FREE}
    return json.loads(json.dumps(flags | {"lists": split.hash}, default=str))


def resume(args: argparse.Namespace, split: data.Split, state: dict[str, object]) -> int:
    """Loads latest.pt of --out into `state`; returns the step to go on from, 0 in a new folder.

    InputError if that run had other flags, lists or sources.
    """
    latest = args.out / "latest.pt"
    again = "give another --out, or --overwrite"
    # --overwrite is for the first attempt alone: torchrun's restarts go on
    if args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return 0
    if not latest.exists():
        if (args.out / "best.pt").exists() and not args.overwrite:
            raise InputError(f"{args.out}: holds best.pt, but no latest.pt to go on from; {again}")
        return 0
    saved = load_checkpoint(latest, again)
    was = saved.get("flags")
    now = flags_of(args, split)
    if not isinstance(was, dict):
        raise InputError(f"{latest}: no latest.pt of ours; {again}")
    differ = [f"{k} was {was.get(k)}, is {now[k]}" for k in now if was.get(k) != now[k]]
    edited = [text for text in differ if text.startswith("sources ")]
    if differ != edited:
        what = "; ".join(text for text in differ if text not in edited)
        raise InputError(f"{args.out}: holds a run with other flags ({what}); {again}")
    if edited and not args.resume_edited:
        what = f"{args.method}.py, common.py or data.py was edited since this run began"
        raise InputError(f"{args.out}: {what}; {again}, or --resume-edited to go on all the same")
    try:
        for name, value in state.items():
            value.load_state_dict(saved[name])
        start = int(saved["step"])
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # noqa: BLE001 - any, on values that only look like a checkpoint
        why = str(e).splitlines()[0][:120]
        raise InputError(f"{latest}: not of this script ({why}); {again}") from None
    finished = "finished before, no step is left; --overwrite starts anew"
    say(f"{latest}: {finished if start == args.iters else f'going on from step {start}'}")
    return start


class Log:
    """log.jsonl and args.json of a run. Rank 0 writes; all ranks know the evaluations."""

    def __init__(self, args: argparse.Namespace, start: int) -> None:
        """Takes over the lines up to step `start`; drops later ones, and files of an old run."""
        self.args = args
        self.path = args.out / "log.jsonl"
        self.rows: list[Tensor] = []  # terms that no line holds yet, [terms] each, on the device
        lines = []
        if start > 0 and self.path.exists():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a torn last line
                    lines.append(json.loads(text))
        lines = [line for line in lines if line["step"] <= start]
        self.evals = {line["step"]: line for line in lines if line["kind"] == "eval"}
        if dist.is_initialized():
            dist.barrier()  # until every rank has read what rank 0 now writes over
        try:
            if rank_world()[0] == 0:
                self._open(lines, start)
        except OSError as e:
            what = f"{args.out}: cannot be written ({e.strerror})"
            raise RunError(f"{what}; give another --out") from None
        self.since = start
        self.clock = time.perf_counter()
        _process.training = True

    def _open(self, lines: list[dict], start: int) -> None:
        out = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        if start == 0:  # latest.pt first: nothing then goes on from it without its log
            (out / "latest.pt").unlink(missing_ok=True)
            (out / "best.pt").unlink(missing_ok=True)
        about = vars(self.args) | dict(command=shlex.join(sys.argv), torch=torch.__version__)
        about["python"] = platform.python_version()
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError):
            about["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        text = json.dumps(about, default=str, indent=1)
        (out / "args.json").write_text(text + "\n", encoding="utf-8")
        kept = out / "log.jsonl.tmp"
        kept.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(kept, self.path)
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
        if not self.rows:
            return
        rows = rank_mean(torch.stack(self.rows))  # [steps, terms]
        self.rows = list(rows)
        bad = (~rows.isfinite()).nonzero().tolist()
        if bad:  # the first column is the total: name the term that spoils it, if there is one
            row, term = next((b for b in bad if b[0] == bad[0][0] and b[1] > 0), bad[0])
            what = f"{self.names[term]} is {rows[row, term]:.0f}"
            self.not_finite(done - len(rows) + row + 1, what)

    def not_finite(self, step: int, what: str) -> None:
        """Ends the run."""
        kept = f"the last good checkpoint in {self.args.out} stays"
        raise RunError(f"step {step}: {what}; {kept}; try a lower --lr, or --amp bf16 or off")

    def train(
        self, done: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """The line after step `done`: means of all terms since the line before, over all ranks."""
        self.check(done)
        if scaler.is_enabled() and scaler.get_scale() < 1:
            self.not_finite(done, "gradients are not finite, fp16 has left out their steps")
        terms = dict(zip(self.names, torch.stack(self.rows).mean(0).tolist(), strict=True))
        self.rows = []
        terms["lr"] = optimizer.param_groups[0]["lr"]
        line = {"step": done} | {name: float(f"{v:.6g}") for name, v in terms.items()}
        now = time.perf_counter()
        images = self.args.batch_size * (1 if self.args.labeled_only else 2)
        line["images_s"] = round((done - self.since) * images / max(now - self.clock, 1e-9), 2)
        if torch.cuda.is_available():
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.clock = now
        self.since = done
        self.write("train", line)

    def write(self, kind: str, line: dict, note: str = "") -> None:
        """A line of log.jsonl and of the terminal."""
        if rank_world()[0] > 0:
            return
        try:
            self.file.write(json.dumps({"kind": kind} | line) + "\n")
            self.file.flush()
        except OSError as e:
            raise RunError(f"{self.path}: cannot be written ({e.strerror}); free space") from None
        said = " ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float))
        say(f"{kind} {line['step']}/{self.args.iters} {said}{note}")

    def close(self, stopped: int = 0) -> None:
        """The last line of a finished run, or of one that signal `stopped` ends: status 128 + n."""
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still be writing
        if stopped:
            command = "the same command" + (" without --overwrite" if self.args.overwrite else "")
            say(f"signal {stopped}: saved; {command} goes on from there")
            raise SystemExit(128 + stopped)
        last = self.evals[max(self.evals)]
        best = max(self.evals.values(), key=lambda line: line["miou"])
        line = f"mIoU last {last['miou']:.2f}{absent_note(last['iou'])}"
        say(f"{line} · best {best['miou']:.2f} at step {best['step']} · {self.args.out}")


def save(state: dict[str, object], split: data.Split, log: Log, done: int) -> None:
    """latest.pt with all state after step `done`; what is not finite ends the run instead."""
    log.check(done)
    for net in (value for value in state.values() if isinstance(value, nn.Module)):
        finite = [t.isfinite().all() for t in net.state_dict().values() if t.is_floating_point()]
        if not torch.stack(finite).all():
            log.not_finite(done, "a weight is not finite")
    if rank_world()[0] == 0:
        saved = {name: value.state_dict() for name, value in state.items()}
        saved |= {"flags": flags_of(log.args, split), "step": done}
        save_file(saved, log.args.out / "latest.pt")


def validate(
    nets: dict[str, Segmenter], split: data.Split, device: torch.device, log: Log, done: int
) -> None:
    """Evaluates `nets` after step `done`; the first is for inference: its mIoU decides on best.pt.

    best.pt comes before the log line: a run killed in between evaluates again when it goes on.
    """
    begin = time.perf_counter()
    args = log.args
    _process.evaluating = True
    results = {name: iou_of(m) for name, m in evaluate(nets, split, args, device).items()}
    _process.evaluating = False
    name, net = next(iter(nets.items()))
    iou = dict(zip(split.classes, results[name][1], strict=True))
    line = {"step": done, "miou": results[name][0]}
    line |= {f"miou_{other}": results[other][0] for other in list(nets)[1:]}
    line["iou"] = iou
    best = max((old["miou"] for old in log.evals.values()), default=-1.0)
    if line["miou"] > best and rank_world()[0] == 0:
        saved = dict(net=net.state_dict(), config=net.config, classes=list(split.classes))
        saved |= dict(dataset=args.dataset, mean=data.MEAN, std=data.STD, step=done)
        saved["eval"] = dict(crop_size=args.crop_size, eval_mode=args.eval_mode, amp=args.amp)
        save_file(saved | {"miou": line["miou"]}, args.out / "best.pt")
    log.evals[done] = line
    log.write("eval", line, absent_note(iou))
    log.clock += time.perf_counter() - begin  # images/s is of training


def save_file(state: dict, path: Path) -> None:
    """torch.save beside `path`, then a rename: a reader finds the old file or the new, never half.

    RunError when it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        what = f"cannot be saved ({str(e).splitlines()[0]})"
        raise RunError(f"{path}: {what}; free space: what was saved before is intact") from None


# ---------------------------------------------------------------------------- signals and exit

# what the thread of signals and `launch` need to know
_process = SimpleNamespace(signal=0, training=False, evaluating=False)


def catch_signals() -> None:
    """SIGTERM and Ctrl-C ask for a save, see `stop_signal`; a second one ends the process at once.

    So does the first during an evaluation. A thread waits for them: the main one may be held up in
    a call that Python's own handlers would have to wait for.
    """
    woken, alarm = socket.socketpair()
    alarm.setblocking(False)

    def wait() -> None:
        while True:
            number = woken.recv(1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):  # a loader's worker that ended
                continue
            if _process.signal or _process.evaluating:
                print(f"signal {number}: ended at once; the last checkpoint stays", flush=True)
                alarm.close()
                os._exit(128 + number)
            _process.signal = number

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()


def stop_signal(due: bool) -> int:
    """The signal to stop at, or 0. Ranks agree on it where a log line is `due`, on the CPU."""
    if not dist.is_initialized():
        return _process.signal
    if not due:
        return 0
    number = torch.tensor(_process.signal)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def launch(main: Callable[[], None]) -> None:
    """Runs a script. Bad input ends it with a line and status 2, a failed run with status 1.

    Exits at once: other ranks may wait in a collective for this one, workers for its data.
    """
    status = 1
    rank, world = rank_world()
    line = ""
    try:
        main()
        status = 0
    except InputError as e:
        status = 2
        line = str(e)
        if rank > 0 and not _process.training:  # before that all ranks see the same
            line = ""
            time.sleep(5)  # torchrun ends all ranks at the first exit: rank 0's line comes first
    except RunError as e:
        line = str(e)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt:  # later ones are caught, see `catch_signals`
        status = 128 + signal.SIGINT
        line = "interrupted before the first step"
    except BaseException as e:
        told = str(e).splitlines()[0] if str(e) else type(e).__name__
        if isinstance(e, MemoryError) or "out of memory" in told or "can't allocate" in told:
            remedy = "give a smaller --batch-size or --crop-size, in evaluation --eval-mode slide"
            line = f"{told}; {remedy}"
        elif "DataLoader worker" in told:
            line = f"{told}; give --workers 0, or more room in /dev/shm (docker: --shm-size 8g)"
        else:
            traceback.print_exc()
    if line:
        print(f"[rank {rank}] error: {line}" if world > 1 else f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
