"""Where images come from: scikit-learn's digits, or folders of pictures, one folder for each class."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(NamedTuple):
    """Loaders of (images, labels), and what networks need to know. `start(epoch)` is called before each pass over
    `train`."""

    train: object
    test: object
    classes: int
    channels: int
    small: bool
    start: object = lambda epoch: None


class Batches:
    """Images in memory, in a new order every pass."""

    def __init__(self, images, labels, size, shuffle):
        self.images, self.labels, self.size, self.shuffle = images, labels, size, shuffle

    def __len__(self):
        return len(self.images) // self.size if self.shuffle else -(-len(self.images) // self.size)

    def __iter__(self):
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        for part in order.split(self.size)[: len(self)]:
            yield self.images[part], self.labels[part]


def digits(seed, device, batch=120, train=1200):
    """1,797 real 8x8 digits, split by the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32, device=device)[:, None] / 16 - 0.3
    labels = torch.tensor(found.target, device=device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    a, b = order[:train], order[train:]
    return Images(Batches(images[a], labels[a], batch, True), Batches(images[b], labels[b], 600, False), 10, 1, True)


class Pictures(Dataset):
    """FOLDER/class/picture: (image of size x size, number of the class); for training cropped and mirrored by chance,
    else its middle."""

    def __init__(self, folder, size, train):
        self.size, self.train = size, train
        folder = Path(folder)
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise ValueError(
                f"{folder} holds no pictures; expected {folder}/CLASS/PICTURE with one of {', '.join(SUFFIXES)}"
            )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        from PIL import Image

        path, label = self.files[i]
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
            box, mirror = (
                (self._random_box(*picture.size), bool(torch.rand(()) < 0.5))
                if self.train
                else (self._middle_box(*picture.size), False)
            )
            picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=3)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(self.size, self.size, 3)
        pixels = (pixels.permute(2, 0, 1).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
            :, None, None
        ]
        return pixels.flip(-1) if mirror else pixels, label

    @staticmethod
    def _random_box(width, height):
        """8 % to 100 % of the area, sides 3:4 to 4:3."""
        for _ in range(10):
            area = width * height * (0.08 + 0.92 * torch.rand(()).item())
            ratio = (4 / 3) ** (2 * torch.rand(()).item() - 1)
            w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
            if w <= width and h <= height:
                left, top = torch.rand(()).item() * (width - w), torch.rand(()).item() * (height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height

    @staticmethod
    def _middle_box(width, height):
        side = min(width, height) * 0.875
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side


def pictures(folder, device, batch, size, workers):
    """DIR/train and DIR/val; each process of a distributed run takes its share of both, and the whole is `batch`
    pictures a step."""
    folder = Path(folder)
    train, test = Pictures(folder / "train", size, True), Pictures(folder / "val", size, False)
    if train.classes != test.classes:
        odd = sorted({*train.classes} ^ {*test.classes})
        raise ValueError(
            f"{folder}/train and {folder}/val have different classes: "
            f"{', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}"
        )
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if batch % world or len(train) < batch:
        raise ValueError(
            f"--batch {batch} must be a multiple of the {world} processes and at most the {len(train)} pictures of "
            f"{folder}/train"
        )
    usual = dict(num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    order = DistributedSampler(train, shuffle=True, drop_last=True) if world > 1 else None
    share = DistributedSampler(test, shuffle=False) if world > 1 else None
    loaders = (
        DataLoader(train, batch // world, shuffle=order is None, sampler=order, drop_last=True, **usual),
        DataLoader(test, batch // world, sampler=share, **usual),
    )
    return Images(*loaders, len(train.classes), 3, False, order.set_epoch if order else lambda epoch: None)
