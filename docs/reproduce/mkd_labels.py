"""How right MKD's pseudo-labels are, by what batch norm the network uses that gives them.

python docs/reproduce/mkd_labels.py runs/voc_animals_finetune/mkd-s0 --root data/voc_animals

Takes the student and the teacher of a finished run, and batches as in its training, of x and of u
whose true labels are known here. Prints the mIoU of argmax z on the weak view u: in eval mode by
the running statistics, in train mode by those of the batch of x and u, and of u alone.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # the scripts lie there
import common  # noqa: E402
import data  # noqa: E402


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", type=Path, help="folder of a run of mkd.py with latest.pt")
    p.add_argument("--root", type=Path, default=Path("data"), help="of its data set")
    p.add_argument("--steps", type=int, default=50, help="batches")
    opts = p.parse_args()
    args = argparse.Namespace(**json.loads((opts.run / "args.json").read_text()))
    args.root = opts.root
    device = common.pick_device(0)
    split = data.load_split(args)
    known = dataclasses.replace(split, labeled=split.unlabeled)  # u with its true labels
    classes = len(split.classes)
    saved = torch.load(opts.run / "latest.pt", map_location="cpu", weights_only=False)

    confusion = {}
    for name in ("student1", "teacher1"):
        net = common.build_network(args.backbone, classes, args.output_stride, args.decoder)
        net = net.place(device)
        for step in range(opts.steps):
            x = data.TrainBatches(split, args)[step]["x"]
            batch = data.TrainBatches(known, args)[step]
            images = torch.cat([x, batch["x"]]).to(device).permute(0, 3, 1, 2).float() / 255
            images = data.normalize(images)
            y = batch["y"].to(device).long()
            for mode in ("running statistics", "batch of x and u", "batch of u"):
                net.load_state_dict(saved[name])  # train mode moves the running statistics
                net.train(mode != "running statistics")
                z = net(images[len(x) :] if mode == "batch of u" else images)[-len(y) :]
                counts = common.confusion_matrix(z.argmax(1), y, classes)
                confusion[name, mode] = confusion.get((name, mode), 0) + counts

    print(f"{opts.run}: {opts.steps} batches of {len(y)} unlabelled crops of {args.crop_size}\n")
    print("| network | batch norm by | mIoU of the labels of u |\n|---|---|---|")
    for (name, mode), counts in confusion.items():
        print(f"| {name} | {mode} | {common.iou_of(counts, split.classes)[0]:.1f} |")


if __name__ == "__main__":
    main()
