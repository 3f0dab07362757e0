"""For the tests: a script's run, and plain restatements that several methods share.

The restatements are written from the notes, with loops, lists of pixels and explicit exponentials;
none is copied from the code under test. A "pixel list" is [P, C]: one row for each pixel kept.
"""

import functools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from common import build_network

F64 = dict(rtol=1e-10, atol=1e-13)


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Normal numbers in float64."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


PADDINGS = ("all", "none", "rectangles", "ragged")


def padded(case: str, b: int, h: int, w: int) -> Tensor:
    """Valid maps [B, H, W]: all, none, cut by rectangles as in training, or ragged."""
    valid = torch.full((b, h, w), case != "none")
    if case == "rectangles":
        for k in range(b):
            valid[k, h - (k * h) // b :] = False
            valid[k, :, : (k * w) // (b + 1)] = False
    elif case == "ragged":
        valid[:] = torch.from_numpy(np.random.default_rng(1).random((b, h, w)) < 0.6)
        valid[0, : h // 2, : w // 2] = False
    return valid


# --------------------------------------------------------------------------------- a whole run

TINY = (
    "--dataset shapes --iters 2 --crop-size 49 --batch-size 2 --workers 0 --log-every 1 --ramp 0 "
    "--amp off --weights none --optimizer sgd --lr 0.004 --head-lr-mult 3 --weight-decay 0.2 "
    "--scale 0.3 0.8"  # images of 29 to 77 pixels: some crops are padded
).split()


def run_main(script: ModuleType, argv: list[str], out: Path) -> tuple[list[dict], dict, dict]:
    """Runs a script's main; returns its train lines, latest.pt and best.pt, and removes `out`."""
    script.main([*argv, "--out", str(out)])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    saved = [torch.load(out / f"{n}.pt", weights_only=True) for n in ("latest", "best")]
    shutil.rmtree(out)  # some 100 MB
    return [line for line in lines if line["kind"] == "train"], *saved


def batches_of(args: object) -> list[dict]:
    """The batches of a run: data.py has tests of its own."""
    split = data.load_split(args)
    return list(data.train_batches(split, args, 0, 1, 0, torch.device("cpu")))


def find_seed(args: object, boxes: bool = True, seeds: Iterable[int] = range(100)) -> list[dict]:
    """Sets args.seed to one whose first batch has padding in x and u, and boxes in both views."""
    for args.seed in seeds:
        batches = batches_of(args)
        first = batches[0]
        padded = all(not first[f"{k}_valid"].all() for k in "xu")
        # all boxes are the notes' (of 2 % or more) or empty
        if padded and (not boxes or first["cutmix"].flatten(1).any(1).all()):
            return batches
    raise AssertionError("no seed has padding and boxes")


def boxes_of(args: object, batch: dict, view: int) -> Tensor:
    """The CutMix boxes [B, 4] of a view, 0 or 1, drawn once more."""
    draws = (data.rng(args.seed, f"box{view + 1}", batch["step"], p) for p in batch["positions"])
    return torch.tensor([data.cutmix_box(args.crop_size, r) for r in draws])


def network(name: str) -> nn.Module:
    """A network for 6 classes in the memory layout of a run, whose rounding it then shares."""
    return build_network(name, 6).place(torch.device("cpu"))


NO_AMP = functools.partial(torch.autocast, "cpu", enabled=False)


def tiny_batch() -> dict:
    """Two labelled and two unlabelled images of 32 x 32, four classes, no padding."""
    every = torch.ones(2, 32, 32, dtype=torch.bool)
    batch = dict(x=torch.rand(2, 3, 32, 32), u=torch.rand(2, 3, 32, 32), order=[0, 1, 2, 3])
    batch |= dict(y=torch.randint(0, 4, (2, 32, 32)), x_valid=every, u_valid=every)
    batch["cutmix"] = torch.rand(2, 2, 32, 32) < 0.5
    batch["strong"] = torch.tensor([1.3, 0.7, 1.2, 0.1, 0.0, 0.8]).repeat(2, 2, 1)
    return batch | dict(step=0, positions=[0, 1])


def learners(loss: Tensor, modules: dict[str, nn.Module]) -> set[str]:
    """The modules that a loss moves; `loss` may be used again."""
    found = set()
    for name, module in modules.items():
        weights = list(module.parameters())
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        if any(g is not None and g.any() for g in grads):
            found.add(name)
    return found


def look(net: nn.Module, x: Tensor, amp: str = "off") -> dict[str, Tensor]:
    """A forward pass by hooks: z_4 and f of decoder size, the last map `deep`, z of full size.

    Float32 whatever `amp`, which rounds inside the network alone.
    """
    seen = {}
    hooks = [
        net.classifier.register_forward_hook(lambda m, i, o: seen.update(f=i[0], z_4=o)),
        net.backbone.register_forward_hook(lambda m, i, o: seen.update(deep=o[-1])),
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
        net(x)
    for hook in hooks:
        hook.remove()
    assert (seen["z_4"].dtype == torch.float32) == (amp == "off")
    seen = {name: t.float() for name, t in seen.items()}
    return seen | {"z": bilinear(seen["z_4"], x.shape[-2:])}


def bilinear(z: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(z, size, mode="bilinear", align_corners=True)


def sgd(args: object, parts: list[tuple[list, float]], step: int, old: list | None) -> list:
    """SGD with momentum 0.9 and L2 decay over (parameters, lr factor); returns the velocities."""
    poly = (1 - step / args.iters) ** 0.9
    velocity, k = [], 0
    with torch.no_grad():
        for parameters, factor in parts:
            for p in parameters:
                g = (0 if p.grad is None else p.grad) + args.weight_decay * p
                velocity.append(g if old is None else 0.9 * old[k] + g)
                p -= args.lr * factor * poly * velocity[-1]
                p.grad = None
                k += 1
    return velocity


def split_parameters(net: nn.Module) -> tuple[list, list]:
    """Parameters of the backbone, and all others."""
    backbone = list(net.backbone.parameters())
    return backbone, [p for p in net.parameters() if not any(p is b for b in backbone)]


def assert_same_terms(lines: list[dict], mine: list[dict], amp: str) -> None:
    """The terms of a run's lines are `mine`; an update magnifies rounding."""
    for step, terms in enumerate(mine):
        tolerance = 2e-5 if step == 0 else 0.05 if amp == "bf16" else 0.01
        for name, value in terms.items():
            found = lines[step][name]
            assert abs(found - value) <= tolerance * abs(value) + 1e-12, (step, name, found, value)


def assert_same_update(begin: dict, mine: dict, theirs: dict, most: float = 0.15) -> None:
    """Parameters of each part, and batch norm's statistics, which move more, moved alike."""
    moved, apart = Counter(), Counter()
    assert mine.keys() == theirs.keys()
    for name, was in begin.items():
        if was.is_floating_point():
            part = "statistics" if "running_" in name else name.split(".")[0]
            moved[part] += (mine[name] - was).double().square().sum().item()
            apart[part] += (theirs[name] - mine[name]).double().square().sum().item()
    assert moved.total() > 0, "nothing was learnt"
    assert (apart.total() / moved.total()) ** 0.5 < 1e-2, (apart, moved)
    for part, value in moved.items():  # <=: MKD's teachers stay where they are in one step
        assert apart[part] ** 0.5 <= most * value**0.5, (part, apart[part], value)


def between(confidence: Tensor) -> float:
    """A threshold near the median that no confidence is close to."""
    c = confidence.flatten().sort().values
    c = c[int(0.3 * len(c)) : int(0.7 * len(c))]
    k = (c[1:] - c[:-1]).argmax()
    return round(((c[k] + c[k + 1]) / 2).item(), 7)


# ---------------------------------------------------------------------------- the notes' pieces


def standardized(image: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] less ImageNet's mean, over its deviation."""
    out = image.clone()
    for k, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        out[:, k] = (image[:, k] - mean) / std
    return out


def pasted(t: Tensor, boxes: Tensor, partner: list[int]) -> Tensor:
    """CutMix with loops: box b (top, left, bottom, right) of t[b] is filled from t[partner[b]]."""
    out = t.clone()
    for b, (top, left, bottom, right) in enumerate(boxes.tolist()):
        out[b, ..., top:bottom, left:right] = t[partner[b], ..., top:bottom, left:right]
    return out


def nearest(t: Tensor, size: tuple[int, int]) -> Tensor:
    """Cell i of h is the pixel nearest to i (H - 1) / (h - 1), halves upwards; t [B, H, W]."""
    rows, cols = (
        [math.floor(i * (n - 1) / max(s - 1, 1) + 0.5) for i in range(s)]
        for n, s in zip(t.shape[-2:], size, strict=True)
    )
    return t[:, rows][:, :, cols]


def pixels(t: Tensor, where: Tensor) -> Tensor:
    """The pixel list [P, C] of t [B, C, H, W] at the True places of `where` [B, H, W]."""
    return t.permute(0, 2, 3, 1)[where]


def log_softmax(rows: Tensor) -> Tensor:
    """Of a pixel list, by definition."""
    e = (rows - rows.amax(1, keepdim=True)).exp()
    return (e / e.sum(1, keepdim=True)).log()


def ce_sum(z: Tensor, label: Tensor, where: Tensor) -> Tensor:
    """Sum of -log p_label over the places of `where`; z [B, C, H, W], label [B, H, W]."""
    if not where.any():
        return z.sum() * 0
    log_p = log_softmax(pixels(z, where))
    return -log_p[torch.arange(len(log_p)), label[where]].sum()


def kl_sum(z_t: Tensor, z: Tensor, where: Tensor, t: float) -> Tensor:
    """Sum of KL(softmax(z_T / t) || softmax(z / t)) t^2 over the places of `where`."""
    if not where.any():
        return z.sum() * 0
    log_t, log_p = (log_softmax(pixels(a, where) / t) for a in (z_t, z))
    return (log_t.exp() * (log_t - log_p)).sum() * t**2


def supervised(z: Tensor, y: Tensor) -> Tensor:
    """CE over the pixels that are not 255."""
    where = y != 255
    return ce_sum(z, y, where) / max(int(where.sum()), 1)
