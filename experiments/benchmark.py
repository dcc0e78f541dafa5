"""Time and memory, measured side by side on the CPU: what the cache costs beyond the branches that
it skips, and what an iteration of training costs beside the same one in the official code's way.

    python -m experiments.benchmark                      # 12 minutes on 2 cores, and pixart
    python -m experiments.benchmark --only digits --repeats 9

cache     the denoising loop at DiT-XL's width: cached / (uncached - skipped branches), bar 1.05
pixart    the same at the dimensions of PixArt-256, three branches a block
digits    the same for the digits network, whose branches are so short that all else shows, bar 1.15
training  one iteration at DiT-S/2: ours / official, bars 0.6 for time and 0.4 for activations
memory    formulas for the bytes of training and of sampling, held against measurements, then used
          for DiT-XL/2 and PixArt-alpha 512

What is compared is measured in turn, round by round, in one process. Ratios are taken within a
round; the figures are medians over the rounds. Weights are random: only their shapes matter.

Notation: B images, R = 2 B rows (with the label, without), N tokens, D width, L blocks, T steps,
K branches: 2 L, for PixArt 3 L.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import functools
import statistics
import time

import numpy as np
import torch

import command
import dit
import models
import pixart
import router as routers
import train_stepwise
import vae
from cache import Cache, SoftCache
from samplers import DDIM, Noise, denoise, guided

SEED, GUIDANCE, TAU, BETA = 0, 1.5, 0.1, 4e-8

# ------------------------------------------------------------------------------------------------
# Measuring


def random_model(sizes, kind=dit.DiT):
    """A frozen network with random weights, none of whose gates is zero, as a model to sample."""
    torch.manual_seed(SEED)
    network = kind(**sizes).eval().requires_grad_(False)
    return models.Model("random", network, "ddim", steps=20, guidance=GUIDANCE)


def random_condition(network, images):
    """A condition for `images`, twice as many rows: labels, or captions of 20 tokens."""
    if isinstance(network, dit.DiT):
        return network.condition(Noise(SEED, range(images)).labels(network.num_classes))
    captions = torch.randn(images, network.model_max_length, network.caption_channels)
    mask = torch.arange(network.model_max_length).expand(images, -1) < 20
    return network.condition(captions, mask)


def in_turn(measures, repeats):
    """Calls every function once to warm up, then in rounds, each round starting with the next one:
    {name: function} -> {name: list of what it returned in each round}."""
    results = {name: [] for name in measures}
    for measure in measures.values():
        measure()
    order = list(measures)
    for _ in range(repeats):
        for name in order:
            results[name].append(measures[name]())
        order.append(order.pop(0))
    return results


def median_ratio(numerators, denominators):
    """The median of the rounds' own ratios, which a slow round hardly moves."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


class SavedBytes:
    """Counts the bytes that autograd keeps from a forward for its backward, every storage once.

        with SavedBytes() as saved:
            ...
        saved.storages                     # {address: bytes}
    """

    def __init__(self):
        self.storages, self.most = {}, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def next_graph(self):
        """Call after a backward: starts to count anew. `most` is the bytes of the largest graph."""
        self.most = max(self.most, sum(self.storages.values()))
        self.storages = {}

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


# ------------------------------------------------------------------------------------------------
# The cache while sampling


class BranchTimer:
    """Stands where a cache would: computes every branch and notes its seconds, (T, K), and the
    bytes of a step's outputs together."""

    def __init__(self, steps, branches):
        self.seconds = np.zeros((steps, branches))

    def start(self, i):
        self.step, self.bytes = i, 0
        return self

    def __call__(self, k, branch):
        start = time.perf_counter()
        output = branch()
        self.seconds[self.step, k] = time.perf_counter() - start
        self.bytes += output.nbytes
        return output


def example_schedules(T, branches):
    """{name: schedule (T, K)}: reuse of one kind of branch, of a random mixture, of whole steps."""
    K, schedules = len(branches), {}
    kinds = dict.fromkeys(name.split()[0] for name in branches)
    for kind in kinds:
        schedule = routers.none(T, K)
        schedule[1::2, [name.startswith(kind) for name in branches]] = False
        schedules[f"{kind}, every 2nd step"] = schedule
    for name in ("random:0.4", "fora:2"):
        schedules[name] = routers.named(name, T, K, SEED)
    return schedules


def benchmark_cache(title, model, steps, images, repeats, bar):
    """Measures the denoising loop without a cache, with timed branches, and under each schedule."""
    network, sampler = model.network, DDIM(steps)
    K = len(network.branches)
    x = Noise(SEED, range(images)).start(model.shape)
    condition = random_condition(network, images)

    def timed(make_cache):
        def measure():
            cache = make_cache()
            start = time.perf_counter()
            denoise(network, sampler, x, condition, GUIDANCE, cache)
            return time.perf_counter() - start, cache

        return measure

    schedules = example_schedules(steps, network.branches)
    measures = {"plain": timed(lambda: None), "timer": timed(lambda: BranchTimer(steps, K))}
    for name, schedule in schedules.items():
        measures[name] = timed(lambda schedule=schedule: Cache(schedule))
    results = in_turn(measures, repeats)

    plain = [seconds for seconds, _ in results["plain"]]
    N = (network.input_size // network.patch_size) ** 2
    D = network.final_layer.linear.in_features
    timer = median_ratio([seconds for seconds, _ in results["timer"]], plain)
    print(f"\n{title}: D = {D}, {len(network.blocks)} blocks, {N} tokens, T = {steps}, "
          f"{images} images, {repeats} rounds\n"
          f"uncached {statistics.median(plain):.3f} s (with every branch timed: {timer:.3f} x)\n"
          f"ratio = cached / (uncached - skipped branches), bar {bar}\n\n"
          f"{'':26}{'CUR %':>6}{'skipped s':>11}{'cached s':>10}{'ratio':>7}{'speed-up':>10}"
          f"{'arithmetic':>12}{'peak cache MB':>15}{'of':>8}")
    for name, schedule in schedules.items():
        reuse = ~schedule.numpy()
        skipped = [branch_timer.seconds[reuse].sum() for _, branch_timer in results["timer"]]
        cached = [seconds for seconds, _ in results[name]]
        least = [a - b for a, b in zip(plain, skipped, strict=True)]
        _, cache = results[name][0]
        promise = model.flops(steps) / model.flops(steps, (~schedule).sum(0).tolist())
        print(f"{name:26}{100 * routers.cur(schedule):6.1f}{statistics.median(skipped):11.3f}"
              f"{statistics.median(cached):10.3f}{median_ratio(cached, least):7.3f}"
              f"{median_ratio(plain, cached):8.2f} x{promise:10.2f} x"
              f"{cache.peak_bytes / 1e6:15.2f}{results['timer'][0][1].bytes / 1e6:8.2f}")


# ------------------------------------------------------------------------------------------------
# An iteration of training


class TwoSteps(DDIM):
    """The first two of DDIM's T steps: one to fill the cache, one to learn from. Notes when the
    first of them is over, which is when the learning begins."""

    def __init__(self, steps):
        super().__init__(steps)
        self.timesteps = self.timesteps[:2]

    def step(self, prediction, i, x, noise=None):
        x = super().step(prediction, i, x, noise)
        if i == 0:
            command.synchronize(x.device)
            self.filled = time.perf_counter()
        return x


def our_iteration(model, router, optimizer, chunk):
    """The trainer's own function, on two steps: -> seconds of the second, one iteration."""
    model.network.requires_grad_(False)
    lambda_ = [1.0] * len(chunk.sampler.timesteps)
    train_stepwise.train_trajectory(
        model, router, optimizer, [chunk], lambda_, GUIDANCE, TAU, BETA
    )
    command.synchronize(model.device)
    return time.perf_counter() - chunk.sampler.filled


def official_iteration(model, router, optimizer, chunk, frozen=False):
    """The same two steps in the official code's way: -> seconds of the second.

    The network's parameters require gradients too, so every product keeps its input for them. The
    teacher's graph is kept and gone through backwards, because nothing detaches its prediction. A
    `frozen` network has neither.
    """
    network, sampler = model.network.requires_grad_(not frozen), chunk.sampler
    cache = SoftCache(router.scores, TAU)
    with torch.no_grad():
        prediction = guided(network, chunk.x, sampler.timesteps[0], chunk.condition, GUIDANCE,
                            cache.start(0))
        x = sampler.step(prediction, 0, chunk.x)

    t = sampler.timesteps[1]
    target = guided(network, x, t, chunk.condition, GUIDANCE)
    prediction = guided(network, x, t, chunk.condition, GUIDANCE, cache.start(1))
    loss = ((target - prediction) ** 2).mean() + BETA * router.scores(1).sum()
    optimizer.zero_grad()
    network.zero_grad()
    loss.backward()
    optimizer.step()
    router.clamp(1)
    loss.item()
    sampler.step(prediction.detach(), 1, x)
    command.synchronize(model.device)
    seconds = time.perf_counter() - sampler.filled
    network.requires_grad_(False).zero_grad()  # our iteration starts without these gradients
    return seconds


class Iteration:
    """Calls `iterate` on the same images and router every time, afresh."""

    def __init__(self, model, images, iterate):
        self.model, self.images, self.iterate = model, images, iterate

    def __call__(self):
        model, steps = self.model, self.model.steps
        self.router = routers.Router(steps, len(model.network.branches), SEED).to(model.device)
        self.optimizer = torch.optim.AdamW(self.router.parameters(), 0.01, weight_decay=0)
        (chunk,) = train_stepwise.chunks_of(
            model, TwoSteps(steps), SEED, range(self.images), self.images, train_stepwise.TRAINING
        )
        return self.iterate(model, self.router, self.optimizer, chunk)

    def saved_bytes(self):
        """What autograd keeps from the forward for the backward, every storage counted once:
        -> bytes without the network's own parameters, and bytes with them."""
        with SavedBytes() as saved:
            self()
        own = {p.untyped_storage().data_ptr() for p in self.model.network.parameters()}
        everything = sum(saved.storages.values())
        return sum(size for key, size in saved.storages.items() if key not in own), everything

    def gradient(self):
        """The last call's gradient on the row that it trained, (K,): AdamW's first moment is a
        tenth of it."""
        return 10 * self.optimizer.state[self.router.rows[0]]["exp_avg"]


def benchmark_training(repeats, images=2):
    """Measures one iteration at DiT-S/2, ours and in the official code's way."""
    model = random_model(dit.SIZES["S/2"])
    ours = Iteration(model, images, our_iteration)
    official = Iteration(model, images, official_iteration)
    frozen = Iteration(model, images, functools.partial(official_iteration, frozen=True))
    seconds = in_turn({"ours": ours, "official": official, "frozen": frozen}, repeats)
    gradient = official.gradient()
    difference = (ours.gradient() - gradient).abs().max() / gradient.abs().max()
    (saved, with_weights), (saved2, with_weights2) = ours.saved_bytes(), official.saved_bytes()
    rows = [
        ("seconds an iteration", statistics.median(seconds["ours"]),
         statistics.median(seconds["official"]),
         median_ratio(seconds["ours"], seconds["official"]), "bar 0.6, aim 0.5"),
        ("saved activations, MB", saved / 1e6, saved2 / 1e6, saved / saved2, "bar 0.4"),
        ("the same and weights, MB", with_weights / 1e6, with_weights2 / 1e6,
         with_weights / with_weights2, ""),
    ]
    print(f"\ntraining: one iteration of DiT-S/2, {images} images ({2 * images} rows), "
          f"{repeats} rounds\nboth compute the same gradient: the largest difference is "
          f"{difference:.0e} of the largest entry\n\n"
          f"{'':26}{'ours':>10}{'official':>10}{'ratio':>8}")
    for name, a, b, ratio, bar in rows:
        print(f"{name:26}{a:10.3f}{b:10.3f}{ratio:8.3f}   {bar}")
    ratio = median_ratio(seconds["ours"], seconds["frozen"])
    print(f"ours takes {ratio:.3f} of the official way with its network frozen")


# ------------------------------------------------------------------------------------------------
# The memory of training


def entry_bytes(network):
    """One row's output of one branch, in float32: N D numbers."""
    N, D = network.pos_embed.shape[1:]
    return 4 * N * D


def saved_by_formula(network, rows):
    """Bytes that the student's graph keeps until its backward, float32, the network frozen.

    A block keeps, in units of N D numbers a row: for attention the input of its norm 1, q k v 3,
    their result 1, the branch's output 1; for the MLP the input of its norm 1, that of its GELU
    `mlp_ratio`, the output 1; and both cached entries, 2. The first block's input needs no gradient
    and so its attention keeps only the output and the entry; the last norm keeps its input. Beside
    that a few numbers a token and a few vectors of modulation, less than 1 %, are left out.
    """
    block = 10 + network.mlp_ratio
    return rows * entry_bytes(network) * (block * len(network.blocks) - 5 + 1)


def training_bytes(network, images, micro_batch):
    """What a run of the trainer holds at its largest, by formula: {part: bytes}, float32."""
    K, entry = len(network.branches), entry_bytes(network)
    cache_of_chunk = K * entry * 2 * micro_batch
    return {
        "weights": sum(4 * p.numel() for p in network.parameters()),
        "cache of the batch": K * entry * 2 * images,
        # The saved tensors include the chunk's entries, which are counted in the cache already.
        "activations of a chunk": saved_by_formula(network, 2 * micro_batch) - cache_of_chunk,
        "a chunk's next entries": cache_of_chunk,
    }


def benchmark_memory(images=2):
    """Holds the formula against a measurement at DiT-S/2; prints what it says of DiT-XL/2."""
    model = random_model(dit.SIZES["S/2"])
    rows, blocks = 2 * images, len(model.network.blocks)
    measured, _ = Iteration(model, images, our_iteration).saved_bytes()
    formula = saved_by_formula(model.network, rows)
    print(f"\nmemory: saved activations of DiT-S/2, {rows} rows, float32, MB\n"
          f"{'':10}{'all':>8}{'a row':>8}{'a row and block':>18}")
    for name, size in (("measured", measured), ("formula", formula)):
        megabytes = size / 1e6
        print(f"{name:10}{megabytes:8.1f}{megabytes / rows:8.2f}{megabytes / rows / blocks:18.3f}")
    print(f"formula / measured {formula / measured:.3f}\n\n"
          "formula for a run of DiT-XL/2, 32 images, --micro-batch 8, float32:")
    with torch.device("meta"):
        network = dit.DiT(**dit.SIZES["XL/2"])
    parts = training_bytes(network, images=32, micro_batch=8)
    for name, size in {**parts, "total": sum(parts.values())}.items():
        print(f"{name:26}{size / 2**30:8.2f} GiB")


def sampling_bytes(network, images, size=2):
    """What sampling pictures with `network` holds, by calculation: {part: bytes}; `size` bytes a
    number. Of the text encoder and the rest, one is on the device at a time."""
    K, rows = len(network.branches), 2 * images
    N = (network.input_size // network.patch_size) ** 2
    D = network.final_layer.linear.in_features
    with torch.device("meta"):
        autoencoder = vae.Autoencoder().to(torch.bfloat16 if size == 2 else torch.float32)
    return {
        "text encoder (T5 v1.1 XXL, 4.76 B)": 4.76e9 * size,
        "network": size * sum(p.numel() for p in network.parameters()),
        "autoencoder": size * sum(p.numel() for p in autoencoder.parameters()),
        "cache, if every branch is kept": size * K * rows * N * D,
        "a block's activations, at most": size * rows * N * 2 * (D + int(network.mlp_ratio * D)),
        "decoding one image": autoencoder.decode_bytes(network.input_size, network.input_size),
    }


def benchmark_sampling_memory(images=2):
    """Prints the calculation for PixArt-alpha 512, and its cache's share against a measurement."""
    model = random_model({**pixart.SIZES["emoji"], "depth": 3}, pixart.PixArt)
    schedule = routers.fora(2, len(model.network.branches), 2)
    schedule[1] = False  # so that every branch is kept until then
    cache = Cache(schedule)
    x = Noise(SEED, range(images)).start(model.shape)
    denoise(model.network, DDIM(2), x, random_condition(model.network, images), GUIDANCE, cache)
    formula = sampling_bytes(model.network, images, size=4)["cache, if every branch is kept"]
    print(f"\nmemory of sampling: the cache, measured on a small PixArt, {cache.peak_bytes} bytes, "
          f"by formula {formula}\ncalculated for PixArt-alpha 512, bfloat16, one image:")
    with torch.device("meta"):
        network = pixart.PixArt(**pixart.SIZES["alpha512"])
    for name, size in sampling_bytes(network, images=1).items():
        print(f"{name:36}{size / 1e9:8.2f} GB")


# ------------------------------------------------------------------------------------------------
# The command


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--only", choices=["cache", "pixart", "digits", "training", "memory"],
                        help="one of the five (default: all)")
    parser.add_argument("--repeats", type=int, default=5,
                        help="rounds; digits runs 4 times as many (5)")
    args = parser.parse_args()
    if args.repeats < 1:
        raise ValueError(f"--repeats must be 1 or more, not {args.repeats}")

    benchmarks = {
        "cache": lambda: benchmark_cache(
            "cache", random_model({**dit.SIZES["XL/2"], "depth": 8}), 10, 1, args.repeats, 1.05
        ),
        "pixart": lambda: benchmark_cache(
            "pixart", random_model({**pixart.SIZES["alpha256"], "depth": 6}, pixart.PixArt), 10, 1,
            args.repeats, 1.05,
        ),
        "digits": lambda: benchmark_cache(
            "digits", random_model(dit.SIZES["digits"]), 20, 16, 4 * args.repeats, 1.15
        ),
        "training": lambda: benchmark_training(args.repeats),
        "memory": lambda: (benchmark_memory(), benchmark_sampling_memory()),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, seed {SEED}")
    for name, benchmark in benchmarks.items():
        if args.only in (None, name):
            benchmark()


if __name__ == "__main__":
    command.run(main)
