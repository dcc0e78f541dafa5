import numpy as np
import pytest
import torch

import uvit
from deepcache import DeepCache, FasterDiffusion, key_evaluations
from dpm_solver import SAMPLERS, DPMSolver
from samplers import Noise, denoise
from tests.small import tiny_uvit

STEPS = 8


def setting(dtype=torch.float32):
    """A network with four blocks beside the middle one, x_T of two images, and their condition."""
    network = tiny_uvit().to(dtype)
    return network, Noise(0, range(2)).start((2, 8, 8)).to(dtype), network.condition([0, 3])


def sampled(network, x, condition, cache=None, name="dpm-solver-2s"):
    return denoise(network, SAMPLERS[name](STEPS), x, condition, 1.4, cache)


class Replaced:
    """The whole network, always run in full, in which modules' inputs or outputs are replaced by
    those at the last key: what a cache of hidden states means, without saving any work."""

    def __init__(self, network, keys, inputs=(), outputs=()):
        self.network, self.keys, self.kept = network, keys, {}
        self.guidance_channels, self.i = network.guidance_channels, -1
        self.hooks = [module.register_forward_pre_hook(self.replace_input) for module in inputs]
        self.hooks += [module.register_forward_hook(self.replace_output) for module in outputs]

    def replace_input(self, module, args):
        return (self.replace(module, args[0]), *args[1:])

    def replace_output(self, module, args, output):
        return self.replace(module, output)

    def replace(self, module, value):
        if self.keys[self.i]:
            self.kept[module] = value
        return self.kept[module]

    def __call__(self, x, t, y, cache=None):
        self.i += 1
        return self.network(x, t, y)

    def remove(self):
        for hook in self.hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize("where", ["starts", "middles"])
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_deepcache_is_the_network_whose_deep_state_stands_still(where, depth):
    network, x, condition = setting()
    keys = key_evaluations(STEPS, where)
    replaced = Replaced(network, keys, inputs=[network.out_blocks[-depth]])
    expected = sampled(replaced, x, condition)
    replaced.remove()
    assert torch.equal(sampled(network, x, condition, DeepCache(keys, depth)), expected)
    assert not torch.allclose(expected, sampled(network, x, condition))


@pytest.mark.parametrize("where", ["starts", "middles"])
@torch.no_grad()
def test_faster_diffusion_is_the_network_whose_in_blocks_stand_still(where):
    network, x, condition = setting()
    keys = key_evaluations(STEPS, where)
    replaced = Replaced(network, keys, outputs=[*network.in_blocks, network.mid_block])
    expected = sampled(replaced, x, condition)
    replaced.remove()
    assert torch.equal(sampled(network, x, condition, FasterDiffusion(keys)), expected)


@pytest.mark.parametrize("make", [lambda keys: DeepCache(keys, 1), FasterDiffusion])
@torch.no_grad()
def test_with_keys_only_it_is_the_network(make):
    network, x, condition = setting()
    cache = make(key_evaluations(STEPS, "all"))
    assert torch.equal(sampled(network, x, condition, cache), sampled(network, x, condition))


# ------------------------------------------------------------------------------------------------
# What U-ViT takes away


@torch.no_grad()
def test_faster_diffusions_out_blocks_repeat_the_keys_prediction_bit_by_bit():
    network, x, condition = setting()
    cache = FasterDiffusion([True, False])
    t, other = torch.full((2,), 900.0), torch.full((2,), 300.0)
    y = condition[0][:2]
    first = network(x, t, y, cache.start(0))
    assert torch.equal(network(torch.randn_like(x), other, y.flip(0), cache.start(1)), first)


@torch.no_grad()
def test_with_keys_at_starts_it_is_ddim_of_half_the_evaluations():
    """The middle repeats the start's eps: x_0 stands still, and the second order is the first."""
    network, x, condition = setting(torch.float64)
    result = sampled(network, x, condition, FasterDiffusion(key_evaluations(STEPS, "starts")))
    half = DPMSolver(np.linspace(1000, 1, STEPS // 2 + 1), [1] * (STEPS // 2))
    expected = denoise(network, half, x, condition, 1.4)
    assert (result - expected).abs().max() < 1e-10
    assert (sampled(network, x, condition) - expected).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------
# What it costs


@torch.no_grad()
def test_blocks_and_bytes_are_counted():
    network, x, condition = setting()
    keys = key_evaluations(STEPS, "middles")
    assert keys == [True, True, False, True, False, True, False, True]
    deep, faster = DeepCache(keys, 1), FasterDiffusion(keys)
    ran = []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in network.blocks]
    for cache, expected in ((deep, 5 * 5 + 3 * 2), (faster, 5 * 5 + 3 * 2)):
        ran.clear()
        sampled(network, x, condition, cache)
        assert cache.blocks == len(ran) == expected
        assert cache.cur == 1 - expected / (STEPS * 5)
    for hook in hooks:
        hook.remove()
    state = 4 * 18 * 32 * 4  # rows, tokens, width, bytes of a number
    assert (deep.bytes, faster.bytes) == (state, 3 * state)


@pytest.mark.parametrize("where, depth, speedup", [
    ("starts", 1, 1.871), ("middles", 1, 1.721), ("starts", 2, 1.757), ("middles", 2, 1.633),
    ("starts", 3, 1.656), ("middles", 4, 1.483), ("starts", 14, 1.016),
    ("starts", None, 1.316), ("middles", None, 1.276),
])  # fmt: skip
def test_speed_up_of_the_published_network_by_arithmetic(where, depth, speedup):
    with torch.device("meta"):
        network = uvit.UViT(**uvit.SIZES["H/2"])
    keys = key_evaluations(20, where)
    cache = FasterDiffusion(keys) if depth is None else DeepCache(keys, depth)
    branches, rest = network.flops()
    assert 20 * (sum(branches) + rest) / cache.flops(network) == pytest.approx(speedup, abs=1e-3)


# ------------------------------------------------------------------------------------------------
# Bad input


def test_what_cannot_be_cached_is_refused():
    network, x, condition = setting()
    for depth in (0, 3):
        with pytest.raises(ValueError, match=f"from 1 to 2, the number of out blocks, not {depth}"):
            sampled(network, x, condition, DeepCache(key_evaluations(STEPS, "starts"), depth))
    for keys in ([], [False, True]):
        with pytest.raises(ValueError, match="first evaluation must be a key"):
            DeepCache(keys, 1)
    with pytest.raises(ValueError, match="not grid"):
        key_evaluations(20, "grid")


def test_evaluations_out_of_order_are_refused():
    cache = DeepCache([True, False, True], 1)
    with pytest.raises(ValueError, match="evaluation 1 of 3 does not follow 2"):
        cache.start(1)
    cache.start(0).start(1)
    with pytest.raises(ValueError, match="does not follow 1"):
        cache.start(0)


def test_a_cache_of_another_number_of_evaluations_is_refused():
    network, x, condition = setting()
    with pytest.raises(ValueError, match="6 steps does not fit a sampler of 8"):
        sampled(network, x, condition, DeepCache(key_evaluations(6, "starts"), 1))
