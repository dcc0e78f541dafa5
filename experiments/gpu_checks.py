"""What experiments/gpu.py checks: each a function that returns rows of figures beside their limits.

Notation: T denoising steps, K cacheable branches.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import torch

import router as routers
import train_stepwise
import training
from cache import Cache
from experiments.benchmark import BETA, GUIDANCE, SEED, TAU, random_condition, training_bytes
from feature_statistics import full_precision
from sample import generate
from samplers import DDIM, Noise, denoise, guided

# Of relative errors. On a CPU float32 differs from float64 by up to 7e-7, 4e-7 and 2e-6 (networks
# of XL's depth and width, 16 tokens, T = 3). A factor in float32 is rounded by 6e-8, in TF32 by
# 5e-4.
LIMITS = {"forward": 1e-5, "sampling": 1e-5, "gradient": 1e-4, "batch size": 1e-5}
MEMORY_LIMIT = 1.1  # measured / formula

# ------------------------------------------------------------------------------------------------
# Rows


@dataclasses.dataclass
class Row:
    """A figure, and what it is held against: `against` says what the `reference` is. `ok` is None
    where nothing is checked."""

    name: str
    value: float
    unit: str = ""
    reference: float | None = None
    against: str = ""
    ok: bool | None = None

    def __str__(self):
        reference = "" if self.reference is None else f"{self.against} {self.reference:.4g}"
        share = f"{self.value / self.reference:.3f}" if self.reference else ""
        result = {None: "", True: "ok", False: "FAILED"}[self.ok]
        value = f"{self.value:.4g} {self.unit}"
        return f"{self.name:58}{value:>18}  {reference:24}{share:>8}  {result}".rstrip()


def at_most(name, value, limit, unit=""):
    """A checked row. A value that is not a number fails."""
    return Row(name, value, unit, limit, "at most", value <= limit)


# ------------------------------------------------------------------------------------------------
# Checks


def strong(model):
    """Draws shifts, scales and gates from N(0, 1). As torch draws them, a branch adds so little
    to its tokens that an error in it hardly shows. -> the model itself."""
    for block in model.network.blocks:
        adaLN = getattr(block, "adaLN_modulation", None)  # DiT's; PixArt's blocks have a table
        torch.nn.init.normal_(adaLN[1].bias if adaLN else block.scale_shift_table)
    return model


def relative_error(a, b):
    """|a - b| / |b|, in float64 on the CPU."""
    a, b = a.cpu().double(), b.cpu().double()
    return ((a - b).norm() / b.norm()).item()


def three_results(model, condition, steps):
    """What a model computes for one image, where it is and in its dtype: {name: tensor} of a
    forward, of sampling, and of a training trajectory the router's gradients (T - 1, K)."""
    network, noise = model.network, Noise(SEED, [0])
    parameter = next(network.parameters())
    condition = tuple(part.to(parameter.device) for part in condition)
    x = noise.start(model.shape).to(parameter)
    with torch.no_grad():
        forward = guided(network, x, 500, condition, GUIDANCE)
    sampled = denoise(network, DDIM(steps), x, condition, GUIDANCE)
    router = routers.Router(steps, len(network.branches), SEED).to(parameter)
    optimizer = torch.optim.AdamW(router.parameters(), 0.01, weight_decay=0)
    chunk = train_stepwise.Chunk(x, condition, noise, DDIM(steps), share=1.0)
    # Without beta, whose part of the gradient would be right even if the network's were not.
    train_stepwise.train_trajectory(model, router, optimizer, [chunk], [1.0] * steps, GUIDANCE, TAU,
                                    beta=0.0)
    moments = [optimizer.state[row]["exp_avg"] for row in router.rows]  # each a tenth of it
    return {"forward": forward, "sampling": sampled, "gradient": torch.stack(moments)}


def check_reference(name, model, steps, device):
    """A model on the GPU, where it stays, against the same on the CPU, where it is at first; on a
    CPU, float32 against float64."""
    condition = random_condition(model.network, 1)
    with full_precision():
        results = three_results(model, condition, steps)
        if device == "cpu":
            model.network.double()
            reference, words = three_results(model, condition, steps), "float32 against float64"
            model.network.float()
        else:
            model.to(device)
            results, reference = three_results(model, condition, steps), results
            words = "GPU against CPU, float32"
    return [at_most(f"{name}, {key}, {words}", relative_error(results[key], reference[key]),
                    LIMITS[key]) for key in results]


def training_settings(steps, trajectories, batch_size, micro_batch):
    """Settings of a short training with the method's defaults."""
    return {
        **dict.fromkeys(training.OPTIONAL), "model": "random", "weights": None, "steps": steps,
        "sampler": "ddim", "guidance": GUIDANCE, "seed": SEED, "dtype": None, "beta": BETA,
        "objective": "iepo", "proxy": "leave-one-out", "tau": TAU, "lr": 0.01, "forecast": 0,
        "iterations": trajectories * steps, "lambda_every": steps, "batch_size": batch_size,
        "micro_batch": micro_batch,
    }


@contextlib.contextmanager
def counted_evaluations(network, stop_at=None):
    """`with counted_evaluations(network) as count:` count[0] evaluations happened; number `stop_at`
    is interrupted, as by Ctrl-C."""
    count = [0]

    def before(*_):
        count[0] += 1
        if count[0] == stop_at:
            raise KeyboardInterrupt

    handle = network.register_forward_pre_hook(before)
    try:
        yield count
    finally:
        handle.remove()


def check_resume(model, batch_size):
    """The same training three times: twice in one go, and once interrupted half way, within the
    second of three trajectories, and resumed."""
    settings = training_settings(3, 3, batch_size, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        first, second, resumed = (Path(folder) / name for name in ("first", "second", "resumed"))
        with counted_evaluations(model.network) as count:
            train_stepwise.train(model, settings, first)
        train_stepwise.train(model, settings, second)
        with contextlib.suppress(KeyboardInterrupt), counted_evaluations(
            model.network, count[0] // 2
        ):
            train_stepwise.train(model, settings, resumed)
        if (resumed / "results.json").exists() or not (resumed / "state.pt").exists():
            raise RuntimeError("the training was not interrupted half way")
        train_stepwise.train(model, settings, resumed, resume=True)
        logits = {out: routers.load(out / "router.safetensors").logits
                  for out in (first, second, resumed)}
    return [at_most(f"training {words}: logits that differ",
                    (logits[out] != logits[first]).sum().item(), 0)
            for words, out in (("repeated", second), ("interrupted and resumed", resumed))]


def check_batch_size(model, steps, images=8):
    """Images made all at once and one by one, the largest relative error of any."""
    rows, labels = [], model.items(images)
    for name in ("none", "random:0.375"):
        schedule = routers.named(name, steps, len(model.network.branches), SEED)
        with full_precision():
            together, single = (
                torch.cat([batch.x for batch in generate(
                    model, DDIM(steps), GUIDANCE, labels, SEED, batch_size, Cache(schedule))])
                for batch_size in (images, 1))
        error = max(map(relative_error, together, single))
        rows.append(at_most(f"batch of {images} against single images, schedule {name}", error,
                            LIMITS["batch size"]))
    return rows


def check_memory(model):
    """The peak of training with the official models' defaults, 32 images and --micro-batch 8. It
    does not depend on T. On a CPU the peak is that of the whole process, and not checked."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with tempfile.TemporaryDirectory() as folder:
        settings = training_settings(3, 1, batch_size=32, micro_batch=8)
        peak = train_stepwise.train(model, settings, Path(folder) / "run")["peak_memory"]
    formula = sum(training_bytes(model.network, images=32, micro_batch=8).values()) / 2**30
    name = "peak memory of training, --micro-batch 8"
    if peak is None:  # the system does not say
        return []
    peak /= 2**30
    if model.device.type != "cuda":
        return [Row(f"{name}, whole process", peak, "GiB", formula, "formula")]
    ok = 1 / MEMORY_LIMIT <= peak / formula <= MEMORY_LIMIT
    return [Row(name, peak, "GiB", formula, "formula", ok)]
