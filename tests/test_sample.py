"""From noise to pictures: guidance, the loop, the pictures, and the whole command in process."""

import copy
import dataclasses
import functools
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import checkpoint
import command
import dit
import models
import pictures
import pixart
import router
import sample
import samplers
import shipped
import vae
from cache import Cache, SoftCache

from .small import tiny_dit

STEPS, IMAGES = 4, 3  # of the commands below

# ------------------------------------------------------------------------------------------------
# Guidance


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_predictions(network, x, t, labels):
    """The network with and without the labels, one image at a time: each (B, C_out, H, W)."""
    null = network.num_classes
    t = torch.tensor([t])
    with_label = [network(x[j : j + 1], t, torch.tensor([y])) for j, y in enumerate(labels)]
    without = [network(x[j : j + 1], t, torch.tensor([null])) for j in range(len(labels))]
    return torch.cat(with_label), torch.cat(without)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("channels, learn_sigma, acted_on",
                         [(1, True, 1), (2, False, 2), (3, True, 3), (4, True, 3), (4, False, 3)])
def test_guided_against_two_separate_forwards(scale, channels, learn_sigma, acted_on):
    network = tiny_dit(in_channels=channels, learn_sigma=learn_sigma)
    x, labels, t = random(3, channels, 8, 8), [4, 0, 2], 412.5
    cond, null = both_predictions(network, x, t, labels)
    output = samplers.guided(network, x, t, network.condition(labels), scale)
    assert output.shape == (6, *cond.shape[1:])
    for j in range(3):
        for c in range(cond.shape[1]):
            if c < acted_on:
                first = second = null[j, c] + scale * (cond[j, c] - null[j, c])
            else:  # the others stay, each half its own
                first, second = cond[j, c], null[j, c]
            torch.testing.assert_close(output[j, c], first, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output[3 + j, c], second, rtol=1e-4, atol=1e-5)
    assert (cond - null).abs().max() > 0.01  # else nothing was tested


def test_guidance_1_is_the_conditional_prediction():
    network = tiny_dit(in_channels=4)
    x, labels = random(2, 4, 8, 8), [1, 3]
    cond, _ = both_predictions(network, x, 700, labels)
    output = samplers.guided(network, x, 700, network.condition(labels), 1)
    for half in output.chunk(2):
        torch.testing.assert_close(half[:, :3], cond[:, :3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", (False, True))
def test_without_guidance_the_loop_evaluates_one_half_and_gives_the_same(cached):
    network, rows = tiny_dit(in_channels=4), []
    network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    x, condition = random(2, 4, 8, 8), network.condition([1, 3])
    caches = [Cache(router.fora(4, 6, 2)) if cached else None for _ in range(2)]
    one, both = (samplers.denoise(network, samplers.DDIM(4), x, condition, guidance, cache)
                 for guidance, cache in zip((None, 1), caches, strict=True))
    assert rows == [2] * 4 + [4] * 4
    torch.testing.assert_close(one, both, rtol=1e-4, atol=1e-4)


def test_guided_hands_the_cache_to_the_network():
    network = tiny_dit()
    K = len(network.branches)
    cache = Cache(router.none(2, K))
    samplers.guided(network, random(2, 2, 8, 8), 9, network.condition([1, 2]), 1.5, cache.start(0))
    assert cache.computed == [1] * K  # both halves in one evaluation


# ------------------------------------------------------------------------------------------------
# The loop


SAMPLERS = ["ddim", "ddim:0.5", "ddpm", "dpm-solver++", "sa-solver"]


@pytest.mark.parametrize("sampler_name, sampler_channels", [
    ("ddim", 3), ("ddpm", 3), ("dpm-solver++", 4), ("sa-solver", 4),
])  # fmt: skip
@pytest.mark.parametrize("network_channels", [2, 3, 4])
def test_the_loop_guides_what_network_and_sampler_agree_on(
    sampler_name, sampler_channels, network_channels
):
    network = tiny_dit(in_channels=4)
    network.guidance_channels = network_channels
    noise, labels = samplers.Noise(0, range(2)), [1, 3]
    x = noise.start((4, 8, 8))
    prediction, null = both_predictions(network, x, 999.0, labels)
    acted_on = min(network_channels, sampler_channels)
    prediction[:, :acted_on] += 2 * (prediction - null)[:, :acted_on]
    expected = samplers.make_sampler(sampler_name, 5).step(prediction, 0, x, noise)
    sampler = samplers.make_sampler(sampler_name, 5)
    walk = samplers.walk(network, sampler, x, network.condition(labels), 3.0, noise=noise)
    torch.testing.assert_close(next(walk), expected, rtol=1e-4, atol=1e-4)


def run_loop(images, sampler_name, cached, steps=5, seed=3):
    """x_0 of the images numbered `images`, made as one batch by the tiny network."""
    network = tiny_dit()
    noise = samplers.Noise(seed, images)
    x = noise.start((2, 8, 8))
    condition = network.condition([j % 5 for j in images])
    cache = Cache(router.random(steps, len(network.branches), 0.4)) if cached else None
    return samplers.denoise(
        network, samplers.make_sampler(sampler_name, steps), x, condition, 1.5, cache, noise
    )


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_an_image_does_not_change_with_its_batch(sampler_name, cached):
    together = run_loop(range(5), sampler_name, cached)
    assert torch.isfinite(together).all()
    for images in ([2], [4, 1], [3, 2, 0, 1, 4]):
        torch.testing.assert_close(
            run_loop(images, sampler_name, cached), together[images], rtol=1e-3, atol=1e-3
        )
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_the_cache_changes_the_image_and_an_empty_schedule_does_not(sampler_name):
    network, steps = tiny_dit(), 5
    noise = samplers.Noise(0, range(2))
    x, condition = noise.start((2, 8, 8)), network.condition([1, 2])

    def made(cache):
        sampler = samplers.make_sampler(sampler_name, steps)
        return samplers.denoise(network, sampler, x, condition, 1.5, cache, noise)

    K = len(network.branches)
    full = made(None)
    assert torch.equal(made(Cache(router.none(steps, K))), full)
    assert not torch.allclose(made(Cache(router.fora(steps, K, 2))), full, atol=1e-2)


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_walk_goes_on_from_any_step_bitwise(sampler_name):
    network, steps = tiny_dit(), 5
    noise = samplers.Noise(0, range(2))
    x, condition = noise.start((2, 8, 8)), network.condition([1, 2])

    def states(x, sampler, first=0):
        for after in samplers.walk(network, sampler, x, condition, 1.5, None, noise, first):
            yield after, copy.copy(sampler)

    whole = list(states(x, samplers.make_sampler(sampler_name, steps)))
    assert len(whole) == steps
    for first in range(1, steps):
        rest = [x for x, _ in states(*whole[first - 1], first)]
        assert len(rest) == steps - first
        assert all(torch.equal(a, b) for a, (b, _) in zip(rest, whole[first:], strict=True))


def test_walk_goes_on_with_a_cache_bitwise():
    network, steps = tiny_dit(), 5
    x, condition = samplers.Noise(0, range(2)).start((2, 8, 8)), network.condition([1, 2])
    scores = torch.rand(steps, len(network.branches), generator=torch.Generator().manual_seed(0))
    cache, sampler = SoftCache(scores.__getitem__, 0.5), samplers.DDIM(steps)
    walk = samplers.walk(network, sampler, x, condition, 1.5, cache)
    before = next(walk), next(walk)
    fork = cache.fork(scores.__getitem__)
    end = list(walk)[-1]
    again = samplers.denoise(network, sampler, before[1], condition, 1.5, fork, first=2)
    assert torch.equal(again, end)


def test_the_loop_builds_no_graph_and_leaves_the_caller_free_to():
    network = tiny_dit().requires_grad_(True)
    x = samplers.Noise(0, [0]).start((2, 8, 8))
    for after in samplers.walk(network, samplers.DDIM(3), x, network.condition([1]), 1.5):
        assert not after.requires_grad
        assert torch.is_grad_enabled()


def test_the_loop_against_its_definition():
    """One image at a time, with the prediction and DDIM's equation written out here."""
    network, labels = tiny_dit(), [3, 0]
    x = samplers.Noise(0, range(2)).start((2, 8, 8))
    sampler = samplers.DDIM(4)
    made = samplers.denoise(network, sampler, x, network.condition(labels), 2.0)
    for t, a, a_next in zip(sampler.timesteps, sampler.alpha_bar, sampler.alpha_bar_next,
                            strict=True):
        cond, null = both_predictions(network, x, t, labels)
        eps = (null + 2.0 * (cond - null))[:, :2]
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
    torch.testing.assert_close(made, x, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------
# Pictures


def test_to_pixels_known_values():
    values = torch.tensor([-1.0, 1.0, 0.0, -0.5, -7.0, 7.0, 1 / 255, -1 / 255])
    pixels = pictures.to_pixels(values.view(1, 1, 2, 4))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 2, 4, 3)
    for channel in range(3):  # grey: all channels the same
        assert pixels[0, :, :, channel].ravel().tolist() == [0, 255, 128, 64, 0, 255, 128, 127]


def test_to_pixels_puts_every_colour_in_its_place():
    levels = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    pixels = pictures.to_pixels(levels / 127.5 - 1)
    assert np.array_equal(pixels, levels.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(pictures.to_pixels((levels / 127.5 - 1).double()), pixels)


def random_images(N, H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (N, H, W, 3), np.uint8)  # never white


@pytest.mark.parametrize("N, columns, H, W, scale", [
    (7, 3, 28, 28, 3), (6, 3, 28, 28, 3), (2, 10, 28, 28, 3), (1, 1, 28, 28, 3), (5, 2, 9, 14, 9),
    (3, 2, 84, 60, 1), (3, 2, 256, 256, 1), (11, 10, 10, 10, 8),
])
def test_grid_puts_every_pixel_of_every_image_in_its_place(N, columns, H, W, scale):
    images = random_images(N, H, W)
    picture = np.asarray(pictures.grid(images, columns))
    shown = min(N, columns)
    rows = (N + shown - 1) // shown
    assert picture.shape == (rows * (H + 1) * scale, shown * (W + 1) * scale, 3)
    white = np.ones(picture.shape[:2], bool)
    for n in range(N):
        top, left = n // shown * (H + 1) * scale, n % shown * (W + 1) * scale
        block = picture[top : top + H * scale, left : left + W * scale]
        for down in range(scale):  # an enlarged pixel is scale x scale pixels
            for right in range(scale):
                assert np.array_equal(block[down::scale, right::scale], images[n])
        white[top : top + H * scale, left : left + W * scale] = False
    assert (picture[white] == 255).all()


def test_grid_has_ten_columns():
    assert np.array_equal(
        pictures.grid(random_images(12, 9, 9)), pictures.grid(random_images(12, 9, 9), columns=10)
    )


def test_stack_puts_each_picture_below_its_title():
    rows = [pictures.grid(random_images(n, 28, 28, seed=n)) for n in (2, 3)]
    canvas = np.asarray(pictures.stack(["one", "two"], rows))
    y = 0
    for picture in rows:
        title = canvas[y : y + 30]
        assert (title < 128).any()
        y += 30
        shown = canvas[y : y + picture.height, : picture.width]
        assert np.array_equal(shown, np.asarray(picture))
        assert (canvas[y : y + picture.height, picture.width :] == 255).all()
        y += picture.height
    assert y == len(canvas)


def test_the_difference_is_four_times_enlarged_up_to_white():
    full = np.full((1, 84, 84, 3), 100, np.uint8)
    cached = full.copy()
    cached[0, 0, :5, 0] = 101, 99, 90, 37, 36  # 4 x 64 = 256 is more than white
    totals = sample.Totals(images=1, seconds=1.0, full_seconds=2.0)
    canvas = np.asarray(sample.comparison(full, cached, totals, Cache(router.none(2, 2))))
    assert canvas[-85, :6, 0].tolist() == [4, 4, 40, 252, 255, 0]


def test_write_a_png(tmp_path):
    images = random_images(5, 28, 28)
    pictures.write(tmp_path / "new" / "x.png", images)
    written = np.asarray(Image.open(tmp_path / "new" / "x.png"))
    assert np.array_equal(written, np.asarray(pictures.grid(images)))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.png"]


def test_write_an_npz_as_adm_reads_it(tmp_path):
    images = random_images(5, 28, 28)
    pictures.write(tmp_path / "x.npz", images)
    with np.load(tmp_path / "x.npz") as data:
        assert data.files == ["arr_0"]
        assert data["arr_0"].dtype == np.uint8
        assert np.array_equal(data["arr_0"], images)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_write_a_folder_numbers_the_images_on(tmp_path):
    images = random_images(5, 28, 20)
    pictures.write(tmp_path / "x", images[:3])
    pictures.write(tmp_path / "x", images[3:], range(3, len(images)))
    files = sorted((tmp_path / "x").iterdir())
    assert [file.name for file in files] == [f"{j:06d}.png" for j in range(5)]
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), image)


@pytest.mark.parametrize("text, count, labels", [
    ("3,1,4", 5, [3, 1, 4, 3, 1]), (" 7 , 0", 2, [7, 0]), ("9", 3, [9, 9, 9]),
    (None, 12, [*range(10), 0, 1]), ("1,2,3", 2, [1, 2]),
])
def test_labels(text, count, labels):
    assert sample.choose_labels(text, 10, count, 0) == labels


# ------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def network():
    """A network of the digits size that hands its input through, disturbed a little by its random
    branches. That makes images with all shades of grey, which random weights alone do not."""
    network = dit.DiT(**dit.SIZES["digits"]).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    embed, final = network.x_embedder.proj, network.final_layer
    for layer in (embed, final.linear, final.adaLN_modulation[1]):
        layer.weight.zero_()
        layer.bias.zero_()
    network.pos_embed.zero_()
    embed.weight[:16] = torch.eye(16).view(16, 1, 4, 4)  # a token begins with its patch's pixels
    embed.bias[-2:] = torch.tensor([64.0, -64.0])  # of 128: so the last norm divides by about 8
    final.linear.weight[0::2, :16] = 8 * torch.eye(16)  # the noise
    final.linear.weight[1::2, :16] = torch.eye(16)  # the variance
    return network


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def run(monkeypatch, tmp_path, weights, capsys):
    """Runs the command as a shell would, in an empty folder: (flags) -> what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        defaults = ["--weights", weights, "--device", "cpu", "--steps", STEPS,
                    "--guidance", 1.5, "--num-samples", IMAGES, "--batch-size", 2]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*defaults, *flags])])
        capsys.readouterr()
        command.run(sample.main)
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def save_router(path, seed=0, steps=STEPS, branches=16, **changes):
    """A router file with random logits: -> the logits (T, K)."""
    logits = random(steps, branches, seed=seed)
    about = dict(model="digits", sampler="ddim", steps=steps, guidance=1.5, tau=0.3, beta=1e-7,
                 objective="iepo", proxy="leave-one-out", seed=seed, iterations=8, cur="0.3")
    router.save(path, logits, **{**about, **changes})
    return logits


def images_in(path):
    """What the command wrote: uint8 (N, H, W, 3) of an npz or a folder."""
    if path.suffix == ".npz":
        with np.load(path) as data:
            return data["arr_0"]
    return np.stack([np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))])


def one_by_one(network, schedule, labels=(0, 1, 2), seed=0, guidance=1.5, sampler="ddim", order=0):
    """The images that the command has to make, each as a batch of its own: x_0 (N, 1, 28, 28)."""
    made = []
    for j, label in enumerate(labels):
        noise = samplers.Noise(seed, [j])
        made.append(samplers.denoise(
            network, samplers.make_sampler(sampler, len(schedule)), noise.start((1, 28, 28)),
            network.condition([label]), guidance, Cache(schedule, order), noise,
        ))
    return torch.cat(made)


def assert_same_pictures(a, b):
    """Equal up to the rounding of one level, and not just black and white."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert ((b > 0) & (b < 255)).mean() > 0.5


def numbers(pattern, text):
    """The numbers in the one place of `text` that matches."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


RANDOM = router.random(STEPS, 16, 0.4, seed=0)


def test_an_npz_holds_the_images(run, network, tmp_path):
    out = run("--schedule", "random:0.4", "--out", "x.npz")
    images = images_in(tmp_path / "x.npz")
    assert images.dtype == np.uint8
    assert_same_pictures(images, pictures.to_pixels(one_by_one(network, RANDOM)))
    assert out.endswith("wrote x.npz\n")
    assert "digits, ddim, T = 4, guidance 1.5, seed 0, cpu" in out
    uncached = pictures.to_pixels(one_by_one(network, router.none(STEPS, 16)))
    changed = np.abs(images.astype(int) - uncached) > 1
    assert changed.mean() > 0.1  # so the cache had an effect


def test_a_png_is_the_grid_of_the_same_images(run, tmp_path):
    run("--schedule", "random:0.4", "--out", "x.npz")
    run("--schedule", "random:0.4", "--out", "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert np.array_equal(picture, np.asarray(pictures.grid(images_in(tmp_path / "x.npz"))))


def test_a_folder_has_one_png_an_image(run, tmp_path):
    run("--schedule", "random:0.4", "--out", "x.npz")
    run("--schedule", "random:0.4", "--out", "new/x")
    files = sorted(file.name for file in (tmp_path / "new" / "x").iterdir())
    assert files == ["000000.png", "000001.png", "000002.png", "items.txt", "settings.json"]
    assert np.array_equal(images_in(tmp_path / "new" / "x"), images_in(tmp_path / "x.npz"))


def test_without_out_it_writes_samples_png(run, tmp_path):
    run("--schedule", "none")
    assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]


def test_compare_shows_full_cached_and_difference(run, tmp_path):
    run("--schedule", "none", "--out", "full.npz")
    run("--schedule", "random:0.4", "--out", "cached.npz")
    run("--schedule", "random:0.4", "--compare", "--out", "compare.png")
    full, cached = images_in(tmp_path / "full.npz"), images_in(tmp_path / "cached.npz")
    difference = 4 * np.abs(full.astype(int) - cached.astype(int))
    canvas = np.asarray(Image.open(tmp_path / "compare.png"))
    height = 29 * 3  # of a grid of one row, enlarged three times
    assert canvas.shape == (3 * (30 + height), IMAGES * height, 3)
    for n, images in enumerate((full, cached, np.minimum(difference, 255).astype(np.uint8))):
        top = n * (30 + height) + 30
        assert np.array_equal(canvas[top : top + height], np.asarray(pictures.grid(images)))


def test_compare_with_schedule_none_has_no_difference(run, tmp_path):
    out = run("--schedule", "none", "--compare", "--out", "compare.png")
    assert "mean squared error to the uncached image: 0.00e+00 (3 images)" in out
    difference = np.asarray(Image.open(tmp_path / "compare.png"))[-87:].reshape(29, 3, -1, 3, 3)
    assert (difference[:28, 0].reshape(28, IMAGES, 29, 3, 3)[:, :, :28] == 0).all()


@pytest.mark.parametrize("flags, count", [
    (("--measure",), 2), (("--compare", "--out", "x.png"), 3),
    (("--compare", "--measure", "--out", "x.png"), 3),
])
def test_the_printed_error(run, network, flags, count):
    """It is over the first batch, or with --compare over all images."""
    out = run("--schedule", "random:0.4", *flags)
    error, images = numbers(r"mean squared error to the uncached image: (\S+) \((\d+) images", out)
    assert images == count
    cached = one_by_one(network, RANDOM)[:count].double()
    full = one_by_one(network, router.none(STEPS, 16))[:count].double()
    assert error == pytest.approx((cached - full).square().mean().item(), rel=0.01)


@pytest.mark.parametrize("name", ["random:0.4", "fora:2", "fora-paper:3", "none"])
def test_the_printed_cur_and_arithmetic_are_those_of_the_schedule(run, network, name):
    out = run("--schedule", name, "--compare", "--out", "x.png")
    schedule = router.named(name, STEPS, 16, seed=0).tolist()
    branch_flops, other_flops = network.flops()
    reused = saved = 0
    for row in schedule:
        for k, computed in enumerate(row):
            if not computed:
                reused += 1
                saved += branch_flops[k]
    full = STEPS * (sum(branch_flops) + other_flops)
    cur = 100 * reused / (STEPS * 16)
    assert numbers(rf"schedule {name}, CUR ([\d.]+) %", out)[0] == pytest.approx(cur, abs=0.051)
    uncached, counted = numbers(r"CUR counted +([\d.]+) % +([\d.]+) %", out)
    assert uncached == 0
    assert counted == pytest.approx(cur, abs=0.051)
    (share,) = numbers(r"([\d.]+) % saved", out)
    assert share == pytest.approx(100 * saved / full, abs=0.051)
    (promise,) = numbers(r"([\d.]+) x by arithmetic", out)
    assert promise == pytest.approx(full / (full - saved), abs=0.0051)
    gflop = numbers(r"GFLOP per image +([\d.]+) +([\d.]+)", out)  # with and without the label: x 2
    assert gflop == pytest.approx([2 * full / 1e9, 2 * (full - saved) / 1e9], abs=0.00051)


def test_the_printed_times_are_consistent(run):
    out = run("--schedule", "fora:2", "--measure")
    full, cached, speedup = numbers(r"seconds per image +([\d.]+) +([\d.]+) +([\d.]+) x", out)
    assert full > 0
    assert cached > 0
    assert speedup == pytest.approx(full / cached, rel=0.02, abs=0.011)


@pytest.mark.parametrize("flags, walks", [
    ("--schedule fora:2", 2), ("--schedule none", 2), ("--schedule fora:2 --measure", 3),
    ("--schedule none --measure", 3), ("--schedule fora:2 --compare", 4),
])
def test_images_are_made_twice_only_if_that_is_asked_for(run, monkeypatch, flags, walks):
    """Three images in two batches. What was not measured is not told, but how to measure it."""
    made, timed_denoise = [], sample.timed_denoise
    monkeypatch.setattr(sample, "timed_denoise",
                        lambda *args, **kwargs: made.append(1) or timed_denoise(*args, **kwargs))
    out = run(*flags.split())
    assert len(made) == walks
    measured = walks > 2
    assert ("x faster" in out) == measured and ("mean squared error" in out) == measured
    if "fora" in flags:
        assert "x by arithmetic" in out and "CUR counted" in out
        assert ("--measure adds the error and the real speed-up" in out) == (not measured)


def test_without_a_comparison_every_batch_is_timed():
    x, totals = torch.zeros(2, 1, 4, 4), sample.Totals()
    for seconds in (1.0, 2.0):
        totals.add(sample.Batch([0, 1], x, seconds))
    assert (totals.images, totals.seconds) == (4, 3.0)
    totals = sample.Totals()
    for full, full_seconds in ((x + 1, 5.0), (None, 0.0)):  # --measure: the first one only
        totals.add(sample.Batch([0, 1], x, 1.0, full, full_seconds))
    assert totals == sample.Totals(2, 1.0, 5.0, 2.0)


def test_the_report_divides_the_seconds_by_the_images(capsys):
    network = tiny_dit()
    cache = Cache(router.none(2, len(network.branches)))
    for i in range(2):
        x, condition = random(2, 2, 8, 8), network.condition([1, 2])
        samplers.guided(network, x, 9, condition, 1, cache.start(i))
    totals = sample.Totals(images=4, seconds=2.0, full_seconds=3.0, squared_error=0.02)
    model = models.Model("tiny", network, "ddim", steps=2, guidance=1)
    sample.report(model, 2, 1.5, cache, totals)
    out = capsys.readouterr().out
    assert numbers(r"seconds per image +(\S+) +(\S+) +(\S+) x", out) == [0.75, 0.5, 1.5]
    assert numbers(r"uncached image: (\S+)", out) == [0.005]
    sample.report(model, 2, 1.5, None, totals)
    assert numbers(r"seconds per image (\S+),", capsys.readouterr().out) == [0.5]


def test_the_printed_peak_of_the_cache(run):
    """FORA's first reused row needs every branch's output, for both halves of the batch of 2."""
    out = run("--schedule", "fora-paper:2")
    uncached, peak = numbers(r"cache at its peak +([\d.]+) MB +([\d.]+) MB", out)
    assert uncached == 0
    assert peak == pytest.approx(16 * 2 * 2 * 49 * 128 * 4 / 1e6, abs=0.0051)


def test_a_router_file_at_its_own_tau_and_at_another(run, network, tmp_path):
    scores = torch.sigmoid(save_router(tmp_path / "r.safetensors", tau=0.3))
    curs = set()
    for flags, tau in (((), 0.3), (("--tau", "0.6"), 0.6)):
        schedule = scores > tau
        schedule[0] = True
        out = run("--router", "r.safetensors", *flags, "--out", "x.npz")
        cur = 100 * (~schedule).sum().item() / schedule.numel()
        assert f"router r.safetensors, tau {tau:g}, CUR" in out
        assert numbers(r"tau \S+, CUR ([\d.]+) %", out)[0] == pytest.approx(cur, abs=0.051)
        assert_same_pictures(
            images_in(tmp_path / "x.npz"), pictures.to_pixels(one_by_one(network, schedule))
        )
        curs.add(cur)
    assert len(curs) == 2


def test_a_router_trained_at_another_guidance_is_used_but_told(run, tmp_path):
    save_router(tmp_path / "r.safetensors", guidance=1.5)
    assert "trained at" not in run("--router", "r.safetensors")
    assert "trained at guidance 1.5" in run("--router", "r.safetensors", "--guidance", "4")


@pytest.mark.parametrize("order", (1, 2))
def test_a_branch_is_forecast_as_the_flag_or_the_router_says(run, network, tmp_path, order):
    """`--forecast` is for schedules. A router brings the order that it was made for."""
    logits = save_router(tmp_path / "r.safetensors", forecast=order)
    trained = router.threshold(torch.sigmoid(logits), 0.3)
    plain = pictures.to_pixels(one_by_one(network, RANDOM))
    for flags, schedule in ((("--schedule", "random:0.4", "--forecast", order), RANDOM),
                            (("--router", "r.safetensors"), trained),
                            (("--router", "r.safetensors", "--forecast", order), trained)):
        out = run(*flags, "--out", "x.npz")
        assert f", forecast of order {order}, CUR" in out
        made = images_in(tmp_path / "x.npz")
        expected = one_by_one(network, schedule, order=order)
        assert_same_pictures(made, pictures.to_pixels(expected))
        assert not np.array_equal(made, plain)


def test_a_router_for_another_forecast_is_refused(refused, tmp_path):
    save_router(tmp_path / "plain.safetensors")
    save_router(tmp_path / "line.safetensors", forecast=1)
    save_router(tmp_path / "odd.safetensors", forecast=3)
    for name, order, words in (("plain", 1, "plain.safetensors was made for --forecast 0, not 1"),
                               ("line", 0, "line.safetensors was made for --forecast 1, not 0"),
                               ("line", 2, "line.safetensors was made for --forecast 1, not 2"),
                               ("odd", 1, "odd.safetensors is not a router file: its forecast")):
        error = refused("--router", f"{name}.safetensors", "--forecast", order)
        assert_one_line(error)
        assert words in error


def test_the_shipped_router_is_used_at_the_models_own_settings_only(
    run, network, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "SHIPPED", tmp_path)
    logits = save_router(tmp_path / "digits_router.safetensors", steps=20)
    schedule = router.threshold(torch.sigmoid(logits), 0.3)
    out = run("--steps", "20", "--num-samples", "1", "--out", "x.npz")
    assert f"digits_router.safetensors, tau 0.3, CUR {100 * router.cur(schedule):.1f} %" in out
    for flags in (("--steps", "19"), ("--steps", "20", "--sampler", "ddpm")):
        out = run(*flags, "--num-samples", "1", "--out", "x.npz")
        assert "no router is shipped for digits with" in out
        assert "CUR 0.0 %" in out and "--router" not in out


def test_a_router_of_the_table_is_offered_by_name(run, tmp_path, monkeypatch):
    """One of HarmoniCa's, for this sampler and T; and it fits."""
    monkeypatch.setattr(models, "SHIPPED", tmp_path)
    (tmp_path / "table").mkdir()
    for name, about in (("a-3-harmonica-40-0", dict(sampler="ddpm", steps=3)),
                        ("b-4-harmonica-40-0", dict(sampler="dpm-solver++")),
                        ("c-4-direct-40-0", dict(sampler="ddpm")),
                        ("c-4-harmonica-40-0", dict(sampler="ddpm")),
                        ("c-4-harmonica-55-0", dict(sampler="ddpm"))):
        save_router(tmp_path / "table" / f"digits-{name}.safetensors", **about)
    offered = tmp_path / "table" / "digits-c-4-harmonica-40-0.safetensors"
    flags = "--sampler", "ddpm", "--num-samples", "1"
    assert f"no cache (--router {offered} is one of the table's)" in run(*flags)
    assert f"router {offered}, tau" in run(*flags, "--router", offered)
    for other in ("ddim", "ddim:0.5"):
        assert "--router" not in run("--sampler", other, "--num-samples", "1")


def test_labels_are_repeated(run, network, tmp_path):
    run("--schedule", "random:0.4", "--labels", "7,3", "--out", "x.npz")
    expected = one_by_one(network, RANDOM, labels=(7, 3, 7))
    assert_same_pictures(images_in(tmp_path / "x.npz"), pictures.to_pixels(expected))


@pytest.mark.parametrize("sampler_name", ["ddim:1", "ddpm", "dpm-solver++"])
def test_sampler_guidance_and_seed(run, network, tmp_path, sampler_name):
    out = run("--schedule", "fora:2", "--sampler", sampler_name, "--guidance", "3", "--seed", "5",
              "--out", "x.npz")
    expected = one_by_one(network, router.fora(STEPS, 16, 2), seed=5, guidance=3,
                          sampler=sampler_name)
    assert_same_pictures(images_in(tmp_path / "x.npz"), pictures.to_pixels(expected))
    assert f"digits, {sampler_name}, T = 4, guidance 3, seed 5" in out


@pytest.mark.parametrize("sampler_name", ["ddim", "ddpm", "sa-solver"])
def test_the_batch_size_does_not_change_the_images(run, tmp_path, sampler_name):
    images = []
    for size in (1, 2, 3, 20):
        run("--schedule", "random:0.4", "--sampler", sampler_name, "--batch-size", size,
            "--out", "x.npz")
        images.append(images_in(tmp_path / "x.npz"))
    for other in images[1:]:
        assert_same_pictures(other, images[0])


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
def test_the_same_seed_gives_the_same_bytes(run, tmp_path, name):
    def bytes_of(seed):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))  # a new one each time
        run("--schedule", "random:0.4", "--seed", seed, "--out", folder / name)
        path = folder / name
        files = sorted(path.glob("*.png")) if path.is_dir() else [path]
        return [file.read_bytes() for file in files]

    first = bytes_of(1)
    assert bytes_of(1) == first
    assert bytes_of(2) != first


def test_latents_are_written_as_they_are(run, tmp_path, monkeypatch):
    monkeypatch.setitem(dit.SIZES, "XL/2", dict(hidden_size=32, depth=2, num_heads=2, patch_size=8))
    network = tiny_dit(**dit.SIZES["XL/2"], input_size=32, in_channels=4, num_classes=1000)
    save_file(network.state_dict(), tmp_path / "tiny.safetensors")
    flags = ["--model", "dit256", "--weights", "tiny.safetensors", "--schedule", "fora:2"]
    flags += ["--latents"]
    out = run(*flags, "--labels", "999,0")
    assert out.endswith("wrote latents.npz\n")
    with np.load("latents.npz") as data:
        assert data.files == ["latents"]
        latents = data["latents"]
    assert latents.shape == (IMAGES, 4, 32, 32)
    assert latents.dtype == np.float32
    for j, label in enumerate((999, 0, 999)):
        x = samplers.Noise(0, [j]).start((4, 32, 32))
        made = samplers.denoise(network, samplers.DDIM(STEPS), x, network.condition([label]), 1.5,
                              Cache(router.fora(STEPS, 4, 2)))
        np.testing.assert_allclose(latents[j], made[0].numpy(), rtol=1e-2, atol=1e-2)
    for more in (("--out", "x.png"), ("--out", "x"), ("--compare", "--out", "x.npz")):
        with pytest.raises(SystemExit):
            run(*flags, *more)


def test_a_folder_goes_on_where_it_was_interrupted(run, tmp_path, monkeypatch):
    """And more images can be asked for: the first ones stay as they are."""
    run("--schedule", "fora:2", "--out", "whole", "--num-samples", 6)
    write, calls = pictures.write, []

    def write_once(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(write(*args))

    monkeypatch.setattr(pictures, "write", write_once)
    with pytest.raises(SystemExit):
        run("--schedule", "fora:2", "--out", "x", "--num-samples", 5)
    monkeypatch.setattr(pictures, "write", write)
    assert len(list((tmp_path / "x").glob("*.png"))) == 2
    before = (tmp_path / "x" / "000001.png").stat().st_mtime_ns
    run("--schedule", "fora:2", "--out", "x", "--num-samples", 5)
    assert "x holds all 5 images" in run("--schedule", "fora:2", "--out", "x", "--num-samples", 5)
    run("--schedule", "fora:2", "--out", "x", "--num-samples", 6)
    assert (tmp_path / "x" / "000001.png").stat().st_mtime_ns == before
    (tmp_path / "x" / "000002.png").unlink()
    run("--schedule", "fora:2", "--out", "x", "--num-samples", 6)
    assert_same_pictures(images_in(tmp_path / "x"), images_in(tmp_path / "whole"))
    assert len((tmp_path / "x" / "items.txt").read_text().splitlines()) == 6


def test_weights_in_a_folder_of_diffusers(run, network, tmp_path):
    """The same pictures as from the file; a folder of images goes on; the weights stay."""
    folder = tmp_path / "pipe" / "transformer"
    folder.mkdir(parents=True)
    layout = checkpoint.to_diffusers(network.state_dict(), network)
    save_file(layout, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    save_file(layout, tmp_path / "w.safetensors")
    run("--schedule", "fora:2", "--weights", "w.safetensors", "--out", "file")
    run("--schedule", "fora:2", "--weights", "pipe", "--out", "x")
    assert np.array_equal(images_in(tmp_path / "x"), images_in(tmp_path / "file"))
    again = ("--schedule", "fora:2", "--weights", "pipe/", "--out", "x")  # as a shell completes it
    assert "x holds all 3 images" in run(*again)
    save_file({key: value + 1 for key, value in layout.items()},
              folder / "diffusion_pytorch_model.safetensors")
    for flags in (again, (*again[:-1], "pipe"), (*again[:-1], "pipe/transformer")):
        with pytest.raises(SystemExit):  # replaced weights; images among the weights
            run(*flags)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"]


def test_random_labels_are_seeded_and_each_images_own():
    labels = sample.choose_labels("random", 10, 400, seed=3)
    assert labels[:7] == sample.choose_labels("random", 10, 7, seed=3)
    assert labels != sample.choose_labels("random", 10, 400, seed=4)
    assert min(labels.count(label) for label in range(10)) > 15


# ------------------------------------------------------------------------------------------------
# Text to image


@pytest.fixture(scope="module")
def emoji_weights(tmp_path_factory):
    torch.manual_seed(0)
    network = pixart.PixArt(**pixart.SIZES["emoji"])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("emoji") / "emoji.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def draw(run, emoji_weights):
    """`sample.py --model emoji`, by DDIM in 2 steps (the solvers have tests of their own)."""
    def draw(*flags):
        return run("--model", "emoji", "--weights", emoji_weights, "--steps", 2, "--sampler",
                   "ddim", "--schedule", "none", *flags)

    return draw


def test_prompts_are_drawn_in_turn(draw, tmp_path):
    draw("--prompt", "red apple", "--prompt", "", "--out", "x.npz")  # three images of two prompts
    images = images_in(tmp_path / "x.npz")
    assert images.shape == (3, 32, 32, 3)
    draw("--prompt", "red apple", "--out", "y.npz", "--batch-size", 3)
    equal = (images_in(tmp_path / "y.npz") == images).mean((1, 2, 3))
    assert equal[0] > 0.999 and equal[1] < 0.999 and equal[2] > 0.999
    (tmp_path / "prompts.txt").write_text("dog\n\nred apple\n")
    draw("--prompts", "prompts.txt", "--out", "folder")
    assert (tmp_path / "folder" / "items.txt").read_text() == "dog\nred apple\ndog\n"
    draw("--prompt", "dog", "--out", "z.npz")
    assert not np.array_equal(images_in(tmp_path / "z.npz")[0], images[0])


def test_without_prompts_it_draws_captions_that_nobody_chose(draw, tmp_path):
    draw("--out", "x")
    captions = (tmp_path / "x" / "items.txt").read_text().splitlines()
    assert captions == shipped.emoji_prompts()[:3]
    with pytest.raises(SystemExit):  # the same folder, other prompts
        draw("--out", "x", "--prompt", "dog")


def test_pictures_of_another_height(draw, tmp_path):
    draw("--height", 48, "--out", "x.npz")
    assert images_in(tmp_path / "x.npz").shape == (3, 48, 32, 3)
    with pytest.raises(SystemExit):
        draw("--width", 30)


def test_a_grid_with_titles(draw, tmp_path):
    draw("--prompt", "red apple")
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (3 * 33 * 4, 33 * 4 + 34)
        bar = np.asarray(picture)[33 * 4 :]
    assert (bar < 100).any() and (bar[:, 2 * 132 :] < 100).any()


def test_latents_become_pictures_with_an_autoencoder(run, tmp_path, monkeypatch):
    """The command's pixels are those of the autoencoder, asked for latents / scale."""
    monkeypatch.setitem(dit.SIZES, "XL/2", dict(hidden_size=32, depth=1, num_heads=2, patch_size=8))
    network = tiny_dit(**dit.SIZES["XL/2"], input_size=32, in_channels=4, num_classes=1000)
    save_file(network.state_dict(), tmp_path / "tiny.safetensors")
    make = vae.Autoencoder
    small = functools.partial(make, channels=32, multipliers=(1, 1, 1, 1), res_blocks=1)
    monkeypatch.setattr(vae, "Autoencoder", small)
    torch.manual_seed(0)
    autoencoder = small().requires_grad_(False)
    save_file(autoencoder.state_dict(), tmp_path / "vae.safetensors")
    flags = ["--model", "dit256", "--weights", "tiny.safetensors", "--schedule", "none"]
    run(*flags, "--latents")
    run(*flags, "--vae", "vae.safetensors", "--out", "x.npz")
    with np.load("latents.npz") as data:
        latents = torch.from_numpy(data["latents"])
    expected = pictures.to_pixels(autoencoder.decode(latents / 0.18215))
    assert_same_pictures(images_in(tmp_path / "x.npz"), expected)


# ------------------------------------------------------------------------------------------------
# Mistakes


def everything_in(folder):
    """{path: content} of all files, hidden ones too."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def refused(run, tmp_path, capsys):
    """Runs the command, which must refuse and leave the folder as it was: -> what it said."""

    def refused(*flags):
        before = everything_in(tmp_path)
        with pytest.raises(SystemExit) as caught:
            run(*flags)
        assert caught.value.code == 2
        assert everything_in(tmp_path) == before
        return capsys.readouterr().err

    return refused


def assert_one_line(error):
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert len(error) > len("error: x\n")


@pytest.mark.parametrize("flags, said", [
    ("--model nope", "unknown model nope"),
    ("--schedule nope", "unknown schedule nope"),
    ("--schedule fora", "fora"),
    ("--schedule fora:0", "fora:0"),
    ("--schedule fora:x", "fora:x"),
    ("--schedule fora:99999999999999999999", "fora:9999"),
    ("--schedule random:0.9", "random:0.9"),
    ("--schedule random:-0.1", "random:-0.1"),
    ("--schedule random:nan", "random:nan"),
    ("--schedule random:inf", "random:inf"),
    ("--sampler nope", "unknown sampler nope"),
    ("--sampler ddim:2", "ddim:2"),
    ("--sampler ddim:x", "ddim:x"),
    ("--sampler ddpm:1", "ddpm:1"),
    ("--steps 1", "steps must be from 2 to 1000"),
    ("--steps 1001", "steps must be from 2 to 1000"),
    ("--steps 0", "steps must be from 2 to 1000"),
    ("--steps -4", "steps must be from 2 to 1000"),
    ("--steps 1 --sampler ddpm", "steps must be from 2 to 1000"),
    ("--tau 0 --router good.safetensors", "tau must be between 0 and 1"),
    ("--tau 1 --router good.safetensors", "tau must be between 0 and 1"),
    ("--tau 0.5 --schedule none", "--tau is the threshold of a router"),
    ("--tau nan --router good.safetensors", "--tau: a finite number, not nan"),
    ("--labels 10 --schedule none", "--labels takes numbers from 0 to 9"),
    ("--labels=-1 --schedule none", "--labels takes numbers from 0 to 9"),
    ("--labels 1,x --schedule none", "--labels takes numbers from 0 to 9"),
    ("--labels 1,,2 --schedule none", "--labels takes numbers from 0 to 9"),
    ("--labels 1.5 --schedule none", "--labels takes numbers from 0 to 9"),
    ("--num-samples 0 --schedule none", "--num-samples"),
    ("--num-samples -1 --schedule none", "--num-samples"),
    ("--batch-size 0 --schedule none", "--batch-size"),
    ("--dtype int8", "unknown dtype int8"),
    ("--device tpu", "no device tpu"),
    ("--device cuda:77", "no device cuda:77 here: torch finds only "),
    ("--router nothing.safetensors", "no router file at nothing.safetensors"),
    ("--router .", "no router file at ."),
    ("--router truncated.safetensors", "truncated.safetensors"),
    ("--router text.safetensors", "text.safetensors"),
    ("--router weights.safetensors", "weights.safetensors"),
    ("--router other_model.safetensors", "a router of dit256 with ddim, T = 4, K = 16"),
    ("--router other_sampler.safetensors", "a router of digits with ddpm, T = 4, K = 16"),
    ("--router other_steps.safetensors", "a router of digits with ddim, T = 5, K = 16"),
    ("--router other_branches.safetensors", "a router of digits with ddim, T = 4, K = 12"),
    ("--router good.safetensors --sampler ddpm", "it cannot be used for digits with ddpm"),
    ("--router good.safetensors --steps 5", "it cannot be used for digits with ddim, T = 5"),
    ("--router good.safetensors --steps 5", "K = 16: use --steps 4\n"),
    ("--router other_sampler.safetensors --steps 9", "K = 16: use --sampler ddpm --steps 4\n"),
    ("--router other_model.safetensors", "K = 16: use --model dit256\n"),
    ("--router other_branches.safetensors --steps 9", "T = 9, K = 16\n"),  # no flag helps
    ("--router unknown_model.safetensors --steps 9", "T = 9, K = 16\n"),
    ("--schedule none --vae nothing.safetensors", "--vae and --latents are for latents"),
    ("--schedule none --latents", "--vae and --latents are for latents"),
    ("--weights nothing.safetensors", "no weights at nothing.safetensors"),
    ("--weights text.safetensors", "text.safetensors is not a whole checkpoint"),
    ("--weights text.pt", "text.pt is not a whole checkpoint"),
    ("--weights good.safetensors", "good.safetensors does not fit this network"),
    ("--schedule none --out x.jpg", "--out is a .png, a .npz or a folder"),
    ("--schedule none --out file/x.png", "file"),
    ("--schedule none --out file/deeper/x.npz", "file"),
    ("--schedule none --out file", "file"),
    ("--schedule none --out folder.png", "folder.png: it is a folder"),
    ("--schedule none --out folder.npz", "folder.npz: it is a folder"),
    ("--schedule none --compare --out x.npz", "--compare draws one picture"),
    ("--schedule none --compare --out x", "--compare draws one picture"),
])
def test_a_mistake_is_one_line(refused, tmp_path, flags, said):
    save_router(tmp_path / "good.safetensors")
    save_router(tmp_path / "other_model.safetensors", model="dit256")
    save_router(tmp_path / "unknown_model.safetensors", model="dit64")
    save_router(tmp_path / "other_sampler.safetensors", sampler="ddpm")
    save_router(tmp_path / "other_steps.safetensors", steps=5)
    save_router(tmp_path / "other_branches.safetensors", branches=12)
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-10])
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    for name in ("text.safetensors", "text.pt", "file"):
        (tmp_path / name).write_text("<html>not found</html>\n")
    for name in ("folder.png", "folder.npz"):
        (tmp_path / name).mkdir()
    error = refused(*flags.split())
    assert_one_line(error)
    assert said in error


@pytest.mark.parametrize("flags, said", [
    ("--router nope", "no router file at nope"),
    ("--schedule fora:0", "fora:0"),
    ("--steps 1", "steps must be from 2 to 1000"),
    ("--sampler euler", "unknown sampler euler"),
    ("--labels 1000", "--labels takes numbers from 0 to 999"),
    ("--prompt x", "takes labels, not prompts"),
    ("--vae nope", "no weights at nope"),
    ("--dtype int8", "unknown dtype int8"),
    ("--router other.safetensors", "use --model digits --steps 4"),
    ("--model sigma512 --height 100", "height and width must be multiples of 16"),
    ("--model pixart256 --labels 1", "takes prompts, not labels"),
    ("--model pixart256 --prompts nope", "nope"),
    ("--model pixart256 --prompt \udcff", "is not a text in UTF-8"),
    ("--raw-captions", "models that read captions by T5"),
    ("--out x.jpg", "--out is a .png"),
    ("--latents --out x.png", "--latents go into a file"),
    ("--weights nope", "no weights at nope"),
])
def test_mistakes_are_found_before_a_download(monkeypatch, tmp_path, capsys, flags, said):
    def offline(*args, **kwargs):
        pytest.fail(f"asked the network for {args}")

    monkeypatch.chdir(tmp_path)
    save_router(tmp_path / "other.safetensors")
    for module, name in ((command, "download"), (models, "hugging_face"), (models.text, "load_t5")):
        monkeypatch.setattr(module, name, offline)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--model", "dit256",
                                      *flags.split()])
    with pytest.raises(SystemExit) as caught:
        command.run(sample.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert_one_line(error)
    assert said in error


def save_overflowing_weights(network, path):
    state = {**network.state_dict(), "final_layer.linear.bias": torch.full((32,), 3e38)}
    save_file(state, path)


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
def test_weights_that_overflow(refused, network, tmp_path, name):
    save_overflowing_weights(network, tmp_path / "large.safetensors")
    error = refused("--weights", "large.safetensors", "--schedule", "none", "--out", name)
    assert_one_line(error)
    assert "not finite" in error


def test_on_a_terminal_the_error_has_a_line_of_its_own(run, network, tmp_path, monkeypatch):
    """There the progress bar is on the same screen."""
    save_overflowing_weights(network, tmp_path / "large.safetensors")
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(SystemExit):
        run("--weights", "large.safetensors", "--schedule", "none", "--out", "x.npz")
    assert "batch" in screen.getvalue()  # there was a bar
    last = screen.getvalue().splitlines()[-1].split("\r")[-1]
    assert last.startswith("error: ")


@pytest.mark.parametrize("flags", [
    "--steps four", "--seed -1", "--seed 1.5", "--num-samples many", "--nonsense", "x.png",
    "--router a.safetensors --schedule none", "--guidance strong",
])
def test_flags_that_do_not_parse(refused, flags):
    assert_one_line(refused(*flags.split()))


def test_an_old_file_survives_a_run_that_fails(run, tmp_path, monkeypatch):
    run("--schedule", "none", "--out", "x.npz")
    old = (tmp_path / "x.npz").read_bytes()

    def full(file, header):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(SystemExit):
        run("--schedule", "fora:2", "--out", "x.npz")
    assert everything_in(tmp_path) == {"x.npz": old}


def test_totals_start_at_zero():
    assert set(dataclasses.asdict(sample.Totals()).values()) == {0}


def test_a_folder_of_somebody_elses_files_is_left_alone(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").write_bytes(b"a holiday")
    error = refused("--schedule", "none", "--out", "mine")
    assert_one_line(error)
    assert "holds files that this command did not write" in error
    assert everything_in(tmp_path / "mine") == {"000000.png": b"a holiday"}


def test_a_router_is_not_written_over(refused, tmp_path):
    save_router(tmp_path / "r.png")
    before = (tmp_path / "r.png").read_bytes()
    error = refused("--router", "r.png", "--out", "r.png")
    assert_one_line(error)
    assert "r.png is read" in error and (tmp_path / "r.png").read_bytes() == before


@pytest.mark.parametrize("flags, words", (
    ("--num-samples 10000000001", "--num-samples must be 1 to 10,000,000"),
    ("--tau inf", "a finite number"), ("--guidance nan", "a finite number"),
))
def test_numbers_out_of_range_are_refused_at_once(refused, flags, words):
    error = refused(*flags.split())
    assert_one_line(error)
    assert words in error


@pytest.mark.parametrize("kind", ("bytes", "folder", "pipe", "none"))
def test_a_folder_whose_notes_cannot_be_read_is_left_alone(refused, tmp_path, kind):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "settings.json").write_text("{}\n")
    make = {"bytes": lambda path: path.write_bytes(b"\xff"), "folder": Path.mkdir,
            "pipe": os.mkfifo, "none": lambda path: None}
    make[kind](folder / "items.txt")
    error = refused("--schedule", "none", "--out", "x")
    assert_one_line(error)
    assert "x has no whole items.txt and settings.json" in error and "another --out" in error


@pytest.mark.parametrize("flag", ("--sampler", "--dtype", "--device", "--weights", "--schedule",
                                  "--router", "--labels", "--vae", "--prompts", "--out"))
def test_names_are_not_empty(refused, flag):
    error = refused(flag, "")
    assert_one_line(error)
    assert f"{flag}: a name, not an empty one" in error
