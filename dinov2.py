"""DINOv2 encoders (Oquab et al., 2023) and the DPT decoder (Ranftl et al., 2021) that SegKC's headline pair uses.

State-dict keys and shapes are those of the published files, so that they load with every key matched.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"dinov2_vits14": (384, 6), "dinov2_vitb14": (768, 12)}  # width, attention heads
URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"
PATCH, TABLE, DEPTH, TAKEN = (
    14,
    37,
    12,
    (2, 5, 8, 11),
)  # position table 37 x 37; blocks whose maps are returned


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
    """Vision transformer: image [B, 3, H, W], H and W multiples of 14, to four maps [B, width, H/14, W/14]."""

    grid = patch = PATCH

    def __init__(self, name: str) -> None:
        super().__init__()
        width, heads = SIZES[name]
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
        """The position table for h x w patches, [1, 1 + h w, width]: bicubic, the class token's part kept."""
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
        # the deepest fusion has no skip; the published design counts its unit all the same, and so do we
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
