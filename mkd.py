"""MKD: mutual knowledge distillation (Yuan, Ge, Wang, Liu; ACM MM 2023, arXiv 2208.11499).

Two students S1, S2 learn from each other's pseudo-labels and from those of the *other* student's
mean teacher (T1 = EMA of S1, T2 = EMA of S2). Students see CutMixed strong views, teachers weak
ones. All logits of the semi-supervised losses are augmented implicitly: shifted by what a Gaussian
around each pixel's feature, with its class's running covariance, would do to the cross-entropy.

    L = L_sup,1 + L_sup,2 + 1.5 L_st + 1.0 L_ss

Dimension key: B images of this rank, C classes, H W pixels, h w cells of the stride-4 map, A = 256
channels of the classifier's input. x, y labelled; u weak and u1 strong view of an unlabelled crop;
z logits, z~ augmented logits (`z_aug`), f features; suffixes _s1 _s2 students, _t1 _t2 teachers.

    torchrun --nproc_per_node=4 mkd.py --split 1/16 --batch-size 16      # or python mkd.py

Inference uses S1 alone. "(step n)" is row n of the README's table, which is followed by a list of
departures from the released code.
"""

import argparse
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
from common import masked_mean, rank_sum
from networks import build_network, load_weights, upsample


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The shared flags and MKD's own. Weights are the released config's, but on shapes."""
    p = common.make_parser(__file__, __doc__.splitlines()[0])
    flag = argparse.BooleanOptionalAction
    a = p.add_argument_group("MKD").add_argument
    a("--ema", type=common.SHARE, default=0.6, help="upper limit of the teachers' momentum m")
    a("--lambda-st", type=common.WEIGHT, default=1.5, help="weight of L_st, from the teachers")
    a("--lambda-ss", type=common.WEIGHT, default=1.0, help="weight of L_ss, between the students")
    a("--threshold-ss", type=common.SHARE, default=0.0, help="tau of L_ss, as --threshold of L_st")
    a("--fa", choices=("all", "students", "none"), default="all", help="whose logits are augmented")
    a("--lambda0", type=common.WEIGHT, default=1.5, help="strength of --fa at the end")
    a("--keep-padding", action=flag, default=False, help="padding takes part, as in released code")
    a("--teacher-mode", choices=("train", "eval"), default="train", help="teachers' batch norm")
    # From scratch a network's own batch is a poor normaliser, most first labels are wrong, and the
    # augmentation took more than it gave in pilot runs.
    small = dict(teacher_mode="eval", fa="none", threshold=0.95, threshold_ss=0.95)
    small |= dict(batch_size=4, lr=2e-3, epochs=4)  # 480 steps
    args = common.parse(p, argv, all=dict(threshold=0.0), shapes=small)
    if (args.fa, args.teacher_mode) == ("all", "eval"):  # Sigma keeps every step's features
        why = "features by running statistics explode at first"
        raise data.InputError(f"--fa all (default): {why}; --teacher-mode train or --fa students")
    return args


# --------------------------------------------------------------------------- the paper's pieces


@torch.no_grad()
def update_teacher(
    teacher: nn.Module, student: nn.Module, t: int, ema: float, mode: str = "train"
) -> None:
    """theta_T <- m theta_T + (1 - m) theta_S, m = min(1 - 1/t, ema), at the start of step t from 1.

    Parameters in float32; at t = 1 it becomes a copy. `mode` "train", as released: batch norm is by
    the batch, with running statistics of its own; "eval": by the student's running statistics.
    """
    m = min(1 - 1 / t, ema)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - m)
    teacher.train(mode == "train")
    if mode == "eval":
        for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)


def mix_boxes(crop: int, r: np.random.Generator) -> list[list[int]]:
    """Three boxes: p ~ U(.25, .5), h = exp(U ln p), w = p / h, both times sqrt(1/3)."""
    boxes = []
    for p, a, top, left in r.uniform((0.25, 0, 0, 0), (0.5, 1, 1, 1), (3, 4)):
        h = math.exp(a * math.log(p))
        height, width = (round(crop * side * math.sqrt(1 / 3)) for side in (h, p / h))
        top, left = round(top * (crop - height)), round(left * (crop - width))
        boxes.append([top, left, top + height, left + width])
    return boxes


def mix_mask(boxes: Tensor, crop: int) -> Tensor:
    """M [B, H, W], boxes [B, 3, 4] XORed onto zeros: True keeps a pixel, False is the partner's."""
    one, two, three = (data.rect_mask(b, crop, crop) for b in boxes.unbind(1))
    return one ^ two ^ three


def mix(t: Tensor, m: Tensor) -> Tensor:
    """M * t + (1 - M) * t[pi] for t [B, ..., H, W]; M is resized to t by its nearest cells.

    The partner pi swaps neighbours, 0-1, 2-3, ...: a roll by one in blocks of two. It is on
    the same rank however many ranks there are, and never the image itself.
    """
    pi = torch.arange(len(t), device=t.device) ^ 1
    m = m if m.shape[-2:] == t.shape[-2:] else common.resize_mask(m, t.shape[-2:])
    return torch.where(m if t.dim() == 3 else m[:, None], t, t[pi])


class ClassStatistics(nn.Module):
    """Running mean mu_c [C, A], diagonal covariance Sigma_c [C, A] of a network's classifier input.

    After each update they are the exact mean and population variance, per class, of all pixels seen
    so far on all ranks. Buffers, so the checkpoint has them.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.float64))  # N_c
        self.register_buffer("mean", torch.zeros(num_classes, width))  # mu_c
        self.register_buffer("var", torch.zeros(num_classes, width))  # Sigma_c

    @torch.no_grad()
    def update(self, f: Tensor, label: Tensor) -> None:
        """Takes in pixels f [B, A, h, w] under their class label [B, h, w]; 255 is left out."""
        f = f.flatten(2).transpose(1, 2).to(self.mean.dtype)  # [B, hw, A]
        classes = torch.arange(len(self.count), device=f.device)
        member = (label.flatten(1)[:, None] == classes[:, None]).to(f.dtype)  # [B, C, hw]
        n = member.sum((0, 2))[:, None]  # n_c [C, 1]
        s1, s2 = (member @ f).sum(0), (member @ f.square()).sum(0)  # [C, A]
        n, s1, s2 = rank_sum(torch.cat([n, s1, s2], 1)).split([1, f.shape[2], f.shape[2]], 1)
        mean = s1 / n.clamp_min(1)
        var = (s2 / n.clamp_min(1) - mean.square()).clamp_min(0)
        # w_c = n_c / (n_c + N_c);  mu <- (1-w) mu + w mean
        # Sigma <- (1-w) Sigma + w var + w (1-w) (mu - mean)^2
        w = (n / (n + self.count[:, None]).clamp_min(1)).to(mean.dtype)
        self.var.copy_((1 - w) * self.var + w * var + w * (1 - w) * (self.mean - mean).square())
        self.mean.copy_((1 - w) * self.mean + w * mean)
        self.count.add_(n[:, 0])


def augment(z: Tensor, label: Tensor, weight: Tensor, var: Tensor, strength: float) -> Tensor:
    """z~_c = z_c + 1/2 lambda(t) sum_a (W_ca - W_ya)^2 Sigma_y,a for pixels of class y = label.

    z [B, C, h, w], label [B, h, w]; W [C, A] and Sigma [C, A] are constants. The sum is a table
    K[y, c], looked up per pixel, zero for 255.
    """
    w, classes = weight.detach().flatten(1).float(), len(weight)
    k = 0.5 * strength * ((w[None] - w[:, None]).square() * var[:, None]).sum(2)  # [C, C]
    k = F.pad(k, (0, 0, 0, 1))  # a row of zeros for 255
    return z + k[label.clamp_max(classes)].permute(0, 3, 1, 2)


def augment_network(
    net: nn.Module, stats: ClassStatistics, z: Tensor, f: Tensor, known: tuple
) -> Tensor:
    """z~ of a network: updates its statistics with f, then augments z [B, C, h, w].

    f [B, A, 2h, 2w] becomes 2x2 means like z. `known` = (y, valid, strength). The first images are
    labelled, y [B_x, h, w]; pixels of the others have the class that z itself says; what is not
    valid [B, h, w] takes no part.
    """
    y, valid, strength = known
    label = torch.cat([y, z[len(y) :].detach().argmax(1)]).where(valid, data.IGNORE)
    stats.update(F.avg_pool2d(f.detach(), 2), label)
    return augment(z, label, net.classifier.weight, stats.var, strength)


def mutual_losses(
    z_s: list[Tensor], t_t: list[Tensor], keep_t: list[Tensor], keep_s: list[Tensor], valid: Tensor
) -> tuple[Tensor, Tensor]:
    """L_st and L_ss over valid pixels; lists hold networks 1 and 2; z_s [B, C, h, w]: students' z~.

    L_st = CE(z~_S1, t_T2) + CE(z~_S2, t_T1): a student learns from the other student's teacher.
    L_ss = CE(z~_S1, t_S2) + CE(z~_S2, t_S1), t_Si = argmax z~_Si: the students teach each other.
    `keep_t`, `keep_s` [B, h, w]: where a teacher is confident enough for L_st, a student for L_ss.
    """
    t_s = [z.detach().argmax(1) for z in z_s]
    loss_st = loss_ss = 0
    for i, other in ((0, 1), (1, 0)):
        log_p = z_s[i].log_softmax(1)
        st, ss = (F.nll_loss(log_p, t[other], reduction="none") for t in (t_t, t_s))
        loss_st = loss_st + masked_mean(st, keep_t[other] & valid, valid)
        loss_ss = loss_ss + masked_mean(ss, keep_s[other] & valid, valid)
    return loss_st, loss_ss


class Students(nn.Module):
    """S1 and S2 in one module, so that one DDP carries both."""

    def __init__(self, s1: nn.Module, s2: nn.Module) -> None:
        super().__init__()
        self.s1, self.s2 = s1, s2

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Stride-4 logits, classifier input and last map of each student."""
        return [self.s1.parts(x), self.s2.parts(x)]


# ----------------------------------------------------------------------------------- training


def mkd_step(
    args: argparse.Namespace,
    run: common.Run,
    students: list[nn.Module],
    teachers: list[nn.Module],
    stats: nn.ModuleList,
    model: nn.Module,
    batch: dict,
    step: int,
) -> dict[str, Tensor]:
    """The losses of one step, "loss" being the total; updates the teachers and the statistics.

    `model` is Students(*students), in DDP if there are ranks; `stats` has S1, S2, T1, T2 in order.
    """
    # t from 1; lambda(t) = lambda0 (1 - cos(pi t / T)) / 2 (step 9)
    t, n_x = step + 1, len(batch["x"])
    strength = args.lambda0 * (1 - math.cos(math.pi * t / args.iters)) / 2
    x, y, u = data.normalize(batch["x"]), batch["y"], data.normalize(batch["u"])
    u1 = data.normalize(data.strong_views(batch["u"], batch["strong"][:1], batch["order"])[0])
    boxes = [mix_boxes(args.crop_size, data.rng(args.seed, "mkd", step, p)) for p in run.positions]
    m = mix_mask(run.put(torch.tensor(boxes)), args.crop_size)

    with torch.no_grad():
        # Teachers see x and u; their logits and features are mixed like the image (steps 2 to 4).
        z_t, f_t = [], []
        for teacher, student in zip(teachers, students, strict=True):
            update_teacher(teacher, student, t, args.ema, args.teacher_mode)
            with run.autocast():
                z, f, _ = teacher.parts(torch.cat([x, u]))
            z_t.append(torch.cat([z[:n_x], mix(z[n_x:], m)]).float())
            f_t.append(torch.cat([f[:n_x], mix(f[n_x:], m)]))

    # Students see x and u_mix = M * u1 + (1 - M) * u1[pi] (step 4)
    with run.autocast():
        (z_s1, f_s1, _), (z_s2, f_s2, _) = model(torch.cat([x, mix(u1, m)]))
    z_s, f_s = [z_s1.float(), z_s2.float()], [f_s1, f_s2]

    # L_sup,i = CE(S_i(x), y) at full resolution (step 5)
    loss_sup1, loss_sup2 = (
        common.supervised_loss(upsample(z[:n_x], y.shape[-2:]), y, args.sup_loss, args.ohem_least)
        for z in z_s
    )

    # The rest, labelled and unlabelled together, at half of the stride-4 resolution (step 6)
    z_s, z_t = ([F.avg_pool2d(z, 2) for z in zs] for zs in (z_s, z_t))
    size = z_s[0].shape[-2:]
    valid = torch.cat([batch["x_valid"], mix(batch["u_valid"], m)]) | args.keep_padding
    valid = common.resize_mask(valid, size)

    # z~ of each network; labelled pixels have class y, others its own argmax (steps 7 to 10)
    known = (F.interpolate(y[:, None].float(), size, mode="nearest")[:, 0].long(), valid, strength)
    z_aug_s, z_aug_t = z_s, z_t
    if args.fa != "none":
        networks = zip(students, stats[:2], z_s, f_s, strict=True)
        z_aug_s = [augment_network(*network, known) for network in networks]
    if args.fa == "all":
        networks = zip(teachers, stats[2:], z_t, f_t, strict=True)
        z_aug_t = [augment_network(*network, known) for network in networks]

    # L_st = CE(z~_S1, t_T2) + CE(z~_S2, t_T1), L_ss = CE(z~_S1, t_S2) + ... (steps 11 to 13)
    t_t = [z.argmax(1) for z in z_aug_t]
    keep_t = [z.softmax(1).amax(1) >= args.threshold for z in z_t]
    keep_s = [z.detach().softmax(1).amax(1) >= args.threshold_ss for z in z_s]
    loss_st, loss_ss = mutual_losses(z_aug_s, t_t, keep_t, keep_s, valid)

    # L = L_sup,1 + L_sup,2 + 1.5 L_st + 1.0 L_ss (step 14)
    mutual = args.lambda_st * loss_st + args.lambda_ss * loss_ss  # of x as of u_mix
    loss = loss_sup1 + loss_sup2 + run.ramp(step) * mutual
    confident = masked_mean(torch.stack(keep_t).float().mean(0), valid, valid)
    terms = {"loss": loss, "L_sup1": loss_sup1, "L_sup2": loss_sup2}
    return terms | {"L_st": loss_st, "L_ss": loss_ss, "confident": confident}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.test_only:
        common.test(args)
        return

    # ---- setup, data
    run = common.Run(args)
    classes = len(run.split.classes)

    # ---- networks (step 1), optimizer: one seed is drawn on for both students: their heads differ
    students = []
    for _ in range(2):
        net = build_network(args.backbone, classes, args.output_stride, args.decoder)
        run.say(load_weights(net, args.backbone, args.weights))
        students.append(run.place(net))
    teachers = [run.place(copy.deepcopy(net).requires_grad_(False)) for net in students]
    width = students[0].classifier.in_channels
    stats = nn.ModuleList(ClassStatistics(classes, width) for _ in range(4)).to(run.device)
    model = run.distribute(students[0] if args.labeled_only else Students(*students))
    backbones = [p for net in students for p in net.backbone.parameters()]
    heads = [p for net in students for p in net.head_parameters()]
    head = {"params": heads, "lr": args.lr * args.head_lr_mult}
    optimizer = run.optimizer([{"params": backbones, "lr": args.lr}, head])
    nets = {"student1": students[0]}
    if not args.labeled_only:
        nets |= {"student2": students[1], "teacher1": teachers[0], "teacher2": teachers[1]}

    # ---- resume
    start = run.resume(**nets, stats=stats, optimizer=optimizer)

    # ---- train
    for step, batch in enumerate(run.batches(start), start):
        run.set_lr(optimizer, step)
        if args.labeled_only:
            terms = run.supervised(model, batch)
        else:
            terms = mkd_step(args, run, students, teachers, stats, model, batch, step)
        run.update(terms["loss"], optimizer)
        run.step_done(step, nets, terms)

    # ---- teardown
    run.finish()


if __name__ == "__main__":
    common.launch(main)
