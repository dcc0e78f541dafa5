"""Three branches a block, prompts and every sampler: proxy, trainer and cache on a tiny
PixArt."""

import pytest
import torch
from safetensors.torch import load_file

import command
import models
import pixart
import proxy
import router as routers
import train_stepwise
from cache import Cache
from sample import denoise
from samplers import Noise, make_sampler

SAMPLERS = ("ddim", "ddpm", "dpm-solver++", "sa-solver")
PROMPTS = ["red apple", "dog", "", "a house by the sea"]
T, TAU, SCALE = 4, 0.5, 4.5


@pytest.fixture(scope="module")
def model():
    """A frozen PixArt with 16 tokens and 6 branches, every parameter N(0, 0.15^2)."""
    network = pixart.PixArt(input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2,
                            num_heads=2, caption_channels=16, model_max_length=5)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    network.eval().requires_grad_(False)
    return models.Model("tiny", network, "ddim", steps=T, guidance=SCALE, text="hashed")


def full_walk(model, sampler, x, condition, scores, noise):
    """x_T to x_0 with the soft cache, without forks."""
    kept = {}
    network = model.network
    for i, t in enumerate(sampler.timesteps):

        def mixed(k, branch, i=i):
            r, new = scores[i, k], branch()
            mix = new if i == 0 else r * new + (1 - r) * kept[k]
            if i == 0 or r > TAU:
                kept[k] = mix
            return mix

        both = torch.cat([x, x])
        output = network(both, torch.full((len(both),), t), *condition, cache=mixed)
        channels = min(network.guidance_channels, sampler.guidance_channels)
        cond, null = output[:, :channels].chunk(2)
        guided = null + SCALE * (cond - null)
        output = torch.cat([torch.cat([guided, guided]), output[:, channels:]], 1)
        x = sampler.step(output, i, x, noise)
    return x


@pytest.mark.parametrize("variant", ("leave-one-out", "cumulative"))
@pytest.mark.parametrize("name", SAMPLERS)
def test_lambda_is_that_of_whole_walks(model, name, variant):
    noise = Noise(0, range(2), 2)
    x, condition = noise.start(model.shape), model.condition(["red apple", "dog"])
    scores = torch.rand(T, 6, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    measured = proxy.image_error(model.network, make_sampler(name, T), x, condition, SCALE, scores,
                                 TAU, noise, variant)
    x0 = [full_walk(model, make_sampler(name, T), x, condition, scores, noise)]
    for i in range(1, T):
        masked = scores.clone()
        masked[i : i + 1 if variant == "leave-one-out" else T] = 1
        x0.append(full_walk(model, make_sampler(name, T), x, condition, masked, noise))
    others = x0[:1] * T if variant == "leave-one-out" else [*x0[2:], x0[0]]
    expected = [0] + [(a.double() - b.double()).square().mean().item()
                      for a, b in zip(x0[1:], others, strict=False)]
    assert measured.tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected[1:]) > 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_training_on_prompts_resumes_bitwise(model, name, tmp_path, monkeypatch):
    settings = dict(
        model="tiny", weights=None, sampler=name, steps=T, guidance=SCALE, seed=0, dtype=None,
        beta=1e-3, objective="iepo", proxy="leave-one-out", tau=TAU, lr=0.5, iterations=3 * T,
        lambda_every=2 * T, batch_size=3, micro_batch=2, prompts=None,
    )
    train_stepwise.train(model, settings, tmp_path / "whole", prompts=PROMPTS)
    save_state = command.save_state

    def save_and_stop(path, state):
        save_state(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "save_state", save_and_stop)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            train_stepwise.train(model, settings, tmp_path / "parts", resume, PROMPTS)
    monkeypatch.setattr(command, "save_state", save_state)
    train_stepwise.train(model, settings, tmp_path / "parts", True, PROMPTS)
    whole, parts = (load_file(tmp_path / run / "router.safetensors") for run in ("whole", "parts"))
    assert whole["logits"].shape == (T, 6) and torch.equal(whole["logits"], parts["logits"])
    file = routers.load(tmp_path / "whole" / "router.safetensors")
    file.check("tiny", name, T, 6)
    with pytest.raises(ValueError, match="is a router of tiny with"):
        file.check("tiny", SAMPLERS[SAMPLERS.index(name) - 1], T, 6)


def test_prompts_of_the_training_are_random_and_the_images_own(model):
    chunks = train_stepwise.chunks_of(model, make_sampler("ddim", T), 0, range(6), 4, 1, PROMPTS)
    labels = Noise(0, range(6), 1).labels(len(PROMPTS))
    y, mask = model.condition([PROMPTS[k] for k in labels])
    halves = [chunk.condition[0].chunk(2)[0] for chunk in chunks]
    assert torch.equal(torch.cat(halves), y[:6]) and len(set(labels.tolist())) > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_cache_counts_three_branches_a_block(model, name):
    schedule = routers.named("random:0.4", T, 6, 0)
    cache, noise = Cache(schedule), Noise(0, range(2))
    calls = []
    for block in model.network.blocks:
        for part in (block.attn, block.cross_attn, block.mlp):
            part.register_forward_hook(lambda *args: calls.append(args[0]))
    x = denoise(model.network, make_sampler(name, T), noise.start(model.shape),
                model.condition(["dog", ""]), SCALE, cache, noise)
    assert x.isfinite().all() and len(calls) == schedule.sum()
    assert cache.cur == pytest.approx(routers.cur(schedule))
    for block in model.network.blocks:
        for part in (block.attn, block.cross_attn, block.mlp):
            part._forward_hooks.clear()
