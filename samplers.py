"""The noise schedule, the samplers, and the walk along it from pure noise to an image.

    sampler = DDIM(20)
    noise = Noise(seed=0, numbers=range(8))
    x = denoise(network, sampler, noise.start((1, 28, 28)), condition, guidance=2.5)

A sampler is built from the number of steps T. It lists its `timesteps` in executed order, the
noisiest first, and `step(prediction, i, x, noise)` takes the network's prediction at step i to the
next x. A multistep solver may store earlier predictions in attributes, under two rules: step 0
resets them, and they are reassigned, never modified in place. Then copy.copy(sampler) is a
snapshot; the proxy relies on that. `guidance_channels` is how many leading channels the sampler's
official code guides, at most.

DDIM: Song et al. 2021, https://arxiv.org/abs/2010.02502. DDPM with learned variance (IDDPM):
Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672. DPM-Solver++: Lu et al. 2022,
https://arxiv.org/abs/2211.01095. SA-Solver: Xue et al. 2023, https://arxiv.org/abs/2309.05019.

Notation: B images, C channels of the latent (of the pixels, for digits), T steps; `alpha_bar` is
the share of signal: x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, with eps from N(0, I). The
last two samplers write alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha /
sigma) and h for the growth of lambda over a step. A prime marks what is after the step.
"""

import itertools
import math

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------
# The noise schedule, in float64

BETAS = np.linspace(1e-4, 0.02, 1000)  # linear, as DiT and PixArt were trained
ALPHA_BAR = np.cumprod(1 - BETAS)  # (1000,), timestep 0 the cleanest


def check_steps(steps):
    """Raises ValueError unless 2 <= steps <= 1000."""
    if not 2 <= steps <= len(BETAS):
        raise ValueError(f"steps must be from 2 to {len(BETAS)}, not {steps}")


def respaced(steps):
    """The official spacing of T of the 1,000 timesteps: from 0 to 999, evenly, rounded.

    -> timesteps (T,) in executed order, alpha_bar at each, and alpha_bar after the step from each
    (that of the next timestep executed; 1, no noise at all, after the last).
    Raises ValueError unless 2 <= steps <= 1000.
    """
    check_steps(steps)
    stride = (len(BETAS) - 1) / (steps - 1)
    # The official code adds the stride up instead of multiplying it, and the rounding of that sum
    # decides between two timesteps at some T (39 of the paper's tables is one).
    sums = itertools.accumulate([stride] * (steps - 1), initial=0.0)
    timesteps = np.array([round(value) for value in sums])[::-1]
    alpha_bar = ALPHA_BAR[timesteps]
    return timesteps.tolist(), alpha_bar, np.append(alpha_bar[1:], 1.0)


def time_uniform(steps):
    """The official grid of DPM-Solver++ and SA-Solver: from 999 down to 0, evenly, not rounded.

    -> (T + 1,): the T timesteps, and the end, at which the network is not evaluated. The official
    time t = (timestep + 1) / 1000 goes from 1 to 0.001.
    Raises ValueError unless 2 <= steps <= 1000.
    """
    check_steps(steps)
    return np.linspace(len(BETAS) - 1, 0, steps + 1)


def noise_levels(grid, alpha_bar=ALPHA_BAR, first=0):
    """alpha, sigma and lambda at timesteps that may be fractional: log alpha is interpolated
    between the whole ones, of which `first` is the cleanest."""
    log_alpha = np.interp(grid, first + np.arange(len(alpha_bar)), 0.5 * np.log(alpha_bar))
    sigma = np.sqrt(-np.expm1(2 * log_alpha))  # sqrt(1 - alpha^2), exact also for alpha near 1
    return np.exp(log_alpha), sigma, log_alpha - np.log(sigma)


# ------------------------------------------------------------------------------------------------
# Noise


class Noise:
    """One stream of Gaussian noise per image j in `numbers`, drawn on the CPU.

    The noise of image j at the start and at step i depends on (seed, j, i) alone, so that batch
    size, order, device, resuming and forking never change an image. Philox makes that a matter of
    addressing: (seed, j) is its key and the step a word of its counter. No two draws overlap, and
    there is no state to keep.

    `purpose` keeps apart the noise of images to look at (0), of training (1), of the proxy (2), and
    of a search for a schedule (3) and the images that it holds out (4).
    """

    def __init__(self, seed, numbers, purpose=0):
        self.seed, self.numbers, self.purpose = seed, list(numbers), purpose

    def start(self, shape, device="cpu"):
        """x_T: (B, *shape) float32."""
        return self._normal(shape, 0, device)

    def step(self, i, x):
        """Fresh noise for step i, shaped and placed like x (B, C, H, W)."""
        return self._normal(x.shape[1:], 1 + i, x.device).to(x.dtype)

    def labels(self, classes):
        """One random label an image, from 0 to classes - 1: (B,)."""
        return torch.tensor([self._stream(j, 1, 0).integers(classes) for j in self.numbers])

    def _normal(self, shape, word, device):
        draws = torch.from_numpy(np.stack([
            self._stream(j, 0, word).standard_normal(tuple(shape), np.float32) for j in self.numbers
        ]))
        if torch.device(device).type != "cuda":
            return draws.to(device)
        # From pinned memory the copy waits for its turn on the GPU, and the CPU does not.
        return draws.pin_memory().to(device, non_blocking=True)

    def _stream(self, j, kind, word):
        counter = [0, kind, self.purpose, word]  # the first word counts the numbers drawn
        return np.random.Generator(np.random.Philox(key=[self.seed, j], counter=counter))


# ------------------------------------------------------------------------------------------------
# Samplers


def split(prediction, x):
    """The network's output (2 B or B, C or 2 C, H, W) -> the noise (B, C, H, W) in x, and the
    variance channels, which are empty if the network predicts none."""
    prediction = prediction[: len(x)].to(x.dtype)  # of 2 B guided rows the conditional half
    return prediction[:, : x.shape[1]], prediction[:, x.shape[1] :]


def predict_x0(x, eps, alpha_bar):
    """Solves x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps for x_0."""
    return (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


class DDIM:
    """DDIM, equation 12 of its paper: eta = 0 adds no noise, eta = 1 as much as DDPM.

    x' = sqrt(alpha_bar') x_0 + sqrt(1 - alpha_bar' - sigma^2) eps + sigma z,
    sigma = eta sqrt((1 - alpha_bar') / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar').
    Raises ValueError for steps outside 2 .. 1000 or eta outside 0 .. 1.
    """

    guidance_channels = 3  # in the code of DiT and PixArt for this sampler and the next

    def __init__(self, steps, eta=0.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, not {eta}")
        self.timesteps, self.alpha_bar, self.alpha_bar_next = respaced(steps)
        a, a_next = self.alpha_bar, self.alpha_bar_next
        self.sigma = eta * np.sqrt((1 - a_next) / (1 - a)) * np.sqrt(1 - a / a_next)

    def step(self, prediction, i, x, noise=None):
        """One step: x (B, C, H, W) at timesteps[i] -> the next x. `noise` is needed if eta > 0."""
        a_next, sigma = self.alpha_bar_next[i], self.sigma[i]
        eps, _ = split(prediction, x)
        x0 = predict_x0(x, eps, self.alpha_bar[i])
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps
        return x + sigma * noise.step(i, x) if sigma > 0 else x


class DDPM:
    """Ancestral sampling with the variance that the network learned (IDDPM, section 3.1).

    x' ~ N(mean, exp(v log beta + (1 - v) log beta_tilde)): v in [0, 1] is the network's, and
    mean = (sqrt(alpha_bar') beta x_0 + sqrt(alpha) (1 - alpha_bar') x) / (1 - alpha_bar) and
    beta_tilde = beta (1 - alpha_bar') / (1 - alpha_bar) are those of q(x' | x, x_0), with
    alpha = alpha_bar / alpha_bar' and beta = 1 - alpha. The last step gives the mean.
    Raises ValueError for steps outside 2 .. 1000.
    """

    guidance_channels = 3

    def __init__(self, steps):
        self.timesteps, self.alpha_bar, self.alpha_bar_next = respaced(steps)
        a, a_next = self.alpha_bar, self.alpha_bar_next
        self.alpha = a / a_next
        self.beta = 1 - self.alpha
        beta_tilde = self.beta * (1 - a_next) / (1 - a)
        beta_tilde[-1] = beta_tilde[-2]  # it is 0 there, which has no logarithm
        self.log_beta, self.log_beta_tilde = np.log(self.beta), np.log(beta_tilde)

    def posterior_mean(self, x0, x, i):
        """The mean of q(x' | x, x_0) at step i."""
        a, a_next = self.alpha_bar[i], self.alpha_bar_next[i]
        from_x0 = math.sqrt(a_next) * self.beta[i] / (1 - a)
        return from_x0 * x0 + math.sqrt(self.alpha[i]) * (1 - a_next) / (1 - a) * x

    def log_variance(self, variance, i):
        """The network's variance channels, in [-1, 1] -> the log variance of step i."""
        v = (variance + 1) / 2
        return v * self.log_beta[i] + (1 - v) * self.log_beta_tilde[i]

    def step(self, prediction, i, x, noise):
        """One step: x (B, C, H, W) at timesteps[i] -> the next x.
        Raises ValueError if the network predicts no variance."""
        eps, variance = split(prediction, x)
        if variance.shape != x.shape:
            raise ValueError("ddpm needs a network that learned the variance (learn_sigma=True)")
        mean = self.posterior_mean(predict_x0(x, eps, self.alpha_bar[i]), x, i)
        if i == len(self.timesteps) - 1:
            return mean
        return mean + torch.exp(0.5 * self.log_variance(variance, i)) * noise.step(i, x)


class DPMSolverPlusPlus:
    """DPM-Solver++ 2M, algorithm 2 of its paper, with PixArt's settings: no noise, and second order
    from the predictions of x_0 at this step and the last.

    Without new noise x / sigma grows by exp(lambda) x_0 for each unit of lambda, so over a step

        x' = sigma' / sigma x + alpha' integral of exp(-u) x_0(lambda' - u) du, u from 0 to h.

    The x_0 of the middle of the step, on the line through the last two, stands for all of it:

        x' = sigma' / sigma x + alpha' (1 - exp(-h)) (x_0 + h / (2 h_last) (x_0 - x_0_last)).

    The first step has no last x_0, and the final one does without it if T < 10 (it is the longest
    by far): there x_0 stands alone, which is DDIM.

    `grid(T)` gives the timesteps and the end (T + 1,).
    Raises ValueError for steps outside 2 .. 1000.
    """

    guidance_channels = math.inf  # all

    def __init__(self, steps, grid=time_uniform):
        grid = grid(steps)
        self.timesteps = grid[:-1].tolist()
        alpha, sigma, lambda_ = noise_levels(grid)
        h = np.diff(lambda_)
        self.alpha_bar = alpha[:-1] ** 2
        self.from_x = sigma[1:] / sigma[:-1]
        self.from_x0 = -alpha[1:] * np.expm1(-h)
        self.ahead = np.append(0, h[1:] / (2 * h[:-1]))
        if steps < 10:
            self.ahead[-1] = 0

    def step(self, prediction, i, x, noise=None):
        """One step: x (B, C, H, W) at timesteps[i] -> the next x."""
        eps, _ = split(prediction, x)
        x0 = predict_x0(x, eps, self.alpha_bar[i])
        last = self.history[i - 1] if i > 0 else x0
        self.history = {i: x0}  # keyed by its step, so that a walk out of order fails
        middle = x0 + self.ahead[i] * (x0 - last)
        return self.from_x[i] * x + self.from_x0[i] * middle


class SASolver:
    """SA-Solver with PixArt's settings: predictor and corrector of second order, one evaluation a
    step, and noise in the middle of the way only.

    Noise of any strength tau leaves the distribution at each timestep as it is, if x_0 pulls harder
    in turn. With tau constant over a step and k = 1 + tau^2 (section 4 of the paper)

        x' = sigma' / sigma exp(-tau^2 h) x + sigma' sqrt(1 - exp(-2 tau^2 h)) z
             + alpha' integral of k exp(-k u) x_0(lambda' - u) du, u from 0 to h.

    x_0 held still gives the integral 1 - exp(-k h) times x_0; call the x' of this first order E.
    x_0 that moves by D over the step adds, to leading order in h,

        x' = E + alpha' k h / 2 D.

    The predictor guesses D = h / h_last (x_0 - x_0_last). The network then sees the x' predicted,
    and from its x_0' the corrector takes D = x_0' - x_0, with E and its noise as they were. That
    corrected x' is where the next step starts; the network does not see it (mode PEC).
    The first step has no last x_0, and the final one is PixArt's first-order step: there D = 0.

    tau is 1 in steps to a time t = (timestep + 1) / 1000 from 0.2 to 0.8, and 0 in all others, so
    also in the final one; `tau` puts another number for the 1. `grid` as in DPMSolverPlusPlus.
    Raises ValueError for steps outside 2 .. 1000.
    """

    guidance_channels = math.inf  # all

    def __init__(self, steps, tau=1.0, grid=time_uniform):
        grid = grid(steps)
        self.timesteps = grid[:-1].tolist()
        alpha, sigma, lambda_ = noise_levels(grid)
        h = np.diff(lambda_)
        t = (grid[1:] + 1) / len(BETAS)
        tau = np.where((t >= 0.2) & (t <= 0.8), tau, 0.0)
        k = 1 + tau**2
        self.alpha_bar = alpha[:-1] ** 2
        self.from_x = sigma[1:] / sigma[:-1] * np.exp(-(tau**2) * h)
        self.from_x0 = -alpha[1:] * np.expm1(-k * h)
        self.from_noise = sigma[1:] * np.sqrt(-np.expm1(-2 * tau**2 * h))
        self.from_change = alpha[1:] * k * h / 2
        self.ahead = np.concatenate([[0], h[1:-1] / h[:-2], [0]])

    def step(self, prediction, i, x, noise):
        """One step: x (B, C, H, W) predicted for timesteps[i] -> x predicted for the next."""
        eps, _ = split(prediction, x)
        x0 = last = predict_x0(x, eps, self.alpha_bar[i])
        if i > 0:
            first_order, last = self.history[i - 1]
            x = first_order + self.from_change[i - 1] * (x0 - last)  # corrected
        first_order = self.from_x[i] * x + self.from_x0[i] * x0
        if self.from_noise[i] > 0:
            first_order = first_order + self.from_noise[i] * noise.step(i, x)
        self.history = {i: (first_order, x0)}  # keyed by its step, as above
        return first_order + self.from_change[i] * self.ahead[i] * (x0 - last)


SAMPLERS = {"ddpm": DDPM, "dpm-solver++": DPMSolverPlusPlus, "sa-solver": SASolver}


def make_sampler(name, steps):
    """`ddim`, `ddim:ETA`, `ddpm`, `dpm-solver++` or `sa-solver` -> a sampler of T steps.
    Raises ValueError for another name."""
    kind, colon, eta = name.partition(":")
    try:
        if kind == "ddim":
            return DDIM(steps, float(eta) if colon else 0.0)
    except ValueError as error:
        hint = "; use ddim:ETA, ETA from 0 to 1" if colon else ""
        raise ValueError(f"sampler {name}: {error}{hint}") from error
    if name in SAMPLERS:
        return SAMPLERS[name](steps)
    raise ValueError(
        f"unknown sampler {name}: use ddim, ddim:ETA, ddpm, dpm-solver++ or sa-solver"
    )


def sampler_name(name):
    """The one name of a sampler, however it was written: ddim:0 is ddim, ddim:1.0 ddim:1."""
    kind, _, eta = name.partition(":")
    try:
        if kind != "ddim" or not eta:
            return name
        return f"{kind}:{float(eta)}".removesuffix(".0") if float(eta) else kind
    except ValueError:  # no number: `make_sampler` says so
        return name


# ------------------------------------------------------------------------------------------------
# The walk


def guided(network, x, t, condition, scale, cache=None, channels=math.inf):
    """Classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598), one batch
    of [condition, null]: eps = null + scale (cond - null) on the first min(network.
    guidance_channels, channels) channels; the rest is returned unguided. Both limits exist because
    the official DiT guides 3 of 4 channels, and the official DPM-Solver++ all.

    x (B, C, H, W), t a number, condition a tuple for 2 B rows -> (2 B, C_out, H, W). An x of 2 B
    rows is both halves of a batch; the network sees the first, as in the official code.
    """
    half = x[: len(condition[0]) // 2]
    x = torch.cat([half, half])
    t = torch.full((len(x),), t, device=x.device)
    output = network(x, t, *condition, cache=cache)
    channels = min(network.guidance_channels, channels)
    cond, null = output[:, :channels].chunk(2)
    eps = null + scale * (cond - null)
    # Both halves are returned because the training loss compares all rows.
    return torch.cat([torch.cat([eps, eps]), output[:, channels:]], dim=1)


def unguided(network, x, t, condition, cache=None):
    """The same without guidance, of the conditional half alone: -> (B, C_out, H, W)."""
    t = torch.full((len(x),), t, device=x.device)
    return network(x, t, *(part[: len(x)] for part in condition), cache=cache)


@torch.no_grad()
def walk(network, sampler, x, condition, guidance, cache=None, noise=None, first=0):
    """The denoising loop, as a generator: yields x (B, C, H, W) after each step from `first` on.
    Where `guidance` is None, the network sees the conditional half only.

    To start at step `first` with a multistep solver, pass a copy.copy of the sampler taken at that
    step: it carries the solver's history. Raises ValueError for a cache of another number of steps.
    """
    T = len(sampler.timesteps)
    if getattr(cache, "steps", T) != T:
        raise ValueError(f"a schedule of {cache.steps} steps does not fit a sampler of {T}")
    for i in range(first, T):
        if cache is not None:
            cache.start(i)
        t = sampler.timesteps[i]
        prediction = unguided(network, x, t, condition, cache) if guidance is None else guided(
            network, x, t, condition, guidance, cache, sampler.guidance_channels)
        x = sampler.step(prediction, i, x, noise)
        yield x


def denoise(network, sampler, x, condition, guidance, cache=None, noise=None, first=0):
    """The denoising loop, to its end: x (B, C, H, W) before step `first` -> x_0."""
    for after in walk(network, sampler, x, condition, guidance, cache, noise, first):
        x = after
    return x
