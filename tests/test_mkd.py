"""Oracles of mkd.py, written a second time from the note; its first steps recomputed."""

import copy
import math
from types import SimpleNamespace

import helpers as h
import numpy as np
import procs
import pytest
import torch
from torch import Tensor, nn

import data
import mkd


def drawn_labels(*shape: int, classes: int, seed: int = 0, ignored: float = 0.2) -> Tensor:
    r = np.random.default_rng(seed)
    y = r.integers(0, classes, shape)
    y[r.random(shape) < ignored] = 255
    return torch.from_numpy(y)


# ------------------------------------------------------------------------------------- teachers


def small_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).double()
    for buffer in ("running_mean", "running_var"):
        getattr(net[1], buffer).uniform_()
    return net


def test_teacher_follows_the_hand_computed_sequence():
    """m = 0, 1/2, 3/5, 3/5 for --ema 0.6: a copy, then means of what the student has been."""
    student, teacher = small_net(0), small_net(1)
    statistics = {n: b.clone() for n, b in teacher.named_buffers()}
    expected = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    for t, m in ((1, 0.0), (2, 0.5), (3, 0.6), (4, 0.6)):
        with torch.no_grad():
            for p in student.parameters():
                p.copy_(torch.randn_like(p))
        was = {n: p.detach().clone() for n, p in student.named_parameters()}
        mkd.update_teacher(teacher, student, t, 0.6, "train")
        for name, p in teacher.named_parameters():
            expected[name] = m * expected[name] + (1 - m) * was[name]
            torch.testing.assert_close(p.detach(), expected[name], **h.F64)
            assert torch.equal(dict(student.named_parameters())[name], was[name]), "student moved"
            if t == 1:
                assert torch.equal(p, was[name]), "step 1 is an exact copy"
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, statistics[name]), "batch norm statistics are the teacher's own"
    mkd.update_teacher(nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), 1, 0.6, "eval")  # no batch norm


# ------------------------------------------------------------------------------------ the mask


@pytest.mark.parametrize("crop", [48, 321])
def test_boxes_are_the_notes(crop: int):
    """p ~ U(.25, .5), h in [p, 1], w = p / h; both times sqrt(1/3); anywhere inside the crop."""
    boxes = np.array([mkd.draw_boxes(crop, np.random.default_rng(k)) for k in range(800)])
    assert boxes.shape == (800, 3, 4)
    assert boxes.min() >= 0
    assert boxes.max() <= crop
    top, left, bottom, right = boxes.reshape(-1, 4).T
    height, width = (bottom - top) / crop, (right - left) / crop
    for side in (height, width):
        assert side.min() > 0.25 * 3**-0.5 - 1 / crop
        assert side.max() < 3**-0.5 + 1 / crop
    area = height * width * 3  # = p, but for rounding
    assert area.min() > 0.25 - 3 / crop
    assert area.max() < 0.5 + 3 / crop
    assert area.mean() == pytest.approx(0.375, abs=0.005)
    assert np.log(height / width).mean() == pytest.approx(0, abs=0.03)  # U is even in log h
    assert np.log(height / width).std() == pytest.approx(0.58, abs=0.03)
    # every place that fits is as likely: near and far edges alike
    free_y, free_x = crop - (bottom - top), crop - (right - left)
    for start, free in ((top, free_y), (left, free_x)):
        assert (start / free).mean() == pytest.approx(0.5, abs=0.02)
        assert (start / free).std() == pytest.approx(12**-0.5, abs=0.02)
    assert len({tuple(b) for b in boxes[0]}) == 3, "three boxes, not one thrice"


def xored(boxes: Tensor, crop: int) -> Tensor:
    """M by counting, pixel by pixel: True in one or in three of the boxes."""
    count = torch.zeros(len(boxes), crop, crop)
    for b in range(len(boxes)):
        for top, left, bottom, right in boxes[b].tolist():
            count[b, top:bottom, left:right] += 1
    return (count == 1) | (count == 3)


def test_mix_mask_is_the_xor_of_three_boxes():
    boxes = [
        [[0, 0, 4, 4], [2, 2, 6, 6], [3, 3, 5, 8]],  # once, twice and thrice covered pixels
        [[0, 0, 8, 8], [0, 0, 8, 8], [1, 2, 3, 4]],
        [[0, 0, 0, 0], [5, 5, 5, 8], [7, 7, 8, 8]],
    ]
    m = mkd.mix_mask(boxes, 8)
    assert torch.equal(m, xored(torch.tensor(boxes), 8))
    assert m[0, 3, 3], "three boxes meet here"
    assert not m[0, 2, 2], "two boxes meet here"
    assert m[1].sum() == 4


def mixed(t: Tensor, m: Tensor) -> Tensor:
    """M t + (1 - M) t[pi] by loops for two images or four; a cell has M of its nearest pixel."""
    m_t, out = h.nearest(m, t.shape[-2:]), t.clone()
    for b, i, j in np.ndindex(*m_t.shape):
        out[b, ..., i, j] = t[b if m_t[b, i, j] else (1, 0, 3, 2)[b], ..., i, j]
    return out


def test_mix_of_images_and_valid_maps():
    m, t = h.draw(4, 16, 16, seed=1) > 0, h.draw(4, 3, 16, 16)
    assert torch.equal(mkd.mix(t, m), mixed(t, m))
    assert torch.equal(mkd.mix(t[:, 0] > 0, m), mixed(t[:, 0] > 0, m))


# --------------------------------------------------------------------------------- statistics


def all_pixels(batches: list[tuple[Tensor, Tensor]], c: int) -> np.ndarray:
    """Every pixel of class c so far, [P, A]."""
    found = [f.permute(0, 2, 3, 1)[label == c] for f, label in batches]
    return torch.cat(found).numpy()


def check_statistics(stats: mkd.ClassStatistics, seen: list, rtol: float = 1e-10):
    """`seen` has a list of batches for each network."""
    for g, c in np.ndindex(len(seen), 5):
        x = all_pixels(seen[g], c)
        assert stats.count[g, c] == len(x)
        mean, var = (x.mean(0), x.var(0)) if len(x) else (np.zeros(7), np.zeros(7))
        np.testing.assert_allclose(stats.mean[g, c], mean, rtol=rtol, atol=1e-12)
        np.testing.assert_allclose(stats.var[g, c], var, rtol=rtol, atol=1e-12)


def test_statistics_are_those_of_all_pixels_so_far():
    """Class 3 comes late, 1 skips an update, 4 never comes, and an update is all 255.

    A second network has other features and, where it sees anything, other classes.
    """
    stats, seen = mkd.ClassStatistics(2, 5, 7).double(), [[], []]
    for k in range(5):
        f = h.draw(2 + 2 * (k % 2), 7, 3, 4, seed=10 + k, scale=1 + k) + k  # means move
        label = drawn_labels(len(f), 3, 4, classes=4, seed=20 + k)
        label[(label == 3) & torch.tensor(k < 2)] = 0
        label[(label == 1) & torch.tensor(k == 1)] = 2
        if k == 2:
            label[:] = 255
        other = h.draw(*f.shape, seed=30 + k), torch.where(label == 0, 2, label)
        stats.update(torch.stack([f, other[0]]), torch.stack([label, other[1]]))
        seen[0].append((f, label))
        seen[1].append(other)
        check_statistics(stats, seen)
    assert len(all_pixels(seen[0][:2], 3)) == len(all_pixels(seen[0], 4)) == 0, "none was absent"
    assert len(all_pixels(seen[0], 3)) > 5


def test_statistics_far_from_zero():
    """Two hundred updates in float32; E f^2 - mean^2 has no digit left at 10^4 deviations."""
    stats, seen = mkd.ClassStatistics(1, 5, 7), []
    for k in range(200):
        f = (2000 + h.draw(2, 7, 4, 4, seed=k) / 10).float()
        seen.append((f.double(), drawn_labels(2, 4, 4, classes=4, seed=k)))
        stats.update(f[None], seen[-1][1][None])
    check_statistics(stats, [seen], rtol=2e-3)


# ------------------------------------------------------------------------------- augmentation


def augmented_directly(z: Tensor, label: Tensor, weight: Tensor, var: Tensor, lam: float) -> Tensor:
    """z~_c = z_c + 1/2 lambda sum_a (W_ca - W_ya)^2 Sigma_ya, as an N x C x A tensor."""
    rows, y = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), label.reshape(-1)
    w, sigma = weight.detach().flatten(1), var[y.clamp_max(len(weight) - 1)]  # [C, A], [N, A]
    own = w[y.clamp_max(len(weight) - 1)]  # [N, A]
    shift = ((w[None] - own[:, None]) ** 2 * sigma[:, None]).sum(2) * lam / 2  # [N, C, A] summed
    shift = torch.where((y == 255)[:, None], torch.zeros_like(shift), shift)
    b, c, h, w_ = z.shape
    return (rows + shift).reshape(b, h, w_, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("kind", ["mixed", "one class", "all ignored"])
def test_augment_is_the_direct_formula(strength: float, kind: str):
    """Also d CE(z~, t) / dz = softmax(z~) - onehot(t): W and Sigma are constants."""
    z, var = h.draw(3, 2, 5, 3, 4).requires_grad_(), h.draw(3, 5, 7, seed=4).abs()
    weight = h.draw(3, 5, 7, seed=3).requires_grad_()
    label = torch.stack([drawn_labels(2, 3, 4, classes=5, seed=k) for k in range(3)])
    label = {"mixed": label, "one class": 0 * label + 4, "all ignored": 0 * label + 255}[kind]
    found = mkd.augment(z, label, weight, var, strength)
    each = zip(z, label, weight, var, strict=True)
    mine = torch.stack([augmented_directly(*one, strength) for one in each]).detach()
    torch.testing.assert_close(found.detach(), mine)
    assert torch.equal((found != z).any(2), (label != 255) & (strength > 0))
    t = drawn_labels(2, 3, 4, classes=5, seed=9, ignored=0).expand(3, -1, -1, -1)
    nn.functional.cross_entropy(found.flatten(0, 1), t.flatten(0, 1), reduction="sum").backward()
    onehot = torch.zeros_like(z).scatter_(2, t[:, :, None], 1.0)
    torch.testing.assert_close(z.grad, mine.softmax(2) - onehot)
    assert weight.grad is None


# ------------------------------------------------------------------------------ mutual losses


def half(z: Tensor) -> Tensor:
    """Means of 2 x 2 cells, at the end of an odd map of those that are left."""
    h, w = z.shape[-2:]
    out = z.new_zeros(*z.shape[:2], (h + 1) // 2, (w + 1) // 2)
    for i, j in np.ndindex(*out.shape[-2:]):
        out[..., i, j] = z[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    return out


def tiny_step(surest: str = "", **changes: object) -> tuple[dict, mkd.ClassStatistics, dict]:
    """mkd_step, the last of fifty, on tiny networks: the networks, the statistics and the terms.

    Network `surest` has a constant, certain prediction, all others an even one.
    """
    torch.manual_seed(0)
    nets = {name: procs.Tiny(4) for name in ("student1", "student2", "teacher1", "teacher2")}
    if surest:
        for name, net in nets.items():
            nn.init.zeros_(net.classifier.weight)
            net.classifier.bias.data = torch.tensor([0.0, 0, 0, 90 * (name == surest)])
    flags = dict(crop_size=32, seed=0, iters=50, ema=1.0, teacher_mode="train", keep_padding=False)
    flags |= dict(sup_loss="ce", ohem_share=0.1, lambda0=1.5, fa="all")
    flags |= dict(lambda_st=1.5, lambda_ss=1.0, threshold=0.0, threshold_ss=0.0)
    args = SimpleNamespace(**(flags | changes))
    stats = mkd.ClassStatistics(mkd.AUGMENTED[args.fa], 4, 16)
    model, batch = mkd.Students(*list(nets.values())[:2]), h.tiny_batch() | dict(step=49)
    return nets, stats, mkd.mkd_step(args, nets, stats, model, h.NO_AMP, batch, 1.0)


def test_who_learns_from_whom():
    """L_st with T1 sure of nothing but T2 of all, and the other way round; L_ss alike."""
    nets, _, terms = tiny_step()
    assert h.learners(terms["L_sup1"], nets) == {"student1"}
    assert h.learners(terms["L_sup2"], nets) == {"student2"}
    assert h.learners(terms["loss"], nets) == {"student1", "student2"}, "a teacher gets gradient"
    torch.testing.assert_close(tiny_step(fa="students")[2]["L_ss"], terms["L_ss"])  # by their own W
    for own, other in (("1", "2"), ("2", "1")):
        nets, _, terms = tiny_step(f"teacher{own}", threshold=0.999, fa="none")
        assert h.learners(terms["L_st"], nets) == {f"student{other}"}
        nets, _, terms = tiny_step(f"student{own}", threshold_ss=0.999, fa="none")
        assert h.learners(terms["L_ss"], nets) == {f"student{other}"}


# ---------------------------------------------------------------------- first steps recomputed

VARIANTS = {
    "all flags": "--threshold {tau} --threshold-ss {tau_s} --ema 0.3 --lambda-st 0.7 --lambda-ss 2 "
    "--lambda0 3 --teacher-mode train --fa all",
    "students only, padding kept": "--fa students --keep-padding --iters 1 --threshold 0 "
    "--threshold-ss 0 --teacher-mode train --crop-size 48",
    "teachers in eval mode, bf16": "--fa none --threshold 0 --threshold-ss 0 --teacher-mode eval "
    "--ramp 1 --amp bf16",
}


def first_steps(
    args: object, batches: list[dict], students: list, teachers: list
) -> tuple[list[dict[str, float]], list[list], tuple[float, float]]:
    """The note's one step, a few times, with the statistics from lists of all pixels. B = 2.

    Trains the networks; returns the terms of each step, what each network has seen as pixels and
    labels, and thresholds that about half of the teachers' and students' pixels reach at step 0.
    """
    lines, velocity, taus = [], None, None
    seen = [[], [], [], []]  # of S1, S2, T1, T2
    for step, batch in enumerate(batches):
        t = step + 1
        lam = args.lambda0 * (1 - math.cos(math.pi * t / args.iters)) / 2
        x, u, y = h.standardized(batch["x"]), h.standardized(batch["u"]), batch["y"]
        u1 = h.standardized(data.strong_views(batch["u"], batch["strong"][:1], batch["order"])[0])
        r = [data.rng(args.seed, "mkd", step, p) for p in range(2)]
        m = xored(torch.tensor([mkd.draw_boxes(args.crop_size, k) for k in r]), args.crop_size)
        valid = torch.cat([batch["x_valid"], mixed(batch["u_valid"], m)])
        valid = torch.ones_like(valid) if args.keep_padding else valid

        z_t, f_t = [], []
        with torch.no_grad():
            for student, teacher in zip(students, teachers, strict=True):
                keep = min(1 - 1 / t, args.ema)
                for mine, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                    theirs.copy_(keep * theirs + (1 - keep) * mine)
                if args.teacher_mode == "eval":
                    teacher.load_state_dict(student.state_dict() | dict(teacher.named_parameters()))
                weak = h.look(
                    teacher.train(args.teacher_mode == "train"), torch.cat([x, u]), args.amp
                )
                z_t.append(torch.cat([weak["z_4"][:2], mixed(weak["z_4"][2:], m)]))
                f_t.append(torch.cat([weak["f"][:2], mixed(weak["f"][2:], m)]))
        both = [h.look(s, torch.cat([x, mixed(u1, m)]), args.amp) for s in students]
        z_s, f_s = ([b[k] for b in both] for k in ("z_4", "f"))
        sup = [h.supervised(h.bilinear(z[:2], y.shape[-2:]), y) for z in z_s]

        # the class of a mean is that of its first cell, at that cell's pixel
        y_8, valid_8 = (h.nearest(a, z_s[0].shape[-2:])[:, ::2, ::2] for a in (y, valid))
        z_s, z_t, f_s, f_t = ([half(v) for v in maps] for maps in (z_s, z_t, f_s, f_t))
        z_aug = []
        for k, (net, z, f) in enumerate(
            zip([*students, *teachers], [*z_s, *z_t], [*f_s, *f_t], strict=True)
        ):
            if args.fa == "none" or (args.fa == "students" and k > 1):
                z_aug.append(z)
                continue
            label = torch.cat([y_8, z[2:].argmax(1)])
            label[~valid_8] = 255
            seen[k].append((f.detach(), label))
            var = torch.zeros(6, 256)
            for c in range(6):
                pixels = all_pixels(seen[k], c).astype(np.float64)
                var[c] = torch.from_numpy(pixels.var(0)) if len(pixels) else 0.0
            z_aug.append(augmented_directly(z, label, net.classifier.weight, var, lam))

        z1, z2, t1, t2 = z_aug
        c1, c2, d1, d2 = (z.detach().softmax(1).amax(1) for z in (*z_t, *z_s))
        pairs = (torch.stack(pair)[:, valid_8] for pair in ((c1, c2), (d1, d2)))
        taus = taus or tuple(h.between(pair) for pair in pairs)
        tau, tau_s = taus if args.threshold is None else (args.threshold, args.threshold_ss)
        k1, k2, n = c1 >= tau, c2 >= tau, int(valid_8.sum())
        st = h.ce_sum(z1, t2.argmax(1), valid_8 & k2) + h.ce_sum(z2, t1.argmax(1), valid_8 & k1)
        ss = h.ce_sum(z1, z2.argmax(1), valid_8 & (d2 >= tau_s))
        ss = ss + h.ce_sum(z2, z1.argmax(1), valid_8 & (d1 >= tau_s))
        terms = {"L_sup1": sup[0], "L_sup2": sup[1], "L_st": st / n, "L_ss": ss / n}
        ramp = step / (args.ramp * args.iters) if args.ramp else 1
        semi = args.lambda_st * terms["L_st"] + args.lambda_ss * terms["L_ss"]
        terms["loss"] = sup[0] + sup[1] + ramp * semi
        terms["loss"].backward()
        parts = [h.split_parameters(s) for s in students]
        groups = [(p[0], 1) for p in parts] + [(p[1], args.head_lr_mult) for p in parts]
        velocity = h.sgd(args, groups, step, velocity)
        confident = (int((k1 & valid_8).sum()) + int((k2 & valid_8).sum())) / 2 / n
        lines.append({k: v.item() for k, v in terms.items()} | {"confident": confident})
    return lines, seen, taus


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_steps_recomputed(variant: str, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    flags = VARIANTS[variant]
    args = mkd.parse_args([*h.TINY, *flags.format(tau=1, tau_s=1).split()])
    batches = h.find_seed(args, boxes=False)
    args.threshold = None if "{tau}" in flags else args.threshold
    torch.manual_seed(args.seed)
    students = [h.network(args.backbone) for _ in range(2)]
    teachers = [copy.deepcopy(s).requires_grad_(False) for s in students]
    nets = dict(zip(("student1", "student2", "teacher1", "teacher2"), students + teachers))  # noqa: B905
    begin = {n: copy.deepcopy(net.state_dict()) for n, net in nets.items()}
    mine, seen, (tau, tau_s) = first_steps(args, batches, students, teachers)

    argv = [*h.TINY, "--seed", str(args.seed), *flags.format(tau=tau, tau_s=tau_s).split()]
    lines, latest, _ = h.run_main(mkd, argv, tmp_path)
    if "{tau}" in flags:
        assert 0.1 < lines[0]["confident"] < 0.9
    h.assert_same_terms(lines, mine, args.amp)
    for name, net in nets.items():
        h.assert_same_update(begin[name], net.state_dict(), latest[name])
    stats = latest["stats"]
    seen = [pixels for pixels in seen if pixels]  # those of --fa
    for pixels, count, found in zip(seen, stats["count"], stats["var"], strict=True):
        x = [all_pixels(pixels, c) for c in range(6)]
        var = np.stack([len(a) * a.var(0) if len(a) else np.zeros(256) for a in x])
        assert (count.sum(), count.dtype) == (sum(map(len, x)), torch.float64)
        apart = np.linalg.norm((count * found).numpy() - var)
        assert apart <= 0.05 * np.linalg.norm(var)
