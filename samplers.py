"""The noise schedule and the samplers that walk along it, from pure noise to an image.

A sampler is built from the number of steps T and lists `timesteps` in executed order, the noisiest
first. `step(prediction, i, x, noise)` takes what the network said of x at step i to the next x. A
solver with history may keep it in attributes, as long as step 0 starts it afresh and it replaces
them instead of changing them in place: then copy.copy(sampler) is a snapshot of it.

DDIM: Song et al. 2021, https://arxiv.org/abs/2010.02502. DDPM with learned variance (IDDPM):
Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672.

Letters: B images, C channels of the latent (of the pixels, for digits), T steps; `alpha_bar` is the
share of signal: x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, with eps from N(0, I).
"""

import itertools
import math

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------
# The noise schedule, in float64

BETAS = np.linspace(1e-4, 0.02, 1000)  # linear, as DiT and PixArt were trained
ALPHA_BAR = np.cumprod(1 - BETAS)  # (1000,), timestep 0 the cleanest


def respaced(steps):
    """The official spacing of T of the 1,000 timesteps: from 0 to 999, evenly, rounded.

    -> timesteps (T,) in executed order, alpha_bar at each, and alpha_bar after the step from each
    (that of the next timestep executed; 1, no noise at all, after the last).
    Raises ValueError unless 2 <= steps <= 1000.
    """
    if not 2 <= steps <= len(BETAS):
        raise ValueError(f"steps must be from 2 to {len(BETAS)}, not {steps}")
    stride = (len(BETAS) - 1) / (steps - 1)
    # The official code adds the stride up instead of multiplying it, and the rounding of that sum
    # decides between two timesteps at some T (39 of the paper's tables is one).
    sums = itertools.accumulate([stride] * (steps - 1), initial=0.0)
    timesteps = np.array([round(value) for value in sums])[::-1]
    alpha_bar = ALPHA_BAR[timesteps]
    return timesteps.tolist(), alpha_bar, np.append(alpha_bar[1:], 1.0)


# ------------------------------------------------------------------------------------------------
# Noise


class Noise:
    """One stream of Gaussian noise per image, drawn on the CPU. What image j gets at the start and
    at step i depends on (seed, j, i) alone, so that batch size, order, device, resuming and forking
    never change an image. Philox makes that a matter of addressing: (seed, j) is its key and the
    step a word of its counter, so no two draws ever overlap and there is no state to keep.

    `purpose` keeps apart the noise of images to look at (0), of training (1) and of the proxy (2).
    """

    def __init__(self, seed, images, purpose=0):
        self.seed, self.images, self.purpose = seed, list(images), purpose

    def start(self, shape, device="cpu"):
        """x_T: (B, *shape) float32."""
        return self._normal(shape, word=0).to(device)

    def step(self, i, x):
        """Fresh noise for step i, shaped and placed like x (B, C, H, W)."""
        return self._normal(x.shape[1:], word=1 + i).to(x)

    def labels(self, classes):
        """One random label an image, from 0 to classes - 1: (B,)."""
        return torch.tensor([self._stream(j, 1, 0).integers(classes) for j in self.images])

    def _normal(self, shape, word):
        draws = [
            self._stream(j, 0, word).standard_normal(tuple(shape), np.float32) for j in self.images
        ]
        return torch.from_numpy(np.stack(draws))

    def _stream(self, j, kind, word):
        counter = [0, kind, self.purpose, word]  # the first word counts the numbers drawn
        return np.random.Generator(np.random.Philox(key=[self.seed, j], counter=counter))


# ------------------------------------------------------------------------------------------------
# Samplers


def split(prediction, x):
    """The network's output (2 B or B, C or 2 C, H, W) -> the noise (B, C, H, W) in x, and the
    variance channels, which are empty if the network predicts none."""
    prediction = prediction[: len(x)].to(x.dtype)
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

    def __init__(self, steps):
        self.timesteps, self.alpha_bar, self.alpha_bar_next = respaced(steps)
        a, a_next = self.alpha_bar, self.alpha_bar_next
        self.alpha = a / a_next
        self.beta = 1 - self.alpha
        beta_tilde = self.beta * (1 - a_next) / (1 - a)
        beta_tilde[-1] = beta_tilde[-2]  # it is 0 there, and its logarithm would be infinite
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


def make_sampler(name, steps):
    """`ddim`, `ddim:ETA` or `ddpm` -> a sampler of T steps. Raises ValueError for another name."""
    kind, _, eta = name.partition(":")
    try:
        if kind == "ddim":
            return DDIM(steps, float(eta or 0))
    except ValueError as error:
        raise ValueError(f"sampler {name}: {error}") from error
    if name == "ddpm":
        return DDPM(steps)
    raise ValueError(f"unknown sampler {name}: use ddim, ddim:ETA or ddpm")
