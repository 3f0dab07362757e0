"""SegKC: semi-supervised segmentation by knowledge consultation (Than et al., arXiv 2503.10693).

A senior S and a junior J of different backbones are trained together: each learns the other's
pseudo-labels (cross pseudo supervision), each draws its features towards the other's (feature
consultation), and the junior also learns the senior's distribution (prediction consultation).

    L = L_sup + lambda_cps L_cps + lambda_feat (L_j2s + L_s2j) / 2 + lambda_kd L_kd

Dimension key: B images of this rank, C classes, H W pixels, h w cells of a backbone's last map.
x, y labelled; u weak and u1 strong view of an unlabelled crop, u_mix its CutMix; z logits, f last
backbone map, g its projection to the other network's width; suffixes _s senior, _j junior.

    torchrun --nproc_per_node=4 segkc.py --split 1/2    # plain `python segkc.py`: one GPU or none

Inference uses the junior alone. The paper has no public code: the README lists what is our reading;
"(step n)" is row n of its table.
Measured: built-in shapes 52.9 mIoU, labelled-only 41.9 (3 seeds); CamVid, small: no gain (README).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
from common import masked_mean
from networks import BACKBONES, build_network, load_weights, upsample


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The shared flags and SegKC's own; --backbone is the junior's, the one of inference."""
    p = common.make_parser(__file__, __doc__.splitlines()[0])
    a = p.add_argument_group("SegKC").add_argument
    a(
        "--junior",
        dest="backbone",
        choices=BACKBONES,
        default=argparse.SUPPRESS,
        help="as --backbone",
    )
    a("--senior", choices=BACKBONES, help="encoder of the senior")
    a("--senior-weights", help="like --weights, of the senior; unset: --weights")
    a("--lambda-cps", type=common.WEIGHT, default=1.0, help="weight of L_cps, pseudo-labels")
    a("--lambda-feat", type=common.WEIGHT, default=0.5, help="weight of the feature terms")
    a("--lambda-kd", type=common.WEIGHT, default=0.5, help="weight of L_kd, senior to junior")
    a("--consult", choices=("both", "j2s", "s2j", "none"), default="both", help="feature terms")
    a("--temperature", type=common.POSITIVE, default=1.0, help="t of L_kd")
    pair = dict(senior="resnet101", backbone="resnet50")
    small = dict(senior="resnet34", backbone="resnet18", epochs=6)  # 8 minutes on 2 cores
    return common.parse(p, argv, all=pair, shapes=small)


# --------------------------------------------------------------------------- the paper's pieces


def cutmix(t: Tensor, box: Tensor) -> Tensor:
    """t [B, ..., H, W], but its partner's inside `box` [B, H, W] bool.

    The partner pi swaps neighbours, 0-1, 2-3, ...: a roll by one in blocks of two. It is on
    the same rank however many ranks there are, and never the image itself.
    """
    pi = torch.arange(len(t), device=t.device) ^ 1
    return torch.where(box if t.dim() == 3 else box[:, None], t[pi], t)


def cps_loss(
    z: Tensor, pseudo_label: Tensor, confidence: Tensor, valid: Tensor, tau: float
) -> Tensor:
    """masked_mean(CE(z, y_hat), c >= tau and valid) (step 5): z one's, y_hat and c the other's."""
    ce = F.cross_entropy(z, pseudo_label, reduction="none")  # [B, H, W]
    return masked_mean(ce, (confidence >= tau) & valid, valid)


def consultation(g: Tensor, f: Tensor, valid: Tensor) -> Tensor:
    """d(g, sg f) = 1 - cosine over channels, mean over valid cells (step 6).

    g [B, A, h', w'] is the learning network's projected map, resized to the grid of f [B, A, h, w];
    valid [B, H, W].
    """
    g = upsample(g, f.shape[-2:]) if g.shape[-2:] != f.shape[-2:] else g.float()
    cells = common.resize_mask(valid, f.shape[-2:])
    return masked_mean(1 - F.cosine_similarity(g, f.detach().float(), dim=1), cells, cells)


def distillation(z_s: Tensor, z_j: Tensor, valid: Tensor, t: float) -> Tensor:
    """L_kd = mean over valid of KL(sg softmax(z_S / t) || softmax(z_J / t)) t^2 (step 7)."""
    log_s, log_j = (z_s.detach() / t).log_softmax(1), (z_j / t).log_softmax(1)
    kl = (log_s.exp() * (log_s - log_j)).sum(1)  # [B, H, W]
    return masked_mean(kl, valid, valid) * t**2


class Pair(nn.Module):
    """Senior and junior with their training-only projections, so that one DDP carries all."""

    def __init__(self, senior: nn.Module, junior: nn.Module) -> None:
        super().__init__()
        self.senior, self.junior = senior, junior
        a_s, a_j = senior.backbone.channels[-1], junior.backbone.channels[-1]
        self.project_s, self.project_j = nn.Conv2d(a_s, a_j, 1), nn.Conv2d(a_j, a_s, 1)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(z, f, g) of senior and junior: logits [B, C, H, W], last map, its projection."""
        out = []
        for net, project in ((self.senior, self.project_s), (self.junior, self.project_j)):
            z, _, f = net(x, features=True)
            out.append((z, f, project(f)))
        return out


# ----------------------------------------------------------------------------------- training


def segkc_step(
    args: argparse.Namespace,
    run: common.Run,
    nets: dict[str, nn.Module],
    model: nn.Module,
    batch: dict,
    step: int,
) -> dict[str, Tensor]:
    """The losses of a step, "loss" the total. `model` is the Pair, in DDP if there are ranks."""
    x, y, u = data.normalize(batch["x"]), batch["y"], data.normalize(batch["u"])
    u1 = data.normalize(data.strong_views(batch["u"], batch["strong"][:1], batch["order"])[0])
    box = data.rect_mask(batch["box"][0], *u.shape[-2:])

    with torch.no_grad():
        # Weak views (step 1), in eval mode (reading); y_hat and c are cut like u_mix (step 2).
        y_hat, c = {}, {}
        for name, net in nets.items():
            net.eval()
            with run.autocast():
                z = net(u)
            net.train()
            c[name], y_hat[name] = (cutmix(t, box) for t in z.softmax(1).max(1))
        u_mix, valid_u = cutmix(u1, box), cutmix(batch["u_valid"], box)
        valid = torch.cat([batch["x_valid"], valid_u])

    # Forward with gradient on cat(x, u_mix) (step 3)
    with run.autocast():
        (z_s, f_s, g_s), (z_j, f_j, g_j) = model(torch.cat([x, u_mix]))
    (z_s_x, z_s_u), (z_j_x, z_j_u) = z_s.split(len(x)), z_j.split(len(x))

    # L_sup = 1/2 [CE(z_S(x), y) + CE(z_J(x), y)] (step 4)
    sup = args.sup_loss, args.ohem_least
    loss_sup = 0.5 * sum(common.supervised_loss(z, y, *sup) for z in (z_s_x, z_j_x))

    # L_cps = 1/2 [masked_mean(CE(z_S, y_hat_J), c_J >= tau) + the same of z_J and S] (step 5)
    cps_s = cps_loss(z_s_u, y_hat["junior"], c["junior"], valid_u, args.threshold)
    cps_j = cps_loss(z_j_u, y_hat["senior"], c["senior"], valid_u, args.threshold)
    loss_cps = 0.5 * (cps_s + cps_j)

    # L_j2s = d(g_S(f_S), sg f_J); L_s2j = d(g_J(f_J), sg f_S) (step 6)
    loss_j2s, loss_s2j = consultation(g_s, f_j, valid), consultation(g_j, f_s, valid)
    j2s, s2j = args.consult in ("both", "j2s"), args.consult in ("both", "s2j")

    # L_kd = KL(sg p_S || p_J) on u_mix (step 7)
    loss_kd = distillation(z_s_u, z_j_u, valid_u, args.temperature)

    # L = L_sup + lambda_cps L_cps + lambda_feat (L_j2s + L_s2j) / 2 + lambda_kd L_kd (step 8)
    feat = args.lambda_feat * (j2s * loss_j2s + s2j * loss_s2j) / 2
    unlabeled = args.lambda_cps * loss_cps + feat + args.lambda_kd * loss_kd
    loss = loss_sup + run.ramp(step) * unlabeled
    terms = {"loss": loss, "L_sup": loss_sup, "L_cps": loss_cps, "L_j2s": loss_j2s}
    terms |= {"L_s2j": loss_s2j, "L_kd": loss_kd}
    for name in nets:
        keep = (c[name] >= args.threshold) & valid_u
        terms[f"confident_{name}"] = masked_mean(torch.ones_like(c[name]), keep, valid_u)
    return terms


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.test_only:
        common.test(args)
        return

    # ---- setup, data
    run = common.Run(args)

    # ---- networks, optimizer: the junior first, so that its weights are those of other scripts
    nets, senior_weights = {}, "none" if args.labeled_only else args.senior_weights
    shared = senior_weights or args.weights in ("imagenet", "none")
    if not shared and args.senior != args.backbone:
        raise data.InputError(
            f"--weights {args.weights}: a file of {args.backbone}; "
            f"give --senior-weights too: imagenet, none or a file of {args.senior}"
        )
    for name, backbone, weights in (
        ("junior", args.backbone, args.weights),
        ("senior", args.senior, senior_weights or args.weights),
    ):
        net = build_network(backbone, len(run.split.classes), args.output_stride, args.decoder)
        size = sum(p.numel() for p in net.parameters()) / 1e6
        run.say(f"{name}, {size:.2f} M parameters: {load_weights(net, backbone, weights)}")
        nets[name] = run.place(net)
    junior, senior = nets["junior"], nets["senior"]
    pair = Pair(senior, junior).to(run.device)
    model = run.distribute(junior if args.labeled_only else pair)
    heads = [*senior.head_parameters(), *junior.head_parameters()]
    heads += [*pair.project_s.parameters(), *pair.project_j.parameters()]
    optimizer = run.optimizer(
        [
            {"params": senior.backbone.parameters(), "lr": args.lr},
            {"params": junior.backbone.parameters(), "lr": args.lr},
            {"params": heads, "lr": args.lr * args.head_lr_mult},
        ]
    )

    # ---- resume
    start = run.resume(pair=pair, optimizer=optimizer)

    # ---- train
    for step, batch in enumerate(run.batches(start), start):
        run.set_lr(optimizer, step)
        if args.labeled_only:
            terms = run.supervised(model, batch)
        else:
            terms = segkc_step(args, run, nets, model, batch, step)
        run.update(terms["loss"], optimizer)
        run.step_done(step, {"junior": junior} if args.labeled_only else nets, terms)

    # ---- teardown
    run.finish()


if __name__ == "__main__":
    common.launch(main)
