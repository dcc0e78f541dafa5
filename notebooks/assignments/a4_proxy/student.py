"""Assignment 4, the proxy: what you hand in. See README.md in this folder.

Letters: T denoising steps, K branches, G groups of branches, B images, C channels, H and W sides.
`scores` (T, K) are a router's, in (0, 1); `condition` is a tuple for 2 B rows; `noise` is the
stream that stochastic samplers draw from, to be handed on.
"""

import torch  # noqa: F401

from cache import SoftCache  # noqa: F401 (you may want it)
from sample import denoise, guided, walk  # noqa: F401
from samplers import predict_x0, split  # noqa: F401


def groups_of(branches, by):
    """Which branches belong together. A branch's name is its kind and its block, like "attn 3".

    branches, K names (`network.branches`); by "kind" or "block" -> the groups' names, a list of G
    in the order in which they first appear, and groups, bool (G, K). Raises ValueError for another
    `by`.
    """
    raise NotImplementedError("task4_1: groups_of")


def masked_errors(network, sampler, x, condition, guidance, scores, tau, groups, noise=None):
    """The error proxy of each step and each group, image by image:

        lambda(i, g, b) = mean over C, H, W of (x_0[b] - x_0^(i,g)[b])^2

    x_0 is made with the soft cache and the scores as they are, x_0^(i,g) with the scores of step i
    in the columns of group g set to exactly 1, and all others as they are. No gradients. The walk
    of x_0 is made once; that of x_0^(i,g) is forked from it at step i: T + G T (T - 1) / 2
    evaluations of the network.

    x (B, C, H, W) is x_T, groups bool (G, K) -> (T, G, B) float64, row 0 being 0.
    """
    raise NotImplementedError("task4_2: masked_errors")


def standard_error(samples):
    """How uncertain a mean over B independent images is: the standard deviation of the mean,
    estimated from the same images without bias in the variance.

    samples (..., B) float64, B >= 2 -> (...) float64.
    """
    raise NotImplementedError("task4_3: standard_error")


def images_needed(samples, relative):
    """The least number of images for which the standard error of every mean is expected to be at
    most `relative` times that mean, judged by a pilot. Means that are 0 (row 0) do not count.

    samples (..., B), the pilot's, none negative; relative a float > 0 -> int, at least 1.
    """
    raise NotImplementedError("task4_4: images_needed")


def truncated_proxy(network, sampler, x, condition, guidance, scores, tau, horizon, noise=None):
    """A cheaper proxy: a fork with the whole row i masked makes at most `horizon` evaluations, at
    the steps i, i + 1, ... Then the x_0 that the network predicts at the last of these steps
    (samplers.predict_x0) is compared with the one of the unmasked walk at the same step, by the
    mean square over everything. T + sum_i min(horizon, T - i) evaluations, the sum over i > 0.

    sampler a DDIM; horizon an int >= 1 -> (T,) float64, row 0 being 0.
    """
    raise NotImplementedError("task4_5: truncated_proxy")


def sparse_proxy(network, sampler, x, condition, guidance, scores, tau, rows, noise=None):
    """Another one: the exact lambda at some rows, and between them a straight line in log lambda.
    T + sum over rows of (T - i) evaluations.

    rows, ascending ints from 1 to T - 1, both included -> (T,) float64, row 0 being 0.
    Raises ValueError for other rows.
    """
    raise NotImplementedError("task4_6: sparse_proxy")
