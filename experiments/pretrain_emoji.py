"""How the shipped emoji model was made: a small PixArt, trained as `pretrain` trains the digits
model, to draw the 1,026 emoji of `data/emoji32.npz` that are neither flags, symbols, components nor
people. It is meant to learn them by heart: nothing is held out, and nothing new is to be expected.

    python -m experiments.pretrain_emoji              # writes checkpoints/emoji_pixart.safetensors

Interrupt it at any time; the same command with --resume goes on to the bitwise same weights.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import command
import pixart
import text
from experiments.pretrain import SAVE_EVERY, learning_rate, training_loss
from samplers import DDPM

DATA = Path(__file__).parent.parent / "data" / "emoji32.npz"
LEFT_OUT = ("Flags", "Symbols", "Component", "People & Body")


def emoji():
    """The emoji that the model learns: -> images (N, 3, 32, 32) in [-1, 1] and N captions."""
    with np.load(DATA) as data:
        keep = ~np.isin(data["categories"], LEFT_OUT)
        images, captions = data["images"][keep], data["captions"][keep].tolist()
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


class Captioned:
    """The network as `training_loss` wants it: asked for labels, which here are the numbers of the
    captions, and the one after them that of the null caption. In guidance the null caption gets the
    mask of the caption beside it, so here it is shown with its first 1 to M tokens, in turn."""

    def __init__(self, network, captions):
        self.network, self.num_classes = network, len(captions)
        self.features, self.mask = text.hashed_words(captions)  # (N, M, channels), (N, M)

    def __call__(self, x, t, labels):
        null = labels == self.num_classes
        caption = torch.where(null, 0, labels)
        M = self.network.model_max_length
        tokens = torch.arange(M) <= torch.arange(len(labels))[:, None] % M  # (B, M)
        features = self.network.y_embedder.y_embedding
        y = torch.where(null[:, None, None], features, self.features[caption])
        return self.network(x, t, y, torch.where(null[:, None], tokens, self.mask[caption]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8000, help="optimiser steps (8000)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (32)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (2e-3)")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the average (0.999)")
    parser.add_argument("--seed", type=command.seed, default=0, help="0 or more (0)")
    parser.add_argument("--out", default="checkpoints/emoji_pixart.safetensors", help="the weights")
    parser.add_argument("--state", default="runs/pretrain_emoji/state.pt", help="for --resume")
    parser.add_argument("--compile", action="store_true", help="fuse small operations with "
                        "torch.compile: 1.3 x as fast; needs a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="go on from --state if it is there")
    args = parser.parse_args()
    train(args)


def train(args):
    """Trains, saving the state every SAVE_EVERY steps and the averaged weights at the end."""
    command.check_writable(args.out)
    command.check_writable(args.state)
    torch.manual_seed(args.seed)  # for the initialisation and the null caption only
    network = pixart.initialize(pixart.PixArt(**pixart.SIZES["emoji"]))
    average = copy.deepcopy(network)
    if args.compile:
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = DDPM(1000)
    images, captions = emoji()
    captioned = Captioned(network, captions)
    names = ("steps", "batch_size", "lr", "ema", "seed", "compile")
    settings = {name: getattr(args, name) for name in names}
    first, seconds = 0, 0.0
    if args.resume and Path(args.state).exists():
        state = command.load_state(args.state)
        if not isinstance(state, dict) or state.get("settings") != settings:
            raise ValueError(f"{args.state} is not the state of a run with these settings")
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(images)} images, "
          f"seed {args.seed}", flush=True)

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", disable=None)
    running = None
    for step in bar:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        # Every step seeds its own generator: nothing about randomness has to be saved.
        generator = torch.Generator().manual_seed(args.seed * 1_000_000_007 + step)
        batch = balanced(step, len(images), args.batch_size, args.seed)
        with sdpa_kernel(SDPBackend.MATH):  # the fused CPU attention is slow on 64 tokens
            mse, kl = training_loss(captioned, schedule, images[batch], batch, generator)
        if not math.isfinite(mse.item() + kl.item()):
            raise ValueError(f"the loss is not finite at step {step}: start again, lower --lr")
        optimizer.zero_grad()
        (mse + kl).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            weight = 1 - min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)

        seconds += time.perf_counter() - start
        running = mse.item() if running is None else 0.99 * running + 0.01 * mse.item()
        bar.set_postfix(loss=f"{running:.4f}", kl=f"{kl.item():.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            print(f"step {step + 1}: loss {running:.4f}, {seconds:.0f} s", flush=True)
            command.save_state(args.state, {
                "settings": settings, "network": network.state_dict(),
                "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step + 1, "seconds": seconds,
            })

    about = {**settings, "hours": f"{seconds / 3600:.2f}", "data": DATA.name}
    with command.replacing(args.out) as temporary:
        metadata = {key: str(value) for key, value in about.items()}
        temporary.write_bytes(save(average.state_dict(), metadata))
    print(f"wrote {args.out}: {about}")


def balanced(step, images, batch, seed):
    """The images of a step: (batch,). Every image once in each epoch, in an order of its own."""
    places = torch.arange(step * batch, (step + 1) * batch)
    chosen = []
    for epoch in places.div(images, rounding_mode="floor").unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_000_007 + 500_000_003 + epoch)
        order = torch.randperm(images, generator=generator)
        chosen.append(order[places[places // images == epoch] % images])
    return torch.cat(chosen)


if __name__ == "__main__":
    command.run(main)
