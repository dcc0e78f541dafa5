"""The router: a T x K table of scores that says, at each denoising step and for each branch of
the network, compute it or reuse the cached output (HarmoniCa,
https://arxiv.org/abs/2410.01723, section 3).

Row 0 is the first step executed, the noisiest; it always computes everything. A schedule is a bool
tensor (T, K), True: compute. A trained router and every heuristic end up as one:

    schedule = router.load("checkpoints/digits_router.safetensors").schedule()
    schedule = router.fora(steps=20, branches=16, interval=2)
    router.heat_map(scores, tau, timesteps, branches).save("router.png")

The `.pt` routers of HarmoniCa's and of Learning-to-Cache's own code load too, and `export` writes
one from ours.

Letters: T denoising steps, K cacheable branches, tau the threshold, CUR the cache utilisation
ratio: the share of the T x K branch evaluations that reuse.
"""

import argparse
import colorsys
import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

import command

LIMIT = 5.0  # logits are kept in [-5, 5]; row 0's are fixed at 5

# ------------------------------------------------------------------------------------------------
# The learnable router


class Router(nn.Module):
    """T rows of K logits, each row a parameter of its own. An optimiser that is stepped after one
    row's loss finds gradients on that row only, so moments and step counts of the others stand
    still. (One (T, K) parameter would be wrong: momentum keeps moving rows without a gradient.)

    Logits start at N(0, 1), drawn from `seed`. Row 0 is fixed: it is not a parameter.
    """

    def __init__(self, steps, branches, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(steps, branches, generator=generator).clamp(-LIMIT, LIMIT)
        self.register_buffer("first", torch.full((branches,), LIMIT))  # (K,)
        self.rows = nn.ParameterList([nn.Parameter(row.clone()) for row in logits[1:]])

    def scores(self, i):
        """Row i of the table: (K,) in (0, 1)."""
        return torch.sigmoid(self.rows[i - 1] if i > 0 else self.first)

    def clamp(self, i):
        """Brings row i back into [-5, 5], after an optimiser step."""
        with torch.no_grad():
            self.rows[i - 1].clamp_(-LIMIT, LIMIT)

    def start_from(self, schedule):
        """Sets the logits to 3 where a schedule (T, K) computes and to -3 where it reuses. At tau =
        0.1 the threshold is a logit of -2.2: a branch that reuses is 0.8 away from it, one that
        computes 5.2."""
        with torch.no_grad():
            for row, computes in zip(self.rows, schedule[1:], strict=True):
                row.copy_(torch.where(computes, 3.0, -3.0))

    def logits(self):
        """The whole table, detached: (T, K)."""
        return torch.stack([self.first, *self.rows]).detach()


# ------------------------------------------------------------------------------------------------
# Schedules


def threshold(scores, tau):
    """Scores (T, K) -> schedule: compute where the score is above tau, and everywhere in row 0.
    Raises ValueError unless 0 < tau < 1."""
    if not 0 < tau < 1:
        raise ValueError(f"tau must be between 0 and 1, not {tau}")
    schedule = scores > tau
    schedule[0] = True
    return schedule


def cur(schedule):
    """Cache utilisation ratio of a schedule: reused branch evaluations / (T x K)."""
    return 1 - schedule.float().mean().item()


def none(steps, branches):
    """No cache: computes everything."""
    return torch.ones(steps, branches, dtype=torch.bool)


def fora(steps, branches, interval):
    """FORA (Selvaraju et al. 2024, https://arxiv.org/abs/2407.01425) as its released DiT code has
    it: a step computes all branches or none. Counted from the last step executed backwards, every
    interval-th computes, and so does the first: CUR 45 % at T = 20, interval 2."""
    index = torch.arange(steps - 1, -1, -1)  # the respaced timestep index, executed order
    return _whole_steps((index == steps - 1) | (index % interval == 0), branches)


def fora_paper(steps, branches, interval):
    """FORA as the papers report it: counted from the first step executed, every interval-th step
    computes: CUR 50 % at T = 20, interval 2."""
    return _whole_steps(torch.arange(steps) % interval == 0, branches)


def _whole_steps(computes, branches):
    """One decision a step (T,) -> the same for every branch (T, K)."""
    return computes[:, None].expand(-1, branches).clone()


def random(steps, branches, cur, seed=0):
    """Reuses drawn evenly over all rows but the first, as many as the CUR asks for.
    Raises ValueError for a CUR that leaves less than row 0 to compute."""
    reuses, free = round(cur * steps * branches), (steps - 1) * branches
    if not 0 <= reuses <= free:
        raise ValueError(f"a CUR of {cur} is not from 0 to {free / (steps * branches):.3f}")
    generator = torch.Generator().manual_seed(seed)
    schedule = none(steps, branches)
    schedule[1:].view(-1)[torch.randperm(free, generator=generator)[:reuses]] = False
    return schedule


def named(name, steps, branches, seed=0):
    """`none`, `fora:N`, `fora-paper:N` or `random:CUR` -> a schedule.
    Raises ValueError for another name or a number out of range."""
    kind, _, value = name.partition(":")
    try:
        if name == "none":
            return none(steps, branches)
        if kind == "random":
            return random(steps, branches, float(value), seed)
        if kind in ("fora", "fora-paper") and int(value) >= 1:
            return (fora if kind == "fora" else fora_paper)(steps, branches, int(value))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"schedule {name}: {error}") from error
    raise ValueError(f"unknown schedule {name}: use none, fora:N, fora-paper:N or random:CUR")


# ------------------------------------------------------------------------------------------------
# Files


@dataclasses.dataclass
class RouterFile:
    """What a router file holds: logits (T, K) and `about`, a dict of strings (model, sampler,
    steps, guidance, tau, beta, objective, proxy, seed, iterations, cur)."""

    path: str
    logits: torch.Tensor
    about: dict

    @property
    def tau(self):
        """The threshold that the router was trained for."""
        return float(self.about["tau"])

    def schedule(self, tau=None):
        """The hard schedule (T, K), at the router's own tau unless another is given."""
        return threshold(torch.sigmoid(self.logits), self.tau if tau is None else tau)

    def check(self, model, sampler, steps, branches):
        """Raises ValueError if the router was trained for another model, sampler or T. Of a router
        that does not name its model only the others are checked."""
        about = self.about
        named = model if about["model"] == UNNAMED else about["model"]
        trained = (named, about["sampler"], *self.logits.shape)
        if trained != (model, sampler, steps, branches):
            raise ValueError(
                f"{self.path} is a router of {about['model']} with {about['sampler']}, "
                f"T = {self.logits.shape[0]}, K = {self.logits.shape[1]}; it cannot be used for "
                f"{model} with {sampler}, T = {steps}, K = {branches}"
            )


def save(path, logits, **about):
    """Writes a router file: safetensors, `logits` (T, K) and the settings it was trained with."""
    metadata = {key: str(value) for key, value in about.items()}
    data = to_bytes({"logits": logits.float().contiguous()}, metadata)
    # The library writes its JSON header in random order: sort it, so that equal routers are equal
    # files. The first 8 bytes are the header's length, to which it is padded with spaces.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(
        json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    with command.replacing(path) as temporary:
        temporary.write_bytes(data[:8] + header.encode().ljust(end - 8) + data[end:])


def load(path):
    """Reads a router file: safetensors, or `.pt` as the official code saves it.
    Raises FileNotFoundError, or ValueError if it is not a whole one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no router file at {path}")
    if Path(path).suffix == ".pt":
        logits, about = read_official(path)
    else:
        try:
            with safe_open(path, framework="pt") as file:
                logits, about = file.get_tensor("logits"), file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a router file, or not a whole one: {error}") from error
    if logits.dim() != 2 or not torch.isfinite(logits).all():
        raise ValueError(f"{path} is not a router file: its logits are not a finite (T, K) table")
    for key, kind in (("model", str), ("sampler", str), ("guidance", float), ("tau", float)):
        try:
            kind(about[key])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a router file: it does not tell its {key}") from error
    return RouterFile(str(path), logits, about)


# ------------------------------------------------------------------------------------------------
# The official code's files
#
# HarmoniCa's and Learning-to-Cache's code saves a dict: `routers`, the rows "0.prob", "1.prob", ...
# of K logits each; `opt`, the optimiser; `args`, the flags as an argparse.Namespace. Rows are
# numbered by respaced timestep index there, so that the last is the first step executed.
#
# The two differ in one rule. Learning-to-Cache trains the even rows only: its odd ones are left as
# they were drawn, and steps of odd index always compute. HarmoniCa trains all rows but the last,
# which it sets to 5.

ALWAYS = 100.0  # a logit whose score is 1 in float32, above every tau
UNNAMED = "an unnamed model"
OFFICIAL_MODELS = {("DiT-XL/2", 256): "dit256", ("DiT-XL/2", 512): "dit512"}


def read_official(path):
    """An official `.pt` -> logits (T, K) in executed order, and `about`.

    Nothing is unpickled but tensors, plain containers and argparse.Namespace. Raises ValueError.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        raise ValueError(
            f"{path} is not a router file: it is damaged, or it holds pickled objects other than "
            "tensors and an argparse.Namespace, which are not loaded, as they could run any code"
        ) from error
    try:
        rows, args = content["routers"], content.get("args")
        logits = torch.stack([rows[f"{i}.prob"] for i in reversed(range(len(rows)))]).float()
        if isinstance(args, dict):  # written by `export`
            return logits, {str(key): str(value) for key, value in args.items()}
        args = {} if args is None else vars(args)
        learning_to_cache = "lambda_c" not in args and not (logits[0] == LIMIT).all()
        if learning_to_cache:
            odd = torch.arange(len(logits)).flip(0) % 2 == 1  # by respaced index
            logits[odd] = ALWAYS
        return logits, about_official(args, learning_to_cache)
    except Exception as error:  # whatever else a dict, its rows and its flags may be
        raise ValueError(
            f"{path} is not a router file of HarmoniCa or Learning-to-Cache: it has no `routers` "
            "with rows 0.prob, 1.prob, ... of equal length"
        ) from error


def about_official(args, learning_to_cache):
    """The official training code's flags, a dict, by our names. What they do not tell is as
    published: DDIM; tau 0.1, at 512 x 512 Learning-to-Cache's 0.9; HarmoniCa was trained with
    guidance 1.5, Learning-to-Cache without."""
    model, size, tau = (args.get(key) for key in ("model", "image_size", "ste_threshold"))
    if tau is None:
        tau = 0.9 if learning_to_cache and size == 512 else 0.1
    about = {
        "model": OFFICIAL_MODELS.get((model, size), f"{model} at {size}") if model else UNNAMED,
        "sampler": "ddim",
        "guidance": args.get("cfg_scale", 1.0 if learning_to_cache else 1.5),
        "tau": tau,
        "objective": "learning-to-cache" if learning_to_cache else "iepo",
    }
    if "l1" in args:
        about["beta"] = args["l1"]
    return {key: str(value) for key, value in about.items()}


def export(path, file):
    """Writes a router (a RouterFile) as a `.pt` that the official sampling code loads.

    HarmoniCa's code then takes the same decisions; Learning-to-Cache's computes all of each step of
    odd index, whatever the router says. `args` holds our settings as a plain dict: with a Namespace
    there, torch from 2.6 on refuses the file when the official code loads it.
    """
    rows = {f"{i}.prob": row for i, row in enumerate(file.logits.flip(0))}
    command.save_state(path, {"routers": rows, "args": file.about})


# ------------------------------------------------------------------------------------------------
# The picture

REUSED = (150, 190, 226)  # blue


def heat_map(scores, tau, timesteps, branches):
    """Draws the router: a row per step, named by its timestep, a column per branch, named; scores
    (T, K) in [0, 1]. Computed cells go from pale to dark orange with the score, reused ones
    (score <= tau; never in row 0) are blue. -> a Pillow image."""
    T, K = scores.shape
    schedule = threshold(scores, tau)
    cell = max(6, min(24, 1200 // max(T, K)))
    font = ImageFont.load_default(max(10, cell * 2 // 3))
    left, top, bottom = 64, 80, 56
    image = Image.new("RGB", (left + max(K * cell, 420) + 16, top + T * cell + bottom), "white")
    draw = ImageDraw.Draw(image)
    for i in range(T):
        for k in range(K):
            colour = score_colour(scores[i, k].item()) if schedule[i, k] else REUSED
            x, y = left + k * cell, top + i * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
    every = -(-14 // cell)  # name every row and column that the font has room for
    for i in range(0, T, every):
        y = top + i * cell + cell // 2
        draw.text((left - 8, y), str(timesteps[i]), "black", font, anchor="rm")
    for k in range(0, K, every):
        name = Image.new("RGB", (top - 6, font.size + 4), "white")
        ImageDraw.Draw(name).text((0, 0), branches[k], "black", font)
        image.paste(name.rotate(90, expand=True), (left + k * cell, 2))
    draw.text((4, top - 18), "timestep", "black", ImageFont.load_default(11))
    legend = (
        f"blue: reused, scores up to tau = {tau:g} (CUR {100 * cur(schedule):.1f} %)\n"
        "orange: computed, the darker the higher the score"
    )
    draw.text((left, top + T * cell + 10), legend, "black", ImageFont.load_default(14))
    return image


def score_colour(score):
    """A score in [0, 1] -> RGB from pale to dark orange."""
    red, green, blue = colorsys.hsv_to_rgb(0.07, 0.15 + 0.8 * score, 1 - 0.3 * score)
    return round(255 * red), round(255 * green), round(255 * blue)
