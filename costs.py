"""What it costs to reuse: measured at the steps of images made without a cache.

    uncached = Uncached(Batch(model, sampler, guidance, noise, items))
    weights = [0.0] + [uncached.sensitivity(i) for i in range(1, T)]
    costs = [uncached.step_costs(j, order, weights) for j in range(T)]  # for budget.by_steps

The squared error of one step's prediction says little: early errors grow on the way to the image,
and late ones do not. So it is weighted by the step's sensitivity,

    sensitivity(i) = squared error of the final image / squared error of the prediction at step i,

both measured when step i alone repeats all outputs of step i - 1. The errors of one run of reuse
lag behind in the same direction. So their roots add up, not their squares:

    cost = (sum over the run of sqrt(sensitivity(i) x squared error(i)))^2.

Notation: B images, T denoising steps, K branches, j a computed step, i a later one that reuses.
"""

import copy
import math

from cache import Cache, forecast
from proxy import squared_error
from samplers import denoise, guided, split


class Batch:
    """B images and how they come about: noise, items, and x_0 without a cache."""

    def __init__(self, model, sampler, guidance, noise, items):
        self.model, self.sampler, self.guidance, self.noise = model, sampler, guidance, noise
        self.condition = model.condition(items)
        self.x = self.noise.start(model.shape, model.device)
        self.full = self.denoise()

    def denoise(self, cache=None):
        return self.go_on(self.x, self.sampler, cache, first=0)

    def go_on(self, x, sampler, cache, first):
        """x (B, C, H, W) before step `first`, and a copy of the sampler made there -> x_0."""
        return denoise(self.model.network, sampler, x, self.condition, self.guidance, cache,
                       self.noise, first)

    def predict(self, x, i, cache):
        """The guided prediction at step i."""
        return guided(self.model.network, x, self.sampler.timesteps[i], self.condition,
                      self.guidance, cache, self.sampler.guidance_channels)

    def error(self, schedule, order):
        """The mean squared error of the images under a schedule."""
        return squared_error(self.denoise(Cache(schedule, order)), self.full)


def choose_items(model, noise):
    """A random label or prompt for each image of the noise: a list."""
    choices = model.prompts() or range(model.network.num_classes)
    return [choices[n] for n in noise.labels(len(choices)).tolist()]


class Replay:
    """A cache for one evaluation: it gives the outputs {k: output} and computes the others, which
    it adds to them."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, k, branch):
        if k not in self.outputs:
            self.outputs[k] = branch()
        return self.outputs[k]


class Uncached:
    """The uncached steps of a batch, and what other outputs would change there. Lists of T: `x`
    before a step, `samplers` as they are there, `outputs` {k: output}, `predictions` (B, C, H, W).
    """

    def __init__(self, batch):
        self.batch, self.T = batch, len(batch.sampler.timesteps)
        self.x, self.samplers, self.outputs, self.predictions = [], [], [], []
        x, sampler = batch.x, copy.copy(batch.sampler)
        for i in range(self.T):
            outputs = {}
            prediction = batch.predict(x, i, Replay(outputs))
            self.x.append(x)
            self.samplers.append(copy.copy(sampler))
            self.outputs.append(outputs)
            self.predictions.append(split(prediction, x)[0])
            x = sampler.step(prediction, i, x, batch.noise)

    def sensitivity(self, i):
        """Error of the final image / error of the prediction, when step i repeats step i - 1."""
        x, sampler = self.x[i], copy.copy(self.samplers[i])
        prediction = self.batch.predict(x, i, Replay(dict(self.outputs[i - 1])))
        error = squared_error(split(prediction, x)[0], self.predictions[i])
        x = sampler.step(prediction, i, x, self.batch.noise)
        final = self.batch.go_on(x, sampler, None, i + 1)
        return squared_error(final, self.batch.full) / error if error else 0.0

    def prediction_error(self, i, outputs):
        """The squared error of step i's prediction with these outputs, the others computed."""
        prediction = self.batch.predict(self.x[i], i, Replay(outputs))
        return squared_error(split(prediction, self.x[i])[0], self.predictions[i])

    def step_costs(self, j, order, sensitivity, longest=19):
        """If step j and the one `gap` steps later compute: the cost of the steps between them, for
        gap = 1 ... longest + 1. The steps before j are taken to compute at the same distance.
        Long gaps are measured too, because steps that only reuse are cheap and costs extrapolated
        from short gaps mislead."""
        costs = []
        for gap in range(1, min(longest + 1, self.T - j) + 1):
            computed = [s for s in range(j - order * gap, j + 1, gap) if s >= 0]
            root = 0.0
            for i in range(j + 1, j + gap):
                outputs = {k: forecast([(s, self.outputs[s][k]) for s in computed], i)
                           for k in self.outputs[j]}
                root += math.sqrt(sensitivity[i] * self.prediction_error(i, outputs))
            costs.append(root**2)
        return costs

    def branch_costs(self, j, k, sensitivity, longest=3):
        """The same for branch k alone, which repeats its output of step j."""
        roots = [0.0]
        for i in range(j + 1, min(j + longest + 1, self.T)):
            # Branches before k are as they are without a cache; those after it feel the change.
            outputs = {before: self.outputs[i][before] for before in range(k)}
            outputs[k] = self.outputs[j][k]
            roots.append(roots[-1] + math.sqrt(sensitivity[i] * self.prediction_error(i, outputs)))
        return [root**2 for root in roots]
