"""Training a router on the error of the final image itself, through the whole trajectory: what the
proxy lambda stands in for (HarmoniCa, https://arxiv.org/abs/2410.01723, section 3.3).

    python -m experiments.train_direct --target-cur 0.4      # digits, T = 10
    python -m experiments.train_direct --start fora-paper:2 --out runs/direct-alternation
    python -m experiments.train_direct --cost                # its time and memory beside SDT's

    L = mean (x_0 - x_0 without a cache)^2 + beta sum_ik r[i, k]

A trajectory makes one update, of all rows. Nothing is detached: the gradient goes back through
every step and through the cache, so a row learns that later steps reuse what it computes. SDT's
loss sees one step only, and takes what the cache holds for a constant. The price is memory: the
graph of T steps is kept, instead of one.

Notation: B images, T denoising steps, K branches.
"""

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import statistics
import time
from pathlib import Path

import torch.nn.functional as F

import command
import models
import router as routers
import training
from experiments.benchmark import SavedBytes
from samplers import denoise
from train_stepwise import PROXY, TRAINING, chunks_of, measure_weights, train_trajectory

STEPS = 10  # with twice as many, memory would be twice as much
DEFAULTS = dict(beta=2e-4, lr=0.1, iterations=2000, batch_size=8)  # at T = 20 a CUR of 45 %


class AttachedCache:
    """cache.SoftCache, but its entries stay in the graph."""

    def __init__(self, scores, tau):
        self.scores, self.tau, self.kept = scores, tau, {}

    def start(self, i):
        self.step, self.r = i, self.scores(i)
        return self

    def __call__(self, k, branch):
        if self.step == 0:
            self.kept[k] = branch()
            return self.kept[k]
        mixed = self.r[k] * branch() + (1 - self.r[k]) * self.kept[k]
        if self.r[k] > self.tau:
            self.kept[k] = mixed
        return mixed


def train_direct_trajectory(model, router, optimizer, chunks, guidance, tau, beta):
    """One trajectory and one update, of all rows. -> the loss and the error of the images.
    Raises ValueError, before the update, if the loss is not finite."""
    steps, error = len(chunks[0].sampler.timesteps), 0.0
    scale = training.loss_scale(1 / chunks[0].x.numel())
    for chunk in chunks:
        target = denoise(model.network, chunk.sampler, chunk.x, chunk.condition, guidance,
                         noise=chunk.noise)
        cache = AttachedCache(router.scores, tau)
        for i in range(steps):
            chunk.advance(i, chunk.predict(model.network, i, guidance, cache))
        mse = chunk.share * F.mse_loss(chunk.x, target)
        (scale * mse).backward()
        error += mse.item()
    for row in router.rows:
        row.grad /= scale
    usage = beta * sum(router.scores(i).sum() for i in range(1, steps))
    usage.backward()
    loss = error + usage.item()
    training.check_loss(loss, "")
    optimizer.step()
    optimizer.zero_grad()
    for i in range(1, steps):
        router.clamp(i)
    return loss, error


def train(model, settings, out, resume=False):
    """A whole run, as train_stepwise.train. -> a dict of results."""
    steps, B = settings["steps"], settings["batch_size"]
    sampler = models.make_sampler(model.name, settings["sampler"], steps)
    router = training.first_router(model, settings)
    run = training.Run(model, sampler, router, settings, out, resume)
    for n in run:
        chunks = chunks_of(model, sampler, settings["seed"], range(n * B, (n + 1) * B),
                           settings["micro_batch"], TRAINING)
        loss, error = train_direct_trajectory(model, router, run.optimizer, chunks,
                                              settings["guidance"], settings["tau"], run.beta)
        run.record([loss] * steps, [0.0] * (steps - 1) + [error])
    return run.finish()


# ------------------------------------------------------------------------------------------------
# What it costs


class NoUpdate:
    """An optimiser that moves nothing. At each step, where one backward ends, it calls `then`."""

    def __init__(self, then=lambda: None):
        self.step = then

    def zero_grad(self):
        pass


def cost(model, settings, rounds=3):
    """Measures one trajectory of SDT, the proxy's share included, and one of direct training, in
    turn; prints seconds and saved bytes. Either way every row is updated once."""
    steps, guidance, tau = settings["steps"], settings["guidance"], settings["tau"]
    B = settings["batch_size"]
    sampler = models.make_sampler(model.name, settings["sampler"], steps)
    router = routers.Router(steps, len(model.network.branches), settings["seed"])

    def chunks(purpose):
        return chunks_of(model, sampler, settings["seed"], range(B), B, purpose)

    def stepwise(optimizer):
        train_trajectory(model, router, optimizer, chunks(TRAINING), [1.0] * steps, guidance, tau,
                         1e-7)

    def direct(optimizer):
        train_direct_trajectory(model, router, optimizer, chunks(TRAINING), guidance, tau, 1e-7)

    def proxy():
        measure_weights(model, router, chunks(PROXY), guidance, tau, "leave-one-out")

    seconds = {"stepwise": [], "direct": [], "proxy": []}
    for _ in range(rounds):
        for name, work in (("stepwise", lambda: stepwise(NoUpdate())), ("proxy", proxy),
                           ("direct", lambda: direct(NoUpdate()))):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(values) for name, values in seconds.items()}
    share = took["proxy"] / (400 / steps)  # measured every 400 iterations
    saved = {}
    for name, work in (("stepwise", stepwise), ("direct", direct)):
        with SavedBytes() as graph:
            work(NoUpdate(graph.next_graph))
        saved[name] = graph.most / 1e6
    ours, other = took["stepwise"] + share, took["direct"]
    print(f"a trajectory of {B} images ({2 * B} rows), T = {steps}, {rounds} rounds\n"
          f"{'':26}{'SDT':>10}{'direct':>10}{'ratio':>8}\n"
          f"{'seconds':26}{ours:10.2f}{other:10.2f}{other / ours:8.2f}   "
          f"(SDT: {share:.2f} of them for lambda)\n"
          f"{'saved for backward, MB':26}{saved['stepwise']:10.1f}{saved['direct']:10.1f}"
          f"{saved['direct'] / saved['stepwise']:8.2f}")


def main():
    parser = command.Parser(__doc__)
    command.add_model_flags(parser, STEPS)
    training.add_flags(parser, "runs/MODEL-direct", {"all": DEFAULTS})
    training.add_start_flag(parser)
    parser.add_argument("--cost", action="store_true", help="measure time and memory, train none")
    args = parser.parse_args()
    model = models.outline(args.model, args.dtype)
    if model.text:
        raise ValueError(f"{args.model} takes prompts: this experiment is for models that take "
                         "labels")
    measure = vars(args).pop("cost")
    steps = STEPS if args.steps is None else args.steps
    defaults = training.for_steps(DEFAULTS, steps) | {"beta": DEFAULTS["beta"]}  # for every T
    settings = training.settings_of(args, defaults) | {
        "objective": "direct", "proxy": "none", "steps": steps,
        "sampler": args.sampler or model.sampler,
        "guidance": model.guidance if args.guidance is None else args.guidance,
    }
    models.make_sampler(args.model, settings["sampler"], steps)  # complains before a download
    model = models.load(args.model, args.weights, args.device, args.dtype)
    models.choose_kernels(model.device)
    if measure:
        cost(model, settings)
        return
    out = args.out or Path("runs") / f"{args.model}-direct"
    print(f"{args.model} on {model.device}: direct, beta {settings['beta']:g}, "
          f"T = {settings['steps']}, seed {settings['seed']} -> {out}")
    with training.run_folder(out):
        training.report(train(model, settings, out, args.resume), settings, out)


if __name__ == "__main__":
    command.run(main)
