"""Region features of scenes without a detector: a small network learns to name the records' boxes, and writes theirs.

    python examples/scenes/regions.py --train 'runs/scenes/train-*.tar' --val 'runs/scenes/val-00000.tar' \
        --output runs/scenes/regions

Boxes are the true ones; what is learned is what is in them: name and colour of the tile, from crops of 24 pixels. The
folders `train` and `val` under --output hold for each image what docs/data.md says that regions are (`features` of
width 128), for `vlmfast train visual_bert --features ... --region-dim 128`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.data import FeatureCache, ImageTextDataset, RecordBoxes
from vlmfast.models.contract import fingerprint
from vlmfast.models.region_batches import WholeImage

SIDE, WIDTH = 24, 128


class BoxNet(nn.Module):
    """Crops (N, 3, 24, 24) to features (N, 128), and to logits of names, the background last, and of colours."""

    def __init__(self, names: int, colours: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128 * 9, WIDTH), nn.ReLU(),
        )  # fmt: skip
        self.names = nn.Linear(WIDTH, names + 1)
        self.colours = nn.Linear(WIDTH, colours)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(crops.float() / 127.5 - 1)
        return features, self.names(features), self.colours(features)


def crops_of(dataset: ImageTextDataset, boxes: RecordBoxes) -> tuple[list[dict[str, Tensor]], list[Tensor | None]]:
    """Of each sample what its record says, with the size of its image, and its crops (R, 3, 24, 24) uint8."""
    regions: list[dict[str, Tensor]] = []
    crops: list[Tensor | None] = []
    for index in range(len(dataset)):
        sample, own = dataset[index], boxes[index]
        if sample is None or sample.image is None:
            regions.append(own)
            crops.append(None)
            continue
        image = Image.fromarray(sample.image.numpy())
        cut = [
            np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)) for box in own["boxes"].tolist()
        ]
        regions.append({**own, "image_size": torch.tensor(image.size)})
        crops.append(torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2) if cut else None)
    return regions, crops


def train(net: BoxNet, crops: Tensor, names: Tensor, colours: Tensor, *, epochs: int, seed: int) -> None:
    """Crops are moved by up to two pixels; the learning rate falls to 0 along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(crops) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    started = time.time()
    for epoch in range(epochs):
        order = torch.randperm(len(crops), generator=generator)
        right = 0
        for rows in order.split(128):
            if len(rows) < 128:
                continue
            dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
            batch = crops[rows].roll((dx, dy), (2, 3))
            _, named, coloured = net(batch)
            loss = F.cross_entropy(named, names[rows], label_smoothing=0.1) + F.cross_entropy(coloured, colours[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((named.argmax(1) == names[rows]).sum())
        print(f"epoch {epoch + 1}: names {right / len(crops):.3f}, {time.time() - started:.0f} s", flush=True)


@torch.no_grad()
def write(folder: Path, net: BoxNet, dataset: Any, regions: Sequence[dict[str, Tensor]], crops: Sequence[Any]) -> float:
    """The features of all samples on disk; returns the share of boxes that the net names right."""
    net.eval()
    identity = {
        "model": fingerprint({"side": SIDE}, net),
        "data": dataset.image_fingerprint(),
        "transform": repr(dataset.transform),
    }
    cache = FeatureCache(folder, identity, len(dataset))
    items: list[dict[str, Tensor] | None] = []
    right, count = 0, 0
    for own, cut in zip(regions, crops, strict=True):
        if cut is None:
            items.append(None)
            continue
        features, named, coloured = net(cut)
        probabilities, seen = named.softmax(1), coloured.softmax(1)
        scores, labels = probabilities[:, :-1].max(1)
        sure, attributes = seen.max(1)
        right, count = right + int((labels == own["labels"]).sum()), count + len(labels)
        items.append(
            {
                "boxes": own["boxes"],
                "features": features,
                "probabilities": probabilities,
                "labels": labels,
                "scores": scores,
                "attributes": attributes,
                "attribute_scores": sure,
                "image_size": own["image_size"],
            }
        )
    for block in cache.missing():
        rows = cache.rows(block)
        cache.write(block, items[rows.start : rows.stop])
    return right / max(count, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="shards to learn from")
    parser.add_argument("--val", required=True, help="shards whose regions are written too")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    dataset = ImageTextDataset(args.train, transform=WholeImage())
    boxes = RecordBoxes(dataset)
    regions, crops = crops_of(dataset, boxes)
    known = [(own, cut) for own, cut in zip(regions, crops, strict=True) if cut is not None]
    print(f"{len(known)} images, {sum(len(cut) for _, cut in known)} boxes, {len(boxes.names)} names", flush=True)
    net = BoxNet(len(boxes.names), len(boxes.attributes))
    flat = torch.cat([cut for _, cut in known])
    names, colours = (torch.cat([own[name] for own, _ in known]) for name in ("labels", "attributes"))
    train(net, flat, names, colours, epochs=args.epochs, seed=args.seed)
    print(f"train: {write(args.output / 'train', net, dataset, regions, crops):.3f} of the boxes named right")
    other = ImageTextDataset(args.val, transform=WholeImage())
    val_boxes = RecordBoxes(other)
    places = {name: place for place, name in enumerate(boxes.names)}
    regions, crops = crops_of(other, val_boxes)
    mine = torch.tensor([places.get(name, -1) for name in val_boxes.names])
    regions = [{**own, "labels": mine[own["labels"]]} for own in regions]
    print(f"val: {write(args.output / 'val', net, other, regions, crops):.3f} of the boxes named right")


if __name__ == "__main__":
    main()
