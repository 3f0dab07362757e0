"""Oracles of speed.py, written a second time from the note; its first two steps recomputed."""

import copy
import itertools
import math

import helpers as h
import numpy as np
import pytest
import torch
from torch import Tensor

import data
import segkc
import speed


def edges(size: int, n: int) -> list[tuple[int, int]]:
    """Cell i of n holds the pixels floor(i H / n) up to floor((i + 1) H / n)."""
    at = [math.floor(i * size / n) for i in range(n + 1)]
    return [*zip(at[:-1], at[1:], strict=True)]


def inside(boxes: Tensor, h: int, w: int) -> Tensor:
    """Rectangles (top, left, bottom, right) as [B, H, W] bool, by a loop."""
    found = torch.zeros(len(boxes), h, w, dtype=torch.bool)
    for b, (top, left, bottom, right) in enumerate(boxes.tolist()):
        found[b, top:bottom, left:right] = True
    return found


@pytest.mark.parametrize("cutmix", [speed.cutmix, segkc.cutmix])
def test_cutmix_pastes_the_partners_box(cutmix):
    boxes = torch.tensor([[0, 0, 3, 9], [2, 1, 8, 5], [0, 0, 0, 0], [4, 3, 8, 9]])
    image = h.draw(4, 3, 8, 9)
    for t in (image, image[:, 0].round().long(), image[:, 0] > 0):  # label and valid map
        mine = h.pasted(t, boxes, [1, 0, 3, 2])
        assert torch.equal(cutmix(t, inside(boxes, 8, 9)), mine)
        assert not torch.equal(mine, t)


# --------------------------------------------------------------------------- entropy and cells


@pytest.mark.parametrize("case", h.PADDINGS)
@pytest.mark.parametrize(
    ("height", "width", "n"), [(8, 8, 4), (13, 9, 4), (11, 7, 3), (5, 6, 1), (3, 9, 4)]
)
def test_cells(case: str, height: int, width: int, n: int):
    """Mean entropy over the valid pixels of each cell; pixels get back what their cell says."""
    z, valid = h.draw(3, 5, height, width).float(), h.padded(case, 3, height, width)
    found = speed.cell_mean(speed.entropy(z), valid, n)
    spread = speed.cells_to_pixels(found, height, width)
    for b, i, j in np.ndindex(3, n, n):
        (top, bottom), (left, right) = edges(height, n)[i], edges(width, n)[j]
        entropies = []
        for y, x in itertools.product(range(top, bottom), range(left, right)):
            if valid[b, y, x]:
                e = [math.exp(v) for v in z[b, :, y, x].tolist()]
                entropies.append(-sum(v / sum(e) * math.log(v / sum(e)) for v in e))
        if entropies:
            mine = sum(entropies) / len(entropies)
            assert found[b, i, j].item() == pytest.approx(mine, rel=2e-6)
        else:
            assert found[b, i, j] < 0, "not below every real entropy"
        assert (spread[b, top:bottom, left:right] == found[b, i, j]).all()


def test_entropy_of_certain_and_of_even_predictions():
    z = torch.zeros(1, 7, 4, 4, dtype=torch.float64)
    z[:, 2, :, :2] = 1000.0
    even = pytest.approx(math.log(7))
    found = speed.entropy(z.requires_grad_())
    assert found[0].tolist() == [[0.0, 0.0, even, even]] * 4
    found.sum().backward()
    assert z.grad.isfinite().all()  # p log p has no slope at 0


def test_pick_view():
    """The view of higher or lower entropy, or the coin's; never one that has no image there."""
    r = np.random.default_rng(0)
    h_1, h_2, coin = (torch.from_numpy(r.random((3, 8, 8))) for _ in range(3))
    h_1[:, 0] = h_2[:, 1] = speed.PAD_ENTROPY
    h_1[:, 2] = h_2[:, 2]  # equal: the first view
    for pick in ("max", "min", "random"):
        found = speed.pick_view(h_1, h_2, pick, coin)
        for place in np.ndindex(3, 8, 8):
            a, b = h_1[place].item(), h_2[place].item()
            mine = dict(max=b > a, min=b < a, random=coin[place].item() < 0.5)[pick]
            if place[1] < 2:
                mine = place[1] == 0
            assert found[place].item() is mine, (pick, place)


def test_coins_are_of_their_own_seed_step_and_position():
    """An absolute value, too: a fault in the stream can be the same on all ranks."""
    coins = speed.draw_coins(0, 5, [0, 1, 2, 3], 4)
    assert torch.equal(speed.draw_coins(0, 5, [2, 3], 4), coins[2:]), "a rank draws others"
    others = [speed.draw_coins(1, 5, [0], 4), speed.draw_coins(0, 6, [0], 4)]
    every = torch.cat([coins, *others])
    assert len(every.unique()) == every.numel(), "images, steps or seeds share coins"
    assert coins[1, 0, :3].tolist() == pytest.approx([0.0956006, 0.2890006, 0.9671795])


# -------------------------------------------------------------------------------------- losses


def relation_oracle(f_t: Tensor, f_m: Tensor, valid: Tensor, sharp: float = 0.1) -> Tensor:
    """L_feat by loops: cells of 16 pixels or a few more, mostly valid ones; rows by definition."""
    grid = [side // 4 for side in f_m.shape[-2:]]

    def inside(cell: tuple, size: tuple) -> tuple:
        """The slices of a map of `size` that the cell touches."""
        parts = zip(cell, grid, size, strict=True)
        return (..., *(slice(k * side // n, -(-(k + 1) * side // n)) for k, n, side in parts))

    total, rows = f_m.sum() * 0, 0
    for b in range(len(f_m)):
        kept = []
        for cell in np.ndindex(*grid):
            if valid[b][inside(cell, valid.shape[-2:])].float().mean() > 0.5:
                kept.append([f[b][inside(cell, f.shape[-2:])].mean((1, 2)) for f in (f_t, f_m)])
        if not kept:
            continue
        s = []
        for k in (0, 1):
            units = torch.stack([pair[k] for pair in kept])
            units = units / units.square().sum(1, keepdim=True).sqrt()
            e = (units @ units.T / sharp).exp()
            s.append(e / e.sum(1, keepdim=True))
        total = total + (s[0] * (s[0] / s[1]).log()).sum()
        rows += len(kept)
    return total / max(rows, 1)


@pytest.mark.parametrize("case", h.PADDINGS)
@pytest.mark.parametrize("size", [(64, 64), (32, 80), (33, 65), (72, 49)])
def test_relation_loss(case: str, size: tuple[int, int]):
    valid, cells = h.padded(case, 3, *size), [(side + 3) // 4 for side in size]
    f_t, f_m = h.draw(3, 6, *cells) + 0.5, h.draw(3, 6, *cells, seed=1) + 0.5  # as after a ReLU
    f_m.requires_grad_()
    mine, found = relation_oracle(f_t, f_m, valid), speed.relation_loss(f_t, f_m, valid)
    assert found.item() == pytest.approx(mine.item(), rel=2e-5, abs=1e-6)
    gradients = [torch.autograd.grad(loss, f_m)[0] for loss in (mine, found)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    if case == "all":
        assert mine > 0.01


@pytest.mark.parametrize("width", [5, 9, 23, 103, 117, 121])
def test_positions_of_features_that_16_is_no_multiple_of(width: int):
    """Crop 126 of DINOv2 with DPT: f has 72 cells a side, S 8 x 8 positions of 15.75 pixels."""
    valid = torch.zeros(1, 126, 126, dtype=torch.bool)
    valid[..., :width] = True
    columns = sum(min(max(width / 15.75 - k, 0), 1) > 0.5 for k in range(8))
    f_t, f_m = h.draw(1, 6, 72, 72), h.draw(1, 6, 72, 72, seed=1).requires_grad_()
    speed.relation_loss(f_t, f_m, valid).backward()
    used = f_m.grad.abs().sum((0, 1, 2)) > 0
    assert used.tolist() == [k < 9 * columns for k in range(72)]


# ------------------------------------------------------------------------ two steps recomputed

VARIANTS = {
    "defaults": "",
    "all flags": "--pick min --grid 3 --temperature 2 --lambda-u 0.5 --alpha 2 --beta 3 "
    "--feature-temperature 0.5",
    "random, no CutMix": "--pick random --no-host-cutmix --ramp 1",
    "no EntropyMix, bf16": "--no-entropy-mix --amp bf16",
}


def two_steps(
    args: object, batches: list[dict], net: torch.nn.Module
) -> tuple[list[dict[str, float]], float]:
    """The note's steps 1 to 10, image by image and cell by cell; trains `net`. B = 2.

    Leaves a threshold in `args` that about half of step 0's pixels reach. Also returns how far
    apart, at least, the views' entropies are in a cell.
    """
    crop, n, swap = args.crop_size, args.grid, [1, 0]
    lines, velocity, picked, apart = [], None, set(), math.inf
    for step, batch in enumerate(batches):
        x, y, valid = h.standardized(batch["x"]), batch["y"], batch["u_valid"]
        u = h.standardized(batch["u"])
        strong = data.strong_views(batch["u"], batch["strong"], batch["order"])
        boxes = torch.stack([h.boxes_of(args, batch, v) for v in (0, 1)]) * args.host_cutmix
        views = [h.pasted(h.standardized(s), b, swap) for s, b in zip(strong, boxes, strict=True)]

        net.eval()  # step 2
        with torch.no_grad():
            weak = h.look(net, u, args.amp)
            seen = [h.look(net, v, args.amp)["z"] for v in views]
        net.train()

        # steps 3: everything cut per view, at its own stride; features by the nearest pixel
        def of_view(v: int, t: Tensor, boxes: Tensor = boxes) -> Tensor:
            if t.shape[-1] == crop:
                return h.pasted(t, boxes[v], swap)
            cut = h.nearest(inside(boxes[v], crop, crop), t.shape[-2:])
            return torch.where(cut[:, None], t[swap], t)

        second = torch.zeros(2, crop, crop, dtype=torch.bool)  # steps 4, 5
        for b in range(2):
            for i, (top, bottom) in enumerate(edges(crop, n)):
                for j, (left, right) in enumerate(edges(crop, n)):
                    cell, means = np.s_[b, top:bottom, left:right], []
                    for v in range(2):
                        p = seen[v].softmax(1).movedim(1, -1)[cell]
                        kept = of_view(v, valid)[cell]
                        p = torch.where(p > 0, -p * p.log(), 0).sum(-1)[kept]
                        means.append(p.mean().item())  # nan where there is no image
                    h_1, h_2 = means
                    apart = min(apart, abs(h_2 - h_1))  # nan is not less
                    take = h_2 > h_1 if args.pick == "max" else h_2 < h_1
                    if args.pick == "random":
                        take = data.rng(args.seed, "coin", step, b).random((n, n))[i, j] < 0.5
                    if math.isnan(h_1) or math.isnan(h_2):
                        take = math.isnan(h_1) and not math.isnan(h_2)
                    second[cell] = bool(take) and args.entropy_mix
                    picked.add(bool(take))

        def mixed(t1: Tensor, t2: Tensor, second: Tensor = second) -> Tensor:
            cut = second if t1.shape[-1] == crop else h.nearest(second, t1.shape[-2:])
            return torch.where(cut[:, None] if t1.dim() == 4 else cut, t2, t1)

        m = mixed(*views)
        z_t, f_t, valid_m = (
            mixed(of_view(0, t), of_view(1, t)) for t in (weak["z"], weak["f"], valid)
        )
        c, y_hat = z_t.softmax(1).max(1)
        if args.threshold is None:
            args.threshold = h.between(c[valid_m])
        keep, count = (c >= args.threshold) & valid_m, int(valid_m.sum())

        both = h.look(net, torch.cat([x, m]), args.amp)  # step 6
        z_x, z_m, f_m = both["z"][:2], both["z"][2:], both["f"][2:]
        t = {"L_x": h.supervised(z_x, y), "L_u": h.ce_sum(z_m, y_hat, keep) / count}
        t["L_logit"] = h.kl_sum(z_t, z_m, valid_m, args.temperature) / count
        t["L_feat"] = relation_oracle(f_t, f_m, valid_m, args.feature_temperature)
        # --ramp: the unlabelled terms grow from 0 over that share of the run
        ramp = step / (args.ramp * args.iters) if args.ramp else 1
        of_u = args.lambda_u * t["L_u"] + args.alpha * t["L_feat"] + args.beta * t["L_logit"]
        t["loss"] = (t["L_x"] + ramp * of_u) / 2
        t["loss"].backward()
        backbone, head = h.split_parameters(net)
        velocity = h.sgd(args, [(backbone, 1), (head, args.head_lr_mult)], step, velocity)
        lines.append({k: v.item() for k, v in t.items()} | {"confident": int(keep.sum()) / count})
    assert len(picked) == 2, "one view has won all cells: this seed tests nothing"
    return lines, apart


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_recomputed(variant: str, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    argv = [*h.TINY, *VARIANTS[variant].split()]
    args = speed.parse_args(argv)
    seeds, apart = iter(range(100)), 0
    while apart < 2.5e-6:  # 20 units of rounding, which must not decide on a cell
        args.threshold, batches = None, h.find_seed(args, seeds=seeds)
        torch.manual_seed(args.seed)
        net = h.network(args.backbone)
        begin = copy.deepcopy(net.state_dict())
        mine, apart = two_steps(args, batches, net)
    argv += ["--threshold", str(args.threshold), "--seed", str(args.seed)]
    lines, latest, _ = h.run_main(speed, argv, tmp_path)
    assert 0.1 < lines[0]["confident"] < 0.9
    h.assert_same_terms(lines, mine, args.amp)
    most = 0.5 if args.amp == "bf16" else 0.15
    h.assert_same_update(begin, net.state_dict(), latest["net"], most)
