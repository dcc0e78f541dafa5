"""Why plain alternation can beat a trained router: SDT does not pay for refreshing the cache.

    python -m experiments.swap                     # the shipped digits router
    python -m experiments.swap --router runs/digits/router.safetensors --num-samples 200

A row of the router is trained on the error of its own step. That later steps reuse what it computes
does not reach it: to its gradient the cache is a constant. So rows at the start, where each one's
error is small, reuse one after the other, until what they reuse is many steps old. This command
takes a trained schedule and swaps two steps, keeping the CUR: one that reuses nearly all of its
branches computes all of them, and another reuses as many more in exchange. It tries every step of
the first kind, takes the best, then every step of the second, and prints the errors.
"""

import argparse
from pathlib import Path

import command
import models
import router as routers
from cache import Cache
from sample import denoise
from samplers import Noise, make_sampler


def image_error(model, schedule, sampler, x, condition, guidance, noise, full):
    """The mean squared error to the images `full`, made from the same noise without a cache."""
    images = denoise(model.network, sampler, x, condition, guidance, Cache(schedule), noise)
    return (images - full).square().mean().item()


def computing(schedule, i):
    """The schedule with step i computing everything."""
    schedule = schedule.clone()
    schedule[i] = True
    return schedule


def reusing(schedule, j, count):
    """The schedule with `count` more branches of step j reused, the last ones first: a step's early
    branches feed its later ones."""
    schedule = schedule.clone()
    computed = schedule[j].nonzero().flatten()
    schedule[j, computed[len(computed) - count :]] = False
    return schedule


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits", help="digits (default) or emoji")
    parser.add_argument("--router", type=Path, help="router file (default: the shipped one)")
    parser.add_argument("--num-samples", type=int, default=100, help="images (100)")
    parser.add_argument("--seed", type=command.seed, default=0, help="0 or more (default: 0)")
    args = parser.parse_args()
    if args.num_samples < 1:
        raise ValueError("--num-samples must be 1 or more")
    model = models.load(args.model)
    file = routers.load(args.router or model.router)
    T, K = file.logits.shape
    file.check(model.name, file.about["sampler"], T, len(model.network.branches))
    schedule, sampler = file.schedule(), make_sampler(file.about["sampler"], T)
    noise = Noise(args.seed, range(args.num_samples))
    if model.text is None:
        items = [j % model.network.num_classes for j in range(args.num_samples)]
    else:
        items = [model.prompts()[j % len(model.prompts())] for j in range(args.num_samples)]
    x, condition = noise.start(model.shape, model.device), model.condition(items)
    full = denoise(model.network, sampler, x, condition, model.guidance, noise=noise)

    def error(schedule):
        return image_error(model, schedule, sampler, x, condition, model.guidance, noise, full)

    def line(words, schedule):
        value = error(schedule)
        print(f"{words:36} CUR {100 * routers.cur(schedule):5.1f} %, error {value:.2e}", flush=True)
        return value

    print(f"{args.num_samples} images, seed {args.seed}; branches computed at each step:\n"
          f"{schedule.sum(1).tolist()}")
    line("the router", schedule)
    mostly_reused = [i for i in range(1, T) if schedule[i].sum() <= K // 4]
    if not mostly_reused:
        raise ValueError("no step of this router reuses three quarters of its branches")
    errors = {}
    for i in mostly_reused:
        errors[i] = line(f"step {i + 1} computes everything", computing(schedule, i))
    best = min(errors, key=errors.get)
    first = computing(schedule, best)
    count = int((first.sum() - schedule.sum()).item())
    able = [j for j in range(1, T) if j != best and first[j].sum() >= count]
    swaps = {j: reusing(first, j, count) for j in able}
    print(f"in exchange for step {best + 1}, {count} branches more are reused at another step:")
    for j, swap in swaps.items():
        line(f"step {best + 1} computes, step {j + 1} reuses", swap)
    for name in ("fora:2", "fora-paper:2"):
        line(name, routers.named(name, T, K))


if __name__ == "__main__":
    command.run(main)
