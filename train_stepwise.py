"""Step-wise denoising training (SDT) of the router: along whole trajectories, student against
teacher, with no images (HarmoniCa, https://arxiv.org/abs/2410.01723, sections 3.2 and 3.3).

    python train_stepwise.py                               # digits, 2 to 6 minutes on 2 CPU cores
    python train_stepwise.py --model dit256 --beta 4e-8    # DiT-XL/2, T = 20, a 24 GB GPU
    python train_stepwise.py --model pixart256 --sampler sa-solver --steps 25
    torchrun --nproc_per_node 4 train_stepwise.py --model dit256 --beta 4e-8 --proxy cumulative

From noise x_T and random labels or prompts, at each step i, with the network frozen:
    teacher     prediction without a cache at the student's x, no gradient
    student     prediction with the soft cache: branch outputs r new + (1 - r) kept
    IEPO        L = lambda(i) MSE(student, teacher) + beta sum_k r[i, k]   (the paper's objective)
    LTC         L =           MSE(student, teacher) + beta sum_k r[i, k]   (Learning-to-Cache's)
    sensitivity as IEPO, with lambda(i) / MSE(i) for lambda(i)             (ours, see proxy.py)
    update      one AdamW step on row i of the router and on nothing else
    next x      the sampler's step from the student's own prediction

With --target-cur the run finds the beta that leads to a target CUR. With --start it begins with a
schedule instead of random logits. `training.py` has the run folder, with a router from the first
trajectory on, and --resume.

Notation: B images, T denoising steps, K cacheable branches.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import command
import distributed
import models
import proxy
import shipped
import training
from cache import SoftCache
from samplers import Noise, guided

TRAINING, PROXY = 1, 2  # the purposes of Noise

# ------------------------------------------------------------------------------------------------
# The method


@dataclasses.dataclass
class Chunk:
    """A part of the batch that fits into memory, and all that belongs to its trajectories. The
    processes share the `count` chunks of a batch."""

    x: torch.Tensor  # (b, C, H, W)
    condition: tuple  # for 2 b rows
    noise: Noise
    sampler: object
    share: float  # b / B
    count: int = 1
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
    of Chunks, this process's."""
    chunks, count = [], math.ceil(len(numbers) / micro_batch)
    for c in distributed.mine(count):
        noise = Noise(seed, numbers[c * micro_batch : (c + 1) * micro_batch], purpose)
        if prompts is None:
            items = noise.labels(model.network.num_classes)
        else:
            items = [prompts[k] for k in noise.labels(len(prompts))]
        x, condition = noise.start(model.shape, model.device), model.condition(items)
        share = len(noise.numbers) / len(numbers)
        chunks.append(Chunk(x, condition, noise, copy.copy(sampler), share, count))
    return chunks


def train_trajectory(model, router, optimizer, chunks, lambda_, guidance, tau, beta, order=0):
    """One trajectory of the paper's algorithm 1: T iterations, T - 1 updates, one a row.

    `lambda_` (T,) weights each step's error; with ones the objective is LTC's. `chunks` are those
    of this process; gradients and errors are summed over all, in their order.
    -> the loss and the plain mean squared error at each step, lists of T (row 0: zeros).
    Raises ValueError, before the update, if a loss is not finite.
    """
    network, timesteps = model.network, chunks[0].sampler.timesteps
    losses, errors = [0.0], [0.0]

    for chunk in chunks:  # step 0 computes everything and fills the cache: nothing to learn yet
        chunk.cache = SoftCache(router.scores, tau, order)
        with torch.no_grad():
            chunk.advance(0, chunk.predict(network, 0, guidance, chunk.cache))

    elements = chunks[0].x.numel() / chunks[0].share  # of the whole batch
    for i, t in enumerate(timesteps[1:], start=1):
        row, scale, parts = router.rows[i - 1], training.loss_scale(lambda_[i] / elements), []
        for chunk in chunks:
            with torch.no_grad():
                target = chunk.predict(network, i, guidance)  # teacher
            prediction = chunk.predict(network, i, guidance, chunk.cache)  # student
            # Weighted by its share, a chunk adds its part to the mean over the batch, and to the
            # gradient: any micro-batch gives the same update.
            mse = chunk.share * F.mse_loss(prediction, target)
            (gradient,) = torch.autograd.grad(scale * lambda_[i] * mse, row)
            parts.append(torch.cat([gradient / scale, mse.detach()[None]]))
            # The next x is the student's own, because in sampling its errors add up as well. It is
            # detached: each row learns from its own step, and memory holds one step's graph.
            chunk.advance(i, prediction.detach())
        total = sum(distributed.together(torch.stack(parts), chunks[0].count))
        usage = beta * router.scores(i).sum()
        usage.backward()
        row.grad += total[:-1]
        error, cost = torch.stack([total[-1], usage.detach()]).tolist()  # a GPU is waited for once
        losses.append(lambda_[i] * error + cost)
        errors.append(error)
        training.check_loss(losses[-1], f" at step {i} (timestep {t:g})")
        optimizer.step()  # finds a gradient on row i only
        optimizer.zero_grad()
        router.clamp(i)
    return losses, errors


def measure_weights(model, router, chunks, guidance, tau, variant, objective="iepo", order=0):
    """The objective's weight of each step's error, from a batch in chunks: -> list of T floats."""
    scores = torch.sigmoid(router.logits())
    parts = [chunk.share * proxy.measure(model.network, chunk.sampler, chunk.x, chunk.condition,
                                         guidance, scores, tau, chunk.noise, variant, order)
             for chunk in chunks]
    lambda_, mse = sum(distributed.together(torch.stack(parts), chunks[0].count))  # each (T,)
    return (lambda_ if objective == "iepo" else proxy.sensitivity(lambda_, mse)).tolist()


def train(model, settings, out, resume=False, prompts=None):
    """SDT, new or resumed, in the folder `out`. `prompts` is a list for a text model.
    -> a dict of results."""
    sampler = models.make_sampler(model.name, settings["sampler"], settings["steps"])
    guidance, tau, B = settings["guidance"], settings["tau"], settings["batch_size"]
    objective, order = settings["objective"], settings["forecast"]
    every = math.ceil(settings["lambda_every"] / settings["steps"])  # in trajectories
    distributed.check_enough(math.ceil(B / settings["micro_batch"]),
                             "chunks of a batch: use a smaller --micro-batch")
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
# The command


def read_flags():
    parser = command.Parser(__doc__)
    command.add_model_flags(parser)
    training.add_flags(parser, "runs/MODEL", training.USUAL)
    training.add_start_flag(parser)
    parser.add_argument("--objective", choices=["iepo", "sensitivity", "ltc"], default="iepo",
                        help="the weight of a step's error: lambda, lambda / MSE, or 1 (iepo)")
    command.add_forecast_flag(parser, default=0)
    parser.add_argument("--proxy", choices=["leave-one-out", "cumulative"], default="leave-one-out",
                        help="the paper's lambda (default), or the official code's, to which the "
                             "published betas belong")
    parser.add_argument("--lambda-every", type=int, help="iterations between measures of lambda "
                        f"({training.in_words(training.USUAL, 'lambda_every')})")
    parser.add_argument("--prompts", type=command.name,
                        help="a file of prompts, one a line, for a text model")
    command.add_captions_flag(parser)
    command.add_compile_flag(parser)
    return parser.parse_args()


def main():
    args = read_flags()
    device = distributed.join(models.find_device(args.device))
    # What needs no network is checked first: numbers, what fits the model, prompts, the run folder.
    settings = training.settings_of(args, training.defaults_of(args.model, args.objective,
                                                               args.steps))
    model = models.outline(args.model, args.dtype, args.raw_captions)
    settings, out = training.completed(settings, model), args.out or Path("runs") / args.model
    if args.prompts and model.text is None:
        raise ValueError(f"{args.model} takes labels, not prompts: leave --prompts out")
    prompts = shipped.read_prompts(args.prompts) if args.prompts else model.prompts()
    with training.run_folder(out):
        training.find_state(out, settings, args.resume)
        with distributed.first_process_first():
            model = models.load(args.model, args.weights, "cpu", args.dtype, args.raw_captions)
        models.choose_kernels(device)
        with distributed.first_process_first():
            model.prepare(prompts or (), device)  # T5 is gone again before the network comes
        model.to(device)
        if args.compile:
            models.compile_branches(model.network)
        print(f"{args.model} on {model.device}: {settings['objective']}, beta "
              f"{settings['beta']:g}, {settings['sampler']}, T = {settings['steps']}, seed "
              f"{settings['seed']} -> {out}", *training.notes(settings), sep="\n")
        training.report(train(model, settings, out, args.resume, prompts), settings, out)


if __name__ == "__main__":
    command.run(main, several=True)
