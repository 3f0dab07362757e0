"""How much can pseudo-labels give? CutMix alone, helped by the truth on unlabelled images.

python tests/oracle.py right --dataset folder --root data/camvid-half --out runs/right-s0

The flags are speed.py's, but EntropyMix and both distillations are off; the unlabelled images need
masks. `truth` gives every labelled pixel of them its true label. `right` leaves out the wrong
pseudo-labels and keeps all others, as the best confidence would. Points of reference, not results.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the repo's root
import common
import data
import speed

SURE = 30.0  # a logit beside zeros: probability 1 in float32
CUTMIX = dict(entropy_mix=False, alpha=0.0, beta=0.0, threshold=0.9)  # above it only if SURE


class WithTruth(data.TrainBatches):
    """The same batches, and u_y [b, H, W] uint8: the labels of u, 255 where there is none."""

    def load(self, step: int) -> dict:
        batch, labels = super().load(step), []
        items = self.pick(self.split.unlabeled, "unlabeled", step)
        for item, r in zip(items, self.rngs("u", step), strict=True):
            if item.mask is None:
                raise data.InputError(f"{item.image}: no mask; the truth of it is needed here")
            image = data.read_image(item)
            mask = data.read_mask(item, image.size, len(self.split.classes))
            y = data.weak_view(image, mask, self.crop, self.scale, r)[1]
            labels.append(torch.tensor(y))
        return batch | {"u_y": torch.stack(labels)}


class Corrected(nn.Module):
    """The network on weak views u: its logits are SURE where it may teach, and zeros elsewhere."""

    def __init__(self, net: nn.Module, u_y: Tensor, mode: str) -> None:
        super().__init__()
        self.net, self.u_y, self.mode = net, u_y, mode

    def forward(self, u: Tensor, features: bool) -> tuple[Tensor, Tensor, Tensor]:
        z, f, deep = self.net(u, features)
        teaches = self.u_y != data.IGNORE  # [B, H, W]
        if self.mode == "right":
            teaches = teaches & (z.argmax(1) == self.u_y)
        y = F.one_hot(torch.where(teaches, self.u_y, 0).long(), z.shape[1]).permute(0, 3, 1, 2)
        return SURE * y * teaches[:, None], f, deep


def main() -> None:
    mode, argv = sys.argv[1], sys.argv[2:]
    if mode not in ("truth", "right"):
        raise data.InputError(f"{mode}: the first word is truth or right, then speed.py's flags")
    speed_step, parse_args, data.TrainBatches = speed.speed_step, speed.parse_args, WithTruth

    def parse(argv: list[str]) -> argparse.Namespace:
        args = parse_args(argv)
        if args.labeled_only or args.test_only:
            raise data.InputError("--labeled-only, --test-only: no pseudo-label to correct")
        args.method = f"oracle-{mode}"  # so that no other run goes on from this one
        vars(args).update(CUTMIX)
        return args

    speed.parse_args = parse
    speed.speed_step = lambda args, run, net, model, batch, step: speed_step(
        args, run, Corrected(net, batch["u_y"], mode), model, batch, step
    )
    speed.main(argv)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    common.launch(main)
