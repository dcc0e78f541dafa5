"""Step-wise denoising training (SDT) of the router: along whole trajectories, student against
teacher, with no images (HarmoniCa, https://arxiv.org/abs/2410.01723, sections 3.2 and 3.3).

    python train_stepwise.py                               # digits, 2 to 5 minutes on 2 CPU cores
    python train_stepwise.py --model dit256 --beta 4e-8    # DiT-XL/2, T = 20, a 24 GB GPU
    python train_stepwise.py --model pixart256 --sampler sa-solver --steps 25

From noise x_T and random labels or prompts, at each step i, with the network frozen:
    teacher     prediction without a cache at the student's x, no gradient
    student     prediction with the soft cache: branch outputs r new + (1 - r) kept
    IEPO        L = lambda(i) MSE(student, teacher) + beta sum_k r[i, k]   (the paper's objective)
    LTC         L =           MSE(student, teacher) + beta sum_k r[i, k]   (Learning-to-Cache's)
    sensitivity as IEPO, with lambda(i) / MSE(i) for lambda(i)             (ours, see proxy.py)
    update      one AdamW step on row i of the router and on nothing else
    next x      the sampler's step from the student's own prediction

With --target-cur the run finds the beta that leads to a target CUR. With --start it begins with a
schedule instead of random logits. `training.py` has the run folder and --resume.

Notation: B images, T denoising steps, K cacheable branches.
"""

if __name__ == "__main__":
    import interrupt  # noqa: F401, before the slow imports

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import command
import models
import proxy
import shipped
import training
from cache import SoftCache
from samplers import Noise, guided, make_sampler

TRAINING, PROXY = 1, 2  # the purposes of Noise

# ------------------------------------------------------------------------------------------------
# The method


@dataclasses.dataclass
class Chunk:
    """A part of the batch that fits into memory, and all that belongs to its trajectories."""

    x: torch.Tensor  # (b, C, H, W)
    condition: tuple  # for 2 b rows
    noise: Noise
    sampler: object
    share: float  # b / B
    cache: SoftCache | None = None

    def predict(self, network, i, guidance, cache=None):
        """The guided prediction at step i: (2 b, C_out, H, W)."""
        return guided(network, self.x, self.sampler.timesteps[i], self.condition, guidance,
                      cache and cache.start(i), channels=self.sampler.guidance_channels)

    def advance(self, i, prediction):
        """Takes x to the next step."""
        self.x = self.sampler.step(prediction, i, self.x, self.noise)


def chunks_of(model, sampler, seed, numbers, micro_batch, purpose, prompts=None):
    """Fresh noise, and random labels or some of the `prompts`, for the images `numbers` -> a list
    of Chunks."""
    chunks = []
    for first in range(0, len(numbers), micro_batch):
        noise = Noise(seed, numbers[first : first + micro_batch], purpose)
        if prompts is None:
            items = noise.labels(model.network.num_classes)
        else:
            items = [prompts[k] for k in noise.labels(len(prompts))]
        x, condition = noise.start(model.shape, model.device), model.condition(items)
        share = len(noise.numbers) / len(numbers)
        chunks.append(Chunk(x, condition, noise, copy.copy(sampler), share))
    return chunks


def train_trajectory(model, router, optimizer, chunks, lambda_, guidance, tau, beta, order=0):
    """One trajectory of the paper's algorithm 1: T iterations, T - 1 updates, one a row.

    `lambda_` (T,) weights each step's error; with ones the objective is LTC's.
    -> the loss and the plain mean squared error at each step, lists of T (row 0: zeros).
    Raises ValueError, before the update, if a loss is not finite.
    """
    network, timesteps = model.network, chunks[0].sampler.timesteps
    losses, errors = [0.0], [0.0]

    for chunk in chunks:  # step 0 computes everything and fills the cache: nothing to learn yet
        chunk.cache = SoftCache(router.scores, tau, order)
        with torch.no_grad():
            chunk.advance(0, chunk.predict(network, 0, guidance, chunk.cache))

    for i, t in enumerate(timesteps[1:], start=1):
        error, scale = 0.0, training.loss_scale(lambda_[i] / chunks[0].x.numel())
        for chunk in chunks:
            with torch.no_grad():
                target = chunk.predict(network, i, guidance)  # teacher
            prediction = chunk.predict(network, i, guidance, chunk.cache)  # student
            # Weighted by its share, a chunk adds its part to the mean over the batch, and to the
            # gradient: any micro-batch gives the same update.
            mse = chunk.share * F.mse_loss(prediction, target)
            (scale * lambda_[i] * mse).backward()
            error += mse.item()
            # The next x is the student's own, because in sampling its errors add up as well. It is
            # detached: each row learns from its own step, and memory holds one step's graph.
            chunk.advance(i, prediction.detach())
        router.rows[i - 1].grad /= scale
        usage = beta * router.scores(i).sum()
        usage.backward()
        losses.append(lambda_[i] * error + usage.item())
        errors.append(error)
        training.check_loss(losses[-1], f" at step {i} (timestep {t:g})")
        optimizer.step()  # finds a gradient on row i only
        optimizer.zero_grad()
        router.clamp(i)
    return losses, errors


def measure_weights(model, router, chunks, guidance, tau, variant, objective="iepo", order=0):
    """The objective's weight of each step's error, from a batch in chunks: -> list of T floats."""
    scores = torch.sigmoid(router.logits())
    both = 0
    for chunk in chunks:
        both = both + chunk.share * proxy.measure(
            model.network, chunk.sampler, chunk.x, chunk.condition, guidance, scores, tau,
            chunk.noise, variant, order)
    lambda_, mse = both  # each (T,)
    return (lambda_ if objective == "iepo" else proxy.sensitivity(lambda_, mse)).tolist()


def train(model, settings, out, resume=False, prompts=None):
    """SDT, new or resumed, in the folder `out`. `prompts` is a list for a text model.
    -> a dict of results."""
    sampler = make_sampler(settings["sampler"], settings["steps"])
    guidance, tau, B = settings["guidance"], settings["tau"], settings["batch_size"]
    objective, order = settings["objective"], settings["forecast"]
    every = math.ceil(settings["lambda_every"] / settings["steps"])  # in trajectories
    router = training.first_router(model, settings)
    run = training.Run(model, sampler, router, settings, out, resume, data=prompts or ())
    for n in run:
        draw = partial(chunks_of, model, sampler, settings["seed"], range(n * B, (n + 1) * B),
                       settings["micro_batch"], prompts=prompts)
        if objective != "ltc" and n % every == 0:
            run.measured(measure_weights(model, router, draw(PROXY), guidance, tau,
                                         settings["proxy"], objective, order))
        run.record(*train_trajectory(model, router, run.optimizer, draw(TRAINING), run.lambda_,
                                     guidance, tau, run.beta, order))
    return run.finish()


# ------------------------------------------------------------------------------------------------
# Settings

# For T = 20, found by measurement. A logit moves at most lr per update of its row, so a short run
# needs a high rate. Without lambda the error has another scale: there is a beta for each objective.
SMALL = dict(lr=0.1, iterations=2000, lambda_every=400, batch_size=8)
BETAS = {"digits": dict(iepo=4e-7, ltc=1e-4, sensitivity=2.5e-4),
         "emoji": dict(iepo=1e-7, ltc=1e-4, sensitivity=None)}
# Published for DiT-XL/2 (64 rows a batch, counting both guidance halves). The other official models
# start from the same: the paper gives none for PixArt. LTC's beta is Learning-to-Cache's own.
PUBLISHED = dict(lr=0.01, iterations=20000, lambda_every=500, batch_size=32, micro_batch=8)
PUBLISHED_BETAS = dict(iepo=4e-8, ltc=5e-6, sensitivity=None)


def defaults_of(name, objective, steps):
    """The settings of a model, by name, for T = `steps` (None: its own T)."""
    if name in BETAS:
        return training.for_steps({"beta": BETAS[name][objective], **SMALL}, steps)
    return {"beta": PUBLISHED_BETAS[objective], **PUBLISHED}


# ------------------------------------------------------------------------------------------------
# The command


def read_flags():
    parser = command.Parser(__doc__)
    command.add_model_flags(parser)
    training.add_flags(parser, "runs/MODEL")
    training.add_start_flag(parser)
    parser.add_argument("--objective", choices=["iepo", "sensitivity", "ltc"], default="iepo",
                        help="the weight of a step's error: lambda, lambda / MSE, or 1 (iepo)")
    command.add_forecast_flag(parser, default=0)
    parser.add_argument("--proxy", choices=["leave-one-out", "cumulative"], default="leave-one-out",
                        help="the paper's lambda, or the official code's (leave-one-out)")
    parser.add_argument("--lambda-every", type=int, help="iterations between measures of lambda")
    parser.add_argument("--prompts", type=command.name,
                        help="a file of prompts, one a line, for a text model")
    parser.add_argument("--raw-captions", action="store_true",
                        help="leave captions as they are (PixArt-alpha's are cleaned for T5)")
    return parser.parse_args()


def main():
    args = read_flags()
    settings = training.settings_of(args, defaults_of(args.model, args.objective, args.steps))
    device = models.find_device(args.device)
    if args.sampler and args.steps:
        make_sampler(args.sampler, args.steps)  # complains before a download
    model = models.load(args.model, args.weights, "cpu", args.dtype, args.raw_captions)
    if args.prompts and model.text is None:
        raise ValueError(f"{args.model} takes labels, not prompts: leave --prompts out")
    prompts = shipped.read_prompts(args.prompts) if args.prompts else model.prompts()
    models.choose_kernels(model, device)
    if model.text:
        model.prepare(prompts, device)  # the text encoder is gone again before the network comes
    model.to(device)
    settings["raw_captions"] = model.text == "t5" and not model.clean  # also if it never cleans
    for key in ("sampler", "steps", "guidance"):
        if settings[key] is None:
            settings[key] = getattr(model, key)
    out = args.out or Path("runs") / args.model
    print(f"{args.model} on {model.device}: {settings['objective']}, beta {settings['beta']:g}, "
          f"{settings['sampler']}, T = {settings['steps']}, seed {settings['seed']} -> {out}")
    with command.locked(out):
        training.report(train(model, settings, out, args.resume, prompts), settings, out)


if __name__ == "__main__":
    command.run(main)
