"""MKD: mutual knowledge distillation (Yuan, Ge, Wang, Liu; ACM MM 2023, arXiv 2208.11499).

Two students S1, S2 learn from each other's pseudo-labels and from those of the *other* student's
mean teacher (T1 = EMA of S1, T2 = EMA of S2). Students see CutMixed strong views, teachers weak
ones. In these losses the logits of the networks of --fa are augmented implicitly: shifted as if
each pixel's feature were drawn from a Gaussian with its class's running covariance.

    L = L_sup,1 + L_sup,2 + 1.5 L_st + 1.0 L_ss

Dimension key: B images of x and B of u on this rank, C classes, G augmented networks (--fa), H W
pixels, h w cells of the stride-4 map, h2 w2 of its 2x2 means (half_), A channels of the
classifier's input (256; DPT: 64 or 128). x, y labelled; u weak and u1 strong view of an unlabelled
crop; z logits, aug = z~ augmented logits, f features; suffixes _s1 _s2 students, _w1 _w2 teachers
on the weak view, _t1 _t2 the same mixed like u_mix.

    torchrun --nproc_per_node=4 mkd.py --split 1/16 --batch-size 16      # or python mkd.py

Inference uses S1 alone. "(step n)" is a row of the table in docs/methods.md, which also lists the
departures from the released code.
"""

import argparse
import copy
import functools
import math
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
from data import SHARE, WEIGHT

AUGMENTED = {"all": 4, "students": 2, "none": 0}  # --fa: G, the first of S1, S2, T1, T2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The shared flags and MKD's own. lambda_st, lambda_ss, lambda0 and ema are as released."""
    p = common.make_parser(__file__, __doc__.splitlines()[0])
    g = p.add_argument_group("MKD")
    g.add_argument("--ema", type=SHARE, default=0.6, help="upper limit of the teachers' m")
    g.add_argument("--lambda-st", type=WEIGHT, default=1.5, help="weight of L_st, by the teachers")
    g.add_argument("--lambda-ss", type=WEIGHT, default=1.0, help="weight of L_ss, by the students")
    g.add_argument("--threshold-ss", type=SHARE, default=0.0, help="tau of L_ss, between students")
    g.add_argument("--fa", choices=AUGMENTED, default="students", help="logits to augment")
    g.add_argument("--lambda0", type=WEIGHT, default=1.5, help="strength of --fa at the end")
    g.add_argument("--keep-padding", action="store_true", help="padding takes part, as released")
    g.add_argument("--teacher-mode", choices=("train", "eval"), default="eval", help="batch norm")
    # From scratch most first labels are wrong, and the augmentation lowered the mIoU.
    shapes = dict(fa="none", threshold=0.95, threshold_ss=0.95)
    shapes.update(batch_size=4, lr=2e-3, epochs=4)
    args = common.parse(p, argv, all=dict(threshold=0.0), shapes=shapes)
    has_batch_norm = args.decoder == "deeplab"
    if args.fa == "all" and args.teacher_mode == "eval" and has_batch_norm:
        # Sigma keeps every step's features
        why = "features by running statistics explode at first"
        raise data.InputError(f"--fa all: {why}; give --teacher-mode train, too")
    return args


# --------------------------------------------------------------------------- the paper's pieces


@torch.no_grad()
def update_teacher(
    teacher: nn.Module, student: nn.Module, t: int, ema: float, mode: str = "eval"
) -> None:
    """theta_T <- m theta_T + (1 - m) theta_S, m = min(1 - 1/t, ema), before step t (step 3).

    Parameters in float32; at t = 1 it becomes a copy. `mode` "eval": batch norm is by the student's
    running statistics; "train", as released: by the batch, with running statistics of its own.
    """
    momentum = min(1 - 1 / t, ema)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    teacher.train(mode == "train")
    if mode == "eval":
        mine = [buffer for buffer in teacher.buffers() if buffer.is_floating_point()]
        theirs = [buffer for buffer in student.buffers() if buffer.is_floating_point()]
        if mine:  # DINOv2 with DPT has no batch norm
            torch._foreach_copy_(mine, theirs)


def draw_boxes(crop: int, r: np.random.Generator) -> list[list[int]]:
    """Three boxes of area U(.25, .5): h = area^U(0, 1), w = area / h, times sqrt(1/3) (step 4)."""
    boxes = []
    for _ in range(3):
        area, s, y, x = r.uniform((0.25, 0, 0, 0), (0.5, 1, 1, 1))
        tall = area**s  # a share of the crop, as the area
        height = round(crop * tall * math.sqrt(1 / 3))
        width = round(crop * area / tall * math.sqrt(1 / 3))
        top = round(y * (crop - height))
        left = round(x * (crop - width))
        boxes.append([top, left, top + height, left + width])
    return boxes


def mix_mask(boxes: list[list[list[int]]], crop: int) -> Tensor:
    """M [B, H, W] (step 4): three boxes an image XORed; False is the partner's pixel."""
    every = [box for three in boxes for box in three]
    inside = data.rect_masks(every, crop).unflatten(0, (-1, 3))  # [B, 3, H, W]
    return inside[:, 0] ^ inside[:, 1] ^ inside[:, 2]


def partner(values: Tensor) -> Tensor:
    """values[pi] of [B, ...]: the partner pi swaps neighbours, 0-1, 2-3, ...

    That is a roll by one in blocks of two: on the same rank however many ranks there are, and never
    the image itself.
    """
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix(values: Tensor, M: Tensor) -> Tensor:
    """M * values + (1 - M) * values[pi] of values [B, ..., H, W], M [B, H, W] (step 4)."""
    if values.dim() == 4:
        M = M[:, None]
    return torch.where(M, values, partner(values))


class ClassStatistics(nn.Module):
    """Running mean mu_c, diagonal covariance Sigma_c [G, C, A] of G networks' features (step 8).

    After each update they are the exact mean and population variance, per class, of all pixels seen
    so far on all ranks. Buffers, so the checkpoint has them.
    """

    def __init__(self, networks: int, num_classes: int, width: int) -> None:
        super().__init__()
        count = torch.zeros(networks, num_classes, 1, dtype=torch.float64)
        self.register_buffer("count", count)  # N_c [G, C, 1]
        self.register_buffer("mean", torch.zeros(networks, num_classes, width))  # mu_c
        self.register_buffer("var", torch.zeros(networks, num_classes, width))  # Sigma_c

    @torch.no_grad()
    def update(self, f: Tensor, label: Tensor) -> None:
        """Takes in pixels f [G, 2B, A, h2, w2] of class label [G, 2B, h2, w2]; 255 is left out."""
        f = f.flatten(3).transpose(2, 3).to(self.mean.dtype)  # [G, 2B, h2 w2, A]
        classes = torch.arange(self.count.shape[1], device=f.device)
        member = (label.flatten(2)[:, :, None] == classes[:, None]).to(f.dtype)  # [G, 2B, C, h2 w2]
        # n_c [G, C, 1], mu^_c, sigma^2_c of the batch over all ranks; two passes: E f^2 - mean^2
        # would lose all digits where the mean is much larger than the deviation
        counts = member.sum((1, 3))[:, :, None]
        sums = common.rank_sum(torch.cat([counts, (member @ f).sum(1)], 2))  # [G, C, 1 + A]
        n = sums[:, :, :1]
        mean = sums[:, :, 1:] / n.clamp_min(1)
        deviation = f - member.transpose(2, 3) @ mean[:, None]  # [G, 2B, h2 w2, A]
        var = common.rank_sum((member @ deviation.square()).sum(1)) / n.clamp_min(1)
        # w_c = n_c / (n_c + N_c);  mu <- (1-w) mu + w mean
        # Sigma <- (1-w) Sigma + w var + w (1-w) (mu - mean)^2;  lerp(a, b, w) = (1-w) a + w b
        w = (n / (n + self.count).clamp_min(1)).to(mean.dtype)
        self.var.lerp_(var, w).add_(w * (1 - w) * (self.mean - mean).square())
        self.mean.lerp_(mean, w)
        self.count.add_(n)


def halve(maps: Tensor) -> Tensor:
    """2x2 means of [2B, C, h, w]: [2B, C, h2, w2]; an odd map's last row is its own (step 6)."""
    return F.avg_pool2d(maps, 2, ceil_mode=True)


def class_of(z: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Class of a pixel [G, 2B, h2, w2] of z [G, 2B, C, h2, w2] (step 7).

    The first images are labelled, y [B, h2, w2]; pixels of the others have the class that z
    itself says. 255 where y is, and where it is not valid [2B, h2, w2].
    """
    pixel_class = z.detach().argmax(2)
    pixel_class[:, : len(y)] = y
    return pixel_class.where(valid, data.IGNORE)


def augment(z: Tensor, label: Tensor, weight: Tensor, var: Tensor, strength: float) -> Tensor:
    """z~_c = z_c + 1/2 lambda(t) sum_a (W_ca - W_ya)^2 Sigma_y,a for pixels of class y (step 10).

    z [G, 2B, C, h2, w2], label [G, 2B, h2, w2]; W and Sigma [G, C, A] are constants. The sum is a
    table K[y, c] of each network, looked up per pixel, zero for 255.
    """
    W = weight.detach()
    squared = (W[:, None] - W[:, :, None]).square()  # (W_ca - W_ya)^2 at [G, y, c, a]
    K = 0.5 * strength * (squared * var[:, :, None]).sum(3)  # [G, C, C]
    K = F.pad(K, (0, 0, 0, 1))  # a row of zeros for 255
    network = torch.arange(len(W), device=z.device)[:, None, None, None]
    return z + K[network, label.clamp_max(W.shape[1])].permute(0, 1, 4, 2, 3)


def pseudo_ce(log_p: Tensor, label: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """masked_mean(CE(z~, label), keep and valid): log_p [2B, C, h2, w2] of z~, another's label."""
    ce = F.nll_loss(log_p, label, reduction="none")  # [2B, h2, w2]
    return masked_mean(ce, keep & valid, valid)


class Students(nn.Module):
    """S1 and S2 in one module, so that one DDP carries both."""

    def __init__(self, s1: nn.Module, s2: nn.Module) -> None:
        super().__init__()
        self.s1 = s1
        self.s2 = s2

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """Stride-4 logits, classifier input and last map of each student."""
        return self.s1.parts(x), self.s2.parts(x)


# ----------------------------------------------------------------------------------- training


def mkd_step(
    args: argparse.Namespace,
    nets: dict[str, nn.Module],
    stats: ClassStatistics,
    model: nn.Module,
    autocast: functools.partial,
    batch: dict,
    ramp: float,
) -> dict[str, Tensor]:
    """The losses of a step, "loss" the total; updates the teachers and the statistics.

    `nets` has student1, student2, teacher1, teacher2; `stats` is of the first G of them (--fa).
    `model` is Students of the first two, in DDP if there are ranks. `batch` is of
    data.train_batches; `ramp`, in [0, 1], weights the unsupervised terms.
    """
    # Views (steps 2, 4): x labelled; u weak; u_mix = M * u1 + (1 - M) * u1[pi]
    x = data.normalize(batch["x"])
    y = batch["y"]
    n_x = len(x)
    u = data.normalize(batch["u"])
    u1 = data.strong_views(batch["u"], batch["strong"][:1], batch["order"])[0]
    u1 = data.normalize(u1)
    crop = args.crop_size
    boxes = [
        draw_boxes(crop, data.rng(args.seed, "mkd", batch["step"], p)) for p in batch["positions"]
    ]
    M = data.to_device(mix_mask(boxes, crop), u.device)  # [B, H, W]
    u_mix = mix(u1, M)

    with torch.no_grad():
        # Teachers see x and u; their logits and features are mixed like the image (steps 2 to 4)
        t = batch["step"] + 1
        update_teacher(nets["teacher1"], nets["student1"], t, args.ema, args.teacher_mode)
        update_teacher(nets["teacher2"], nets["student2"], t, args.ema, args.teacher_mode)
        with autocast():
            z_w1, f_w1, _ = nets["teacher1"].parts(torch.cat([x, u]))
            z_w2, f_w2, _ = nets["teacher2"].parts(torch.cat([x, u]))
        M_4 = common.resize_mask(M, z_w1.shape[-2:])
        z_t1 = torch.cat([z_w1[:n_x], mix(z_w1[n_x:], M_4)]).float()
        z_t2 = torch.cat([z_w2[:n_x], mix(z_w2[n_x:], M_4)]).float()
        f_t1 = torch.cat([f_w1[:n_x], mix(f_w1[n_x:], M_4)])
        f_t2 = torch.cat([f_w2[:n_x], mix(f_w2[n_x:], M_4)])

    # Students see x and u_mix (step 4)
    with autocast():
        (z_s1, f_s1, _), (z_s2, f_s2, _) = model(torch.cat([x, u_mix]))
    z_s1 = z_s1.float()
    z_s2 = z_s2.float()

    # L_sup,i = CE(S_i(x), y) at full resolution (step 5)
    z_x1 = common.upsample(z_s1[:n_x], y.shape[-2:])
    z_x2 = common.upsample(z_s2[:n_x], y.shape[-2:])
    loss_sup1 = common.supervised_loss(z_x1, y, args.sup_loss, args.ohem_share)
    loss_sup2 = common.supervised_loss(z_x2, y, args.sup_loss, args.ohem_share)

    # The rest, labelled and unlabelled together, at half of the stride-4 resolution (step 6);
    # S1, S2, T1, T2 lie along the first dimension
    half_z = torch.stack([halve(z) for z in (z_s1, z_s2, z_t1, z_t2)])  # [4, 2B, C, h2, w2]
    size = z_s1.shape[-2:]
    half_y = common.resize_mask(y, size)[:, ::2, ::2]
    valid = torch.cat([batch["x_valid"], mix(batch["u_valid"], M)])
    if args.keep_padding:
        valid = torch.ones_like(valid)
    half_valid = common.resize_mask(valid, size)[:, ::2, ::2]

    # z~_c = z_c + 1/2 lambda(t) sum_a (W_ca - W_ya)^2 Sigma_y,a of each network (steps 7 to 10),
    # lambda(t) = lambda0 (1 - cos(pi t / T)) / 2, with the number pi and T = iters
    strength = args.lambda0 * (1 - math.cos(math.pi * t / args.iters)) / 2
    aug = half_z
    G = AUGMENTED[args.fa]
    if G > 0:
        features = (f_s1.detach(), f_s2.detach(), f_t1, f_t2)[:G]
        half_f = torch.stack([halve(f.float()) for f in features])  # [G, 2B, A, h2, w2]
        W = torch.stack([net.classifier.weight.flatten(1) for net in nets.values()][:G])
        pixel_class = class_of(half_z[:G], half_y, half_valid)
        stats.update(half_f, pixel_class)
        aug = torch.cat([augment(half_z[:G], pixel_class, W, stats.var, strength), half_z[G:]])

    # Targets (step 11): argmax z~, kept where the confidence of z is enough
    label_s1, label_s2, label_t1, label_t2 = aug.detach().argmax(2)
    confidence = half_z.detach().softmax(2).amax(2)  # [4, 2B, h2, w2]
    keep_s1, keep_s2 = confidence[:2] >= args.threshold_ss
    keep_t1, keep_t2 = confidence[2:] >= args.threshold

    # L_st = CE(z~_S1, y_hat_T2) + CE(z~_S2, y_hat_T1): from the other student's teacher (step 12)
    log_s1, log_s2 = aug[:2].log_softmax(2)  # [2B, C, h2, w2] each
    loss_st1 = pseudo_ce(log_s1, label_t2, keep_t2, half_valid)
    loss_st2 = pseudo_ce(log_s2, label_t1, keep_t1, half_valid)
    loss_st = loss_st1 + loss_st2

    # L_ss = CE(z~_S1, y_hat_S2) + CE(z~_S2, y_hat_S1): the students teach each other (step 13)
    loss_ss1 = pseudo_ce(log_s1, label_s2, keep_s2, half_valid)
    loss_ss2 = pseudo_ce(log_s2, label_s1, keep_s1, half_valid)
    loss_ss = loss_ss1 + loss_ss2

    # L = L_sup,1 + L_sup,2 + 1.5 L_st + 1.0 L_ss (step 14)
    unsupervised = args.lambda_st * loss_st + args.lambda_ss * loss_ss
    loss = loss_sup1 + loss_sup2 + ramp * unsupervised
    confident = (keep_t1.float() + keep_t2.float()) / 2
    return {
        "loss": loss,
        "L_sup1": loss_sup1,
        "L_sup2": loss_sup2,
        "L_st": loss_st,
        "L_ss": loss_ss,
        "confident": masked_mean(confident, half_valid, half_valid),
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

    # ---- networks (step 1): both students draw from one random stream, so that their heads differ
    # (from scratch their backbones, too)
    config = (args.backbone, len(split.classes), args.output_stride, args.decoder)
    student_1 = common.build_network(*config)
    common.say(common.load_weights(student_1, args.backbone, args.weights, split.classes))
    student_2 = common.build_network(*config)
    common.say(common.load_weights(student_2, args.backbone, args.weights))
    if world > 1 and device.type == "cuda":
        student_1 = nn.SyncBatchNorm.convert_sync_batchnorm(student_1)
        student_2 = nn.SyncBatchNorm.convert_sync_batchnorm(student_2)
    teacher_1 = copy.deepcopy(student_1).requires_grad_(False)
    teacher_2 = copy.deepcopy(student_2).requires_grad_(False)
    nets = {  # those that are evaluated; the first is for inference
        "student1": student_1.place(device),
        "student2": student_2.place(device),
        "teacher1": teacher_1.place(device),
        "teacher2": teacher_2.place(device),
    }
    if args.compile:
        for net in nets.values():
            for part in net.children():  # not the whole: `parts` and `forward` share them
                part.compile()
    width = student_1.classifier.in_channels
    stats = ClassStatistics(AUGMENTED[args.fa], len(split.classes), width).to(device)
    model = Students(student_1, student_2)
    if dist.is_initialized():
        ids = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    # ---- optimizer: the schedule sets each group's lr from its initial_lr
    backbones = [*student_1.backbone.parameters(), *student_2.backbone.parameters()]
    heads = [*student_1.head_parameters(), *student_2.head_parameters()]
    groups = [
        {"params": backbones, "initial_lr": args.lr},
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
    state = {**nets, "stats": stats, "optimizer": optimizer, "scaler": scaler}
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

        losses = mkd_step(args, nets, stats, model, autocast, batch, ramp)

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
