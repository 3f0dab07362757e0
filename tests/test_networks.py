"""The networks against plain second constructions, and what load_weights takes and refuses."""

import argparse
import copy
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from common import build_network, download_weights, load_weights
from data import InputError


def conv_bn_relu(inputs: int, outputs: int, kernel: int, rate: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, 1, rate * (kernel // 2), rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Published(nn.Module):
    """DeepLabV3+ on ResNet-50 as Chen et al. draw it, on torchvision's own dilated backbone."""

    def __init__(self, classes: int, stride: int) -> None:
        super().__init__()
        rates = {16: (6, 12, 18), 8: (12, 24, 36)}[stride]
        dilated = [False, stride == 8, True]
        self.net = models.resnet50(weights=None, replace_stride_with_dilation=dilated)
        del self.net.fc
        self.point = conv_bn_relu(2048, 256, 1)
        self.atrous = nn.ModuleList(conv_bn_relu(2048, 256, 3, r) for r in rates)
        self.whole = conv_bn_relu(2048, 256, 1)
        self.project = conv_bn_relu(5 * 256, 256, 1)
        self.low = conv_bn_relu(256, 48, 1)
        self.refine1, self.refine2 = conv_bn_relu(304, 256, 3), conv_bn_relu(256, 256, 3)
        self.last = nn.Conv2d(256, classes, 1)

    def backbone(self, x: Tensor) -> tuple[Tensor, Tensor]:
        net = self.net
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        return low, net.layer4(net.layer3(net.layer2(low)))

    def decode(self, low: Tensor, deep: Tensor) -> Tensor:
        mean = self.whole(deep.mean((2, 3), keepdim=True)).expand(-1, -1, *deep.shape[-2:])
        deep = self.project(torch.cat([self.point(deep), *(b(deep) for b in self.atrous), mean], 1))
        deep = F.interpolate(deep, low.shape[-2:], mode="bilinear", align_corners=True)
        return self.refine2(self.refine1(torch.cat([deep, self.low(low)], 1)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.last(self.decode(*self.backbone(x)))
        return F.interpolate(z, x.shape[-2:], mode="bilinear", align_corners=True)


def shuffled(net: nn.Module) -> nn.Module:
    """Every parameter and running statistic away from its initial value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if t.is_floating_point() and t.dim() == 1:  # biases, batch norm
                t.copy_(torch.rand_like(t) + (0.5 if "var" in name or "weight" in name else -0.5))
    return net


def assert_close(ours: Tensor, mine: Tensor) -> None:
    """The same but for float32's rounding, relative to how much there is in it."""
    assert mine.std() > 1e-3 * mine.abs().max()
    assert (ours - mine).norm() < 1e-4 * mine.norm()


@pytest.mark.parametrize("stride", [16, 8])
def test_deeplab_is_the_published_design(stride: int):
    torch.manual_seed(0)
    ours, plain = shuffled(build_network("resnet50", 21, stride)), Published(21, stride)
    groups = [*ours.backbone.parameters(), *ours.head_parameters()]
    assert sorted(map(id, groups)) == sorted(map(id, ours.parameters()))
    theirs = ours.state_dict()
    assert [v.shape for v in theirs.values()] == [v.shape for v in plain.state_dict().values()]
    plain.load_state_dict(dict(zip(plain.state_dict(), theirs.values(), strict=True)))
    count = sum(p.numel() for p in ours.parameters())
    assert count == pytest.approx(40.35e6, rel=1e-3)

    x = torch.randn(2, 3, 64, 96)
    for training in (False, True):
        ours.train(training)
        plain.train(training)
        with torch.no_grad():
            z, f, deep = ours(x, features=True)
            low, mine = plain.backbone(x)
            assert_close(deep, mine)
            assert_close(f, plain.decode(low, mine))
            assert_close(z, plain(x))
            assert_close(ours(x), z)

    # maps larger than the rates: thin ones, so that it is quick
    ours.eval()
    plain.eval()
    for h, w in ((2, 40), (40, 2)):
        low, deep = torch.randn(1, 256, 4 * h, 4 * w), torch.randn(1, 2048, h, w)
        with torch.no_grad():
            assert_close(ours.decoder([low, deep]), plain.decode(low, deep))


def stages(name: str) -> nn.Sequential:
    """torchvision's network as it is, at stride 32, up to its last map."""
    net = getattr(models, name)(weights=None)
    if name == "mobilenet_v2":
        return net.features[:18]
    return nn.Sequential(*[s for n, s in net.named_children() if n not in ("avgpool", "fc")])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("stride", [16, 8])
def test_dilation_keeps_what_the_backbone_computes(name: str, stride: int):
    """A trous: at every second (fourth) place the dilated map is torchvision's stride-32 map."""
    torch.manual_seed(0)
    ours = shuffled(build_network(name, 2, stride)).backbone.double().eval()
    theirs = stages(name).double().eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    # layer1 follows conv, norm, relu and pooling; mobilenet's stages are numbered
    first = 4 if name == "mobilenet_v2" else 5
    with torch.no_grad():
        low, deep = ours(x)
        mine = theirs[:first](x)
        torch.testing.assert_close(low, mine, rtol=1e-9, atol=1e-12)
        mine = theirs[first:](mine)
    assert (low.shape[1], deep.shape[1]) == ours.channels
    step = 32 // stride
    torch.testing.assert_close(deep[:, :, ::step, ::step], mine, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------- DINOv2, DPT


def published_shapes(width: int = 384) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of dinov2_vits14_pretrain.pth, as the note lists them."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    for k in range(12):
        block = {"ls1.gamma": (width,), "ls2.gamma": (width,)}
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linear.items():
            block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            block |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        shapes |= {f"blocks.{k}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


@pytest.fixture(scope="module")
def vits() -> nn.Module:
    """ViT-S with DPT, no parameter at a trivial value; tests do not change it."""
    torch.manual_seed(0)
    net = build_network("dinov2_vits14", 21, decoder="dpt").eval()
    with torch.no_grad():
        for name, p in net.backbone.named_parameters():
            if p.dim() == 1 or "token" in name:
                p.add_(torch.randn_like(p) * 0.2)
        net.backbone.pos_embed.normal_()
    return net


@pytest.mark.parametrize(
    ("name", "width", "count"),
    [("dinov2_vits14", 384, 24_795_637), ("dinov2_vitb14", 768, 97_528_789)],
)
def test_dinov2_with_dpt_has_the_published_parameters(name: str, width: int, count: int):
    with torch.device("meta"):
        net = build_network(name, 21, decoder="dpt")
    state = net.backbone.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == published_shapes(width)
    assert sum(p.numel() for p in net.parameters()) == count
    groups = [p for p in net.backbone.parameters() if p.requires_grad] + net.head_parameters()
    assert sorted(map(id, groups)) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad]  # in no loss
    assert {n.split("skip")[0] for n in frozen} == {"backbone.mask_token", "decoder.fuse.3."}
    assert (net.backbone.grid, {b.heads for b in net.backbone.blocks}) == (14, {width // 64})
    norms = [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
    assert {m.eps for m in norms} == {1e-6}, "a difference that no output shows"


def cubic(table: np.ndarray, size: int) -> np.ndarray:
    """Bicubic (a = -0.75) along the first axis to `size`, scale (size + 0.1) / 37, no antialias."""
    rows, a = [], -0.75
    for i in range(size):
        at = (i + 0.5) * 37 / (size + 0.1) - 0.5
        first, row = math.floor(at), 0.0
        for tap in range(first - 1, first + 3):
            d = abs(at - tap)
            inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
            outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            row = row + (inner if d <= 1 else outer) * table[min(max(tap, 0), 36)]
        rows.append(row)
    return np.stack(rows)


def positions(pos_embed: Tensor, h: int, w: int) -> Tensor:
    """[1 + h w, A]: the class part, then the resized table."""
    table = pos_embed.detach()[0].double().numpy()
    patches = cubic(table[1:].reshape(37, 37, -1), h).transpose(1, 0, 2)
    patches = cubic(patches, w).transpose(1, 0, 2)
    return torch.from_numpy(np.concatenate([table[:1], patches.reshape(h * w, -1)]))


def test_position_table(vits: nn.Module):
    dino = vits.backbone
    assert torch.equal(dino.positions(37, 37), dino.pos_embed), "used as it is at 37 x 37"
    for h, w in ((2, 3), (16, 5), (40, 37)):
        found = dino.positions(h, w)[0].double()
        torch.testing.assert_close(found, positions(dino.pos_embed, h, w), rtol=0, atol=2e-4)


LAYERS = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj."}
LAYERS |= {"linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
GAMMAS = {"attn.proj.": "ls1.gamma", "mlp.fc2.": "ls2.gamma"}


def vit(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Images [B, 3, H, W] to four maps, by torch's own layers: LayerScale is in their weights."""
    s = {k: v.double() for k, v in state.items()}
    b, _, height, width = x.shape
    h, w = height // 14, width // 14
    patches = x.reshape(b, 3, h, 14, w, 14).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, -1)
    patches = patches @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"]
    x = torch.cat([s["cls_token"].expand(b, 1, -1), patches], 1)
    x, maps = x + positions(state["pos_embed"], h, w), []
    last = (s["norm.weight"].shape, s["norm.weight"], s["norm.bias"], 1e-6)
    for k in range(12):
        layer = nn.TransformerEncoderLayer(384, 6, 1536, 0, "gelu", 1e-6, True, True).double()
        own = {}
        for theirs, ours in LAYERS.items():
            gamma = s[f"blocks.{k}.{GAMMAS[ours]}"] if ours in GAMMAS else torch.ones(1).double()
            weight = s[f"blocks.{k}.{ours}weight"]
            own[f"{theirs}weight"] = weight * gamma.view(-1, *[1] * (weight.dim() - 1))
            own[f"{theirs}bias"] = s[f"blocks.{k}.{ours}bias"] * gamma
        layer.load_state_dict(own)
        x = layer(x)
        if k in (2, 5, 8, 11):
            maps.append(F.layer_norm(x, *last)[:, 1:].transpose(1, 2).reshape(b, 384, h, w))
    return maps


def test_dinov2_forward(vits: nn.Module):
    torch.manual_seed(2)
    x = torch.randn(2, 3, 28, 42)
    with torch.no_grad():
        mine = vit(vits.backbone.state_dict(), x.double())
        for ours, theirs in zip(vits.backbone(x), mine, strict=True):
            assert theirs.abs().max() > 1
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=5e-5)


def dpt(d: nn.Module, maps: list[Tensor]) -> Tensor:
    """The note's DPT decoder step by step, on the parameters of d."""

    def unit(p: nn.Module, x: Tensor) -> Tensor:
        y = F.conv2d(F.relu(x), p[1].weight, p[1].bias, padding=1)
        return x + F.conv2d(F.relu(y), p[3].weight, p[3].bias, padding=1)

    layers = []
    for k, m in enumerate(maps):
        y, r = F.conv2d(m, d.project[k].weight, d.project[k].bias), d.resize[k]
        if k < 2:
            y = F.conv_transpose2d(y, r.weight, r.bias, stride=(4, 2)[k])
        elif k == 3:
            y = F.conv2d(y, r.weight, r.bias, stride=2, padding=1)
        layers.append(F.conv2d(y, d.reduce[k].weight, None, padding=1))
    x = 0
    for k in (3, 2, 1, 0):  # from the deepest; that one has nothing to fuse with
        fuse = d.fuse[k]
        x = layers[3] if k == 3 else x + unit(fuse.skip, layers[k])
        x = F.interpolate(unit(fuse.refine, x), scale_factor=2, mode="bilinear", align_corners=True)
        x = F.conv2d(x, fuse.out.weight, fuse.out.bias)
    return F.relu(F.conv2d(x, d.head[0].weight, d.head[0].bias, padding=1))


def test_dpt_decoder(vits: nn.Module):
    torch.manual_seed(3)
    maps = [torch.randn(2, 384, 4, 6) for _ in range(4)]
    with torch.no_grad():
        found, mine = vits.decoder(maps), dpt(vits.decoder, maps)
        torch.testing.assert_close(found, mine, rtol=1e-4, atol=1e-5)
        x = torch.randn(1, 3, 56, 84)
        z = vits.classifier(dpt(vits.decoder, vits.backbone(x)))
        z = F.interpolate(z, (56, 84), mode="bilinear", align_corners=True)
        torch.testing.assert_close(vits(x), z, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ weights


def vits_file() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {k: torch.randn(shape) for k, shape in published_shapes().items()}


def torchvisions(name: str) -> dict[str, Tensor]:
    """The state dict of a network with its classifier."""
    torch.manual_seed(6)
    return shuffled(getattr(models, name)(weights=None)).state_dict()


@pytest.fixture
def save(tmp_path: Path):
    """Writes a checkpoint for one test."""
    path = tmp_path / "weights.pth"
    yield lambda state: (torch.save(state, path), str(path))[1]
    path.unlink()  # some 100 MB


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def beside(state: dict) -> dict:
    """What other people's trainers save beside the tensors: no code, but no plain values either."""
    flags = argparse.Namespace(lr=0.1, arch="resnet18")
    return {"model_state": state, "acc": np.float64(71.2), "best": np.float32(1), "args": flags}


FOREIGN = {  # network: how a file may hold its state dict
    "resnet18: DDP": lambda s: {"state_dict": prefixed("module.", s), "epoch": 3},
    "resnet18: a segmenter": lambda s: {"net": prefixed("module.backbone.", s)},
    "resnet18: an encoder": lambda s: {"model_state": prefixed("encoder.", s), "optimizer": {}},
    "resnet18: nested": lambda s: {"checkpoint": {"model": {"state_dict": s}}},
    "resnet18: beside numpy and argparse": beside,
    "mobilenet_v2: a prefix more": lambda s: prefixed("module.", s),
    "dinov2_vits14: as published": lambda s: s,
    "dinov2_vits14: a teacher": lambda s: {"teacher": prefixed("backbone.", s)},
}


@pytest.mark.parametrize("how", FOREIGN)
def test_a_file_of_others_is_looked_through(how: str, save):
    name = how.split(":")[0]
    state = vits_file() if name == "dinov2_vits14" else torchvisions(name)
    net = build_network(name, 4)
    head = copy.deepcopy(net.classifier.weight)
    line = load_weights(net, name, save(FOREIGN[how](state)))
    counts = {"resnet18": (120, 2), "mobilenet_v2": (306, 6), "dinov2_vits14": (175, 0)}[name]
    assert "{} keys matched, 0 missing, {} unexpected".format(*counts) in line
    for key, value in net.backbone.state_dict().items():
        assert torch.equal(value, state["features." * (name == "mobilenet_v2") + key]), key
    assert torch.equal(net.classifier.weight, head)


def test_our_own_best_network_is_loaded_whole_where_the_classes_agree(save):
    """Guards: a head with classes in another order; a second network that takes the same head."""
    trained = shuffled(build_network("resnet18", 2))
    best = {"net": trained.state_dict(), "config": trained.config, "classes": ["cat", "dog"]}
    file = save(best | {"step": 7})
    for classes, whole in ((["cat", "dog"], True), (["dog", "cat"], False), (None, False)):
        net = build_network("resnet18", 2)
        line = load_weights(net, "resnet18", file, classes)
        assert ("the whole network of step 7" in line) == whole
        for name, value in net.state_dict().items():
            same = torch.equal(value, trained.state_dict()[name])
            assert "tracked" in name or same == (whole or "backbone" in name), name
    del best["net"]["classifier.weight"]
    with pytest.raises(InputError, match="1 missing.*; classifier.weight differs"):
        load_weights(net, "resnet18", save(best), ["cat", "dog"])


REFUSED = {  # backbone, file, what the line says
    "deep stem": (  # three 3x3 convolutions instead of the 7x7 one
        "resnet18",
        lambda: torchvisions("resnet18") | {"conv1.weight": torch.randn(64, 64, 3, 3)},
        "1 missing.*conv1.weight differs",
    ),
    # ResNet-34 holds every key of ResNet-18, and has the same shapes there
    "a larger network": ("resnet18", lambda: torchvisions("resnet34"), r"0 missing.*layer1\.2"),
    "another kind": ("mobilenet_v2", lambda: torchvisions("resnet18"), "0 keys matched"),
    "a ViT with registers": (
        "dinov2_vits14",
        lambda: vits_file() | {"register_tokens": torch.randn(1, 4, 384)},
        "1 unexpected; register_tokens differs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_architectures_file_is_refused(case: str, save):
    name, state, said = REFUSED[case]
    net = build_network(name, 4)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=said) as e:
        load_weights(net, name, save(state()))
    assert f"another architecture; give a file of {name}" in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_cannot_be_read_safely_is_named(save):
    file = save({"model": torchvisions("resnet18"), "config": Fraction(1, 2)})
    with pytest.raises(InputError, match=rf"{file}: .*fractions.Fraction\); give a state_dict"):
        load_weights(build_network("resnet18", 4), "resnet18", file)


def test_imagenet_weights(monkeypatch):
    state, net = torchvisions("resnet18"), build_network("resnet18", 4)
    published = {models.ResNet18_Weights.IMAGENET1K_V1.url: state}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda u, **_: published[u])
    assert "120 keys matched, 0 missing, 2 unexpected" in load_weights(net, "resnet18", "imagenet")
    assert torch.equal(net.backbone.conv1.weight, state["conv1.weight"])
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda u, **_: u)
    assert download_weights("resnet50").endswith("/resnet50-0676ba61.pth")  # V1, as the field
    assert download_weights("dinov2_vits14").endswith("/dinov2_vits14/dinov2_vits14_pretrain.pth")
