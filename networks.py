"""The networks: CNN backbones and DeepLabV3+, DINOv2 encoders and the DPT decoder, their weights.

State-dict keys and shapes of a backbone are those of its published file (torchvision's, DINOv2's).
Dimension key: B images, C classes, H and W pixels, h and w cells of a feature map.
"""

import os
import urllib.error
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import ASPP

from data import InputError

CNNS = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
DINOV2 = {"dinov2_vits14": (384, 6), "dinov2_vitb14": (768, 12)}  # width, attention heads
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"
BACKBONES = (*CNNS, *DINOV2)

# ------------------------------------------------------------------------------- CNN backbones


class CNN(nn.Sequential):
    """torchvision's backbone as a row of its own stages: its state-dict keys are torchvision's.

    forward: image [B, 3, H, W] to the stride-4 map and the last map (stride 16 or 8).
    """

    grid, patch = 16, 1  # evaluation pads images to multiples of grid, crops are multiples of patch

    def __init__(self, name: str, output_stride: int) -> None:
        net = getattr(models, name)(weights=None)
        if name == "mobilenet_v2":  # without the last 1x1 to 1280 channels, a classifier's input
            stages, self_low = list(net.features[:18].named_children()), "3"
            stride_16, stride_32 = map(str, range(7, 14)), map(str, range(14, 18))
            channels = (24, 320)
        else:
            stages, self_low = list(net.named_children())[:-2], "layer1"  # no pooling, classifier
            stride_16, stride_32 = ["layer3"], ["layer4"]
            channels = (64, 512) if name in ("resnet18", "resnet34") else (256, 2048)
        super().__init__(OrderedDict(stages))
        self.low, self.channels = self_low, channels
        for stride, names in ((16, stride_16), (32, stride_32)):
            if stride > output_stride:
                _dilate([self.get_submodule(n) for n in names], stride // output_stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        for name, stage in self.named_children():
            x = stage(x)
            if name == self.low:
                low = x
        return [low, x]


def _dilate(stages: list[nn.Module], dilation: int) -> None:
    """Stages that would halve the resolution keep it: stride 1, 3x3 kernels spread by `dilation`.

    The convolution that had the stride keeps the spread before it, as in torchvision's ResNets.
    """
    for conv in (m for stage in stages for m in stage.modules() if isinstance(m, nn.Conv2d)):
        spread = dilation // 2 if conv.stride == (2, 2) else dilation
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (spread, spread)


def _conv_bn_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


# ------------------------------------------------------------------ DINOv2 (Oquab et al., 2023)

PATCH, TABLE, DEPTH = 14, 37, 12  # pixels, the position table's side, blocks
TAKEN = (2, 5, 8, 11)  # blocks whose maps are returned


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


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


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + scale attention(norm x), then x + scale mlp(norm x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """Image [B, 3, H, W], H and W multiples of 14, to four maps [B, width, H/14, W/14]."""

    grid = patch = PATCH

    def __init__(self, name: str) -> None:
        super().__init__()
        width, heads = DINOV2[name]
        self.channels = (width,) * len(TAKEN)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TABLE**2, width))
        # in the published file, used by DINOv2's own training alone
        self.mask_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for weight in (
            self.pos_embed,
            *(m.weight for m in self.modules() if isinstance(m, nn.Linear)),
        ):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.zeros_(linear.bias)

    def positions(self, h: int, w: int) -> Tensor:
        """Positions of h x w patches, [1, 1 + h w, width]: bicubic but for the class token's."""
        if (h, w) == (TABLE, TABLE):
            return self.pos_embed
        table = self.pos_embed[:, 1:].view(1, TABLE, TABLE, -1).permute(0, 3, 1, 2)
        scale = (
            (h + 0.1) / TABLE,
            (w + 0.1) / TABLE,
        )  # published so: the 0.1 keeps the size from rounding down
        table = F.interpolate(table.float(), scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat(
            [self.pos_embed[:, :1], table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], 1
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h, w = (s // PATCH for s in x.shape[-2:])
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1) + self.positions(
            h, w
        )
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
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class Fusion(nn.Module):
    """RefineNet-style: adds a refined skip, refines the sum, upsamples it, 1 x 1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.skip, self.refine = ResidualConvUnit(width), ResidualConvUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = x if skip is None else x + self.skip(skip)
        x = F.interpolate(self.refine(x), size, mode="bilinear", align_corners=True)
        return self.out(x)


class DPTDecoder(nn.Module):
    """Four maps [B, width, h, w] to a feature [B, 64, 8h, 8w], the input of the classifier."""

    def __init__(
        self, width: int, steps: tuple[int, ...] = (48, 96, 192, 384), features: int = 64
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(width, s, 1) for s in steps)
        self.resize = nn.ModuleList(
            (
                nn.ConvTranspose2d(steps[0], steps[0], 4, 4),
                nn.ConvTranspose2d(steps[1], steps[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(steps[3], steps[3], 3, 2, 1),
            )
        )
        self.reduce = nn.ModuleList(nn.Conv2d(s, features, 3, padding=1, bias=False) for s in steps)
        self.fuse = nn.ModuleList(Fusion(features) for _ in steps)
        # the deepest fusion has no skip; the published design counts its unit, and so do we
        self.fuse[3].skip.requires_grad_(False)
        self.head = nn.Sequential(nn.Conv2d(features, features, 3, padding=1), nn.ReLU())

    def forward(self, maps: list[Tensor]) -> Tensor:
        layers = zip(maps, self.project, self.resize, self.reduce, strict=True)
        skips = [reduce(resize(project(m))) for m, project, resize, reduce in layers]
        sizes = [
            tuple(2 * s for s in skips[0].shape[-2:]),
            *(tuple(s.shape[-2:]) for s in skips[:3]),
        ]
        x = self.fuse[3](skips[3], None, sizes[3])
        for k in (2, 1, 0):
            x = self.fuse[k](x, skips[k], sizes[k])
        return self.head(x)


# -------------------------------------------------------------------------- segmentation networks


def upsample(z: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as the baselines: [B, C, h, w] to [B, C, *size] in float32."""
    return F.interpolate(z.float(), size, mode="bilinear", align_corners=True)


class Segmenter(nn.Module):
    """A backbone, `decode`, and a 1x1 classifier; what is not the backbone is the head.

    `config` is what `build_network` needs to build it again.
    """

    layout = torch.contiguous_format

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
        f = self.decode(maps)
        return self.classifier(f), f, maps[-1]

    def forward(self, x: Tensor, features: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits [B, C, H, W] at input size, float32; with `features` also f and the last map."""
        z, f, deep = self.parts(x)
        z = upsample(z, x.shape[-2:])
        return (z, f, deep) if features else z

    def head_parameters(self) -> list[nn.Parameter]:
        """Every trained parameter that is not the backbone's."""
        named = self.named_parameters()
        return [p for n, p in named if not n.startswith("backbone.") and p.requires_grad]


class DeepLabV3Plus(Segmenter):
    """DeepLabV3+ (Chen et al., 2018): ASPP, 48 low-level channels, two 3x3 convolutions.

    f is [B, 256, h, w] at stride 4, on DINOv2's patches 14. ASPP is torchvision's without its
    dropout: a forward has no randomness of its own.
    """

    def __init__(self, backbone: str, num_classes: int, output_stride: int = 16) -> None:
        super().__init__()
        self.config = dict(backbone=backbone, num_classes=num_classes, output_stride=output_stride)
        vit = backbone in DINOV2
        self.backbone = DINOv2(backbone) if vit else CNN(backbone, output_stride)
        low, deep = self.backbone.channels[0], self.backbone.channels[-1]
        dilation = 1 if vit else 16 // output_stride
        self.aspp = ASPP(deep, [r * dilation for r in (6, 12, 18)], 256)
        self.aspp.project = self.aspp.project[:3]
        self.reduce = _conv_bn_relu(low, 48, 1)
        self.fuse = nn.Sequential(_conv_bn_relu(256 + 48, 256, 3), _conv_bn_relu(256, 256, 3))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def decode(self, maps: list[Tensor]) -> Tensor:
        low = self.reduce(maps[0])
        deep = upsample(self.aspp(maps[-1]), low.shape[-2:]).to(low.dtype)
        return self.fuse(torch.cat([deep, low], 1))


class DPT(Segmenter):
    """DINOv2 with the DPT decoder; f is [B, 64, 8h, 8w] for h x w patches."""

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        self.config = dict(backbone=backbone, num_classes=num_classes, decoder="dpt")
        self.backbone = DINOv2(backbone)
        self.decode = DPTDecoder(self.backbone.channels[-1])
        self.classifier = nn.Conv2d(64, num_classes, 1)


def build_network(
    backbone: str, num_classes: int, output_stride: int = 16, decoder: str = "deeplab"
) -> Segmenter:
    """The network of --backbone, --output-stride and --decoder, or of a best.pt's `config`."""
    if backbone not in BACKBONES:
        raise InputError(f"backbone {backbone!r}: unknown; one of {', '.join(BACKBONES)}")
    if decoder == "deeplab":
        return DeepLabV3Plus(backbone, num_classes, output_stride)
    if backbone not in DINOV2:
        raise InputError(f"--decoder dpt: needs a DINOv2 backbone, not {backbone}; use deeplab")
    return DPT(backbone, num_classes)


# ------------------------------------------------------------------------------------- weights


def load_checkpoint(path: Path) -> dict:
    """A dict of tensors and plain values, never code; InputError on anything else."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as z:
                broken = z.testzip()
            if broken:
                raise zipfile.BadZipFile(f"checksum of {broken} is wrong")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001 - the readers raise all kinds on broken bytes
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
        raise InputError(f"{path}: no loadable checkpoint ({reason}); give another file") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, no state dict; give another")
    return found


def load_weights(net: Segmenter, name: str, weights: str) -> str:
    """Loads backbone weights: imagenet, none, or a file. Returns a line that counts the keys.

    Looks through a wrapping {"net": ...} and the prefixes module., backbone., features.; leaves
    classifier keys aside. InputError when a backbone key is missing or of another shape.
    """
    if weights == "none":
        return f"{name}: random weights"
    fetched = weights == "imagenet"
    state = _download_weights(name) if fetched else load_checkpoint(Path(weights))
    for wrap in ("state_dict", "model", "net"):
        state = state[wrap] if isinstance(state.get(wrap), dict) else state
    state = {k: v for k, v in state.items() if isinstance(k, str)}
    for prefix in ("module.", "backbone.", "features."):
        if any(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    own = net.backbone.state_dict()
    same = {k: v for k, v in state.items() if k in own and getattr(v, "shape", 0) == own[k].shape}
    missing = [k for k in own if k not in same and not k.endswith("num_batches_tracked")]
    others = [k for k in state if k not in own]
    line = f"{name}: weights {weights}: {len(same)} keys matched, {len(missing)} missing"
    line += f", {len(others)} unexpected"
    stages = {key.split(".")[0] for key in own}
    # a classifier's have other first names, and none is a bare tensor like a ViT's register_tokens
    wrong = missing + [k for k in others if "." not in k or k.split(".")[0] in stages]
    if wrong:
        k = wrong[0]
        shapes = [tuple(getattr(v[k], "shape", ())) for v in (state, own) if k in v]
        what = f"has shapes {shapes}" if len(shapes) == 2 else f"is only in one of them, {shapes}"
        raise InputError(f"{line}; {k} {what}: another architecture; give a file of {name}")
    net.backbone.load_state_dict(same, strict=False)
    return line


def _download_weights(name: str) -> dict:
    """torch.hub caches the file; one process of a machine fetches it, the others then find it."""
    ranks = dist.is_initialized()
    first = not ranks or int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    try:
        if name in DINOV2:
            url = DINOV2_URL.format(name)
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        return models.get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=first)
    except (urllib.error.URLError, OSError, RuntimeError) as e:
        raise InputError(
            f"--weights imagenet: {name} cannot be fetched ({e}); give a FILE or none"
        ) from None
    finally:
        if first and ranks:
            dist.barrier()
