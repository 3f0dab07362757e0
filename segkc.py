"""SegKC: semi-supervised segmentation by knowledge consultation (Than et al., arXiv 2503.10693).

A senior S and a junior J of different backbones are trained together: each learns the other's
pseudo-labels (cross pseudo supervision), each draws its features towards the other's (feature
consultation), and the junior also learns the senior's distribution (prediction consultation).

    L = L_sup + lambda_cps L_cps + lambda_feat (L_j2s + L_s2j) / 2 + lambda_kd L_kd

Dimension key: B images of x and B of u on this rank, C classes, H W pixels, h w cells of a
backbone's last map, A_s and A_j its channels. x, y labelled; u weak and u1 strong view of an
unlabelled crop, u_mix its CutMix; z logits, f last backbone map, g its projection to the other
network's width; suffixes _s senior, _j junior, _w on u, _x on x, _m on u_mix.

    torchrun --nproc_per_node=4 segkc.py --split 1/2    # plain `python segkc.py`: one GPU or none

Inference uses the junior alone. "(step n)" is a row of the table in docs/methods.md. The paper has
no public code; that page lists which parts are our reading, and their flags.
"""

import argparse
import functools
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common
import data
from common import masked_mean
from data import POSITIVE, WEIGHT


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The shared flags and SegKC's own; --backbone is the junior's, the one of inference."""
    p = common.make_parser(__file__, __doc__.splitlines()[0])
    g = p.add_argument_group("SegKC")
    junior = dict(dest="backbone", choices=common.BACKBONES, default=argparse.SUPPRESS)
    g.add_argument("--junior", **junior, help="as --backbone")
    g.add_argument("--senior", choices=common.BACKBONES, help="encoder of the senior")
    g.add_argument("--senior-weights", help="like --weights, of the senior; unset: --weights")
    g.add_argument("--senior-lr", type=POSITIVE, help="of the senior's backbone; unset: --lr")
    g.add_argument("--lambda-cps", type=WEIGHT, default=1.0, help="weight of L_cps, pseudo-labels")
    g.add_argument("--lambda-feat", type=WEIGHT, default=0.5, help="weight of the feature terms")
    g.add_argument("--lambda-kd", type=WEIGHT, default=0.5, help="weight of L_kd, senior to junior")
    g.add_argument(
        "--consult", choices=("both", "j2s", "s2j", "none"), default="both", help="L_j2s, L_s2j"
    )
    g.add_argument("--temperature", type=POSITIVE, default=1.0, help="t of L_kd")
    networks = dict(senior="resnet101", backbone="resnet50")
    shapes = dict(senior="resnet34", backbone="resnet18", epochs=6)
    args = common.parse(p, argv, all=networks, shapes=shapes)
    args.senior_weights = args.senior_weights or args.weights
    one_file = args.senior_weights == args.weights and args.weights not in ("imagenet", "none")
    if one_file and args.senior != args.backbone:
        raise data.InputError(
            f"--weights {args.weights}: a file of {args.backbone}; "
            f"give --senior-weights too: imagenet, none or a file of {args.senior}"
        )
    return args


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


def cps_loss(z: Tensor, pseudo_label: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """masked_mean(CE(z, y_hat), c >= tau and valid) (step 5): z one's, y_hat and c the other's.

    z [B, C, H, W]; pseudo_label, keep (where c >= tau and valid) and valid [B, H, W].
    """
    ce = F.cross_entropy(z, pseudo_label, reduction="none")  # [B, H, W]
    return masked_mean(ce, keep, valid)


def consultation(g: Tensor, f: Tensor, valid: Tensor) -> Tensor:
    """d(g, sg f) = 1 - cosine over channels, mean over valid cells (step 6).

    g [B, A, h', w'] is the learning network's projected map, resized to the grid of f [B, A, h, w];
    valid [B, H, W].
    """
    size = f.shape[-2:]
    if g.shape[-2:] != size:
        g = common.upsample(g, size)
    cells = common.resize_mask(valid, size)
    distance = 1 - F.cosine_similarity(g.float(), f.detach().float(), dim=1)  # [B, h, w]
    return masked_mean(distance, cells, cells)


def distillation(z_s: Tensor, z_j: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """L_kd = mean over valid of KL(sg softmax(z_S / t) || softmax(z_J / t)) t^2 (step 7).

    t is the temperature.
    """
    log_s = (z_s.detach() / temperature).log_softmax(1)
    log_j = (z_j / temperature).log_softmax(1)
    kl = F.kl_div(log_j, log_s, reduction="none", log_target=True).sum(1)  # [B, H, W]
    return masked_mean(kl, valid, valid) * temperature**2


class Pair(nn.Module):
    """Senior and junior with their training-only projections, so that one DDP carries all.

    `consult` says which projections exist: DDP allows no parameter that no loss uses.
    """

    def __init__(self, senior: nn.Module, junior: nn.Module, consult: str = "both") -> None:
        super().__init__()
        self.senior = senior
        self.junior = junior
        width_s = senior.backbone.channels[-1]
        width_j = junior.backbone.channels[-1]
        self.project_s = None
        self.project_j = None
        if consult in ("both", "j2s"):
            self.project_s = nn.Conv2d(width_s, width_j, 1)
        if consult in ("both", "s2j"):
            self.project_j = nn.Conv2d(width_j, width_s, 1)

    def projections(self) -> list[nn.Parameter]:
        """The parameters that are in neither network."""
        return [p for name, p in self.named_parameters() if name.startswith("project_")]

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor | None], ...]:
        """(z, f, g) of senior and junior: logits, last map, its projection."""
        z_s, _, f_s = self.senior(x, features=True)
        z_j, _, f_j = self.junior(x, features=True)
        g_s = self.project_s(f_s) if self.project_s else None
        g_j = self.project_j(f_j) if self.project_j else None
        return (z_s, f_s, g_s), (z_j, f_j, g_j)


# ----------------------------------------------------------------------------------- training


def segkc_step(
    args: argparse.Namespace,
    nets: dict[str, nn.Module],
    model: nn.Module,
    autocast: functools.partial,
    batch: dict,
    ramp: float,
) -> dict[str, Tensor]:
    """The losses of a step, "loss" the total.

    `nets` has junior and senior; `model` is the Pair of them, in DDP if there are ranks. `batch` is
    of data.train_batches; `ramp`, in [0, 1], weights the unsupervised terms.
    """
    # Views (step 1): x labelled; u weak; u_mix = CutMix(u1)
    x = data.normalize(batch["x"])
    y = batch["y"]
    n_x = len(x)
    u = data.normalize(batch["u"])
    u1 = data.strong_views(batch["u"], batch["strong"][:1], batch["order"])[0]
    u1 = data.normalize(u1)
    box = batch["cutmix"][0]
    u_mix = cutmix(u1, box)
    valid_mix = cutmix(batch["u_valid"], box)
    valid = torch.cat([batch["x_valid"], valid_mix])

    with torch.no_grad():
        # Weak views (step 2), in eval mode: c = max p, y_hat = argmax p, cut like u_mix
        for net in nets.values():
            net.eval()
        with autocast():
            z_ws = nets["senior"](u)
            z_wj = nets["junior"](u)
        for net in nets.values():
            net.train()
        c_s, y_hat_s = z_ws.softmax(1).max(1)
        c_j, y_hat_j = z_wj.softmax(1).max(1)
        label_s = cutmix(y_hat_s, box)
        label_j = cutmix(y_hat_j, box)
        keep_s = cutmix(c_s >= args.threshold, box) & valid_mix
        keep_j = cutmix(c_j >= args.threshold, box) & valid_mix

    # Forward with gradient on cat(x, u_mix) (step 3):
    # z [2B, C, H, W]; f_s, g_j [2B, A_s, h, w] and f_j, g_s [2B, A_j, h, w], each on its own grid
    with autocast():
        (z_s, f_s, g_s), (z_j, f_j, g_j) = model(torch.cat([x, u_mix]))
    z_xs, z_ms = z_s.split(n_x)  # split: one operation backwards, not three
    z_xj, z_mj = z_j.split(n_x)

    # L_sup = 1/2 [CE(z_S(x), y) + CE(z_J(x), y)] (step 4)
    sup_s = common.supervised_loss(z_xs, y, args.sup_loss, args.ohem_share)
    sup_j = common.supervised_loss(z_xj, y, args.sup_loss, args.ohem_share)
    loss_sup = 0.5 * (sup_s + sup_j)

    # L_cps = 1/2 [masked_mean(CE(z_S, y_hat_J), c_J >= tau) + the same of z_J and S] (step 5)
    cps_s = cps_loss(z_ms, label_j, keep_j, valid_mix)
    cps_j = cps_loss(z_mj, label_s, keep_s, valid_mix)
    loss_cps = 0.5 * (cps_s + cps_j)

    # L_j2s = d(g_S(f_S), sg f_J); L_s2j = d(g_J(f_J), sg f_S) (step 6)
    loss_j2s = torch.zeros_like(loss_sup)
    loss_s2j = torch.zeros_like(loss_sup)
    if args.consult in ("both", "j2s"):
        loss_j2s = consultation(g_s, f_j, valid)
    if args.consult in ("both", "s2j"):
        loss_s2j = consultation(g_j, f_s, valid)

    # L_kd = KL(sg p_S || p_J) on u_mix (step 7)
    loss_kd = distillation(z_ms, z_mj, valid_mix, args.temperature)

    # L = L_sup + lambda_cps L_cps + lambda_feat (L_j2s + L_s2j) / 2 + lambda_kd L_kd (step 8)
    loss_feat = (loss_j2s + loss_s2j) / 2
    unsupervised = (
        args.lambda_cps * loss_cps + args.lambda_feat * loss_feat + args.lambda_kd * loss_kd
    )
    loss = loss_sup + ramp * unsupervised
    return {
        "loss": loss,
        "L_sup": loss_sup,
        "L_cps": loss_cps,
        "L_j2s": loss_j2s,
        "L_s2j": loss_s2j,
        "L_kd": loss_kd,
        "confident_junior": masked_mean(keep_j, keep_j, valid_mix),
        "confident_senior": masked_mean(keep_s, keep_s, valid_mix),
    }


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

    # ---- networks: the junior first, so that its weights are those of the other scripts
    rest = (len(split.classes), args.output_stride, args.decoder)
    junior = common.build_network(args.backbone, *rest)
    loaded = common.load_weights(junior, args.backbone, args.weights, split.classes)
    common.say(f"junior: {loaded}")
    senior = common.build_network(args.senior, *rest)
    # --senior-weights may be a whole best.pt; from one file both would start equal, and stay so
    classes = split.classes if args.senior_weights != args.weights else None
    loaded = common.load_weights(senior, args.senior, args.senior_weights, classes)
    common.say(f"senior: {loaded}")
    if world > 1 and device.type == "cuda":
        junior = nn.SyncBatchNorm.convert_sync_batchnorm(junior)
        senior = nn.SyncBatchNorm.convert_sync_batchnorm(senior)
    # those that are evaluated; the first is for inference
    nets = {"junior": junior.place(device), "senior": senior.place(device)}
    if args.compile:
        for net in nets.values():
            for part in net.children():  # not the whole: `parts` and `forward` share them
                part.compile()
    pair = Pair(senior, junior, args.consult).to(device)
    model = pair
    if dist.is_initialized():
        ids = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(pair, device_ids=ids, gradient_as_bucket_view=True)

    # ---- optimizer: the schedule sets each group's lr from its initial_lr
    senior_lr = args.senior_lr or args.lr
    heads = [*senior.head_parameters(), *junior.head_parameters(), *pair.projections()]
    groups = [
        {"params": list(junior.backbone.parameters()), "initial_lr": args.lr},  # the logged lr
        {"params": list(senior.backbone.parameters()), "initial_lr": senior_lr},
        {"params": heads, "initial_lr": args.lr * args.head_lr_mult},
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
    state = {"pair": pair, "optimizer": optimizer, "scaler": scaler}
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

        losses = segkc_step(args, nets, model, autocast, batch, ramp)

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
