"""What any training of a router needs around it: complete settings, a run folder with its log,
state and results, resuming, and the search for beta. Each trainer keeps its own loop in sight:

    run = training.Run(model, sampler, router, settings, out, resume)
    for n in run:                                # the number of a trajectory
        losses, errors = ...                     # with run.optimizer, run.lambda_ and run.beta
        run.record(losses, errors)
    results = run.finish()

After each trajectory the folder `out` gets a line in log.jsonl, state.pt, and the router as it is
then, router.safetensors; once a minute and at the end router.png and lambda.png; at the end
results.json. The state is saved between trajectories only, so it holds no latent and no cache. A
resumed run ends with bitwise the same router, and so does one that goes on to more iterations.

Notation: T denoising steps, K cacheable branches, CUR the cache utilisation ratio.
"""

import contextlib
import hashlib
import json
import math
import time
from pathlib import Path

import torch

import command
import distributed
import models
import pictures
import router as routers
from samplers import sampler_name

# ------------------------------------------------------------------------------------------------
# Settings: a plain dict, saved with the run, in which every key stands

VERSION = 2  # of what a state holds and of what it leads to: a state of another one is refused
OF_THE_MACHINE = ("out", "resume", "device", "vae")  # flags that do not change the router
# None or False in some trainings; then a router file does not mention them
OPTIONAL = ("prompts", "images", "start", "target_cur", "lambda_every", "raw_captions", "forecast",
            "compile")


def for_steps(defaults, steps):
    """Settings found for T = 20 -> those for T = `steps` (None: 20): as many trajectories, and beta
    times (20 / T)^2. From step to step a branch's output changes by about 1 / T, so the squared
    error of reusing it goes with 1 / T^2. (Measured on digits for a CUR of 40 %: with IEPO the beta
    found at T = 10 is 4.2 times that at T = 20, a mean of three seeds, and that is 7.0 times the
    one at T = 50; with LTC 3.0 and 5.1 times.)"""
    T = 20 if steps is None else max(1, steps)
    settings = {key: -(-value * T // 20) if key in ("iterations", "lambda_every") else value
                for key, value in defaults.items()}
    beta = defaults["beta"]
    return settings | {"beta": beta and (20 / T) ** 2 * beta}


# SDT's settings for T = 20, found by measurement. A logit moves at most lr per update of its row,
# so a short run needs a high rate. Each objective has errors of another scale, and its own beta.
SMALL = dict(lr=0.1, iterations=2000, lambda_every=400, batch_size=8)
BETAS = {"digits": dict(iepo=4e-7, ltc=1e-4, sensitivity=2.5e-4),
         "emoji": dict(iepo=1e-7, ltc=1e-4, sensitivity=None)}
# Published for DiT-XL/2 (64 rows a batch, counting both guidance halves). The other official models
# start from the same: the paper gives none for PixArt. LTC's beta is Learning-to-Cache's own.
PUBLISHED = dict(lr=0.01, iterations=20000, lambda_every=500, batch_size=32, micro_batch=8)
PUBLISHED_BETAS = dict(iepo=4e-8, ltc=5e-6, sensitivity=None)


USUAL = {"digits": {**SMALL, "beta": BETAS["digits"]["iepo"]},  # for --help
         "emoji": {**SMALL, "beta": BETAS["emoji"]["iepo"]},
         "official": {**PUBLISHED, "beta": PUBLISHED_BETAS["iepo"]}}


def defaults_of(name, objective, steps):
    """SDT's settings for a model, by name, at T = `steps` (None: its own T)."""
    if name in BETAS:
        return for_steps({"beta": BETAS[name][objective], **SMALL}, steps)
    return {"beta": PUBLISHED_BETAS[objective], **PUBLISHED}


def notes(settings):
    """What the user should know before SDT starts: a list of lines."""
    if settings["model"] in BETAS or settings["objective"] != "iepo" or settings["target_cur"] or (
        settings["proxy"] == "cumulative"
    ):
        return []
    return ["note: published betas, like 4e-8, belong to --proxy cumulative. The paper's lambda "
            "has another scale: --target-cur 0.26 finds the beta for it"]


def settings_of(args, defaults):
    """The command's flags, completed by the model's `defaults` -> settings.
    Raises ValueError for a number out of range."""
    flags = {key: value for key, value in vars(args).items() if key not in OF_THE_MACHINE}
    settings = {**dict.fromkeys(OPTIONAL), **flags}
    for key, value in defaults.items():
        if settings[key] is None:
            settings[key] = value
    if settings["micro_batch"] is None:  # the whole batch at once
        settings["micro_batch"] = settings["batch_size"]
    check(settings)
    return settings


def completed(settings, model):
    """Settings, completed by what a model or its outline brings, and checked. Raises ValueError."""
    settings = {**settings, "raw_captions": model.text == "t5" and not model.clean}
    for key in ("sampler", "steps", "guidance"):
        settings[key] = getattr(model, key) if settings[key] is None else settings[key]
    models.make_sampler(model.name, settings["sampler"], settings["steps"])
    first_router(model, settings)
    return settings


def named_alike(settings):
    """The settings with one name for each thing, however it was written: equal ones are equal.
    Raises ValueError for an unknown dtype."""
    return {**settings, "dtype": models.dtype_name(settings.get("dtype")),
            "sampler": sampler_name(str(settings.get("sampler")))}


def check(settings):
    """Raises ValueError for a number out of range."""
    if not 0 < settings["tau"] < 1:
        raise ValueError(f"--tau must be between 0 and 1, not {settings['tau']}")
    if settings["beta"] is None:
        raise ValueError("no --beta is known for this model and --objective: name one, with "
                         "--target-cur to find the right one from there")
    if settings["beta"] < 0:
        raise ValueError(f"--beta must be 0 or more, not {settings['beta']}")
    if settings["lr"] <= 0:
        raise ValueError(f"--lr must be more than 0, not {settings['lr']}")
    target = settings["target_cur"]
    if target is not None and not 0 < target < 1:
        raise ValueError(f"--target-cur is a share, like 0.4 for 40 %, not {target}")
    if target is not None and settings["beta"] == 0:
        raise ValueError("--target-cur starts from --beta, which must be more than 0")
    for key in ("iterations", "lambda_every", "batch_size", "micro_batch"):
        if settings[key] is not None and settings[key] < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be 1 or more, not {settings[key]}")


def first_router(model, settings):
    """The router that training starts from: random logits, or those of the schedule `start`.
    Raises ValueError for an unknown schedule, or a tau that its scores do not straddle."""
    steps, branches, seed = settings["steps"], len(model.network.branches), settings["seed"]
    router = routers.Router(steps, branches, seed)
    if settings["start"]:
        if not 0.05 <= settings["tau"] <= 0.95:
            raise ValueError(f"--start needs a --tau from 0.05 to 0.95, not {settings['tau']}")
        router.start_from(routers.named(settings["start"], steps, branches, seed))
    return router


def check_loss(loss, where):
    """Raises ValueError, before the update that it would spoil, if a loss is not finite."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is not finite{where}: the network's predictions overflow; try "
                         "--dtype float32")


def loss_scale(factor):
    """What a loss is multiplied by for its backward: a power of two, near 1 / factor. The gradient
    of a mean squared error, times lambda, is below float16's smallest number (6e-8) on many rows.
    Scaled back on the router it has lost nothing: powers of two are exact."""
    return 2.0 ** -round(math.log2(factor)) if factor > 0 else 1.0


# ------------------------------------------------------------------------------------------------
# The search for beta

CLOSE = 0.01  # a CUR within a point of the target will do
STEADY = 1.15  # constant beta / mean of the moving beta, at equal CUR (measured: SDT on digits)


class BetaSearch:
    """With a target CUR, beta moves after every trajectory; without one it stays:

        log beta += (target CUR - CUR to come) / 2

    A logit needs tens of trajectories to reach the threshold, so steering by today's CUR would
    overshoot. Beta is steered by the CUR to come instead: every logit is extrapolated 2 / lr
    trajectories ahead at its present speed (a moving average). In that time a logit that always
    moves the same way moves by 2.
    """

    def __init__(self, beta, target, tau, lr):
        self.beta, self.target, self.tau, self.horizon = beta, target, tau, 2 / lr
        self.logits, self.pace, self.log_betas = None, 0.0, []

    def update(self, logits):
        """Call after a trajectory, with the table as it is now, (T, K)."""
        if self.target is None:
            return
        logits = logits.cpu()
        if self.logits is not None:
            # The newest trajectory's share in the average; the first few count alike.
            share = max(0.2, 1 / len(self.log_betas))
            self.pace = (1 - share) * self.pace + share * (logits - self.logits)
        self.logits = logits
        ahead = routers.threshold(torch.sigmoid(logits + self.horizon * self.pace), self.tau)
        self.log_betas.append(math.log(self.beta))
        self.beta *= math.exp((self.target - routers.cur(ahead)) / 2)

    def reached(self, cur):
        """Whether a router of this CUR will do."""
        return self.target is None or abs(cur - self.target) < CLOSE

    @property
    def found(self):
        """The constant beta for a fresh run: 1.15 times the geometric mean of beta over the last
        half of the trajectories. The factor is there because a branch that a high beta once pushed
        below the threshold mostly stays there when beta falls again. On digits such runs end up to
        4 points below the target CUR."""
        last = self.log_betas[len(self.log_betas) // 2 :]
        return STEADY * math.exp(sum(last) / len(last)) if last else self.beta

    def state_dict(self):
        return {key: getattr(self, key) for key in ("beta", "logits", "pace", "log_betas")}

    def load_state_dict(self, state):
        vars(self).update({key: state[key] for key in self.state_dict()})


# ------------------------------------------------------------------------------------------------
# The run


class Run:
    """A training in the folder `out`, new or resumed: iterate over it. Each trajectory has `length`
    iterations (T, if not named). With a target CUR that is not reached, it goes on to twice
    the iterations at most. `data` is what the training draws from beside noise, a list of strings
    (prompts, or names of files): if it or the weights have changed, a run is not resumed. Of
    several processes all read the folder, and the first one writes.

    Attributes: `optimizer`; `lambda_`, a list of T, ones until `measured` sets it.
    Raises ValueError if the folder holds a run that this one does not resume.
    """

    def __init__(self, model, sampler, router, settings, out, resume=False, length=None,
                 data=()):
        settings = named_alike(settings)
        self.model, self.sampler, self.router = model, sampler, router.to(model.device)
        self.settings, self.out = settings, Path(out)
        self.length = settings["steps"] if length is None else length
        # AdamW skips parameters without a gradient, so every row has its own moments and count.
        self.optimizer = torch.optim.AdamW(router.parameters(), settings["lr"], weight_decay=0)
        self.search = BetaSearch(settings["beta"], settings["target_cur"], settings["tau"],
                                 settings["lr"])
        self.lambda_, self.news = [1.0] * settings["steps"], {}
        self.done, self.curs, self.seconds = 0, [], 0.0
        self.first_cur, self.drawn = routers.cur(self._schedule()), time.monotonic()
        self.contents = {"weights": model.fingerprint(),
                         "prompts or images": hashlib.sha256(repr(data).encode()).hexdigest()}
        for name in FILES:
            command.check_writable(self.out / name)  # found out now, not after a trajectory
        state = find_state(self.out, settings, resume, self.contents)
        if state:
            self._load(state)
        self.first = self.done
        if distributed.rank() == 0:
            command.write_json(self.out / "settings.json", settings)
            # A run that was killed after its log and before its state has a line too many.
            command.keep_lines(self.out / "log.jsonl", self.done)

    @property
    def beta(self):
        """The weight of usage in this trajectory's loss."""
        return self.search.beta

    def _schedule(self):
        return routers.threshold(torch.sigmoid(self.router.logits()), self.settings["tau"])

    def measured(self, lambda_):
        """Takes the weights of the steps' errors, list of T, that were measured anew."""
        self.lambda_ = lambda_
        self.news = {"lambda": lambda_}

    def __iter__(self):
        planned = math.ceil(self.settings["iterations"] / self.length)
        with command.progress(total=planned * self.length, initial=self.done * self.length,
                              unit="iteration") as self.bar:
            # Without a target CUR, any is `reached`.
            while self.done < planned or (
                self.done < 2 * planned and not self.search.reached(self.curs[-1])
            ):
                self.start = time.perf_counter()
                yield self.done

    def record(self, losses, errors):
        """Call after a trajectory, with its losses and squared errors, lists of T: moves beta, and
        saves the log, the state, and the router as it is now."""
        beta, schedule = self.search.beta, self._schedule()
        self.curs.append(routers.cur(schedule))
        self.search.update(self.router.logits())
        self.seconds += time.perf_counter() - self.start
        self.done += 1
        line = {
            "trajectory": self.done - 1, "iteration": self.done * self.length,
            "loss": sum(losses) / (len(losses) - 1), "mse": errors, "cur": self.curs[-1],
            "computed": schedule.sum(1).tolist(), "beta": beta, "seconds": round(self.seconds, 3),
            **self.news,
        }
        self.news = {}
        if distributed.rank() == 0:
            # The log first. A line too many is cut off when the run is resumed; one that is missing
            # could not be made again.
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            (self.out / "results.json").unlink(missing_ok=True)  # of the run that was shorter
            command.save_state(self.out / "state.pt", self._state())
            self._save_router()
            if time.monotonic() - self.drawn >= MINUTE:
                self._draw()
        self.bar.set_postfix_str(f"loss {line['loss']:.2e}, CUR {100 * self.curs[-1]:.1f} %", False)
        self.bar.update(self.length)

    def _state(self):
        return {
            "version": VERSION, "settings": self.settings, "contents": self.contents,
            "router": self.router.state_dict(), "optimizer": self.optimizer.state_dict(),
            "search": self.search.state_dict(), "lambda": self.lambda_,
            "trajectories": self.done, "curs": self.curs, "seconds": self.seconds,
        }

    def _load(self, state):
        try:
            self.router.load_state_dict(state["router"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.search.load_state_dict(state["search"])
            self.lambda_, self.done, self.curs, self.seconds = (
                state[key] for key in ("lambda", "trajectories", "curs", "seconds")
            )
            self._check()
        except Exception as error:  # a foreign file may hold anything anywhere
            raise ValueError(f"{self.out}/state.pt is not a whole state of this training "
                             f"({type(error).__name__}: {error}): choose another --out") from error

    def _check(self):
        """Raises ValueError if what was loaded cannot have come from a run."""
        numbers = [self.seconds, self.search.beta, *self.lambda_, *self.curs,
                   *self.search.log_betas]
        tensors = [*self.router.state_dict().values(), torch.as_tensor(self.search.pace)]
        tensors += [] if self.search.logits is None else [self.search.logits]
        for row, moments in self.optimizer.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if moments[key].shape != row.shape:
                    raise ValueError(f"{key} is {tuple(moments[key].shape)}")
                tensors.append(moments[key])
        if not all(map(math.isfinite, numbers)) or not all(t.isfinite().all() for t in tensors):
            raise ValueError("not all of its numbers are finite")
        if len(self.lambda_) != self.settings["steps"] or len(self.curs) != self.done or (
            self.done < 1 or self.seconds < 0 or self.search.beta < 0
            or not all(0 <= cur <= 1 for cur in self.curs)
        ):
            raise ValueError("its numbers do not go together")

    def finish(self):
        """Call after the last trajectory: writes the results, the router, and the pictures of it
        and of lambda. -> a dict of results."""
        images = self.done * self.length * self.settings["batch_size"]
        results = {
            "cur": self.curs[-1], "cur_at_start": self.first_cur,
            "cur_before_last_quarter": [self.first_cur, *self.curs][self.done * 3 // 4],
            "lr_updates": self.settings["lr"] * self.done,
            "trajectories": self.done, "iterations": self.done * self.length,
            "beta": self.search.found,
            "seconds": self.seconds,
            "images": images if self.settings["objective"] == "learning-to-cache" else 0,  # real
            "peak_memory": command.peak_memory(self.model.device),
        }
        if distributed.rank() == 0:
            # A resumed run that was finished keeps its results: this process's memory is not its.
            if self.done > self.first or not (self.out / "results.json").exists():
                command.write_json(self.out / "results.json", results)
            self._save_router()
            self._draw()
        return results

    def _save_router(self):
        """Writes the router as it is now: sampling can use it from the first trajectory on."""
        settings = self.settings
        about = {**settings, "iterations": self.done * self.length, "cur": f"{self.curs[-1]:.4f}",
                 "beta": self.search.found}
        about = {key: value for key, value in about.items() if value or key not in OPTIONAL}
        if settings["objective"] == "ltc":
            about["proxy"] = "none"  # the flag has a default, but this objective measures none
        routers.save(self.out / "router.safetensors", self.router.logits().cpu(), **about)

    def _draw(self):
        """Draws the router as it is now, and lambda."""
        settings, self.drawn = self.settings, time.monotonic()
        timesteps = [f"{t:.5g}" for t in self.sampler.timesteps]  # a solver's are fractional
        picture = pictures.heat_map(torch.sigmoid(self.router.logits().cpu()), settings["tau"],
                                    timesteps, self.model.network.branches)
        command.save_image(self.out / "router.png", picture)
        if settings["objective"] in ("iepo", "sensitivity"):
            weight = "lambda" if settings["objective"] == "iepo" else "lambda / MSE"
            picture = pictures.lambda_curve(self.lambda_, timesteps, weight)
            command.save_image(self.out / "lambda.png", picture)


# ------------------------------------------------------------------------------------------------
# The run folder


FILES = ("state.pt", "settings.json", "log.jsonl", "router.safetensors", "router.png", "lambda.png",
         "results.json")
MINUTE = 60  # seconds from one drawing of the pictures to the next


@contextlib.contextmanager
def run_folder(out):
    """`with run_folder(out):` no other process trains there. An interruption says how to go on."""
    with command.locked(out) if distributed.rank() == 0 else contextlib.nullcontext():
        try:
            yield
        except KeyboardInterrupt as error:
            if not (Path(out) / "state.pt").exists():
                raise  # there is nothing to go on with
            raise KeyboardInterrupt(f"the same command with --resume goes on with {out}") from error


def find_state(out, settings, resume, contents=None):
    """The state in a run folder, or None for a new run. Raises ValueError if the folder holds a run
    and this one does not resume it; more iterations are no other settings: the run goes on. Without
    `contents`, which need the weights, those are not compared."""
    state_file = out / "state.pt"
    if not state_file.exists():
        return None
    if not resume:
        raise ValueError(f"{out} holds a run: --resume goes on with it, or choose another --out")
    state = command.load_state(state_file)
    state = state if isinstance(state, dict) else {}
    old, known = state.get("settings"), state.get("contents")
    if not isinstance(old, dict) or not isinstance(known, dict) or (
        repr(state.get("version")) != repr(VERSION)
    ):
        raise ValueError(f"{state_file} is not a state of this trainer, or of another version of "
                         "it: choose another --out")
    old, settings = named_alike(old), named_alike(settings)
    # Files are compared by what they hold, below, and not by what they are called. A damaged state
    # may hold anything anywhere, also what cannot be compared, so the texts of both are.
    compared = settings.keys() - {"iterations", "weights", "prompts"}
    changed = [f"{key} {old.get(key)}" for key in settings
               if key in compared and repr(settings[key]) != repr(old.get(key))]
    if changed:
        raise ValueError(f"{out} is a run with other settings: {', '.join(changed)}")
    if not isinstance(old.get("iterations"), int) or settings["iterations"] < old["iterations"]:
        raise ValueError(f"{out} is a run of {old.get('iterations')} iterations: --iterations can "
                         "only be more, and then it goes on")
    changed = [key for key in contents or () if repr(known.get(key)) != repr(contents[key])]
    if changed:
        raise ValueError(f"{out} is a run with other {' and other '.join(changed)} in the same "
                         "files: choose another --out")
    return state


# ------------------------------------------------------------------------------------------------
# The command


def in_words(defaults, key):
    """`defaults`, {models: {flag: value}}, for one flag -> words for its help."""
    words = "; ".join(f"{names}: {values[key]:g}" for names, values in defaults.items())
    return f"T = 20: {words}" if key in ("beta", "iterations", "lambda_every") else words


def add_flags(parser, folder, defaults):
    """The flags of every training of a router; `folder` says where it goes by default, `defaults`
    {models: {flag: value}} what they are at T = 20."""
    words = {key: in_words(defaults, key) for key in ("beta", "lr", "iterations", "batch_size")}
    parser.add_argument("--beta", type=command.finite,
                        help=f"weight of the router's usage in the loss ({words['beta']})")
    parser.add_argument("--target-cur", type=command.finite,
                        help="find the beta that leads to this CUR, a share like 0.4; --beta is "
                             "where the search starts")
    parser.add_argument("--tau", type=command.finite, default=0.1,
                        help="reuse at scores <= tau (0.1)")
    parser.add_argument("--lr", type=command.finite, help=f"AdamW's learning rate ({words['lr']})")
    parser.add_argument("--iterations", type=int, help="at least so many; one is a batch at one "
                        f"denoising step, and trajectories are finished ({words['iterations']})")
    parser.add_argument("--batch-size", type=int,
                        help=f"images or trajectories at once ({words['batch_size']})")
    parser.add_argument("--micro-batch", type=int,
                        help="of them, how many in memory at once (all; official: 8); same result")
    parser.add_argument("--out", type=command.path, help=f"run folder (default: {folder})")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, a finished one to more --iterations")


def add_start_flag(parser):
    parser.add_argument("--start", metavar="SCHEDULE", type=command.name,
                        help="a schedule to start from, like fora-paper:2 (default: random logits)")


LONG = 8  # lr x updates per row: in a shorter run logits may not have reached the threshold


def verdict(results):
    """What may be said of a run, from how its CUR moved."""
    if abs(results["cur"] - results["cur_before_last_quarter"]) >= 0.01:
        return "still moving"
    if results["lr_updates"] < LONG:
        return "too early to tell"
    if abs(results["cur"] - results["cur_at_start"]) < 0.005:
        return "where it started"
    return "settled"


def report(results, settings, out):
    """Prints what a run came to, and how to go on with it if it was not long enough."""
    cur, lr_updates, n = results["cur"], results["lr_updates"], results["trajectories"]
    target, moved = settings["target_cur"], cur - results["cur_before_last_quarter"]
    found, long_enough = target is None or abs(cur - target) < CLOSE, lr_updates >= LONG
    print(f"CUR {100 * cur:.1f} %, at the start {100 * results['cur_at_start']:.1f} %; it moved by "
          f"{100 * moved:+.1f} points in the last {n - n * 3 // 4} of {n} trajectories "
          f"({verdict(results)})")
    if target is not None:
        print(f"beta found: {results['beta']:.3g}"
              + ("" if found else f"; a CUR of {100 * target:g} % is not reached"))
    print(f"lr x updates per row {lr_updates:g}" + ("" if long_enough else
          f" (below {LONG}: rows may not have reached the threshold)"))
    if not long_enough or not found or verdict(results) == "still moving":
        more = 2 * n if long_enough else max(n + 1, math.ceil(LONG / settings["lr"]))
        print("to train longer: the same command with --resume --iterations "
              f"{more * results['iterations'] // n}")
    if results["peak_memory"]:
        print(f"peak memory {results['peak_memory'] / 2**30:.2f} GiB")
    print(f"{results['seconds']:.0f} s; wrote {out}/router.safetensors, router.png and log.jsonl")
