"""Assignment 3, routers: what you hand in. See README.md in this folder.

Notation: T denoising steps, K branches, B images, N tokens, D width; `z` a logit, `p` = sigmoid(z)
its score, `r` the gate that mixes a branch's new and kept output.
"""

import torch  # noqa: F401

from cache import SoftCache  # noqa: F401 (you may want it)
from samplers import guided  # noqa: F401


def gumbel_sigmoid(logits, u, temperature):
    """A random gate near 0 or 1: the sigmoid of (z + logistic noise) / temperature.

    logits (K,); u (K,), uniform in (0, 1), the source of the noise; temperature a float > 0
    -> r (K,) in (0, 1), differentiable in the logits.
    """
    raise NotImplementedError("task3_1: gumbel_sigmoid")


def straight_through(logits, tau):
    """A hard gate with a soft gradient: exactly 1 where sigmoid(z) > tau and exactly 0 elsewhere,
    but with the derivative of sigmoid(z).

    logits (K,), tau a float in (0, 1) -> r (K,), each number 0.0 or 1.0.
    """
    raise NotImplementedError("task3_2: straight_through")


def row_gradient(logits, u, temperature, new, kept, upstream, costs, beta):
    """The derivative of the loss with respect to one row's logits, by hand, without autograd:

        L = E(m_1, ..., m_K) + beta sum_k costs_k sigmoid(z_k)
        m_k = r_k new_k + (1 - r_k) kept_k,   r = gumbel_sigmoid(z, u, temperature).

    logits, u, costs (K,); new, kept and upstream are lists of K tensors (B, N, D): a branch's new
    output, its kept one, and dE / dm_k, which includes all later effects of m_k in the network
    -> dL / dz (K,).
    """
    raise NotImplementedError("task3_3: row_gradient")


def sdt_trajectory(
    network, sampler, x, condition, guidance, rows, relax, optimizer, costs, tau, beta, lambda_
):
    """One trajectory of step-wise denoising training, with any relaxation and a price per branch:

        L_i = lambda_i MSE(student, teacher) + beta sum_k costs_k sigmoid(z_ik)

    for i = 1 .. T - 1, with one optimiser step after each L_i. Row 0 computes everything and has no
    loss.

    network is frozen; x (B, C, H, W) is x_T, condition a tuple for 2 B rows; rows is a list of
    T - 1 parameters (K,), rows[i - 1] for step i; relax(i, logits) -> r (K,), to be called once for
    each step i > 0; costs (K,); lambda_ a list of T floats, entry 0 unused
    -> the losses, a list of T floats (0.0 for step 0), and x_0 (B, C, H, W) without a graph.
    """
    raise NotImplementedError("task3_4: sdt_trajectory")


def budgeted_schedule(scores, cur):
    """A hard schedule that reuses exactly round(cur T K) branch evaluations: those with the lowest
    scores, none in row 0. Raises ValueError if so many reuses are impossible.

    scores (T, K), cur a float -> bool (T, K), True: compute.
    """
    raise NotImplementedError("task3_5: budgeted_schedule")


def budgeted_scores(logits, budget):
    """Scores that sum to the budget: sigmoid(z_k + b), with the one shift b for which the sum over
    k is `budget`. As b depends on all logits, the gradient must flow through b too.

    logits (K,); budget a float in (0, K) -> scores (K,), differentiable in the logits.
    Raises ValueError for another budget.
    """
    raise NotImplementedError("task3_6: budgeted_scores")
