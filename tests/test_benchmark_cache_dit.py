"""The comparison with cache-dit, which a stand-in plays: what is counted, refused and put back."""

import contextlib
import sys
import types
from unittest import mock

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import benchmark_cache_dit, gpu
from experiments.benchmark import random_model

T, DEPTH = 4, 3
COMPUTED = [1, 1, 0, 1]  # fora:2


def small():
    """Networks of equal sizes: ours, diffusers'."""
    network = random_model(dict(hidden_size=32, depth=DEPTH, num_heads=2, input_size=8,
                                patch_size=2)).network
    theirs = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4,
                                   out_channels=8, patch_size=2, sample_size=8, num_layers=DEPTH)
    return network, theirs.eval()


class StandIn(types.ModuleType):
    """Does to a network what cache-dit 1.5.3 does: steps that it does not compute run the first
    block only, and disable_cache leaves three attributes behind. It computes `shift` steps late."""

    def __init__(self, shift=0):
        super().__init__("cache_dit")
        self.shift, self.calls = shift, []

    def DBCacheConfig(self, **settings):
        self.settings = settings
        return settings

    def enable_cache(self, network, cache_config):
        plain, mask = network.forward, cache_config["steps_computation_mask"]

        def forward(*args):
            computes = mask[(self.step - self.shift) % len(mask)]
            self.step += 1
            first = network.transformer_blocks[:1]
            with (contextlib.nullcontext() if computes
                  else mock.patch.object(network, "transformer_blocks", first)):
                return plain(*args)

        network.forward, network._is_patched = forward, True
        network._norm1_emb = network.transformer_blocks[0].norm1.emb
        self.calls.append("enable")

    def refresh_context(self, network):
        self.step = 0
        self.calls.append("refresh")

    def disable_cache(self, network):
        self.calls.append("disable")


@pytest.fixture
def compare(monkeypatch):
    """Compares small networks: -> what speed_ups returns, the stand-in, diffusers' network."""

    def run(stand_in):
        network, theirs = small()
        monkeypatch.setitem(sys.modules, "cache_dit", stand_in)
        monkeypatch.setattr(benchmark_cache_dit, "STEPS", T)
        monkeypatch.setattr(benchmark_cache_dit, "networks", lambda *_: (network, theirs))
        before = set(vars(theirs)), set(theirs.state_dict())
        try:
            return benchmark_cache_dit.speed_ups(DEPTH, torch.float32, "cpu", 2), network
        finally:
            assert (set(vars(theirs)), set(theirs.state_dict())) == before
            assert theirs.forward.__func__ is DiTTransformer2DModel.forward
            assert not any(block._forward_hooks for block in theirs.transformer_blocks)

    return run


def counted(theirs, blocks):
    """What PyTorch counts in one row and step of diffusers' DiT with its first `blocks` blocks."""
    with (mock.patch.object(theirs, "transformer_blocks", theirs.transformer_blocks[:blocks]),
          sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad()):
        theirs(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([5]))
    return counter.get_total_flops()


def test_both_are_held_against_what_really_ran(compare):
    stand_in = StandIn()
    found, network = compare(stand_in)
    assert stand_in.settings["steps_computation_mask"] == COMPUTED
    assert stand_in.settings["num_inference_steps"] == T
    assert stand_in.settings["steps_computation_policy"] == "static"
    # Counted, warmed up and in two rounds: four trajectories, each begun anew.
    assert stand_in.calls == ["enable", *["refresh"] * 4, "disable"]
    each, rest = network.flops()
    _, ours = found["ours"]
    assert ours == pytest.approx(T * (sum(each) + rest) / (3 * sum(each) + T * rest))
    _, theirs = found["cache-dit"]
    full, first = (counted(small()[1], blocks) for blocks in (DEPTH, 1))
    assert theirs == pytest.approx(T * full / (3 * full + first))
    assert all(real > 0 for real, _ in found.values())


def test_other_steps_than_ours_are_refused(compare):
    with pytest.raises(ValueError, match=r"fora:2; its steps ran \[3, 3, 3, 1\]"):
        compare(StandIn(shift=1))


@pytest.mark.parametrize("depth, reason", [(3, "cache-dit cannot be imported"),
                                           (1, "2 blocks or more")])
def test_without_it_nothing_is_measured(monkeypatch, depth, reason):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(gpu.NotMeasured, match=reason):
        gpu.measure_cache_dit(depth, "float32", "cpu", 1)
