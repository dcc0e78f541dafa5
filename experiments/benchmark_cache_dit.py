"""Our cached sampling beside cache-dit's: DiT-XL/2 and diffusers' DiT with equal weights, both of
which compute the same 11 of T = 20 steps.

    pip install cache-dit                                   # measured with 1.5.3
    python -m experiments.benchmark_cache_dit --depth 28    # XL/2, 8 GB by calculation

Each is held against its own uncached run, in the same rounds: the real speed-up, and the one by
arithmetic. The network is called with the same inputs, two rows, without a sampler. In the other
steps ours reuses every branch. cache-dit computes the first block there, the least it can be set
to, and reuses what the blocks after it add together.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import contextlib
import os
from functools import partial

import torch

import command
import models
import router as routers
from cache import Cache
from experiments.benchmark import GUIDANCE, SEED, in_turn, median_ratio, random_condition
from experiments.benchmark_networks import networks, seconds
from sample import counted_flops
from samplers import DDIM

STEPS, SCHEDULE = 20, "fora:2"


def import_cache_dit():
    """-> the module, which then prints errors only. Raises ValueError if it is not installed."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read at its import
    try:
        import cache_dit
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"cache-dit cannot be imported ({command.one_line(error)}): "
                         "pip install cache-dit") from error
    return cache_dit


@contextlib.contextmanager
def cached(cache_dit, network, mask):
    """`with cached(cache_dit, network, mask) as begin:` cache-dit computes the steps of `mask`, a
    list of 0 and 1, in diffusers' `network`; call begin() before each trajectory."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=len(mask),
        steps_computation_mask=mask, steps_computation_policy="static", enable_separate_cfg=False)
    cache_dit.enable_cache(network, cache_config=config)
    try:
        # Left to itself it would begin anew one step late (1.5.3), with the mask shifted by one.
        yield partial(cache_dit.refresh_context, network)
    finally:
        cache_dit.disable_cache(network)
        for name in ("forward", "_norm1_emb", "_is_patched"):  # what that call leaves (1.5.3)
            with contextlib.suppress(AttributeError):
                delattr(network, name)


def blocks_run(network, trajectory):
    """How many blocks of diffusers' `network` really run in each call that a `trajectory` makes of
    it, counted by hooks: a list."""
    ran = []

    def count(*_):
        ran[-1] += 1

    hooks = [network.register_forward_pre_hook(lambda *_: ran.append(0))]
    hooks += [block.register_forward_hook(count) for block in network.transformer_blocks]
    try:
        seconds(trajectory)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def their_flops(network, blocks):
    """Arithmetic of one row in STEPS calls of diffusers' DiT in which `blocks` blocks run in all,
    reckoned from ours, `network`. Each of its blocks embeds the timestep itself and has its own
    adaLN, which is saved with it."""
    (attention, mlp, *_), rest = network.flops()
    D = network.pos_embed.shape[-1]
    adaLN = 2 * 6 * D * D
    block = attention + mlp + adaLN + 2 * (256 * D + D * D)
    return blocks * block + STEPS * (rest - len(network.blocks) * adaLN)


def speed_ups(depth, dtype, device, repeats):
    """{"ours" or "cache-dit": (real, by arithmetic)}, the first a median over the rounds. Raises
    ValueError for one block, without diffusers or cache-dit, or if cache-dit computes other steps.
    """
    if depth < 2:
        raise ValueError("cache-dit always computes the first block: this takes 2 blocks or more")
    cache_dit = import_cache_dit()
    network, theirs = networks("DiT-XL/2", depth, dtype, device)
    model = models.Model("DiT-XL/2", network, "ddim", steps=STEPS, guidance=GUIDANCE)
    schedule = routers.named(SCHEDULE, STEPS, len(network.branches), SEED)
    cache, mask = Cache(schedule), schedule.all(1).int().tolist()
    x = torch.randn(2, *model.shape).to(device, dtype)
    condition = random_condition(network, 1)
    times = [torch.full((2,), int(t), device=device) for t in DDIM(STEPS).timesteps]
    plain = theirs.forward  # cache-dit puts another one in its place

    def ours_cached():
        for i, t in enumerate(times):
            network(x, t, *condition, cache=cache.start(i))

    def theirs_cached():
        begin()
        for t in times:
            theirs(x, t, *condition)

    runs = {"ours": ours_cached, "cache-dit": theirs_cached,
            "ours, plain": lambda: [network(x, t, *condition) for t in times],
            "cache-dit, plain": lambda: [plain(x, t, *condition) for t in times]}
    with cached(cache_dit, theirs, mask) as begin:
        ran = blocks_run(theirs, theirs_cached)
        if ran != [depth if computes else 1 for computes in mask]:
            raise ValueError(f"cache-dit was to compute {SCHEDULE}; its steps ran {ran} blocks")
        found = in_turn({name: partial(seconds, run, device) for name, run in runs.items()},
                        repeats)
    arithmetic = {
        "ours": model.flops(STEPS) / counted_flops(model, cache),
        "cache-dit": their_flops(network, STEPS * depth) / their_flops(network, sum(ran))}
    return {name: (median_ratio(found[f"{name}, plain"], found[name]), ratio)
            for name, ratio in arithmetic.items()}


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--depth", type=int, default=8, help="blocks (8; XL has 28)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    args = parser.parse_args()
    if args.repeats < 1 or not 2 <= args.depth <= 1000:
        raise ValueError("--repeats must be 1 or more, --depth 2 to 1000")
    found = speed_ups(args.depth, getattr(torch, args.dtype), "cpu", args.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, "
          f"{args.depth} blocks, T = {STEPS}, {SCHEDULE}")
    for name, (real, arithmetic) in found.items():
        print(f"{name:10}{real:6.2f} x, by arithmetic {arithmetic:.2f} x")


if __name__ == "__main__":
    command.run(main)
