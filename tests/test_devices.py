"""Every loop on a GPU that is not there. Torch's device "meta" stands for any GPU: the code sees
tensors on it, and their numbers are really on the CPU. A mode watches every operation. It fails
where a tensor of the CPU meets one of the device, as on a real GPU, and where the device is given
float64, which Apple's GPUs do not have. Torch's own fake tensors for "cuda" and "mps" confirm these
rules. (For the loops they take minutes, and torch's build for the CPU stops at some operations.)"""

import contextlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import costs
import deepcache
import feature_statistics
import features
import metrics
import models
import pictures
import pixart
import router as routers
import sample
import samplers
import search
import text
import train_stepwise
import training
import vae
from cache import Cache
from samplers import Noise, make_sampler
from tests.small import tiny_dit, tiny_uvit

aten = torch.ops.aten
DEVICE = "meta"
SAMPLERS = "ddim", "ddim:0.5", "ddpm", "dpm-solver++", "sa-solver"
T, GUIDANCE, TAU = 4, 1.5, 0.5

# ------------------------------------------------------------------------------------------------
# A device without the device


class Away(torch.Tensor):
    """A tensor on the device. Its numbers, `value`, are really on the CPU."""

    @staticmethod
    def __new__(cls, value):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype,
            device=DEVICE)
        tensor.value = value
        return tensor

    def tolist(self):  # torch has none for a class of tensors
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} on the device, outside of GPU()")


class GPU(TorchDispatchMode):
    """Inside, DEVICE is a device that computes. Raises RuntimeError where tensors of two devices
    meet, and for float64 on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        check_met(function.overloadpacket, tensors)
        away = any(is_away(t) for t in tensors)
        if kwargs.get("device") is not None:  # of a new tensor, or of a copy
            away = torch.device(kwargs["device"]).type == DEVICE
            kwargs["device"] = "cpu"
        args, kwargs = tree_map_only(torch.Tensor, value_of, (args, kwargs))
        result = function(*args, **kwargs)
        if not away or function.overloadpacket is aten._local_scalar_dense:
            return result
        before = {id(t.value): t for t in tensors if isinstance(t, Away)}  # changed in place
        return tree_map_only(
            torch.Tensor, lambda t: before[id(t)] if id(t) in before else placed(t), result)


def is_away(tensor):
    return tensor.device.type == DEVICE


def value_of(tensor):
    """On the CPU. What torch.tensor makes on the device meta has lost its numbers: ones for it."""
    if is_away(tensor) and not isinstance(tensor, Away):
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return getattr(tensor, "value", tensor)


def placed(value):
    if value.dtype == torch.float64:
        raise RuntimeError("float64 on the device")
    return Away(value)


def check_met(kind, tensors):
    """Raises RuntimeError if an operation is given tensors of two devices, unless it copies between
    them. One number of the CPU, of no dimensions, goes with any device. (Torch also takes an index
    of the CPU. It is copied at every use, so here it is a fault.)"""
    places = {is_away(t) for t in tensors if t.dim() > 0 or is_away(t)}
    if len(places) > 1 and kind not in (aten._to_copy, aten.copy_):
        raise RuntimeError(f"{kind} of tensors on two devices")


MEETINGS = {  # x (2, 3) and i (2,) are on the device, the others on the CPU
    "add": lambda x, i, y: x + y,
    "matmul": lambda x, i, y: x @ y.T,
    "cat": lambda x, i, y: torch.cat([x, y]),
    "stack": lambda x, i, y: torch.stack([y, x]),
    "where": lambda x, i, y: torch.where(y > 0, x, 0.0),
    "lerp": lambda x, i, y: torch.lerp(x, x, y),
    "layer": lambda x, i, y: torch.nn.functional.linear(x, y),
    "embedding": lambda x, i, y: torch.nn.functional.embedding(torch.tensor([0, 1]), x),
    "in place": lambda x, i, y: x.add_(y),
    "of the CPU, in place": lambda x, i, y: y.mul_(x),
    "a number of the device": lambda x, i, y: y + x.sum(),
    "put": lambda x, i, y: x.index_put((i,), y),
    "select": lambda x, i, y: x.index_select(0, torch.tensor([0, 1])),
    "float64": lambda x, i, y: x.double(),
    "float64 from numpy": lambda x, i, y: torch.from_numpy(np.ones(3)).to(x.device),
    "new float64": lambda x, i, y: torch.zeros(3, dtype=torch.float64, device=x.device),
    "float64 of numbers": lambda x, i, y: torch.tensor([1.0], dtype=torch.float64).to(x.device),
    "means of float64": lambda x, i, y: x.mean(dtype=torch.float64),
    "good: a number of the CPU": lambda x, i, y: x * y.sum(),
    "good: a number of numpy": lambda x, i, y: np.float64(3) * x + x * np.float64(3),
    "good: copied there": lambda x, i, y: x + y.to(x),
    "good: copied there as float32": lambda x, i, y: x + torch.from_numpy(np.ones(3)).to(x),
    "good: copied here": lambda x, i, y: x.cpu().double() + y,
    "good: half precision": lambda x, i, y: x.bfloat16() @ x.half().bfloat16().T,
}


class Float64(TorchDispatchMode):
    """The second rule alone, beside torch's fake tensors, which have the first themselves."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, torch.Tensor) and part.dtype == torch.float64 and (
                part.device.type != "cpu"
            ):
                raise RuntimeError(f"float64 on {part.device}")
        return result


def verdict(name, device, *modes):
    y = torch.ones(2, 3)
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        x, i = torch.ones(2, 3, device=device), torch.zeros(2, dtype=torch.long, device=device)
        try:
            MEETINGS[name](x, i, y)
        except RuntimeError as error:
            return "float64" if str(error).startswith("float64") else "two devices"
    return "good"


@pytest.mark.parametrize("name", MEETINGS)
def test_the_rules_are_those_of_torch_for_real_devices(name):
    found = verdict(name, DEVICE, GPU())
    assert (found == "good") == name.startswith("good")
    for device in ("cuda:0", "mps:0"):
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        assert verdict(name, device, fakes, Float64()) == found, device


# ------------------------------------------------------------------------------------------------
# The loops: they must give what they give on the CPU


def tiny(kind="dit", dtype=torch.float32):
    """A model on the CPU. `model.to(DEVICE)` moves it, inside `GPU()`."""
    network = {"dit": partial(tiny_dit, depth=1), "pixart": tiny_pixart, "uvit256": tiny_uvit}[kind]
    network, reader = network(), "hashed" if kind == "pixart" else None
    return models.Model(kind, network.to(dtype), "ddim", steps=T, guidance=GUIDANCE, text=reader)


def tiny_pixart(**changes):
    torch.manual_seed(0)
    sizes = dict(input_size=8, in_channels=2, hidden_size=24, depth=1, num_heads=2,
                 caption_channels=16, model_max_length=5, predict_v=True)
    return pixart.PixArt(**{**sizes, **changes}).eval().requires_grad_(False)


def alternating(model):
    """A schedule in which each branch is computed, reused, computed, ..."""
    return routers.fora_paper(T, len(model.network.branches), 2)


def check(x, shape, dtype=torch.float32):
    assert isinstance(x, Away) and (tuple(x.shape), x.dtype) == (shape, dtype)


def check_equal(x, expected, tolerance=1e-4):
    """x, on the device, is `expected`, on the CPU, up to a share of its norm."""
    check(x, tuple(expected.shape), expected.dtype)
    assert (x.value - expected).norm() <= tolerance * expected.norm()


def sampled(kind, device, name, order=None, dtype=torch.float32):
    """x_0 of three images. With an `order` of forecast, with a cache."""
    model, noise = tiny(kind, dtype).to(device), Noise(0, range(3))
    condition = model.condition(["a red apple", "", "dog"] if model.text else [1, 0, 2])
    cache = None if order is None else Cache(alternating(model), order)
    sampler = models.make_sampler(model.name, name, T)
    x = samplers.denoise(model.network, sampler, noise.start(model.shape, device), condition,
                         GUIDANCE, cache, noise)
    assert cache is None or cache.reused[0] == T // 2
    return x


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling(name):
    for order in (None, 0, 1, 2):
        with GPU():
            x = sampled("dit", DEVICE, name, order)
        check_equal(x, sampled("dit", "cpu", name, order))


@pytest.mark.parametrize("name, order", [("dpm-solver-2s", 1), ("dpm-solver-3s", 0)])
def test_sampling_along_a_u(name, order):
    with GPU():
        x = sampled("uvit256", DEVICE, name, order)
    check_equal(x, sampled("uvit256", "cpu", name, order))


@pytest.mark.parametrize("make", [partial(deepcache.DeepCache, depth=1), deepcache.FasterDiffusion])
def test_caches_of_hidden_states(make):
    def deep(device):
        model, cache = tiny("uvit256").to(device), make(deepcache.key_evaluations(T, "middles"))
        sampler = models.make_sampler(model.name, "dpm-solver-2s", T)
        x = Noise(0, range(3)).start(model.shape, device)
        return samplers.denoise(model.network, sampler, x, model.condition([1, 0, 2]), GUIDANCE,
                                cache)

    with GPU():
        x = deep(DEVICE)
    check_equal(x, deep("cpu"))


@pytest.mark.parametrize("name, order", [("ddpm", 0), ("sa-solver", 1)])
def test_sampling_by_prompts(name, order):
    with GPU():
        x = sampled("pixart", DEVICE, name, order)
    check_equal(x, sampled("pixart", "cpu", name, order))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, name", [("dit", "ddpm"), ("pixart", "sa-solver")])
def test_sampling_in_half_precision(kind, name, dtype):
    with GPU():
        x = sampled(kind, DEVICE, name, 1, dtype)
    check_equal(x, sampled(kind, "cpu", name, 1, dtype), tolerance=0.1)


def test_the_command_that_samples():
    model, cache = tiny(), Cache(alternating(tiny()))
    with GPU():
        batches = list(sample.generate(model.to(DEVICE), make_sampler("ddim", T), GUIDANCE,
                                       [1, 0, 2], seed=0, batch_size=2, cache=cache, twice=1))
        totals = sample.Totals()
        totals.add(batches[0])
        pixels = pictures.to_pixels(batches[0].x[:, :1])
    check(batches[0].full, (2, *model.shape))
    check_equal(batches[0].x, sampled("dit", "cpu", "ddim", 0)[:2])
    assert totals.squared_error > 0 and pixels.shape == (2, 8, 8, 3)


def chunks_of(model, name, purpose, micro_batch=3):
    return train_stepwise.chunks_of(model, make_sampler(name, T), 0, range(3), micro_batch, purpose,
                                    prompts=model.text and ["a dog", "b"])


def test_the_proxy():
    for kind, variant, order in (("dit", "leave-one-out", 1), ("pixart", "cumulative", 0)):
        def measured(device, kind=kind, variant=variant, order=order):
            model = tiny(kind).to(device)
            router = routers.Router(T, len(model.network.branches)).to(device)
            return train_stepwise.measure_weights(
                model, router, chunks_of(model, "sa-solver", 2), GUIDANCE, TAU, variant,
                "sensitivity", order)

        with GPU():
            found = measured(DEVICE)
        assert found == pytest.approx(measured("cpu"), rel=1e-3)


@pytest.mark.parametrize("kind, dtype, order, micro_batch", [
    ("dit", torch.float32, 0, 2), ("pixart", torch.float32, 1, 3), ("dit", torch.bfloat16, 2, 3)])
def test_training(kind, dtype, order, micro_batch):
    """Two trajectories, in chunks of a micro-batch, with their backward passes and updates."""
    def trained(device):
        model = tiny(kind, dtype).to(device)
        router = routers.Router(T, len(model.network.branches)).to(device)
        optimizer = torch.optim.AdamW(router.parameters(), 0.1, weight_decay=0)
        beta = training.BetaSearch(1e-3, 0.4, TAU, 0.1)
        for _ in range(2):
            chunks = chunks_of(model, "ddpm", 1, micro_batch)
            train_stepwise.train_trajectory(model, router, optimizer, chunks, [1.0] * T, GUIDANCE,
                                            TAU, beta.beta, order)
            beta.update(router.logits())
        return chunks[-1].x, router.logits(), beta.beta

    with GPU():
        x, logits, beta = trained(DEVICE)
    expected = trained("cpu")
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    check_equal(x, expected[0], tolerance)
    check_equal(logits, expected[1], tolerance)
    assert beta == pytest.approx(expected[2], rel=0.1)


class Waits(GPU):
    """Counts how often the CPU reads from the device, and so waits for it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = function.overloadpacket is aten._local_scalar_dense or (
            function.overloadpacket is aten._to_copy and str((kwargs or {}).get("device")) == "cpu")
        self.count += reads and is_away(args[0])
        return super().__torch_dispatch__(function, types, args, kwargs)


def test_how_often_a_gpu_is_waited_for():
    """Training: for each chunk and step its cache's thresholds, and for each step but the first the
    loss. Sampling: never."""
    model, name = tiny(), "ddim"
    router = routers.Router(T, len(model.network.branches))
    with Waits() as training_waits:
        model.to(DEVICE)
        router.to(DEVICE)
        optimizer = torch.optim.AdamW(router.parameters(), 0.1, weight_decay=0)
        chunks = chunks_of(model, name, 1, micro_batch=2)
        train_stepwise.train_trajectory(model, router, optimizer, chunks, [1.0] * T, GUIDANCE, TAU,
                                        1e-3)
    assert len(chunks) == 2 and training_waits.count == 2 * T + T - 1
    x, condition = Noise(0, [0]).start(model.shape), model.network.condition([1])
    with Waits() as sampling_waits:
        samplers.denoise(model.network, make_sampler(name, T), x.to(DEVICE), condition, GUIDANCE,
                         Cache(alternating(model)))
    assert sampling_waits.count == 0


def test_the_search():
    def searched(device):
        model, noise = tiny().to(device), Noise(0, range(2))
        schedule, other = alternating(model), routers.fora(T, 2, 3)
        batch = costs.Batch(model, make_sampler("sa-solver", T), GUIDANCE, noise,
                            costs.choose_items(model, noise))
        uncached = costs.Uncached(batch)
        weights = [0.0] + [uncached.sensitivity(i) for i in range(1, T)]
        climber = search.Climber(batch, 1, lambda work, measure: measure(), schedule)
        climber.attempt(other, 1)
        climber.climb([(1, 2)], tries=1)
        return [batch.error(schedule, 2), climber.error, *weights,
                *uncached.step_costs(0, 1, weights), *uncached.branch_costs(0, 1, weights)]

    with GPU():
        found = searched(DEVICE)
    assert found == pytest.approx(searched("cpu"), rel=1e-3, abs=1e-9)


# ------------------------------------------------------------------------------------------------
# What goes in and what comes out


def test_conditions():
    network, wide = tiny_dit(), tiny_pixart(micro_conditions=True)
    captions, mask = text.hashed_words(["a dog", ""], 5, 16)
    with GPU():
        network.to(DEVICE)
        wide.to(DEVICE)
        for labels in ([1, 2], torch.tensor([1, 2]), torch.tensor([1, 2]).to(DEVICE)):
            check(*network.condition(labels), (4,), torch.int64)
        condition = wide.condition(captions, mask, (8, 16))
        x = torch.zeros(4, 2, 8, 8, device=DEVICE)
        check(wide(x, torch.ones(4, device=DEVICE), *condition), (4, 4, 8, 8))
    for part, shape in zip(condition, ((4, 5, 16), (4, 5), (4, 2), (4, 1)), strict=True):
        check(part, shape, torch.bool if part is condition[1] else torch.float32)


def test_captions_of_t5(monkeypatch):
    """The text encoder is on the device, the features that it gives are on the CPU."""
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 4)

        def forward(self, input_ids, attention_mask):
            x = self.table(input_ids) * attention_mask[..., None]
            return SimpleNamespace(last_hidden_state=x)

    def tokenizer(words, verbose):
        return SimpleNamespace(input_ids=[len(word) for word in words.split()])

    encoder = Encoder().requires_grad_(False)
    table = encoder.table.weight.clone()
    monkeypatch.setattr(text, "load_t5", lambda *args: (tokenizer, encoder))
    with GPU():
        features_, mask = text.encode(["a red apple", "dog"], max_length=6, device=DEVICE)
    check(encoder.table.weight, (9, 4))
    assert torch.equal(features_[0, :3], table[[1, 3, 5]])
    assert mask.sum(1).tolist() == [3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_autoencoder(dtype):
    """Whole pictures, and in tiles."""
    torch.manual_seed(0)
    network = vae.Autoencoder(32, (1, 1), res_blocks=1).requires_grad_(False).to(dtype)
    images, noise = torch.randn(1, 3, 8, 12), torch.randn(1, 4, 4, 6)
    expected = network.encode(images, noise)
    options = dict(tile=4, overlap=2)
    decoded = network.decode(expected), network.decode(expected, **options)
    with GPU():
        network.to(DEVICE)
        latents = network.encode(images.to(DEVICE), noise.to(DEVICE))
        pair = network.decode(latents), network.decode(latents, **options)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for x, y in zip((latents, *pair), (expected, *decoded), strict=True):
        check_equal(x, y, tolerance)


@pytest.mark.parametrize("name, side", [("digits", 28), ("emoji", 32)])
def test_feature_networks(name, side):
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 1), np.uint8)
    pixels = np.repeat(pixels, 3, axis=3)
    network = features.load(name)
    expected = feature_statistics.look(pixels, network)
    with GPU():
        seen = feature_statistics.look(pixels, network.to(DEVICE))
    for x, y in zip(seen, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_preprocessing_for_inception():
    """All of it that makes tensors; the rest are layers."""
    images = torch.arange(2 * 3 * 9 * 5).view(2, 3, 9, 5)
    expected = features.resize_tf1(images.float(), 17)
    with GPU():
        check_equal(features.resize_tf1(images.to(DEVICE).float(), 17), expected)


def test_distances():
    """All distances, of features on the device; and the statistics that are compared."""
    def measured(device):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(n, 4, generator=generator).to(device) for n in (9, 7))
        moments = feature_statistics.Moments()
        for part in (a[:5], a[5:]):
            moments.add(part)
        sigma = torch.eye(4).to(device)
        return [metrics.frechet_distance(moments.mean, moments.covariance, b[0], sigma),
                metrics.inception_score(a, split_size=4), *metrics.precision_recall(a, b),
                *metrics.nearest_distance(a, b)]

    with GPU():
        found = measured(DEVICE)
    assert found == pytest.approx(measured("cpu"), rel=1e-5)


def test_the_clip_score():
    clip = list(features.load_clip("emoji"))
    images, words = np.zeros((3, 32, 32, 3), np.uint8), ["red apple", "dog", "cat"]
    expected = metrics.clip_score(images, words, clip, batch_size=2)
    with GPU():
        clip[0].to(DEVICE)
        found = metrics.clip_score(images, words, clip, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------
# Planted faults are found


class OnTheCPU(torch.nn.Module):
    """A network whose answer is on the CPU."""

    def __init__(self, network):
        super().__init__()
        self.network, self.guidance_channels = network, network.guidance_channels

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs).cpu()


class NoiseOnTheCPU(Noise):
    def step(self, i, x):
        return self._normal(x.shape[1:], 1 + i, "cpu")


class CacheOnTheCPU(Cache):
    def _keep(self, k, entries):
        super()._keep(k, tuple((s, output.cpu()) for s, output in entries))


class DDIMInFloat64(samplers.DDIM):
    def step(self, prediction, i, x, noise=None):
        return super().step(prediction, i, x.double(), noise)


def faulty(fault):
    """Samples on the device with one fault in it."""
    model = tiny().to(DEVICE)
    noise = (NoiseOnTheCPU if fault == "noise" else Noise)(0, range(2))
    cache = (CacheOnTheCPU if fault == "cache" else Cache)(alternating(model))
    sampler = DDIMInFloat64(T) if fault == "float64" else samplers.DDIM(T, eta=1)
    condition = model.condition([1, 2])
    if fault == "condition":
        condition = tuple(part.cpu() for part in condition)
    network = OnTheCPU(model.network) if fault == "network" else model.network
    x = noise.start(model.shape, "cpu" if fault == "start" else DEVICE)
    return samplers.denoise(network, sampler, x, condition, GUIDANCE, cache, noise)


@pytest.mark.parametrize("fault", ["noise", "cache", "condition", "network", "start", "float64"])
def test_planted_faults_are_found(fault):
    words = "float64 on the device" if fault == "float64" else "of tensors on two devices"
    with GPU(), pytest.raises(RuntimeError, match=words):
        faulty(fault)


def test_a_fault_in_training_is_found(monkeypatch):
    """A target on the CPU; and a loss in float64."""
    def train(model, router):
        optimizer = torch.optim.AdamW(router.parameters(), 0.1)
        train_stepwise.train_trajectory(model, router, optimizer, chunks_of(model, "ddim", 1),
                                        [1.0] * T, GUIDANCE, TAU, 1e-3)

    mse_loss = F.mse_loss
    faults = {"of tensors on two devices": lambda x, y: mse_loss(x, y.cpu()),
              "float64 on the device": lambda x, y: mse_loss(x.double(), y)}
    for words, loss in faults.items():
        monkeypatch.setattr(F, "mse_loss", loss)
        with GPU(), pytest.raises(RuntimeError, match=words):
            train(tiny().to(DEVICE), routers.Router(T, 2).to(DEVICE))


def test_without_a_fault_all_is_well():
    with GPU():
        check(faulty(None), (2, 2, 8, 8))
