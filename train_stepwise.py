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
    update      one AdamW step on row i of the router and on nothing else
    next x      the sampler's step from the student's own prediction

The run folder --out gets router.safetensors, router.png, lambda.png, settings.json, results.json,
log.jsonl (a line per trajectory) and state.pt, from which --resume goes on to the bitwise same
router. With --target-cur the run finds the beta that leads to a wanted CUR; with --start it begins
with a schedule, and not with logits drawn at random.

Letters: B images, T denoising steps, K cacheable branches.
"""

import argparse
import copy
import dataclasses
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import command
import models
import proxy
import router as routers
import shipped
from cache import SoftCache
from sample import guided
from samplers import Noise, make_sampler

# Settings for T = 20 found by measurement: a logit moves at most lr per update of its row, so a
# short run needs a high rate. Without lambda, beta is of another size: there is one for each
# objective.
DEFAULTS = {
    "digits": dict(beta=dict(iepo=4e-7, ltc=1e-4), lr=0.1, iterations=2000, lambda_every=400,
                   batch_size=8),
    "emoji": dict(beta=dict(iepo=1e-7, ltc=1e-4), lr=0.1, iterations=2000, lambda_every=400,
                  batch_size=8),
}
# Those published for DiT-XL/2 (64 rows a batch, counting both guidance halves), which the others
# start from: for PixArt the paper does not give any. LTC's beta is Learning-to-Cache's own.
PUBLISHED = dict(beta=dict(iepo=4e-8, ltc=5e-6), lr=0.01, iterations=20000, lambda_every=500,
                 batch_size=32, micro_batch=8)
TRAINING, PROXY = 1, 2  # the purposes of Noise

# ------------------------------------------------------------------------------------------------
# The method


@dataclasses.dataclass
class Chunk:
    """A part of the batch, with everything that belongs to its trajectories."""

    x: torch.Tensor  # (b, C, H, W)
    condition: tuple  # for 2 b rows
    noise: Noise
    sampler: object
    share: float  # b / B


def chunks_of(model, sampler, seed, images, micro_batch, purpose, prompts=None):
    """Fresh noise and random labels, or some of the `prompts`, for the images numbered `images`, in
    chunks."""
    chunks = []
    for first in range(0, len(images), micro_batch):
        noise = Noise(seed, images[first : first + micro_batch], purpose)
        x = noise.start(model.shape, model.device)
        if prompts is None:
            items = noise.labels(model.network.num_classes)
        else:
            items = [prompts[k] for k in noise.labels(len(prompts))]
        condition = model.condition(items)
        share = len(noise.images) / len(images)
        chunks.append(Chunk(x, condition, noise, copy.copy(sampler), share))
    return chunks


def train_trajectory(model, router, optimizer, chunks, lambda_, guidance, tau, beta):
    """The paper's algorithm 1, one trajectory: T iterations, T - 1 updates, one a row.

    `lambda_` (T,) weighs each step's error; ones make it the LTC objective.
    -> the loss and the plain mean squared error at each step, lists of T (row 0: zeros).
    Raises ValueError, before the update, if a loss is not finite.
    """
    caches = [SoftCache(router.scores, tau) for _ in chunks]
    losses, errors = [0.0], [0.0]
    for i, t in enumerate(chunks[0].sampler.timesteps):
        error = 0.0
        for chunk, cache in zip(chunks, caches, strict=True):
            predict = partial(guided, model.network, chunk.x, t, chunk.condition, guidance,
                              channels=chunk.sampler.guidance_channels)
            if i == 0:
                with torch.no_grad():  # computes everything and fills the cache: no loss
                    prediction = predict(cache.start(i))
            else:
                with torch.no_grad():
                    target = predict()  # teacher
                prediction = predict(cache.start(i))  # student
                mse = chunk.share * F.mse_loss(prediction, target)
                (lambda_[i] * mse).backward()
                error += mse.item()
            chunk.x = chunk.sampler.step(prediction.detach(), i, chunk.x, chunk.noise)
        if i == 0:
            continue
        usage = beta * router.scores(i).sum()
        usage.backward()
        loss = lambda_[i] * error + usage.item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is not finite at step {i} (timestep {t:g}): the network's predictions "
                "overflow; try --dtype float32"
            )
        optimizer.step()  # finds a gradient on row i only
        optimizer.zero_grad()
        router.clamp(i)
        losses.append(loss)
        errors.append(error)
    return losses, errors


def measure_lambda(model, router, chunks, guidance, tau, variant):
    """The image error proxy over a batch in chunks: -> list of T floats."""
    scores = torch.sigmoid(router.logits())
    total = 0
    for chunk in chunks:
        total = total + chunk.share * proxy.image_error(
            model.network, chunk.sampler, chunk.x, chunk.condition, guidance, scores, tau,
            chunk.noise, variant,
        )
    return total.tolist()


# ------------------------------------------------------------------------------------------------
# The search for beta

CLOSE = 0.01  # a CUR within a point of the wanted one will do
# A beta that stands still, over the mean of one that wavers, for the same CUR (SDT on digits)
STEADY = 1.15


class BetaSearch:
    """With a wanted CUR, beta is moved after every trajectory:

        log beta += (wanted CUR - CUR ahead) / 2

    A logit takes tens of trajectories from where it starts to the threshold, so the CUR of today
    would come too late: the CUR ahead is that of the logits where their present pace (a moving
    average) leads them in 2 / lr trajectories, in which one that always goes one way comes 2 far.
    Without a wanted CUR beta stands still.
    """

    def __init__(self, beta, target, tau, lr):
        self.beta, self.target, self.tau, self.horizon = beta, target, tau, 2 / lr
        self.logits, self.pace, self.log_betas = None, 0.0, []

    def update(self, logits):
        """After a trajectory: the table as it is now, (T, K)."""
        if self.target is None:
            return
        logits = logits.cpu()
        if self.logits is not None:
            share = max(0.2, 1 / len(self.log_betas))  # of the newest in the average
            self.pace = (1 - share) * self.pace + share * (logits - self.logits)
        self.logits = logits
        ahead = routers.threshold(torch.sigmoid(logits + self.horizon * self.pace), self.tau)
        self.log_betas.append(math.log(self.beta))
        self.beta *= math.exp((self.target - routers.cur(ahead)) / 2)

    def reached(self, cur):
        """Whether a router of this CUR is what is wanted."""
        return self.target is None or abs(cur - self.target) < CLOSE

    @property
    def found(self):
        """The beta that, fixed from the start, would lead near there (on digits up to 4 points
        lower): the (geometric) mean over the last half, and 15 % more. A branch that a wavering
        beta has brought below the threshold mostly stays there, so that one which stands still has
        to be higher than the mean."""
        last = self.log_betas[len(self.log_betas) // 2 :]
        return STEADY * math.exp(sum(last) / len(last)) if last else self.beta

    def state_dict(self):
        return {key: getattr(self, key) for key in ("beta", "logits", "pace", "log_betas")}

    def load_state_dict(self, state):
        vars(self).update(state)


# ------------------------------------------------------------------------------------------------
# The run


def for_steps(defaults, steps):
    """Settings found for T = 20 -> those for T = `steps` (None: 20): as many trajectories, and beta
    times (20 / T)^2. From step to step a branch's output changes by about 1 / T, so the squared
    error of reusing it goes with 1 / T^2. (For a CUR of 40 % on digits, the beta found at T = 10 is
    4.2 times that at T = 20, a mean of three seeds, and that is 7.0 times the one at T = 50, for
    IEPO; 3.0 and 5.1 times for LTC.)"""
    T = 20 if steps is None else max(1, steps)
    settings = {key: -(-value * T // 20) if key in ("iterations", "lambda_every") else value
                for key, value in defaults.items()}
    scale = (20 / T) ** 2
    betas = defaults["beta"]
    settings["beta"] = ({key: scale * beta for key, beta in betas.items()}
                        if isinstance(betas, dict) else scale * betas)
    return settings


def settings_of(args, defaults):
    """The command's flags, completed by the model's `defaults`: a plain dict, saved with the run.
    Raises ValueError for a number out of range."""
    settings = {
        key: value for key, value in vars(args).items()
        if key not in ("out", "resume", "device", "vae")
    }
    for key, value in defaults.items():
        if settings[key] is None:
            settings[key] = value[args.objective] if isinstance(value, dict) else value
    if settings["micro_batch"] is None:
        settings["micro_batch"] = settings["batch_size"]
    if not 0 < settings["tau"] < 1:
        raise ValueError(f"--tau must be between 0 and 1, not {settings['tau']}")
    if not 0 <= settings["beta"] < math.inf:
        raise ValueError(f"--beta must be 0 or more, not {settings['beta']}")
    if not 0 < settings["lr"] < math.inf:
        raise ValueError(f"--lr must be more than 0, not {settings['lr']}")
    target = settings["target_cur"]
    if target is not None and not 0 < target < 1:
        raise ValueError(f"--target-cur is a share, like 0.4 for 40 %, not {target}")
    if target is not None and settings["beta"] == 0:
        raise ValueError("--target-cur starts from --beta, which must be more than 0")
    for key in ("iterations", "lambda_every", "batch_size", "micro_batch"):
        if settings.get(key, 1) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be 1 or more, not {settings[key]}")
    return settings


def open_run(out, settings, resume):
    """Makes the run folder, or finds the state in it. -> the state, or None for a new run.
    Raises ValueError if the folder holds a run and this one does not resume it."""
    state_file = out / "state.pt"
    command.check_writable(state_file)
    if not state_file.exists():
        return None
    if not resume:
        raise ValueError(f"{out} holds a run: --resume goes on with it, or choose another --out")
    state = command.load_state(state_file)
    if not isinstance(state, dict) or not {"settings", "search"} <= state.keys():
        raise ValueError(f"{state_file} is not a state of this trainer, or of an older version of "
                         "it: choose another --out")
    old = state["settings"]
    changed = [f"{key} {old.get(key)}" for key in settings if settings[key] != old.get(key)]
    if changed:
        raise ValueError(f"{out} is a run with other settings: {', '.join(changed)}")
    return state


def train(model, settings, out, resume=False, prompts=None):
    """SDT, new or resumed, in the folder `out`; `prompts` is a list for a text model.
    -> a dict of results."""
    sampler = make_sampler(settings["sampler"], settings["steps"])
    every = math.ceil(settings["lambda_every"] / settings["steps"])
    guidance, tau, B = settings["guidance"], settings["tau"], settings["batch_size"]

    def trajectory(n, router, optimizer, beta, lambda_):
        def chunks(purpose):
            return chunks_of(model, sampler, settings["seed"], range(n * B, (n + 1) * B),
                             settings["micro_batch"], purpose, prompts)

        if settings["objective"] == "iepo" and n % every == 0:
            lambda_ = measure_lambda(model, router, chunks(PROXY), guidance, tau, settings["proxy"])
        losses, errors = train_trajectory(
            model, router, optimizer, chunks(TRAINING), lambda_, guidance, tau, beta
        )
        return losses, errors, lambda_

    router = first_router(model, settings)
    return run(model, settings, out, resume, sampler, router, trajectory, settings["steps"])


def first_router(model, settings):
    """The router that training starts from. Raises ValueError for an unknown schedule's name, and
    for a tau that does not lie between the scores of a start."""
    steps, branches, seed = settings["steps"], len(model.network.branches), settings["seed"]
    router = routers.Router(steps, branches, seed)
    if settings.get("start"):
        if not 0.05 <= settings["tau"] <= 0.95:
            raise ValueError(f"--start needs a --tau from 0.05 to 0.95, not {settings['tau']}")
        router.start_from(routers.named(settings["start"], steps, branches, seed))
    return router


def run(model, settings, out, resume, sampler, router, trajectory, length):
    """The loop over trajectories of `length` iterations, with everything that a run keeps.

    `trajectory(n, router, optimizer, beta, lambda_)` trains on the n-th and gives its losses and
    squared errors, lists of T, and lambda, which it may have measured anew. As long as a wanted CUR
    is not reached, the run goes on, to twice the iterations at most. -> a dict of results.
    """
    router.to(model.device)
    # AdamW skips parameters without a gradient: every row has moments and a step count of its own.
    optimizer = torch.optim.AdamW(router.parameters(), settings["lr"], weight_decay=0)
    planned = math.ceil(settings["iterations"] / length)
    search = BetaSearch(settings["beta"], settings["target_cur"], settings["tau"],
                        settings["lr"])
    lambda_ = [1.0] * settings["steps"]
    done, curs, seconds = 0, [], 0.0
    state = open_run(out, settings, resume)
    if state:
        router.load_state_dict(state["router"])
        optimizer.load_state_dict(state["optimizer"])
        search.load_state_dict(state["search"])
        lambda_, done, curs, seconds = (
            state[key] for key in ("lambda", "trajectories", "curs", "seconds")
        )
    write_json(out / "settings.json", settings)
    log = out / "log.jsonl"
    keep_lines(log, done)

    bar = tqdm(total=planned * length, initial=done * length, unit="iteration", disable=None)
    n = done
    while n < planned or (n < 2 * planned and not search.reached(curs[-1])):
        start = time.perf_counter()
        beta, before = search.beta, lambda_
        losses, errors, lambda_ = trajectory(n, router, optimizer, beta, lambda_)
        schedule = routers.threshold(torch.sigmoid(router.logits()), settings["tau"])
        curs.append(routers.cur(schedule))
        search.update(router.logits())
        seconds += time.perf_counter() - start
        n += 1
        line = {
            "trajectory": n - 1, "iteration": n * length, "loss": sum(losses) / (len(losses) - 1),
            "mse": errors, "cur": curs[-1], "computed": schedule.sum(1).tolist(), "beta": beta,
            "seconds": round(seconds, 3),
        }
        if lambda_ is not before:
            line["lambda"] = lambda_
        # The log first: lines beyond the state are cut off again when a run is resumed.
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        command.save_state(out / "state.pt", {
            "settings": settings, "router": router.state_dict(),
            "optimizer": optimizer.state_dict(), "search": search.state_dict(), "lambda": lambda_,
            "trajectories": n, "curs": curs, "seconds": seconds,
        })
        bar.update(length)
        bar.set_postfix_str(f"loss {line['loss']:.2e}, CUR {100 * curs[-1]:.1f} %")
    bar.close()

    logits = router.logits().cpu()
    results = {
        "cur": curs[-1],
        "cur_before_last_quarter": curs[len(curs) * 3 // 4 - 1] if len(curs) >= 4 else 0.0,
        "lr_updates": settings["lr"] * n,
        "iterations": n * length,
        "beta": search.found,
        "seconds": seconds,
        "images": n * length * settings["batch_size"] if "images" in settings else 0,  # real ones
        "peak_memory": command.peak_memory(model.device),
    }
    if n > done or not (out / "results.json").exists():  # not again for a run that was finished
        write_json(out / "results.json", results)
    save_run(out, model, settings, logits, sampler.timesteps, lambda_, results)
    return results


def save_run(out, model, settings, logits, timesteps, lambda_, results):
    """Writes what a finished run is for: the router and the pictures of it and of lambda."""
    about = {**settings, "iterations": results["iterations"], "cur": f"{results['cur']:.4f}",
             "beta": results["beta"]}
    about = {key: value for key, value in about.items()
             if value or key not in ("prompts", "images", "start", "target_cur")}
    if settings["objective"] == "ltc":
        about["proxy"] = "none"
    routers.save(out / "router.safetensors", logits, **about)
    timesteps = [f"{t:.5g}" for t in timesteps]  # a solver's are fractional
    picture = routers.heat_map(
        torch.sigmoid(logits), settings["tau"], timesteps, model.network.branches
    )
    command.save_image(out / "router.png", picture)
    if settings["objective"] == "iepo":
        command.save_image(out / "lambda.png", proxy.curve(lambda_, timesteps))


def keep_lines(path, count):
    """Cuts a file down to its first `count` lines; makes it if there is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    with command.replacing(path) as temporary:
        temporary.write_text("".join(lines[:count]))


def write_json(path, value):
    with command.replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def add_training_flags(parser, folder):
    """The flags of every training of a router; `folder` says where it goes by default."""
    parser.add_argument("--beta", type=float, help="weight of the router's usage in the loss")
    parser.add_argument("--target-cur", type=float,
                        help="find the beta that leads to this share of reuse, like 0.4: --beta is "
                             "where the search starts")
    parser.add_argument("--tau", type=float, default=0.1, help="reuse at scores <= tau (0.1)")
    parser.add_argument("--lr", type=float, help="AdamW's learning rate")
    parser.add_argument("--iterations", type=int, help="the least number of them: one is a batch "
                        "at one denoising step; whole trajectories are made")
    parser.add_argument("--batch-size", type=int, help="images or trajectories at once")
    parser.add_argument("--micro-batch", type=int,
                        help="of them, how many in memory at once; same result (default: all)")
    parser.add_argument("--out", type=Path, help=f"run folder (default: {folder})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if any")


def add_start_flag(parser):
    parser.add_argument("--start", metavar="SCHEDULE",
                        help="a schedule to start from, like fora-paper:2 (default: logits drawn "
                             "at random)")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_model_flags(parser)
    add_training_flags(parser, "runs/MODEL")
    add_start_flag(parser)
    parser.add_argument("--objective", choices=["iepo", "ltc"], default="iepo",
                        help="iepo weighs each step's error by lambda, ltc does not (iepo)")
    parser.add_argument("--proxy", choices=["leave-one-out", "cumulative"], default="leave-one-out",
                        help="the paper's lambda, or the official code's (leave-one-out)")
    parser.add_argument("--lambda-every", type=int, help="iterations between measures of lambda")
    parser.add_argument("--prompts", help="a file of prompts, one a line, for a text model")
    args = parser.parse_args()

    small = args.model in DEFAULTS
    defaults = for_steps(DEFAULTS[args.model], args.steps) if small else PUBLISHED
    settings = settings_of(args, defaults)
    device = models.find_device(args.device)
    model = models.load(args.model, args.weights, "cpu", args.dtype)
    if args.prompts and model.text is None:
        raise ValueError(f"{args.model} is told a class, not a prompt: leave --prompts out")
    prompts = shipped.read_prompts(args.prompts) if args.prompts else model.prompts()
    if model.text:
        model.prepare(prompts, device)  # the text encoder is gone again before the network comes
    model.to(device)
    for key in ("sampler", "steps", "guidance"):
        if settings[key] is None:
            settings[key] = getattr(model, key)
    out = args.out or Path("runs") / args.model
    print(f"{args.model} on {model.device}: {settings['objective']}, beta {settings['beta']:g}, "
          f"{settings['sampler']}, T = {settings['steps']}, seed {settings['seed']} -> {out}")
    tell(train(model, settings, out, args.resume, prompts), settings, model, out)


def tell(results, settings, model, out):
    """Prints what a run came to, and whether it was long enough."""
    moved = 100 * (results["cur"] - results["cur_before_last_quarter"])
    print(f"CUR {100 * results['cur']:.1f} %; it moved by {moved:+.1f} points in the last quarter "
          + ("(still moving: train longer)" if abs(moved) >= 1 else "(settled)"))
    if settings["target_cur"] is not None:
        found = abs(results["cur"] - settings["target_cur"]) < CLOSE
        print(f"beta found: {results['beta']:.3g}"
              + ("" if found else "; the CUR is not there yet: start from it, by --beta"))
    print(f"lr x updates per row {results['lr_updates']:g}"
          + ("" if results["lr_updates"] >= 8 else
             " (below 8: rows may not have reached the threshold; raise --lr or --iterations)"))
    if results["peak_memory"]:
        print(f"peak memory {results['peak_memory'] / 2**30:.2f} GiB")
    print(f"{results['seconds']:.0f} s; wrote {out}/router.safetensors, router.png and log.jsonl")


if __name__ == "__main__":
    command.run(main)
