"""The small real data sets in this repository (`data/README.md` has their sources).

    images, labels = shipped.digits("train")         # uint8 (4000, 1, 28, 28) and (4000,)
    images, captions = shipped.emoji()               # uint8 (1026, 3, 32, 32) and 1,026 strings
    prompts = shipped.read_prompts()                 # 124 strings

Notation: N images of a set.
"""

import unicodedata
from pathlib import Path

import numpy as np
import torch

import command

DATA = Path(__file__).parent / "data"
PARTS = ("all", "train", "held-out")


def held_out(labels, fold=0):
    """Which digits are held out from training: labels (N,) -> bool (N,). Fold 0 holds out the last
    100 of the 500 of each class, fold 1 the 100 before them, and so on. Every shipped network was
    trained with fold 0 held out."""
    rank = torch.zeros_like(labels)  # the place of an image within its class
    for label in range(10):
        rank[labels == label] = torch.arange((labels == label).sum())
    return (rank >= 400 - 100 * fold) & (rank < 500 - 100 * fold)


def digits(part="all"):
    """MNIST digits: all 5,000, the 4,000 to train with, or the 1,000 held-out ones -> images uint8
    (N, 1, 28, 28), 0 is background, and labels int64 (N,). Raises ValueError for another part."""
    if part not in PARTS:
        raise ValueError(f"unknown part {part}: use {', '.join(PARTS)}")
    with np.load(DATA / "digits28.npz") as data:
        images = torch.from_numpy(data["images"])[:, None]
        labels = torch.from_numpy(data["labels"]).long()
    if part == "all":
        return images, labels
    mask = held_out(labels) == (part == "held-out")
    return images[mask], labels[mask]


def emoji(every=False):
    """The 1,026 emoji that the small text-to-image model has learned: all but flags, symbols,
    components and people. With `every` these 885 follow. -> images uint8 (N, 3, 32, 32), white is
    background, and a list of N captions."""
    with np.load(DATA / "emoji32.npz") as data:
        other = np.isin(data["categories"], ("Flags", "Symbols", "Component", "People & Body"))
        # A stable sort of False and True: the learned ones first, each group in the file's order.
        order = np.argsort(other, kind="stable")[: None if every else (~other).sum()]
        images, captions = data["images"][order], data["captions"][order].tolist()
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions


def emoji_prompts():
    """The 1,026 captions of `emoji()`, in a fixed random order, so that the first few are not
    picked by anyone."""
    _, captions = emoji()
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))
    return [captions[j] for j in order]


def read_lines(path):
    """The lines of a text: -> a list. A line feed ends a line; a carriage return within one, as old
    editors leave it, does not. Raises ValueError if it is not UTF-8, FileNotFoundError."""
    try:
        text = command.read_bytes(path).decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error.reason}") from error
    lines = [one_line(line) for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines  # no line follows the last line break


def one_line(text):
    """A caption without control characters (a carriage return, a tab), which become spaces."""
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in text).strip(" ")


def read_prompts(path=DATA / "prompts.txt"):
    """A file with one prompt a line -> the list of the lines that are not blank. Raises ValueError
    if there is none, and as `read_lines` does."""
    prompts = [line for line in read_lines(path) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line")
    return prompts
