"""SPEED with EntropyMix: self pseudo entropy knowledge distillation (Lu et al., TCSVT 34(8), 2024).

Two strong views of an unlabelled crop are cut into cells; a new image takes each cell from the view
whose prediction has the higher entropy (EntropyMix). The network learns this image from its own
prediction on the weak view: by pseudo-label (L_u), by its logits (L_logit) and by the relations
between its features (L_feat). One network, no teacher, no auxiliary head.

    L = 1/2 (L_x + lambda_u L_u + alpha L_feat + beta L_logit)

Dimension key: B images of this rank, C classes, A channels of f, the classifier's input, H W
pixels, h w cells of a stride-4 map, n grid cells a side (--grid), N cells of a stride-16 map. x, y
labelled; u weak, u1 u2 strong, m mixed views; z logits; valid is True where a crop holds image.

    torchrun --nproc_per_node=4 speed.py --split 1/16    # plain `python speed.py`: one GPU or none

"(step n)" is a row of the table in docs/methods.md. The paper has no public code; that page lists
which parts are our reading, and their flags.
"""

import argparse
import functools
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common
import data
from common import masked_mean
from data import POSITIVE, STEPS, WEIGHT

PAD_ENTROPY = -1.0  # entropy of a cell without image: below every real one


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The shared flags and SPEED's own."""
    p = common.make_parser(__file__, __doc__.splitlines()[0])
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("SPEED")
    g.add_argument("--labeled-only", action="store_true", help="supervised baseline of all methods")
    g.add_argument("--grid", type=STEPS, default=4, help="n: EntropyMix cells a side")
    g.add_argument("--pick", choices=("max", "min", "random"), default="max", help="which entropy")
    g.add_argument("--entropy-mix", action=flag, default=True, help="off: learn from u1 alone")
    g.add_argument("--host-cutmix", action=flag, default=True, help="CutMix before EntropyMix")
    g.add_argument("--lambda-u", type=WEIGHT, default=1.0, help="weight of L_u, pseudo-labels")
    g.add_argument("--alpha", type=WEIGHT, default=1.0, help="weight of L_feat, pixel relations")
    g.add_argument("--beta", type=WEIGHT, default=1.0, help="weight of L_logit, distilled logits")
    g.add_argument("--feature-temperature", type=POSITIVE, default=0.1, help="divides f f^T")
    g.add_argument("--temperature", type=POSITIVE, default=1.0, help="t of L_logit")
    return common.parse(p, argv)


# --------------------------------------------------------------------------- the paper's pieces


def partner(values: Tensor) -> Tensor:
    """values[pi] of [B, ...]: the partner pi swaps neighbours, 0-1, 2-3, ...

    That is a roll by one in blocks of two: on the same rank however many ranks there are, and never
    the image itself.
    """
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def cutmix(values: Tensor, box: Tensor) -> Tensor:
    """values [B, ..., H, W], but the partner's inside `box` [B, H, W] bool."""
    if values.dim() == 4:
        box = box[:, None]
    return torch.where(box, partner(values), values)


def entropy(z: Tensor) -> Tensor:
    """H = -sum_k p_k log p_k of logits [B, C, H, W]: [B, H, W] (step 4)."""
    log_p = z.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


@functools.cache  # made once, not in each step
def in_cell(pixels: int, n: int, device: torch.device) -> Tensor:
    """[n, pixels]: 1 where a row or column lies in a cell, of n with edges floor(i pixels / n)."""
    cell = (torch.arange(pixels, device=device) * n + n - 1) // pixels
    return (cell == torch.arange(n, device=device)[:, None]).float()


def cell_mean(values: Tensor, valid: Tensor, n: int) -> Tensor:
    """Mean of [B, H, W] over the valid pixels of each cell of an n x n grid: [B, n, n] (step 4).

    PAD_ENTROPY where a cell holds no image.
    """
    rows = in_cell(values.shape[1], n, values.device)  # [n, H]
    columns = in_cell(values.shape[2], n, values.device)  # [n, W]
    sums = rows @ torch.stack([values * valid, valid]) @ columns.T  # [2, B, n, n]
    total = sums[0]
    count = sums[1]
    return torch.where(count > 0, total / count, PAD_ENTROPY)


def cells_to_pixels(cells: Tensor, height: int, width: int) -> Tensor:
    """Spreads cells [B, n, n] float over pixels [B, H, W]."""
    rows = in_cell(height, cells.shape[1], cells.device)
    columns = in_cell(width, cells.shape[2], cells.device)
    return rows.T @ cells @ columns


def pick_view(h_1: Tensor, h_2: Tensor, pick: str, coin: Tensor | None = None) -> Tensor:
    """EntropyMix (step 5): True where a cell [B, n, n] is taken from the second view.

    `pick`: the view of higher ("max") or lower ("min") entropy; "random": by coin [B, n, n] in
    [0, 1). A cell without image in one view is taken from the other, whatever `pick`.
    """
    higher = h_2 > h_1
    if pick == "max":
        return higher  # an empty cell has PAD_ENTROPY, the lower, and is not taken
    second = h_2 < h_1 if pick == "min" else coin < 0.5
    empty = (h_1 < 0) | (h_2 < 0)
    return torch.where(empty, higher, second)


def draw_coins(seed: int, step: int, positions: list[int], n: int) -> Tensor:
    """For --pick random: a number in [0, 1) for each cell [B, n, n] of the samples at a step."""
    drawn = [data.rng(seed, "coin", step, p).random((n, n)) for p in positions]
    return torch.tensor(np.stack(drawn), dtype=torch.float32)


def logit_loss(z_t: Tensor, z_m: Tensor, valid_m: Tensor, temperature: float) -> Tensor:
    """L_logit = mean over valid_m of KL(softmax(z_T / t) || softmax(z_m / t)) t^2 (step 8).

    t is the temperature.
    """
    log_p_t = (z_t / temperature).log_softmax(1)
    log_p_m = (z_m / temperature).log_softmax(1)
    kl = kl_divergence(log_p_t, log_p_m, 1)  # [B, H, W]
    return masked_mean(kl, valid_m, valid_m) * temperature**2


def kl_divergence(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """KL(p || q) over `dim`."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim)


def relation_loss(f_t: Tensor, f_m: Tensor, valid_m: Tensor, temperature: float = 0.1) -> Tensor:
    """L_feat (step 9): KL(S_T || S_m), S = row-softmax(f f^T / temperature), f unit at stride 16.

    f_T, f_m [B, A, h, w]; valid_m [B, H, W]. Mostly padded cells are left out of S.
    """
    pool = max(1, round(16 * f_m.shape[-1] / valid_m.shape[-1]))  # a cell's side: 4; ViT 1, DPT 9
    # N equal cells of 4x4; at crops of 16k + 1 they are 5x5, and neighbours share a row of f
    grid = (f_m.shape[-2] // pool, f_m.shape[-1] // pool)
    keep = F.adaptive_avg_pool2d(valid_m[:, None].float(), grid).flatten(1) > 0.5  # [B, N]
    f = F.adaptive_avg_pool2d(torch.cat([f_t, f_m]).float(), grid)
    f = F.normalize(f.flatten(2), dim=1)  # [2B, A, N]
    s = f.transpose(1, 2) @ f / temperature
    s = s.masked_fill(~keep.repeat(2, 1)[:, None], -1e4)
    log_s_t, log_s_m = s.log_softmax(2).split(len(f_t))  # [B, N, N] each
    kl = kl_divergence(log_s_t.detach(), log_s_m, 2)  # [B, N]
    return masked_mean(kl, keep, keep)


# ----------------------------------------------------------------------------------- training


def speed_step(
    args: argparse.Namespace,
    net: nn.Module,
    model: nn.Module,
    autocast: functools.partial,
    batch: dict,
    ramp: float,
) -> dict[str, Tensor]:
    """The losses of a step, "loss" the total. `model` is `net`, in DDP if there are ranks.

    `batch` is of data.train_batches; `ramp`, in [0, 1], weights the unsupervised terms.
    """
    # Views (step 1): x labelled; u, u1, u2 of one unlabelled crop; u1, u2 CutMixed with own boxes
    x = data.normalize(batch["x"])
    y = batch["y"]
    u = data.normalize(batch["u"])
    valid = batch["u_valid"]
    box = batch["cutmix"].flatten(0, 1)  # [2B, H, W]: for u1, then for u2
    if not args.host_cutmix:
        box = torch.zeros_like(box)
    strong = data.strong_views(batch["u"], batch["strong"], batch["order"])  # [2, B, 3, H, W]
    # [2B, 3, H, W]: u1, then u2; B is even, so partners share a view
    u12 = cutmix(data.normalize(strong.flatten(0, 1)), box)
    u1, u2 = u12.split(len(u))
    box_1 = box[: len(u)]
    box_2 = box[len(u) :]

    with torch.no_grad():
        # Predictions (step 2), in eval mode: z_u, f_u = net(u); z_1 = net(u1); z_2 = net(u2)
        views = torch.cat([u, u12]) if args.entropy_mix else u
        net.eval()
        with autocast():
            z_views, f_views, _ = net(views, features=True)
        net.train()
        z_u = z_views[: len(u)]
        f_u = f_views[: len(u)]

        # EntropyMix (steps 4, 5): m takes each cell from the view with the higher entropy H_v.
        # Both views have the targets of u, so both steps are one cut of these, with box_m.
        m = u1
        box_m = box_1
        if args.entropy_mix:
            z_12 = z_views[len(u) :]
            valid_12 = cutmix(valid.repeat(2, 1, 1), box)
            h_12 = cell_mean(entropy(z_12), valid_12, args.grid)  # [2B, n, n]
            h_1 = h_12[: len(u)]
            h_2 = h_12[len(u) :]
            coin = None
            if args.pick == "random":
                coin = draw_coins(args.seed, batch["step"], batch["positions"], args.grid)
                coin = data.to_device(coin, u.device)
            picked = pick_view(h_1, h_2, args.pick, coin)  # [B, n, n]
            second = cells_to_pixels(picked.float(), *valid.shape[-2:]) > 0.5  # [B, H, W]
            m = torch.where(second[:, None], u2, u1)
            box_m = torch.where(second, box_2, box_1)

        # Targets (steps 3, 5), cut like m: c = max_k p_k, y_hat = argmax_k p_k, z_T, f_T
        valid_m = cutmix(valid, box_m)
        z_t = cutmix(z_u, box_m)
        f_t = cutmix(f_u, common.resize_mask(box_m, f_u.shape[-2:]))
        confidence, pseudo_label = z_t.softmax(1).max(1)
        keep = (confidence >= args.threshold) & valid_m

    # One forward with gradient (step 6): z_x, z_m, f_m
    with autocast():
        z, f, _ = model(torch.cat([x, m]), features=True)
    z_x, z_m = z.split(len(x))  # split: one operation backwards, not three
    f_m = f[len(x) :]

    # L_x = CE(z_x, y); L_u = masked_mean(CE(z_m, y_hat_m), c_m >= tau and valid_m) (step 7)
    loss_x = common.supervised_loss(z_x, y, args.sup_loss, args.ohem_share)
    ce = F.cross_entropy(z_m, pseudo_label, reduction="none")  # [B, H, W]
    loss_u = masked_mean(ce, keep, valid_m)

    # L_logit and L_feat: distillation from z_T and f_T (steps 8, 9)
    loss_logit = logit_loss(z_t, z_m, valid_m, args.temperature)
    loss_feat = relation_loss(f_t, f_m, valid_m, args.feature_temperature)

    # L = 1/2 (L_x + lambda_u L_u + alpha L_feat + beta L_logit) (step 10)
    unsupervised = args.lambda_u * loss_u + args.alpha * loss_feat + args.beta * loss_logit
    loss = 0.5 * (loss_x + ramp * unsupervised)
    return {
        "loss": loss,
        "L_x": loss_x,
        "L_u": loss_u,
        "L_feat": loss_feat,
        "L_logit": loss_logit,
        "confident": masked_mean(keep, keep, valid_m),
    }


def supervised_step(
    args: argparse.Namespace, model: nn.Module, autocast: functools.partial, batch: dict
) -> dict[str, Tensor]:
    """--labeled-only: L = CE(model(x), y), or OHEM."""
    with autocast():
        z_x = model(data.normalize(batch["x"]))
    loss = common.supervised_loss(z_x, batch["y"], args.sup_loss, args.ohem_share)
    return {"loss": loss}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # ---- ranks: torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; plain python is one process
    rank, world = common.rank_world()
    device = common.pick_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # torchrun's store outlives a restart: without a prefix gloo reads dead ranks' addresses
        store = next(dist.rendezvous("env://"))[0]
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    torch.manual_seed(args.seed)  # the same weights on all ranks; batches have seeds of their own
    if args.test_only:
        common.test(args, device)
        return

    # ---- data
    split = data.load_split(args)
    common.say("\n".join([split.line, *split.notes]))
    common.settle(args, split, world, device)

    # ---- network
    net = common.build_network(args.backbone, len(split.classes), args.output_stride, args.decoder)
    common.say(common.load_weights(net, args.backbone, args.weights, split.classes))
    if world > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net = net.place(device)
    if args.compile:
        for part in net.children():  # not the whole: `parts` and `forward` share them
            part.compile()
    model = net
    if dist.is_initialized():
        ids = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)

    # ---- optimizer: the schedule sets each group's lr from its initial_lr
    groups = [
        {"params": list(net.backbone.parameters()), "initial_lr": args.lr},
        {"params": net.head_parameters(), "initial_lr": args.lr * args.head_lr_mult},
    ]
    if args.optimizer == "sgd":
        fused = None if args.amp == "fp16" else True  # fused has no momentum if fp16 skips step 0
        optimizer = torch.optim.SGD(
            groups, momentum=0.9, weight_decay=args.weight_decay, fused=fused
        )
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)

    # ---- precision: forward passes alone are in autocast; losses, softmax and EMA in float32
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---- resume
    nets = {"net": net}  # those that are evaluated; the first is for inference
    state = {"net": net, "optimizer": optimizer, "scaler": scaler}
    start = common.resume(args, split, state)
    log = common.Log(args, start)
    common.catch_signals()
    if log.owes_evaluation(start):
        common.validate(nets, split, device, log, start)

    # ---- train
    batches = data.train_batches(split, args, rank, world, start, device)
    for step, batch in enumerate(batches, start):
        # poly: lr (1 - step/iters)^0.9; ramp: the unsupervised terms' weight, rising from 0 to 1
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / args.iters) ** 0.9
        ramp = min(1.0, step / (args.ramp * args.iters)) if args.ramp > 0 else 1.0

        if args.labeled_only:
            losses = supervised_step(args, model, autocast, batch)
        else:
            losses = speed_step(args, net, model, autocast, batch, ramp)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        if world > 1 and device.type == "cpu":  # there is no SyncBN: share the running statistics
            common.average_buffers(nets.values())

        # ---- log, save, evaluate: saved before evaluated, so that an evaluation can cost no step
        done = step + 1
        last = done == args.iters
        log.add(losses)
        if done % args.log_every == 0 or last:
            log.train(done, optimizer, scaler)
        stop = common.stop_signal(done % args.log_every == 0)
        evaluate = done % args.eval_every == 0 or last
        if evaluate or stop or done % args.save_every == 0:
            common.save(state, split, log, done)
        if stop and not last:
            log.close(stop)
        if evaluate:
            common.validate(nets, split, device, log, done)

    # ---- teardown: launch() exits at once; to destroy the group first may hang gloo in torch 2.6
    log.close()


if __name__ == "__main__":
    common.launch(main)
