"""Oracles of segkc.py, written a second time from the note; its first two steps recomputed."""

import copy
import math
from types import SimpleNamespace
from unittest import mock

import helpers as h
import numpy as np
import procs
import pytest
import torch
from torch import Tensor, nn

import common
import data
import segkc

# ----------------------------------------------------------------------- feature consultation


def cosine_distance(g: Tensor, f: Tensor, valid: Tensor) -> float:
    """Mean of 1 - cos over valid cells; g is resized to f's grid, with aligned corners."""
    b, _, rows, columns = f.shape
    (h_g, w_g), total, cells = g.shape[-2:], 0.0, h.nearest(valid, (rows, columns))
    for k, i, j in np.ndindex(b, rows, columns):
        if not cells[k, i, j]:
            continue
        y, x = (p * (s - 1) / (n - 1) for p, s, n in ((i, h_g, rows), (j, w_g, columns)))
        at = np.zeros(g.shape[1])
        for row in range(h_g):
            for col in range(w_g):
                share = max(0, 1 - abs(row - y)) * max(0, 1 - abs(col - x))
                at += share * g[k, :, row, col].numpy()
        other = f[k, :, i, j].numpy()
        total += 1 - at @ other / math.sqrt((at @ at) * (other @ other))
    return total / max(int(cells.sum()), 1)


@pytest.mark.parametrize("case", h.PADDINGS)
@pytest.mark.parametrize("grid", [(4, 6), (3, 2), (8, 5)])  # the same, a coarser, a finer one
def test_consultation(case: str, grid: tuple[int, int]):
    """The distance by loops, 0 to 2; it moves the learner alone, and not by what is padding."""
    g, f = h.draw(2, 7, *grid).requires_grad_(), (h.draw(2, 7, 4, 6, seed=1) + 1).requires_grad_()
    valid = h.padded(case, 2, 16, 24)
    loss = segkc.consultation(g, f, valid)
    mine = cosine_distance(g.detach(), f.detach(), valid)
    assert loss.item() == pytest.approx(mine, rel=1e-5, abs=1e-6)
    loss.backward()
    assert f.grad is None
    if grid == (4, 6):
        assert torch.equal(g.grad.any(1), h.nearest(valid, grid))


# --------------------------------------------------------------------------- gradient routing


@pytest.fixture(scope="module")
def tiny_step() -> tuple[segkc.Pair, dict[str, Tensor]]:
    """segkc_step on tiny networks and random images: the Pair and the terms."""
    torch.manual_seed(0)
    nets = {"junior": procs.Tiny(4, 5), "senior": procs.Tiny(4, 6)}
    flags = dict(threshold=0.0, temperature=1.0, consult="both", sup_loss="ce", ohem_share=0.1)
    flags |= dict(lambda_cps=1.0, lambda_feat=0.5, lambda_kd=0.5)
    pair = segkc.Pair(nets["senior"], nets["junior"])
    args = SimpleNamespace(**flags)
    return pair, segkc.segkc_step(args, nets, pair, h.NO_AMP, h.tiny_batch(), 1.0)


ALL = {"senior.backbone", "senior.classifier", "junior.backbone", "junior.classifier"}
ALL |= {"project_s", "project_j"}
LEARNERS = {  # who learns from a term; the sum of all others' gradients is exactly nothing
    "L_sup": ALL - {"project_s", "project_j"},
    "L_cps": ALL - {"project_s", "project_j"},
    "L_j2s": {"senior.backbone", "project_s"},
    "L_s2j": {"junior.backbone", "project_j"},
    "L_kd": {"junior.backbone", "junior.classifier"},
}


@pytest.mark.parametrize("term", LEARNERS)
def test_gradients_flow_where_the_note_says(term: str, tiny_step):
    pair, terms = tiny_step
    parts = {name: pair.get_submodule(name) for name in ALL}
    assert h.learners(terms[term], parts) == LEARNERS[term]


# ------------------------------------------------------------------------ two steps recomputed

VARIANTS = {
    "defaults": ("resnet34", ""),
    "other flags": (
        "resnet18",
        "--consult j2s --temperature 2 --lambda-cps 2 --lambda-feat 3 --lambda-kd 0.25 "
        "--senior-lr 0.01",
    ),
    "two of a kind, bf16": ("resnet18", "--consult s2j --ramp 1 --amp bf16"),
}


def distance(g: Tensor, f: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine at the valid cells of one grid, differentiable in g."""
    cells = h.nearest(valid, f.shape[-2:])
    a, b = (t.permute(0, 2, 3, 1)[cells] for t in (g, f.detach()))
    cos = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return (1 - cos).sum() / max(len(cos), 1)


def two_steps(
    args: object, batches: list[dict], nets: dict[str, nn.Module]
) -> list[dict[str, float]]:
    """The note's steps 1 to 8, twice; trains the networks. B = 2.

    Leaves a threshold in `args` that half of the less confident network's pixels reach.
    """
    lines, velocity, swap, (senior, junior, *projections) = [], None, [1, 0], nets.values()
    for step, batch in enumerate(batches):
        x, u, y = h.standardized(batch["x"]), h.standardized(batch["u"]), batch["y"]
        u1 = h.standardized(data.strong_views(batch["u"], batch["strong"][:1], batch["order"])[0])
        box = h.boxes_of(args, batch, 0)
        u_mix, valid_u = h.pasted(u1, box, swap), h.pasted(batch["u_valid"], box, swap)
        valid, n = torch.cat([batch["x_valid"], valid_u]), int(valid_u.sum())
        targets = []  # of the senior, of the junior
        for net in (senior, junior):
            net.eval()
            with torch.no_grad():
                p = h.look(net, u, args.amp)["z"].softmax(1)
            net.train()
            targets.append((h.pasted(p.argmax(1), box, swap), h.pasted(p.amax(1), box, swap)))
        (y_s, c_s), (y_j, c_j) = targets
        if args.threshold is None:
            args.threshold = h.between(min(c_s[valid_u], c_j[valid_u], key=Tensor.median))
        keep_s, keep_j = (valid_u & (c >= args.threshold) for c in (c_s, c_j))

        both = torch.cat([x, u_mix])
        of_s, of_j = h.look(senior, both, args.amp), h.look(junior, both, args.amp)
        z_s, z_j, f_s, f_j = of_s["z"], of_j["z"], of_s["deep"], of_j["deep"]
        t = {"L_sup": (h.supervised(z_s[:2], y) + h.supervised(z_j[:2], y)) / 2}
        t["L_cps"] = (h.ce_sum(z_s[2:], y_j, keep_j) + h.ce_sum(z_j[2:], y_s, keep_s)) / n / 2
        t["L_j2s"], t["L_s2j"] = torch.zeros(2)
        ways = (("L_j2s", "project_s", f_s, f_j), ("L_s2j", "project_j", f_j, f_s))
        for term, name, own, other in ways:
            if name in nets:
                with torch.autocast("cpu", torch.bfloat16, enabled=args.amp == "bf16"):
                    own = nets[name](own)
                t[term] = distance(own.float(), other, valid)
        t["L_kd"] = h.kl_sum(z_s[2:].detach(), z_j[2:], valid_u, args.temperature) / n
        semi = args.lambda_cps * t["L_cps"] + args.lambda_kd * t["L_kd"]
        semi = semi + args.lambda_feat * (t["L_j2s"] + t["L_s2j"]) / 2
        ramp = step / (args.ramp * args.iters) if args.ramp else 1
        t["loss"] = t["L_sup"] + ramp * semi
        t["loss"].backward()
        parts = [h.split_parameters(net) for net in (senior, junior)]
        heads = [*parts[0][1], *parts[1][1], *nn.ModuleList(projections).parameters()]
        senior_rate = (args.senior_lr or args.lr) / args.lr
        groups = [(parts[0][0], senior_rate), (parts[1][0], 1), (heads, args.head_lr_mult)]
        velocity = h.sgd(args, groups, step, velocity)
        line = {k: v.item() for k, v in t.items()}
        line["confident_senior"], line["confident_junior"] = (
            int(k.sum()) / n for k in (keep_s, keep_j)
        )
        lines.append(line)
    return lines


def test_each_network_loads_its_own_weights(tmp_path, monkeypatch):
    """Guards: --weights or --senior-weights that does nothing, or reaches the other network."""
    load = mock.Mock(return_value="")
    monkeypatch.setattr(common, "load_weights", load)
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    flags = "--senior resnet34 --junior resnet18 --iters 1 --weights a.pt --senior-weights b.pt"
    h.run_main(segkc, [*h.TINY, *flags.split()], tmp_path)
    loaded = [(c.args[0].config["backbone"], *c.args[1:]) for c in load.call_args_list]
    whole = data.SHAPES_CLASSES  # a file of its own may hold the whole network
    assert loaded == [("resnet18",) * 2 + ("a.pt", whole), ("resnet34",) * 2 + ("b.pt", whole)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_recomputed(variant: str, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    other, flags = VARIANTS[variant]
    argv = [*h.TINY, "--senior", other, "--junior", "resnet18", *flags.split()]
    args = segkc.parse_args(argv)
    args.threshold, batches = None, h.find_seed(args)
    torch.manual_seed(args.seed)
    junior, senior = (h.network(name) for name in ("resnet18", other))
    nets = {"senior": senior, "junior": junior}
    for name, direction in (("project_s", "j2s"), ("project_j", "s2j")):  # no other is there
        if args.consult in ("both", direction):
            nets[name] = nn.Conv2d(512, 512, 1)
    begin = {n: copy.deepcopy(net.state_dict()) for n, net in nets.items()}
    mine = two_steps(args, batches, nets)

    argv += ["--threshold", str(args.threshold), "--seed", str(args.seed)]
    lines, latest, _ = h.run_main(segkc, argv, tmp_path)
    confident = sorted(lines[0][f"confident_{name}"] for name in ("senior", "junior"))
    assert 0.1 < confident[0] < 0.9, "tau decides nothing"
    h.assert_same_terms(lines, mine, args.amp)
    for name, net in nets.items():
        found = latest["pair"].items()
        found = {k.removeprefix(f"{name}."): v for k, v in found if k.startswith(f"{name}.")}
        h.assert_same_update(begin[name], net.state_dict(), found)
