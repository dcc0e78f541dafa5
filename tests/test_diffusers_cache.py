"""A router in a pipeline of diffusers, against our own sampling with the same weights."""

import types
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)

import checkpoint
import dit
import models
import router
from cache import Cache
from diffusers_cache import apply_router_cache, branch_modules, remove_router_cache
from samplers import Noise, denoise, make_sampler

from .small import tiny_dit
from .test_dit import diffusers_dit
from .test_pixart import diffusers_pixart, inputs, tiny_pixart

T = 6


def save_router(path, branches, steps=T, model=checkpoint.UNNAMED, sampler="ddim", forecast=0):
    """A router file that reuses about half. -> its schedule (T, K)."""
    logits = torch.randn(steps, branches, generator=torch.Generator().manual_seed(0))
    router.save(path, logits, model=model, sampler=sampler, guidance=1.5, tau=0.5,
                forecast=forecast)
    schedule = router.load(path).schedule()
    assert not schedule[-1].all() and 0.2 < router.cur(schedule) < 0.6
    return schedule


def count_executed(transformer):
    """Counts from now on how often each branch really runs: -> a list of K."""
    counts = [0] * len(branch_modules(transformer))
    for k, module in enumerate(branch_modules(transformer)):
        layer = module.net if hasattr(module, "net") else module.to_q
        for inner in layer if isinstance(layer, torch.nn.ModuleList) else [layer]:
            inner.register_forward_hook(lambda *_, k=k: counts.__setitem__(k, counts[k] + 1))
            break
    return counts


def relative_error(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------
# Against our own sampling


class Theirs:
    """A transformer of diffusers as a network of ours; it gets no cache of ours."""

    def __init__(self, transformer, guidance_channels):
        self.transformer, self.guidance_channels = transformer, guidance_channels

    def __call__(self, x, t, y, mask=None, cache=None):
        assert cache is None
        if mask is None:
            return self.transformer(x, timestep=t, class_labels=y).sample
        return self.transformer(x, encoder_hidden_states=y, timestep=t,
                                encoder_attention_mask=mask.long()).sample


def both(kind):
    """Our network, diffusers' transformer with its weights, and a condition for three images."""
    if kind == "dit":
        network = tiny_dit(1)
        return network, diffusers_dit(network), network.condition([0, 3, 1])
    network = tiny_pixart(1)
    _, _, y, mask = inputs(network)
    return network, diffusers_pixart(network), network.condition(y, mask)


@pytest.mark.parametrize("kind, sampler, forecast", [
    ("dit", "ddim", 0), ("dit", "ddim", 2), ("pixart", "dpm-solver++", 0), ("pixart", "ddim", 1),
])  # fmt: skip
@torch.no_grad()
def test_takes_the_decisions_of_our_sampling_and_gives_its_images(tmp_path, kind, sampler,
                                                                  forecast):
    """The scheduler being ours. What is reused does not run."""
    network, transformer, condition = both(kind)
    K = len(network.branches)
    schedule = save_router(tmp_path / "r.safetensors", K, sampler=sampler, forecast=forecast)
    cache = apply_router_cache(transformer, tmp_path / "r.safetensors")
    executed = count_executed(transformer)
    ours, solver = Cache(schedule, forecast), make_sampler(sampler, T)
    theirs = Theirs(transformer, network.guidance_channels)
    for seed in (0, 1):
        x = Noise(seed, range(3)).start((2, 8, 8))
        result = denoise(theirs, solver, x, condition, 1.5)
        expected = denoise(network, solver, x, condition, 1.5, ours)
        assert relative_error(result, expected) < 1e-4
        assert relative_error(denoise(network, solver, x, condition, 1.5), expected) > 1e-3
        assert cache.computed == ours.computed == executed
        assert cache.computed == [(seed + 1) * n for n in schedule.sum(0).tolist()]
        assert cache.reused == ours.reused and cache.cur == pytest.approx(router.cur(schedule))
        assert cache.bytes == 0


# ------------------------------------------------------------------------------------------------
# In a pipeline


class Ours(torch.nn.Module):
    """Our network in the place of the pipeline's transformer. `cache` counts its own steps: a whole
    trajectory each time."""

    def __init__(self, network, transformer, cache):
        super().__init__()
        self.network, self.config, self.cache, self.calls = network, transformer.config, cache, 0
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, x, timestep, class_labels):
        cache = self.cache and self.cache.start(self.calls % self.cache.steps)
        self.calls += 1
        return types.SimpleNamespace(sample=self.network(x, timestep, class_labels, cache=cache))


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    """A tiny pipeline of the kind of `dit256`, its router at "r.safetensors", and a function that
    makes images (N, H, W, 3) with it."""
    monkeypatch.chdir(tmp_path)
    small = dict(hidden_size=32, depth=2, num_heads=2, patch_size=8)
    monkeypatch.setitem(dit.SIZES, "XL/2", small)
    network = tiny_dit(3, **small, input_size=32, in_channels=4, num_classes=1000)
    torch.manual_seed(0)
    decoder = AutoencoderKL(block_out_channels=(32,), layers_per_block=1)
    # Latents of up to about 40 become grey values: no picture hides what its latents are.
    decoder.decode = lambda latents: types.SimpleNamespace(sample=latents[:, :3] / 40)
    pipe = DiTPipeline(diffusers_dit(network), decoder, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.network = network
    pipe.schedule = save_router("r.safetensors", 4, model="dit256")
    return pipe


def draw(pipe, labels=(3, 999), guidance=2.0, steps=T):
    return pipe(list(labels), guidance, torch.Generator().manual_seed(5), steps, "np").images


def test_a_pipeline_over_several_calls(pipe):
    """Other batches, guidance on and off: each as a pipeline with our network and cache."""
    transformer = pipe.transformer
    cache = apply_router_cache(transformer, "r.safetensors")
    executed = count_executed(transformer)
    stand_in = Ours(pipe.network, transformer, Cache(pipe.schedule))
    for labels, guidance in (((3, 999), 2.0), ((3, 999), 2.0), ((7,), 2.0), ((7, 1), 1.0),
                             ((1, 2, 3), 4.0)):
        images = draw(pipe, labels, guidance)
        pipe.transformer = stand_in
        expected = draw(pipe, labels, guidance)
        pipe.transformer = transformer
        assert np.ptp(images) > 0.1 and ((images > 0) & (images < 1)).mean() > 0.9
        np.testing.assert_allclose(images, expected, atol=1e-4)
        assert cache.computed == stand_in.cache.computed == executed
    assert cache.computed == [5 * n for n in pipe.schedule.sum(0).tolist()]


def test_removal_leaves_the_pipeline_as_it_was(pipe):
    before, weights = draw(pipe), pipe.transformer.state_dict()
    remove_router_cache(pipe.transformer)  # nothing is there
    cache = apply_router_cache(pipe.transformer, "r.safetensors")
    cached = draw(pipe)
    assert not np.allclose(cached, before, atol=1e-3)
    remove_router_cache(pipe.transformer)
    computed = list(cache.computed)
    assert np.array_equal(draw(pipe), before) and len(draw(pipe, steps=2 * T)) == 2
    assert cache.computed == computed
    after = pipe.transformer.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[k], weights[k]) for k in after)
    apply_router_cache(pipe.transformer, "r.safetensors")
    assert np.array_equal(draw(pipe), cached)


@pytest.mark.parametrize("step", [0, 2, T - 1])
@pytest.mark.parametrize("where", ["module", "scheduler"])
def test_after_an_interruption_a_call_begins_afresh(pipe, where, step, monkeypatch):
    """Within a pass, or between two, which looks like a trajectory that was too short."""
    apply_router_cache(pipe.transformer, "r.safetensors")
    expected, calls = draw(pipe), []

    def interrupt(*args, **kwargs):
        calls.append(None)
        if len(calls) == step + 1:
            raise KeyboardInterrupt

    if where == "module":
        handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(interrupt)
    else:
        take = pipe.scheduler.step
        monkeypatch.setattr(pipe.scheduler, "step", lambda *a: interrupt() or take(*a))
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, (5, 6))  # other images
    handle.remove() if where == "module" else monkeypatch.setattr(pipe.scheduler, "step", take)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert np.array_equal(draw(pipe), expected)
    lines = [str(line.message) for line in told if "trajectory" in str(line.message)]
    assert len(lines) == (where == "scheduler" and step < T - 1)
    assert all(f"ended after {step + 1} of {T} steps" in line for line in lines)


@pytest.mark.parametrize("kind, spacing", [
    (DDIMScheduler, "leading"), (DDIMScheduler, "trailing"),
    (DPMSolverMultistepScheduler, "linspace"),
])  # fmt: skip
def test_another_number_of_steps_fails(pipe, kind, spacing):
    """At once or at the end. Where it passes, one or two too few, the next call tells it."""
    pipe.scheduler = kind(timestep_spacing=spacing)
    cache = apply_router_cache(pipe.transformer, "r.safetensors")
    expected = draw(pipe, [3], 1.0)
    for steps in (3, T - 1, T + 1, 2 * T):
        short = True
        try:
            draw(pipe, [3], 1.0, steps)
            assert steps == T - 1 and cache.step == steps - 1
        except ValueError as error:
            short = False
            assert f"use num_inference_steps={T}" in str(error) and "\n" not in str(error)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert np.array_equal(draw(pipe, [3], 1.0), expected)  # and goes on well
        assert any(f"use num_inference_steps={T}" in str(line.message) for line in told) == short


# ------------------------------------------------------------------------------------------------
# What is refused


def refused(words, *args):
    with pytest.raises(ValueError, match=words) as caught:
        apply_router_cache(*args)
    assert "\n" not in str(caught.value)


def test_a_transformer_of_another_class(pipe):
    flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8,
                                  num_attention_heads=2, joint_attention_dim=8,
                                  pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))
    words = "DiTTransformer2DModel or PixArtTransformer2DModel, not for a "
    refused(words + "FluxTransformer2DModel", flux, "r.safetensors")
    refused(words + "DiTPipeline", pipe, "r.safetensors")
    refused(words + "AutoencoderKL", pipe.vae, "r.safetensors")


def test_a_router_of_another_model(pipe):
    for name, words in (
        ("dit512", "is a router of dit512, and this transformer is another: sample_size is 32, "
                   "not 64"),
        ("pixart256", "router of pixart256, .* is another: it is a DiTTransformer2DModel"),
        ("digits", "router of digits, .* another: sample_size is 32, not 28, patch_size is"),
        ("DiT-B/2 at 256", "unknown model DiT-B/2 at 256: use digits"),
    ):
        save_router("other.safetensors", 4, model=name)
        refused(words, pipe.transformer, "other.safetensors")
    save_router("other.safetensors", 56, model="dit256")
    refused("dit256 with K = 56 branches, this transformer has 4", pipe.transformer,
            "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no router file at nothing"):
        apply_router_cache(pipe.transformer, "nothing.safetensors")
    assert np.array_equal(draw(pipe), draw(pipe))  # nothing was applied


def test_a_router_of_another_pixart(tmp_path):
    """Only alpha 1024 has micro-conditions; its config leaves open whether."""
    path = tmp_path / "r.safetensors"
    save_router(path, 84, model="sigma1024")
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(caption_channels=4096)
    refused("of sigma1024, .* another: use_additional_conditions is True, not False$", transformer,
            path)
    save_router(path, 84, model="pixart1024")
    apply_router_cache(transformer, path)


def test_a_second_router(pipe):
    apply_router_cache(pipe.transformer, "r.safetensors")
    refused("has a router already: remove_router_cache first", pipe.transformer, "r.safetensors")
    draw(pipe)


@torch.no_grad()
def test_a_pass_after_one_that_failed_begins_a_trajectory(pipe):
    """Also at a lower timestep, as with another scheduler."""
    cache = apply_router_cache(pipe.transformer, "r.safetensors")
    x, y = torch.ones(2, 4, 32, 32), torch.tensor([1, 2])
    for t, step in ((999, 0), (840, 1), (700, 2), (840, 0), (700, 1)):
        if (t, step) == (840, 0):
            with pytest.raises(TypeError):  # within the pass, after step 0 has begun
                pipe.transformer(x, torch.tensor([999, 999]), None)
        pipe.transformer(x, torch.full((2,), t), y)
        assert cache.step == step


@torch.no_grad()
def test_passes_that_are_not_a_walk(pipe):
    """Chunks of an MLP, rows at different timesteps, a batch that changes on the way: each would
    give wrong images."""
    transformer, y = pipe.transformer, torch.tensor([1, 2])
    apply_router_cache(transformer, "r.safetensors")
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    transformer(x, torch.tensor([999, 999]), y)
    with pytest.warns(match="after 1 of 6 steps"), pytest.raises(
        ValueError, match="step 0 of T = 6 is at timestep 700, far from 999"
    ):
        transformer(x[:1], torch.tensor([700]), y[:1])
    with pytest.raises(ValueError, match=r"are at different timesteps: \[999, 700\]"):
        transformer(x, torch.tensor([999, 700]), y)
    for block in transformer.transformer_blocks:
        block.set_chunk_feed_forward(8, 1)
    with pytest.raises(ValueError, match="branch 1 runs where 2 should.*without chunks"):
        transformer(x, torch.tensor([999, 999]), y)


def test_the_names_of_models_have_networks():
    for name in models.MODELS:
        network = models.bare_network(name)
        assert all(weight.is_meta for weight in network.parameters())
        assert network.input_size == {"digits": 28, "emoji": 32}.get(name) or (
            8 * network.input_size == int("".join(c for c in name if c.isdigit())))
