"""The router: a T x K table of scores that says, at each denoising step and for each branch of
the network, compute it or reuse its last output (HarmoniCa, https://arxiv.org/abs/2410.01723,
section 3).

Row 0 is the first step executed, the noisiest. It always computes everything. A schedule is a bool
tensor (T, K), True: compute. A trained router and every heuristic become one:

    schedule = router.load("checkpoints/digits_router.safetensors").schedule()
    schedule = router.fora(steps=20, branches=16, interval=2)

Notation: T denoising steps, K cacheable branches (the argument `branches`), tau the threshold. CUR,
the cache utilisation ratio, is the share of the T x K branch evaluations that reuse.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

import checkpoint
import command
from samplers import sampler_name

LIMIT = 5.0  # logits are kept in [-5, 5]; row 0's are fixed at 5

# ------------------------------------------------------------------------------------------------
# The learnable router


class Router(nn.Module):
    """The learnable scores: sigmoid of T rows of K logits, which start at N(0, 1) from `seed`.

    Row 0 is fixed. Every other row is a parameter of its own, so that AdamW keeps moments and a
    step count for each row and skips the rows without a gradient. (With one (T, K) parameter,
    momentum would keep moving rows whose gradient is zero.)
    """

    def __init__(self, steps, branches, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(steps, branches, generator=generator).clamp(-LIMIT, LIMIT)
        self.register_buffer("first", torch.full((branches,), LIMIT))  # row 0 (K,), not trained
        self.rows = nn.ParameterList([nn.Parameter(row.clone()) for row in logits[1:]])

    def scores(self, i):
        """Row i of the table: (K,) in (0, 1)."""
        return torch.sigmoid(self.rows[i - 1] if i > 0 else self.first)

    def clamp(self, i):
        """Brings row i back into [-5, 5]. Call after an optimiser step."""
        with torch.no_grad():
            self.rows[i - 1].clamp_(-LIMIT, LIMIT)

    def start_from(self, schedule):
        """Sets the logits to 3 where a schedule (T, K) computes and to -3 where it reuses. At
        tau = 0.1 the threshold is a logit of -2.2, so a reusing branch is 0.8 away from it and a
        computing one 5.2."""
        with torch.no_grad():
            for row, computes in zip(self.rows, schedule[1:], strict=True):
                row.copy_(torch.where(computes, 3.0, -3.0))

    def logits(self):
        """The whole table, detached: (T, K)."""
        return torch.stack([self.first, *self.rows]).detach()


# ------------------------------------------------------------------------------------------------
# Schedules


def threshold(scores, tau):
    """Scores (T, K) -> schedule (T, K): compute where the score is above tau, and everywhere in
    row 0. Raises ValueError unless 0 < tau < 1."""
    if not 0 < tau < 1:
        raise ValueError(f"tau must be between 0 and 1, not {tau}")
    schedule = scores > tau
    schedule[0] = True  # there is nothing to reuse yet
    return schedule


def cur(schedule):
    """Cache utilisation ratio of a schedule: reused branch evaluations / (T x K)."""
    return 1 - schedule.float().mean().item()


def none(steps, branches):
    """No cache: computes everything."""
    return torch.ones(steps, branches, dtype=torch.bool)


def fora(steps, branches, interval):
    """FORA (Selvaraju et al. 2024, https://arxiv.org/abs/2407.01425) as its released DiT code
    counts: a step computes all branches or none. Every interval-th step computes, counted backwards
    from the last, and so does the first. At T = 20 and interval 2 the CUR is 45 %."""
    index = torch.arange(steps - 1, -1, -1)  # the respaced timestep index, executed order
    return _whole_steps((index == steps - 1) | (index % interval == 0), branches)


def fora_paper(steps, branches, interval):
    """FORA as the papers report it: every interval-th step computes, counted from the first. At
    T = 20 and interval 2 the CUR is 50 %."""
    return _whole_steps(torch.arange(steps) % interval == 0, branches)


def _whole_steps(computes, branches):
    """One decision a step (T,) -> the same for every branch (T, K)."""
    return computes[:, None].expand(-1, branches).clone()


def random(steps, branches, cur, seed=0):
    """As many reuses as the CUR asks for, at random places outside row 0.
    Raises ValueError for a CUR below 0 or above (T - 1) / T: row 0 always computes."""
    reuses, free = round(cur * steps * branches), (steps - 1) * branches
    if not 0 <= reuses <= free:
        raise ValueError(f"a CUR of {cur} is not from 0 to {free / (steps * branches):.3f}")
    generator = torch.Generator().manual_seed(seed)
    schedule = none(steps, branches)
    # Exactly as many as asked for: with a coin for each place the CUR would vary.
    schedule[1:].view(-1)[torch.randperm(free, generator=generator)[:reuses]] = False
    return schedule


def named(name, steps, branches, seed=0):
    """`none`, `fora:N`, `fora-paper:N` or `random:CUR` -> a schedule.
    Raises ValueError for another name or a number out of range."""
    kind, _, value = name.partition(":")
    usual = "use none, fora:N, fora-paper:N or random:CUR"
    try:
        if name == "none":
            return none(steps, branches)
        if kind == "random":
            return random(steps, branches, float(value), seed)
        if kind in ("fora", "fora-paper") and int(value) >= 1:
            return (fora if kind == "fora" else fora_paper)(steps, branches, int(value))
    except (ValueError, OverflowError) as error:  # the latter for random:inf
        raise ValueError(f"schedule {name}: {error}; {usual}") from error
    raise ValueError(f"unknown schedule {name}: {usual}")


# ------------------------------------------------------------------------------------------------
# Files


@dataclasses.dataclass
class RouterFile:
    """What a router file holds: logits (T, K), and `about`, a dict of strings that say how they
    were trained (model, sampler, steps, guidance, tau, beta, objective, proxy, seed, ...)."""

    path: str
    logits: torch.Tensor
    about: dict

    @property
    def tau(self):
        """The threshold that the router was trained for."""
        return float(self.about["tau"])

    @property
    def forecast(self):
        """The order of the cache's forecast that the router was made for."""
        return int(self.about.get("forecast", 0))

    def schedule(self, tau=None):
        """The hard schedule (T, K), at the router's own tau unless another is given."""
        return threshold(torch.sigmoid(self.logits), self.tau if tau is None else tau)

    def check(self, model, sampler, steps, branches):
        """Raises ValueError if the router was trained for another model, sampler or T. A file that
        does not name its model (some official ones do not) may belong to any."""
        about = self.about
        name = model if about["model"] == checkpoint.UNNAMED else about["model"]
        trained = (name, sampler_name(about["sampler"]), *self.logits.shape)
        if trained != (model, sampler_name(sampler), steps, branches):
            raise ValueError(
                f"{self.path} is a router of {about['model']} with {about['sampler']}, "
                f"T = {self.logits.shape[0]}, K = {self.logits.shape[1]}; it cannot be used for "
                f"{model} with {sampler}, T = {steps}, K = {branches}"
            )


def save(path, logits, **about):
    """Writes a router file: safetensors, `logits` (T, K) and the settings it was trained with."""
    metadata = {key: str(value) for key, value in about.items()}
    data = to_bytes({"logits": logits.float().contiguous()}, metadata)
    # The library writes its JSON header in random order. Sorted, equal routers are equal files.
    # The first 8 bytes are the header's length; spaces fill it up.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(
        json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    with command.replacing(path) as temporary:
        temporary.write_bytes(data[:8] + header.encode().ljust(end - 8) + data[end:])


def load(path):
    """Reads a router file: safetensors, or `.pt` or `.pth` as official codes save it.
    Raises FileNotFoundError, or ValueError if it is not a whole one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no router file at {path}")
    if Path(path).suffix in (".pt", ".pth"):
        logits, about = checkpoint.read_official_router(path)
    else:
        try:
            with safe_open(path, framework="pt") as file:
                logits, about = file.get_tensor("logits"), file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a router file, or not a whole one: {error}") from error
    if logits.dim() != 2 or not logits.is_floating_point() or not logits.isfinite().all():
        raise ValueError(f"{path} is not a router file: its logits are not a finite (T, K) table")
    for key in ("model", "sampler"):
        if key not in about:
            raise ValueError(f"{path} is not a router file: it does not say its {key}")
    for key in ("guidance", "tau"):
        try:
            finite = math.isfinite(float(about[key]))
        except (KeyError, ValueError):
            finite = False
        if not finite:
            raise ValueError(f"{path} is not a router file: it does not say its {key}")
    if about.get("forecast", "0") not in ("0", "1", "2"):
        raise ValueError(f"{path} is not a router file: its forecast is not 0, 1 or 2")
    return RouterFile(str(path), logits, about)
