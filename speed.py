"""SPEED with EntropyMix: self pseudo entropy knowledge distillation (Lu et al., TCSVT 34(8), 2024).

Two strong views of an unlabelled crop are cut into cells; a new image takes each cell from the view
whose prediction has the higher entropy (EntropyMix). The network learns this image from its own
prediction on the weak view: by pseudo-label (L_u), by its logits (L_logit) and by the relations
between its features (L_feat). One network, no teacher, no auxiliary head.

    L = 1/2 (L_x + lambda_u L_u + alpha L_feat + beta L_logit)

Dimension key: B images of this rank, C classes, H W pixels, h w cells of a stride-4 map, n grid
cells a side (--grid), N positions of the stride-16 map. x, y labelled; u weak, u1 u2 strong, m
mixed views; valid is True where a crop holds image.

    torchrun --nproc_per_node=4 speed.py --split 1/16    # plain `python speed.py`: one GPU or none

The paper has no public code: the README lists what is our reading, with its flag; "(step n)" is row
n of its table. Measured (README): built-in shapes 57.2 mIoU, with CutMix alone 53.9, labelled-only
41.9 (16 labels, 2400 steps, 3 seeds); on small CamVid images no gain over labelled-only.
"""

import argparse
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
from common import masked_mean
from networks import build_network, load_weights

PAD_ENTROPY = -1.0  # entropy of a cell without image: below every real one


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The shared flags and SPEED's own."""
    p = common.make_parser(__file__, __doc__.splitlines()[0])
    flag = argparse.BooleanOptionalAction
    a = p.add_argument_group("SPEED").add_argument
    a("--grid", type=common.STEPS, default=4, help="n: EntropyMix cells a side")
    a("--pick", choices=("max", "min", "random"), default="max", help="entropy of the view taken")
    a("--entropy-mix", action=flag, default=True, help="off: learn from u1 alone")
    a("--host-cutmix", action=flag, default=True, help="CutMix u1 and u2 before EntropyMix")
    a("--lambda-u", type=common.WEIGHT, default=1.0, help="weight of L_u, pseudo-labels")
    a("--alpha", type=common.WEIGHT, default=1.0, help="weight of L_feat, pixel relations")
    a("--beta", type=common.WEIGHT, default=1.0, help="weight of L_logit, distilled logits")
    a("--feature-temperature", type=common.POSITIVE, default=0.1, help="divides f f^T in L_feat")
    a("--temperature", type=common.POSITIVE, default=1.0, help="t of L_logit")
    return common.parse(p, argv)


# --------------------------------------------------------------------------- the paper's pieces


def cutmix(t: Tensor, box: Tensor) -> Tensor:
    """t [B, ..., H, W], but its partner's inside `box` [B, H, W] bool.

    The partner pi swaps neighbours, 0-1, 2-3, ...: a roll by one in blocks of two. It is on
    the same rank however many ranks there are, and never the image itself.
    """
    pi = torch.arange(len(t), device=t.device) ^ 1
    return torch.where(box if t.dim() == 3 else box[:, None], t[pi], t)


def cell_entropy(z: Tensor, valid: Tensor, n: int) -> Tensor:
    """Mean of H = -sum_k p_k log p_k over the valid pixels of a cell: z to [B, n, n]."""
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1) * valid  # [B, H, W]
    total, count = (cell_sum(t, n) for t in (entropy, valid.float()))
    return torch.where(count > 0, total / count.clamp_min(1), PAD_ENTROPY)


def cell_sum(t: Tensor, n: int) -> Tensor:
    """Sums [B, H, W] over the cells of an n x n grid with edges floor(i H / n)."""
    for dim in (1, 2):
        size = t.shape[dim]
        edges = [i * size // n for i in range(n + 1)]
        t = torch.stack(
            [t.narrow(dim, a, b - a).sum(dim) for a, b in itertools.pairwise(edges)], dim
        )
    return t


def pick_view(h1: Tensor, h2: Tensor, pick: str) -> Tensor:
    """EntropyMix: True where a cell [B, n, n] is the second view's; padding never wins."""
    empty = (h1 < 0) | (h2 < 0)
    return torch.where(empty | (pick != "min"), h2 > h1, h2 < h1)


def coins(args: argparse.Namespace, run: common.Run, step: int) -> Tensor:
    """For --pick random: a number in [0, 1) for each cell [B, n, n] of this rank's samples."""
    size = (args.grid, args.grid)
    drawn = [data.rng(args.seed, "coin", step, p).random(size) for p in run.positions]
    return run.put(torch.tensor(np.stack(drawn), dtype=torch.float32))


def cells_to(second: Tensor, size: torch.Size) -> Tensor:
    """Spreads cells [B, n, n] over a map of `size` = (H, W), with the same edges as `cell_sum`."""
    n = second.shape[-1]
    row, col = ((torch.arange(s, device=second.device) * n + n - 1) // s for s in size)
    return second[:, row][:, :, col]


def mixed_image(
    u1: Tensor, u2: Tensor, box1: Tensor, box2: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """m, and box_m [B, H, W], True where a pixel of m is the partner's.

    Both views have the targets of u, so mixing the two cut targets is one cut with box_m:
    where(second, cutmix(t, box2), cutmix(t, box1)) = cutmix(t, where(second, box2, box1)).
    """
    m = torch.where(second[:, None], cutmix(u2, box2), cutmix(u1, box1))
    return m, torch.where(second, box2, box1)


def logit_loss(z_t: Tensor, z_m: Tensor, valid_m: Tensor, t: float) -> Tensor:
    """L_logit = mean over valid_m of KL(softmax(z_T / t) || softmax(z_m / t)) t^2 (step 8)."""
    log_t, log_m = (z_t / t).log_softmax(1), (z_m / t).log_softmax(1)
    kl = (log_t.exp() * (log_t - log_m)).sum(1)  # [B, H, W]
    return masked_mean(kl, valid_m, valid_m) * t**2


def relation_loss(f_t: Tensor, f_m: Tensor, valid_m: Tensor, sharp: float = 0.1) -> Tensor:
    """L_feat (step 9): KL(S_T || S_m), S = row-softmax(f f^T / sharp), f unit at stride 16.

    f_T, f_m [B, A, h, w]; valid_m [B, H, W]. Mostly padded cells are no row and no column of S.
    """
    pool = max(1, round(16 * f_m.shape[-1] / valid_m.shape[-1]))  # cells: 4; ViT 1, DPT 9
    share = F.interpolate(valid_m[:, None].float(), f_m.shape[-2:], mode="area")
    maps = (f_t.float(), f_m.float(), share)
    f_t, f_m, cells = (F.avg_pool2d(t, pool, ceil_mode=True) for t in maps)
    cells = cells.flatten(1) > 0.5  # [B, N]

    def log_s(f: Tensor) -> Tensor:
        f = F.normalize(f.flatten(2), dim=1)
        s = f.transpose(1, 2) @ f / sharp
        return s.masked_fill(~cells[:, None], -1e4).log_softmax(2)  # [B, N, N]

    log_s_t, log_s_m = log_s(f_t), log_s(f_m)
    kl = (log_s_t.exp() * (log_s_t - log_s_m)).sum(2)  # [B, N]
    return masked_mean(kl, cells, cells)


# ----------------------------------------------------------------------------------- training


def speed_step(
    args: argparse.Namespace,
    run: common.Run,
    net: nn.Module,
    model: nn.Module,
    batch: dict,
    step: int,
) -> dict[str, Tensor]:
    """The losses of a step, "loss" the total. `model` is `net`, in DDP if there are ranks."""
    # Views (step 1): x labelled; u, u1, u2 of one unlabelled crop; u1 and u2 CutMixed, own boxes.
    x, y, valid = data.normalize(batch["x"]), batch["y"], batch["u_valid"]
    strong = data.strong_views(batch["u"], batch["strong"], batch["order"])
    u, u1, u2 = (data.normalize(v) for v in (batch["u"], *strong))
    box1, box2 = (data.rect_mask(b, *u.shape[-2:]) & args.host_cutmix for b in batch["box"])

    with torch.no_grad():
        # Step 2, in eval mode: z_u, f_u = net(u); z_1 = net(u1); z_2 = net(u2)
        net.eval()
        views = [u, cutmix(u1, box1), cutmix(u2, box2)] if args.entropy_mix else [u]
        with run.autocast():
            z, f, _ = net(torch.cat(views), features=True)
        net.train()
        z_u, f_u, z_12 = z[: len(u)], f[: len(u)], z[len(u) :].chunk(2)

        # EntropyMix (steps 4, 5): a cell of m is of the view with the higher entropy H_v
        second = torch.zeros_like(box1)
        if args.entropy_mix:
            valid_12 = cutmix(valid, box1), cutmix(valid, box2)
            h1, h2 = (cell_entropy(*v, args.grid) for v in zip(z_12, valid_12, strict=True))
            if args.pick == "random":
                coin, empty = coins(args, run, step), (h1 < 0) | (h2 < 0)
                h1, h2 = torch.where(empty, h1, coin), torch.where(empty, h2, 0.5)
            second = cells_to(pick_view(h1, h2, args.pick), u.shape[-2:])
        m, box_m = mixed_image(u1, u2, box1, box2, second)

        # Targets (steps 3, 5), cut like m: c = max_k p_k, y_hat = argmax_k p_k, z_T, f_T
        z_t, valid_m = cutmix(z_u, box_m), cutmix(valid, box_m)
        f_t = cutmix(f_u, common.resize_mask(box_m, f_u.shape[-2:]))
        confidence, pseudo_label = z_t.softmax(1).max(1)
        keep = (confidence >= args.threshold) & valid_m

    # One forward with gradient (step 6): z_x, z_m, f_m
    with run.autocast():
        z, f, _ = model(torch.cat([x, m]), features=True)
    (z_x, z_m), f_m = z.split(len(x)), f[len(x) :]

    # L_x = CE(z_x, y); L_u = masked_mean(CE(z_m, y_hat_m), c_m >= tau and valid_m) (step 7)
    loss_x = common.supervised_loss(z_x, y, args.sup_loss, args.ohem_least)
    ce = F.cross_entropy(z_m, pseudo_label, reduction="none")
    loss_u = masked_mean(ce, keep, valid_m)

    # L_logit and L_feat: distillation from z_T and f_T (steps 8, 9)
    loss_logit = logit_loss(z_t, z_m, valid_m, args.temperature)
    loss_feat = relation_loss(f_t, f_m, valid_m, args.feature_temperature)

    # L = 1/2 (L_x + lambda_u L_u + alpha L_feat + beta L_logit) (step 10)
    unlabeled = args.lambda_u * loss_u + args.alpha * loss_feat + args.beta * loss_logit
    loss = 0.5 * (loss_x + run.ramp(step) * unlabeled)
    confident = masked_mean(torch.ones_like(ce), keep, valid_m)
    terms = {"loss": loss, "L_x": loss_x, "L_u": loss_u, "L_feat": loss_feat}
    return terms | {"L_logit": loss_logit, "confident": confident}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.test_only:
        common.test(args)
        return

    # ---- setup, data
    run = common.Run(args)

    # ---- network, optimizer
    net = build_network(args.backbone, len(run.split.classes), args.output_stride, args.decoder)
    run.say(load_weights(net, args.backbone, args.weights))
    net = run.place(net)
    model = run.distribute(net)
    head = {"params": net.head_parameters(), "lr": args.lr * args.head_lr_mult}
    optimizer = run.optimizer([{"params": net.backbone.parameters(), "lr": args.lr}, head])

    # ---- resume
    start = run.resume(net=net, optimizer=optimizer)

    # ---- train
    for step, batch in enumerate(run.batches(start), start):
        run.set_lr(optimizer, step)
        if args.labeled_only:
            terms = run.supervised(model, batch)
        else:
            terms = speed_step(args, run, net, model, batch, step)
        run.update(terms["loss"], optimizer)
        run.step_done(step, {"net": net}, terms)

    # ---- teardown
    run.finish()


if __name__ == "__main__":
    common.launch(main)
