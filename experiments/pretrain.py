"""How the shipped digits model was made: DiT's own training (section 3 of its paper; the loss is
IDDPM's), on 4,000 of the 5,000 digits.

    python -m experiments.pretrain                    # writes checkpoints/digits_dit.safetensors

Interrupt it at any time; the same command with --resume goes on to the bitwise same weights.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import command
import dit
from samplers import DDPM

DATA = Path(__file__).parent.parent / "data" / "digits28.npz"
SAVE_EVERY = 200  # steps
DROP_LABEL = 0.1  # the share of labels replaced by the null label, for classifier-free guidance


def digits(held_out=False):
    """The shipped digits: -> images (N, 1, 28, 28) in [-1, 1] and labels (N,). The last 100 of each
    class are held out from every training in this project."""
    with np.load(DATA) as data:
        images, labels = data["images"], data["labels"]
    index = np.arange(len(labels))
    first = np.array([np.flatnonzero(labels == label)[0] for label in range(10)])
    mask = (index - first[labels] >= 400) == held_out
    images = torch.from_numpy(images[mask]).float()[:, None] / 127.5 - 1
    return images, torch.from_numpy(labels[mask]).long()


def bfloat16_is_faster():
    """Whether bfloat16 multiplies matrices of this training's shape faster than float32. A CPU with
    instructions for it gains about 2 x; one without loses more than 10 x."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(3136, 128, dtype=dtype), torch.ones(128, 512, dtype=dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def training_loss(network, schedule, images, labels, generator):
    """IDDPM's hybrid loss on one batch: mean (eps - eps_theta)^2, plus the KL divergence (bits) of
    each pixel's learned p(x' | x) from q(x' | x, x_0), which trains the variance only."""
    B = len(images)
    i = torch.randint(len(schedule.timesteps), (B,), generator=generator)  # executed order
    noise = torch.randn(images.shape, generator=generator)
    dropped = torch.rand(B, generator=generator) < DROP_LABEL
    labels = torch.where(dropped, network.num_classes, labels)

    def at(table):  # the coefficients of step i, one an image: (B, 1, 1, 1)
        return torch.from_numpy(table).float()[i][:, None, None, None]

    a = at(schedule.alpha_bar)
    x = a.sqrt() * images + (1 - a).sqrt() * noise
    t = torch.tensor(schedule.timesteps)[i]
    eps, variance = network(x, t, labels).float().chunk(2, dim=1)

    # KL between two Gaussians whose means differ by from_x0 (x_0 - predicted x_0)
    x0 = (x - (1 - a).sqrt() * eps.detach()) / a.sqrt()
    from_x0 = at(np.sqrt(schedule.alpha_bar_next) * schedule.beta / (1 - schedule.alpha_bar))
    v = (variance + 1) / 2
    log_q = at(schedule.log_beta_tilde)
    log_p = v * at(schedule.log_beta) + (1 - v) * log_q
    distance = (from_x0 * (images - x0)) ** 2
    kl = 0.5 * (log_p - log_q - 1 + torch.exp(log_q - log_p) + distance * torch.exp(-log_p))
    return F.mse_loss(eps, noise), kl.mean() / math.log(2)


def learning_rate(step, steps, peak):
    """Linear warm-up over 100 steps, then a cosine to zero."""
    return peak * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8000, help="optimiser steps (8000)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (2e-3)")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the average (0.999)")
    parser.add_argument("--seed", type=command.seed, default=0, help="0 or more (0)")
    parser.add_argument("--out", default="checkpoints/digits_dit.safetensors", help="the weights")
    parser.add_argument("--state", default="runs/pretrain/state.pt", help="for --resume")
    parser.add_argument("--resume", action="store_true", help="go on from --state if it is there")
    args = parser.parse_args()
    train(args)


def train(args):
    """Trains, saving the state every SAVE_EVERY steps and the averaged weights at the end."""
    command.check_writable(args.out)
    command.check_writable(args.state)
    torch.manual_seed(args.seed)  # for the initialisation only
    network = dit.initialize(dit.DiT(**dit.SIZES["digits"]))
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = DDPM(1000)
    images, labels = digits()
    bfloat16 = bfloat16_is_faster()
    settings = {key: getattr(args, key) for key in ("steps", "batch_size", "lr", "ema", "seed")}
    first, seconds = 0, 0.0
    if args.resume and Path(args.state).exists():
        state = command.load_state(args.state)
        if not isinstance(state, dict) or state.get("settings") != settings:
            raise ValueError(f"{args.state} is not the state of a run with these settings")
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, bfloat16 = state["step"], state["seconds"], state["bfloat16"]
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(images)} images, "
          f"{'bfloat16' if bfloat16 else 'float32'}, seed {args.seed}")

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", disable=None)
    running = None
    for step in bar:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        # Every step seeds its own generator: nothing about randomness has to be saved.
        generator = torch.Generator().manual_seed(args.seed * 1_000_000_007 + step)
        batch = torch.randint(len(images), (args.batch_size,), generator=generator)
        # The fused CPU attention is slow on 49 tokens, above all backwards.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            mse, kl = training_loss(network, schedule, images[batch], labels[batch], generator)
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
            command.save_state(args.state, {
                "settings": settings, "network": network.state_dict(),
                "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step + 1, "seconds": seconds, "bfloat16": bfloat16,
            })

    about = {**settings, "hours": f"{seconds / 3600:.2f}", "data": DATA.name}
    with command.replacing(args.out) as temporary:
        metadata = {key: str(value) for key, value in about.items()}
        temporary.write_bytes(save(average.state_dict(), metadata))
    print(f"wrote {args.out}: {about}")


if __name__ == "__main__":
    command.run(main)
