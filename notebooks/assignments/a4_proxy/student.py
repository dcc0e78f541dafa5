"""Assignment 4, the proxy: what you hand in. See README.md in this folder.

Notation: T denoising steps, K branches, G groups of branches, B images, C channels, H and W sides.
`scores` (T, K) are a router's, in (0, 1); `condition` is a tuple for 2 B rows; `noise` is the
stream that stochastic samplers draw from: pass it on.
"""

import torch  # noqa: F401

from cache import SoftCache  # noqa: F401 (you may want it)
from samplers import denoise, guided, predict_x0, split, walk  # noqa: F401


def groups_of(branches, by):
    """The branches, grouped. A branch's name is its kind and its block, like "attn 3".

    branches, K names (`network.branches`); by "kind" or "block" -> the groups' names, a list of G
    in the order of their first branch, and groups, bool (G, K). Raises ValueError for another `by`.
    """
    raise NotImplementedError("task4_1: groups_of")


def masked_errors(network, sampler, x, condition, guidance, scores, tau, groups, noise=None):
    """The error proxy of each step and each group, image by image:

        lambda(i, g, b) = mean over C, H, W of (x_0[b] - x_0^(i,g)[b])^2

    x_0 is made with the soft cache and the scores as they are. For x_0^(i,g) the scores of step i
    in the columns of group g are set to exactly 1. No gradients. The run to x_0 is made once; the
    run to x_0^(i,g) is forked from it at step i: T + G T (T - 1) / 2 evaluations of the network.

    x (B, C, H, W) is x_T, groups bool (G, K) -> (T, G, B) float64; row 0 is 0.
    """
    raise NotImplementedError("task4_2: masked_errors")


def standard_error(samples):
    """The standard error of a mean over B independent images: the standard deviation of the mean,
    estimated from the same images, with an unbiased variance.

    samples (..., B) float64, B >= 2 -> (...) float64.
    """
    raise NotImplementedError("task4_3: standard_error")


def images_needed(samples, relative):
    """The smallest number of images for which every mean's standard error is expected to be at most
    `relative` times that mean, estimated from a pilot. Means that are 0 (row 0) do not count.

    samples (..., B) of the pilot, none negative; relative a float > 0 -> int, at least 1.
    """
    raise NotImplementedError("task4_4: images_needed")


def truncated_proxy(network, sampler, x, condition, guidance, scores, tau, horizon, noise=None):
    """A cheaper proxy: a fork with the whole row i masked makes at most `horizon` evaluations, at
    the steps i, i + 1, ... At the last of these steps the predicted x_0 (samplers.predict_x0) is
    compared with that of the unmasked run at the same step, by the mean square over everything.
    T + sum_i min(horizon, T - i) evaluations, the sum over i > 0.

    sampler a DDIM; horizon an int >= 1 -> (T,) float64; row 0 is 0.
    """
    raise NotImplementedError("task4_5: truncated_proxy")


def sparse_proxy(network, sampler, x, condition, guidance, scores, tau, rows, noise=None):
    """Another cheaper proxy: the exact lambda at some rows, and between them a straight line in log
    lambda. T + sum over rows of (T - i) evaluations.

    rows, ascending ints from 1 to T - 1, both included -> (T,) float64; row 0 is 0.
    Raises ValueError for other rows.
    """
    raise NotImplementedError("task4_6: sparse_proxy")
