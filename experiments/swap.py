"""Why plain alternation can beat a trained router: SDT does not pay for refreshing the cache.

    python -m experiments.swap                     # the shipped digits router
    python -m experiments.swap --router runs/digits/router.safetensors --num-samples 200

A row of the router is trained on the error of its own step. Its gradient takes the cache for a
constant, so the row does not learn that later steps reuse what it computes. The first rows, whose
own errors are small, therefore reuse one after the other, until what they reuse is many steps old.
This command takes a trained schedule and swaps two steps at equal CUR: a step that reuses nearly
all of its branches computes all of them, and another step reuses as many more in exchange. It tries
every step of the first kind, takes the best, then tries every step of the second kind, and prints
the errors. Steps count from 0.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import command
import models
import router as routers
from cache import Cache
from samplers import Noise, denoise

MOST_IMAGES = 100_000


def computing(schedule, i):
    """The schedule with step i computing everything."""
    schedule = schedule.clone()
    schedule[i] = True
    return schedule


def reusing(schedule, j, count):
    """The schedule with `count` more branches of step j reused, the last ones first, because a
    step's early branches feed its later ones."""
    schedule = schedule.clone()
    computed = schedule[j].nonzero().flatten()
    schedule[j, computed[len(computed) - count :]] = False
    return schedule


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--model", default="digits", help="digits (default) or emoji")
    parser.add_argument("--router", type=command.path,
                        help="router file (default: the shipped one)")
    parser.add_argument("--num-samples", type=int, default=100, help="images (100)")
    parser.add_argument("--seed", type=command.seed, default=0, help="0 or more (default: 0)")
    args = parser.parse_args()
    if not 1 <= args.num_samples <= MOST_IMAGES:
        raise ValueError(f"--num-samples must be 1 to {MOST_IMAGES:,}, all at once")
    if args.router is None and models.outline(args.model).router is None:
        raise ValueError(f"no router is shipped for {args.model}: name one by --router")
    model = models.load(args.model)
    models.choose_kernels(model.device)
    file = routers.load(args.router or model.router)
    T, K = file.logits.shape
    file.check(model.name, file.about["sampler"], T, len(model.network.branches))
    schedule = file.schedule()
    sampler = models.make_sampler(model.name, file.about["sampler"], T)
    noise = Noise(args.seed, range(args.num_samples))
    x = noise.start(model.shape, model.device)
    condition = model.condition(model.items(args.num_samples))

    def images(cache=None):
        return denoise(model.network, sampler, x, condition, model.guidance, cache, noise)

    full = images()

    def line(words, schedule):
        error = (images(Cache(schedule)) - full).square().mean().item()
        print(f"{words:36} CUR {100 * routers.cur(schedule):5.1f} %, error {error:.2e}", flush=True)
        return error

    print(f"{args.num_samples} images, seed {args.seed}; branches computed at each step:\n"
          f"{schedule.sum(1).tolist()}")
    line("the router", schedule)
    # Candidates to compute: steps that had nearly everything from the cache.
    mostly_reused = [i for i in range(1, T) if schedule[i].sum() <= K // 4]
    if not mostly_reused:
        raise ValueError("no step of this router reuses three quarters of its branches")
    errors = {}
    for i in mostly_reused:
        errors[i] = line(f"step {i} computes everything", computing(schedule, i))
    best = min(errors, key=errors.get)
    first = computing(schedule, best)
    # The CUR stays the same: as many branches more are computed here as are reused there.
    count = int((first.sum() - schedule.sum()).item())
    able = [j for j in range(1, T) if j != best and first[j].sum() >= count]
    swaps = {j: reusing(first, j, count) for j in able}
    print(f"in exchange for step {best}, {count} branches more are reused at another step:")
    for j, swap in swaps.items():
        line(f"step {best} computes, step {j} reuses", swap)
    for name in ("fora:2", "fora-paper:2"):
        line(name, routers.named(name, T, K))


if __name__ == "__main__":
    command.run(main)
