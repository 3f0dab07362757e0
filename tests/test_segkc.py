"""Oracles of segkc.py, written a second time from the note; its first two steps recomputed."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    assert_same_update,
    batches_of,
    between,
    bilinear,
    ce_sum,
    find_seed,
    kl_sum,
    look,
    nearest,
    network,
    pasted,
    run_main,
    sgd,
    split_parameters,
    standardized,
    supervised,
)
from networks import build_network
from torch import Tensor, nn

import data
import segkc

F64 = dict(rtol=1e-10, atol=1e-13)


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


def some(case: str, *shape: int) -> Tensor:
    """Valid maps: all, none, one pixel, or a part with whole rows of padding."""
    valid = torch.ones(shape, dtype=torch.bool)
    if case in ("none", "one pixel"):
        valid[:] = False
        valid[0, 0, 0] = case == "one pixel"
    elif case == "part":
        valid[0, shape[1] // 2 :] = False
        valid[1, :, : shape[2] // 3] = False
    return valid


VALID = ("all", "part", "one pixel", "none")


def test_the_flags_default_to_the_notes_values():
    args = segkc.parse_args(["--dataset", "pascal"])
    assert (args.lambda_cps, args.lambda_feat, args.lambda_kd) == (1.0, 0.5, 0.5)
    assert (args.consult, args.temperature, args.threshold) == ("both", 1.0, 0.95)
    assert (args.senior, args.backbone) == ("resnet101", "resnet50")
    assert not args.ramp
    assert segkc.parse_args(["--junior", "resnet34"]).backbone == "resnet34"


# ------------------------------------------------------------------------------------- CutMix


@pytest.mark.parametrize("b", [2, 4, 6])
def test_the_partner_is_always_another_image(b: int):
    image = torch.arange(b).float()[:, None, None, None].expand(b, 2, 5, 4)
    everything = torch.ones(b, 5, 4, dtype=torch.bool)
    partner = segkc.cutmix(image, everything)[:, 0, 0, 0].long().tolist()
    assert sorted(partner) == list(range(b)), "no permutation"
    assert all(p != i for i, p in enumerate(partner)), "an image is its own partner"
    assert torch.equal(segkc.cutmix(image, ~everything), image)


@pytest.mark.parametrize("kind", ["image", "label", "valid"])
def test_cutmix_pastes_the_partners_box(kind: str):
    boxes = torch.tensor([[0, 0, 3, 9], [2, 1, 8, 5], [0, 0, 0, 0], [4, 3, 8, 9]])
    box = torch.zeros(4, 8, 9, dtype=torch.bool)
    for b, (top, left, bottom, right) in enumerate(boxes.tolist()):
        box[b, top:bottom, left:right] = True
    t = draw(4, 3, 8, 9)
    t = {"image": t, "label": t[:, 0].round().long(), "valid": t[:, 0] > 0}[kind]
    whole = torch.ones(4, 1, 1, dtype=torch.bool)
    partner = segkc.cutmix(torch.arange(4)[:, None, None], whole).flatten().tolist()
    assert torch.equal(segkc.cutmix(t, box), pasted(t, boxes, partner))
    assert not torch.equal(segkc.cutmix(t, box), t)


# ---------------------------------------------------------------------------------- L_cps


@pytest.mark.parametrize("case", VALID)
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.1])  # every pixel, some, none is confident
@pytest.mark.parametrize("classes", [5, 1])
def test_cps_loss(case: str, tau: float, classes: int):
    r = np.random.default_rng(0)
    z, valid = draw(2, 5, 4, 6), some(case, 2, 4, 6)
    y_hat = torch.from_numpy(r.integers(0, classes, (2, 4, 6)))
    c = torch.from_numpy(r.random((2, 4, 6)))
    c[0, 0, 0] = 0.6  # tau itself is confident
    total = 0.0
    for b, i, j in np.ndindex(2, 4, 6):
        if valid[b, i, j] and c[b, i, j] >= tau:
            e = [math.exp(v) for v in z[b, :, i, j].tolist()]
            total -= math.log(e[y_hat[b, i, j]] / sum(e))
    z.requires_grad_()
    loss = segkc.cps_loss(z, y_hat, c, valid, tau)
    np.testing.assert_allclose(loss.item(), total / max(int(valid.sum()), 1), **F64)
    loss.backward()
    learnt = valid & (c >= tau)
    assert torch.equal(z.grad.any(1), learnt), "gradient at confident valid pixels alone"


# ----------------------------------------------------------------------- feature consultation


def cosine_distance(g: Tensor, f: Tensor, valid: Tensor) -> float:
    """Mean of 1 - cos over valid cells; g is resized to f's grid, with aligned corners."""
    b, _, h, w = f.shape
    (h_g, w_g), total, cells = g.shape[-2:], 0.0, 0
    for k, i, j in np.ndindex(b, h, w):
        if not valid[k, i * valid.shape[1] // h, j * valid.shape[2] // w]:
            continue
        y, x = (p * (s - 1) / (n - 1) for p, s, n in ((i, h_g, h), (j, w_g, w)))
        at = np.zeros(g.shape[1])
        for row in range(h_g):
            for col in range(w_g):
                share = max(0, 1 - abs(row - y)) * max(0, 1 - abs(col - x))
                at += share * g[k, :, row, col].numpy()
        other = f[k, :, i, j].numpy()
        total += 1 - at @ other / math.sqrt((at @ at) * (other @ other))
        cells += 1
    return total / max(cells, 1)


@pytest.mark.parametrize("case", VALID)
@pytest.mark.parametrize("grid", [(4, 6), (3, 2), (8, 5)])  # the same, a coarser, a finer one
def test_consultation(case: str, grid: tuple[int, int]):
    g, f, valid = draw(2, 7, *grid), draw(2, 7, 4, 6, seed=1) + 1, some(case, 2, 16, 24)
    mine = cosine_distance(g, f, valid)
    found = segkc.consultation(g, f, valid).item()
    assert found == pytest.approx(mine, rel=1e-5, abs=1e-6)
    if case != "none":
        assert mine > 0.1


def test_consultation_is_zero_for_parallel_and_two_for_opposite_features():
    f, valid = draw(2, 7, 4, 6), some("all", 2, 16, 24)
    length = 0.1 + draw(2, 1, 4, 6, seed=2).abs()
    assert segkc.consultation(length * f, f, valid).item() == pytest.approx(0, abs=1e-6)
    assert segkc.consultation(-length * f, f, valid).item() == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("grid", [(4, 6), (3, 2)])
def test_consultation_moves_the_learner_alone(grid: tuple[int, int]):
    g, f = draw(2, 7, *grid).requires_grad_(), draw(2, 7, 4, 6, seed=1).requires_grad_()
    segkc.consultation(g, f, some("part", 2, 16, 24)).backward()
    assert f.grad is None
    assert g.grad.any()


def test_what_stands_in_padding_does_not_consult():
    g, f, valid = draw(2, 7, 4, 6), draw(2, 7, 4, 6, seed=1), some("part", 2, 16, 24)
    other = g.clone()
    other[0, :, 2:], other[1, :, :, :2] = 5.0, -5.0
    g.requires_grad_()
    loss = segkc.consultation(g, f, valid)
    loss.backward()
    assert segkc.consultation(other, f, valid).item() == loss.item()
    assert not g.grad[0, :, 2:].any()
    assert g.grad[0, :, :2].any()


# ------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("case", VALID)
@pytest.mark.parametrize("t", [1.0, 0.5, 3.0])
def test_distillation(case: str, t: float):
    z_s, z_j, valid = draw(2, 5, 4, 6), draw(2, 5, 4, 6, seed=1), some(case, 2, 4, 6)
    total = 0.0
    for b, i, j in np.ndindex(2, 4, 6):
        if valid[b, i, j]:
            e_s, e_j = ([math.exp(v / t) for v in z[b, :, i, j].tolist()] for z in (z_s, z_j))
            p, q = ([v / sum(e) for v in e] for e in (e_s, e_j))
            total += t * t * sum(a * math.log(a / c) for a, c in zip(p, q, strict=True))
    found = segkc.distillation(z_s, z_j, valid, t).item()
    np.testing.assert_allclose(found, total / max(int(valid.sum()), 1), **F64)


def test_distillation_moves_the_junior_alone():
    """d/dz_J = t (p_J - p_S) / count at valid pixels; the senior gets none at all."""
    z_s, z_j = draw(2, 5, 4, 6).requires_grad_(), draw(2, 5, 4, 6, seed=1).requires_grad_()
    valid, t = some("part", 2, 4, 6), 2.0
    segkc.distillation(z_s, z_j, valid, t).backward()
    assert z_s.grad is None
    mine = t * ((z_j / t).softmax(1) - (z_s / t).softmax(1)) / valid.sum() * valid[:, None]
    torch.testing.assert_close(z_j.grad, mine.detach(), **F64)


# --------------------------------------------------------------------------- gradient routing


class Tiny(nn.Module):
    """A network of two layers with what segkc asks of one: parts of `width`, a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.backbone.channels = (width, width)
        self.classifier = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor, features: bool = False):
        f = self.backbone(x).relu()
        z = bilinear(self.classifier(f), x.shape[-2:])
        return (z, f, f) if features else z


FLAGS = dict(threshold=0.0, temperature=1.0, consult="both", sup_loss="ce", ohem_least=1)
FLAGS |= dict(lambda_cps=1.0, lambda_feat=0.5, lambda_kd=0.5)


def step_of(**changes: object) -> tuple[segkc.Pair, dict, dict[str, Tensor]]:
    """segkc_step on tiny networks and random images: the Pair, the batch and the terms."""
    torch.manual_seed(0)
    nets = {"junior": Tiny(5), "senior": Tiny(6)}
    pair = segkc.Pair(nets["senior"], nets["junior"])
    run = SimpleNamespace(
        autocast=lambda: torch.autocast("cpu", enabled=False), ramp=lambda step: 1.0
    )
    every = torch.ones(2, 32, 32, dtype=torch.bool)
    batch = dict(x=torch.rand(2, 3, 32, 32), u=torch.rand(2, 3, 32, 32), order=[0, 1, 2, 3])
    batch |= dict(y=torch.randint(0, 4, (2, 32, 32)), x_valid=every, u_valid=every)
    batch |= dict(box=torch.tensor([[[0, 0, 20, 20], [8, 8, 30, 31]]] * 2))
    batch["strong"] = torch.tensor([1.3, 0.7, 1.2, 0.1, 0.0, 0.8]).repeat(2, 2, 1)
    args = SimpleNamespace(**(FLAGS | changes))
    return pair, batch, segkc.segkc_step(args, run, nets, pair, batch, 0)


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
def test_gradients_flow_where_the_note_says(term: str):
    pair, _, terms = step_of()
    terms[term].backward()
    for part in ALL:
        gradients = [p.grad for p in pair.get_submodule(part).parameters()]
        learns = any(g is not None and g.any() for g in gradients)
        assert learns == (part in LEARNERS[term]), part


def test_cps_pairs_each_network_with_the_others_pseudo_labels(monkeypatch):
    calls, original = [], segkc.cps_loss

    def record(z: Tensor, y_hat: Tensor, c: Tensor, valid: Tensor, tau: float) -> Tensor:
        calls.append((z, y_hat, c))
        return original(z, y_hat, c, valid, tau)

    monkeypatch.setattr(segkc, "cps_loss", record)
    pair, batch, terms = step_of()
    boxes, u = batch["box"][0], standardized(batch["u"])
    found = []
    for z, y_hat, c in calls:
        learners = {"senior": pair.senior, "junior": pair.junior}
        (name,) = (
            n
            for n, net in learners.items()
            if torch.autograd.grad(
                z.sum(), net.classifier.weight, retain_graph=True, allow_unused=True
            )[0]
            is not None
        )
        found.append(name)
        other = pair.junior if name == "senior" else pair.senior
        p = other(u).softmax(1)
        assert torch.equal(y_hat, pasted(p.argmax(1), boxes, [1, 0]))
        torch.testing.assert_close(c, pasted(p.amax(1), boxes, [1, 0]), rtol=1e-5, atol=1e-6)
        assert not c.requires_grad, "targets get no gradient"
    assert sorted(found) == ["junior", "senior"]
    mine = sum(original(*a, batch["u_valid"], 0.0).item() for a in calls) / 2
    assert terms["L_cps"].item() == pytest.approx(mine, rel=1e-6)


@pytest.mark.parametrize(
    ("consult", "j2s", "s2j"), [("both", 1, 1), ("j2s", 1, 0), ("s2j", 0, 1), ("none", 0, 0)]
)
def test_total_loss_and_the_flags(consult: str, j2s: int, s2j: int):
    changes = dict(consult=consult, lambda_cps=0.3, lambda_feat=0.7, lambda_kd=1.1)
    *_, t = step_of(**changes)
    t = {k: v.item() for k, v in t.items()}
    mine = t["L_sup"] + 0.3 * t["L_cps"] + 1.1 * t["L_kd"]
    mine += 0.7 * (j2s * t["L_j2s"] + s2j * t["L_s2j"]) / 2
    assert t["loss"] == pytest.approx(mine, rel=1e-6)


def test_pair_projects_each_network_to_the_others_width():
    torch.manual_seed(0)
    senior, junior = Tiny(6), Tiny(5)
    pair, x = segkc.Pair(senior, junior), torch.rand(2, 3, 16, 16)
    (z_s, f_s, g_s), (z_j, f_j, g_j) = pair(x)
    for net, z, f in ((senior, z_s, f_s), (junior, z_j, f_j)):
        torch.testing.assert_close(f, net.backbone(x).relu())
        torch.testing.assert_close(z, net(x))
    for g, f, project, width in ((g_s, f_s, pair.project_s, 5), (g_j, f_j, pair.project_j, 6)):
        rows = f.permute(0, 2, 3, 1) @ project.weight[:, :, 0, 0].T + project.bias
        torch.testing.assert_close(g, rows.permute(0, 3, 1, 2))
        assert g.shape[1] == width


# ------------------------------------------------------------------------ two steps recomputed

VARIANTS = {
    "defaults": ("resnet34", ""),
    "other flags": (
        "resnet18",
        "--consult j2s --temperature 2 --lambda-cps 2 --lambda-feat 3 --lambda-kd 0.25",
    ),
    "two of a kind": ("resnet18", "--consult s2j --ramp 1"),
}


def distance(g: Tensor, f: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine at the valid cells of one grid, differentiable in g."""
    cells = nearest(valid, f.shape[-2:])
    a, b = (t.permute(0, 2, 3, 1)[cells] for t in (g, f.detach()))
    cos = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return (1 - cos).sum() / max(len(cos), 1)


def two_steps(
    args: object, batches: list[dict], senior: nn.Module, junior: nn.Module, to_j, to_s
) -> list[dict[str, float]]:
    """The note's steps 1 to 8, twice; trains the networks. B = 2; to_j projects the senior's f.

    Leaves a threshold in `args` that half of the less confident network's pixels reach.
    """
    lines, velocity, swap = [], None, [1, 0]
    for step, batch in enumerate(batches):
        x, u, y = standardized(batch["x"]), standardized(batch["u"]), batch["y"]
        u1 = standardized(data.strong_views(batch["u"], batch["strong"][:1], batch["order"])[0])
        box = batch["box"][0]
        u_mix, valid_u = pasted(u1, box, swap), pasted(batch["u_valid"], box, swap)
        valid, n = torch.cat([batch["x_valid"], valid_u]), int(valid_u.sum())
        targets = []  # of the senior, of the junior
        for net in (senior, junior):
            net.eval()
            with torch.no_grad():
                p = look(net, u)["z"].softmax(1)
            net.train()
            targets.append((pasted(p.argmax(1), box, swap), pasted(p.amax(1), box, swap)))
        (y_s, c_s), (y_j, c_j) = targets
        if args.threshold is None:
            args.threshold = between(min(c_s[valid_u], c_j[valid_u], key=Tensor.median))
        keep_s, keep_j = (valid_u & (c >= args.threshold) for c in (c_s, c_j))

        both = torch.cat([x, u_mix])
        of_s, of_j = look(senior, both), look(junior, both)
        z_s, z_j, f_s, f_j = of_s["z"], of_j["z"], of_s["deep"], of_j["deep"]
        t = {"L_sup": (supervised(z_s[:2], y) + supervised(z_j[:2], y)) / 2}
        t["L_cps"] = (ce_sum(z_s[2:], y_j, keep_j) + ce_sum(z_j[2:], y_s, keep_s)) / n / 2
        t["L_j2s"], t["L_s2j"] = distance(to_j(f_s), f_j, valid), distance(to_s(f_j), f_s, valid)
        t["L_kd"] = kl_sum(z_s[2:].detach(), z_j[2:], valid_u, args.temperature) / n
        feat = {"both": t["L_j2s"] + t["L_s2j"], "j2s": t["L_j2s"], "s2j": t["L_s2j"]}
        semi = args.lambda_cps * t["L_cps"] + args.lambda_feat * feat[args.consult] / 2
        semi = semi + args.lambda_kd * t["L_kd"]
        ramp = step / (args.ramp * args.iters) if args.ramp else 1
        t["loss"] = t["L_sup"] + ramp * semi
        t["loss"].backward()
        parts = [split_parameters(net) for net in (senior, junior)]
        heads = [*parts[0][1], *parts[1][1], *to_j.parameters(), *to_s.parameters()]
        groups = [(parts[0][0], 1), (parts[1][0], 1), (heads, args.head_lr_mult)]
        velocity = sgd(args, groups, step, velocity)
        line = {k: v.item() for k, v in t.items()}
        line["confident_senior"], line["confident_junior"] = (
            int(k.sum()) / n for k in (keep_s, keep_j)
        )
        lines.append(line)
    return lines


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_recomputed(variant: str, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    other, flags = VARIANTS[variant]
    argv = [*TINY, "--senior", other, "--junior", "resnet18", *flags.split()]
    args = segkc.parse_args(argv)
    args.threshold, batches = None, find_seed(args)
    torch.manual_seed(args.seed)
    junior, senior = (network(name) for name in ("resnet18", other))
    to_j, to_s = (nn.Conv2d(512, 512, 1) for _ in range(2))
    nets = {"senior": senior, "junior": junior, "project_s": to_j, "project_j": to_s}
    begin = {n: copy.deepcopy(net.state_dict()) for n, net in nets.items()}
    mine = two_steps(args, batches, senior, junior, to_j, to_s)

    argv += ["--threshold", str(args.threshold), "--seed", str(args.seed)]
    lines, latest, best = run_main(segkc, argv, tmp_path)
    confident = sorted(lines[0][f"confident_{name}"] for name in ("senior", "junior"))
    assert 0.1 < confident[0] < 0.9, "tau decides nothing"
    for step, tolerance in ((0, 2e-5), (1, 0.01)):
        for name, value in mine[step].items():
            assert lines[step][name] == pytest.approx(value, rel=tolerance), (step, name)
    for name, net in nets.items():
        found = latest["pair"].items()
        found = {k.removeprefix(f"{name}."): v for k, v in found if k.startswith(f"{name}.")}
        assert_same_update(begin[name], net.state_dict(), found)

    # best.pt is the junior, with no trace of the senior, and loads as a network of its own
    assert best["config"]["backbone"] == "resnet18"
    alone = build_network(**best["config"])
    alone.load_state_dict(best["net"], strict=True)
    for name, value in best["net"].items():
        assert torch.equal(value, latest["pair"][f"junior.{name}"])
    assert best["net"].keys() == junior.state_dict().keys()
    tensors = [v for v in best.values() if isinstance(v, Tensor)]
    assert not tensors, "best.pt holds tensors beside the network"


def test_labeled_only_trains_the_junior(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    argv = [*TINY, "--labeled-only", "--iters", "1"]
    args = segkc.parse_args(argv)
    torch.manual_seed(args.seed)
    net = network(args.backbone)
    torch.save(net.backbone.state_dict(), tmp_path.with_suffix(".pth"))
    argv += ["--weights", str(tmp_path.with_suffix(".pth"))]  # the senior, another net, needs none
    begin, batch = copy.deepcopy(net.state_dict()), batches_of(args)[0]
    loss = supervised(look(net, standardized(batch["x"]))["z"], batch["y"])
    loss.backward()
    backbone, head = split_parameters(net)
    sgd(args, [(backbone, 1), (head, args.head_lr_mult)], 0, None)
    lines, latest, best = run_main(segkc, argv, tmp_path)
    assert lines[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_update(begin, net.state_dict(), best["net"])
