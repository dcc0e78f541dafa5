"""Three branches a block, prompts and every sampler: proxy, trainer and cache on a tiny
PixArt."""

import pytest
import torch
from safetensors.torch import load_file

import command
import models
import pixart
import router as routers
import train_stepwise
from cache import Cache
from samplers import Noise, denoise, make_sampler
from tests import test_proxy

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


@pytest.mark.parametrize("variant", test_proxy.VARIANTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_lambda_is_that_of_whole_walks(model, name, variant):
    """To the last bit."""
    noise = Noise(0, range(test_proxy.B), 2)
    x, condition = noise.start(model.shape), model.condition(["red apple", "dog"])
    scores = torch.rand(test_proxy.T, 6, generator=torch.Generator().manual_seed(1))
    case = model.network, x, condition, scores, noise
    sampler = make_sampler(name, test_proxy.T)
    measured = test_proxy.measure(case[0], sampler, *case[1:], variant=variant)
    expected = test_proxy.naive(
        case[0], lambda: make_sampler(name, test_proxy.T), *case[1:], variant
    )
    assert torch.equal(measured, torch.as_tensor(expected, dtype=measured.dtype))
    assert (measured[1:] > 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_training_on_prompts_resumes_bitwise(model, name, tmp_path, monkeypatch):
    settings = dict(
        model="tiny", weights=None, sampler=name, steps=T, guidance=SCALE, seed=0, dtype=None,
        beta=1e-3, objective="iepo", proxy="leave-one-out", tau=TAU, lr=0.5, iterations=3 * T,
        lambda_every=2 * T, batch_size=3, micro_batch=2, prompts=None, target_cur=None, start=None,
        forecast=0,
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
