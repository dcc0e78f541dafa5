"""Learning-to-Cache's training: against its description in slow words, and runs of it."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import command
import models
import router as routers
from dpm_solver import SAMPLERS
from experiments import train_ltc
from samplers import DDIM, Noise
from tests.small import tiny_dit, tiny_uvit
from tests.test_train_stepwise import StandStill
from tests.test_training import log_of, logits_of

SEEDS = (0, 1, 2)
TAU = 0.5


def tiny_model(seed=0):
    return models.Model("tiny", tiny_dit(seed), "ddim", steps=4, guidance=1.5)


def draw(noise):
    """Images that are noise too, and labels."""
    return noise.start((2, 8, 8)), noise.labels(5)


def settings(**changes):
    known = dict(
        model="tiny", steps=4, sampler="ddim", guidance=1.0, seed=0, beta=1e-3, tau=TAU, lr=0.2,
        objective="learning-to-cache", proxy="none", iterations=12, batch_size=3, micro_batch=3,
        target_cur=None, images=None,
    )
    return {**known, **changes}


# ------------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize("T", (2, 3, 10, 13, 20, 50))
def test_rows_that_may_reuse(T):
    """By timestep index: odd ones compute, and so does the first step executed; so CUR <= 50 %."""
    computes = {T - 1 - index for index in range(T) if index % 2 == 1 or index == T - 1}
    assert set(train_ltc.learned_rows(T)) == set(range(T)) - computes
    router = train_ltc.make_router(T, 6, 0, train_ltc.learned_rows(T))
    for i in train_ltc.learned_rows(T):
        router.rows[i - 1].data.fill_(-5)
    schedule = routers.threshold(torch.sigmoid(router.logits()), 0.9)
    assert [row.all() for row in schedule] == [i in computes for i in range(T)]
    assert routers.cur(schedule) == pytest.approx(len(train_ltc.learned_rows(T)) / T)
    assert routers.cur(schedule) <= 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("micro_batch", (1, 2, 3))
def test_an_iteration_against_its_description(seed, micro_batch):
    """The loss, image by image with a cache of our own, and its gradient by finite differences."""
    model, T, beta, i = tiny_model(seed), 4, 0.01, (1, 3, 3)[seed]
    network, sampler = model.network.double(), DDIM(T)
    router = train_ltc.make_router(T, 6, seed, train_ltc.learned_rows(T)).double()
    noise = Noise(seed, range(3), 1)
    images, labels = draw(Noise(seed + 50, range(3)))
    labels[1] = 5  # the null label
    images = images.double()
    recorder = StandStill(router)
    loss, error = train_ltc.train_row(model, router, recorder, sampler, i, images, labels, noise,
                                      TAU, beta, micro_batch)

    def described(row):
        errors = []
        for j in range(3):
            a, after = sampler.alpha_bar[i - 1], sampler.alpha_bar[i]
            fresh = Noise(seed, [j], 1).step(i, images[:1])
            x = math.sqrt(a) * images[j : j + 1] + math.sqrt(1 - a) * fresh
            kept, mixed = {}, {}

            def fill(k, branch, kept=kept):
                kept[k] = branch()
                return kept[k]

            def mix(k, branch, kept=kept, mixed=mixed):
                mixed[k] = row[k] * branch() + (1 - row[k]) * kept[k]
                return mixed[k]

            y = labels[j : j + 1]
            t, t_next = (torch.tensor([sampler.timesteps[n]]) for n in (i - 1, i))
            eps = network(x, t, y, cache=fill)[:, :2]
            x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
            errors.append(F.mse_loss(network(x, t_next, y, cache=mix), network(x, t_next, y)))
        return torch.stack(errors).mean(), beta * row.sum()

    logits = router.rows[i - 1].detach()
    expected_error, usage = described(torch.sigmoid(logits))
    assert error == pytest.approx(expected_error.item(), rel=1e-6)
    assert loss == pytest.approx((expected_error + usage).item(), rel=1e-6)
    (gradients,) = recorder.gradients
    assert [gradient is None for gradient in gradients] == [n != i for n in (1, 2, 3)]
    for k in (0, 3, 5):
        h = torch.zeros(6, dtype=torch.float64)
        h[k] = 1e-5
        up, down = (sum(described(torch.sigmoid(logits + d))) for d in (h, -h))
        assert gradients[i - 1][k].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-4)


def test_an_iteration_on_a_u_vit_against_its_description():
    """x_s at a step's start; the step to its end, whose middle fills the cache; there the two. By
    a network, a cache and a solver's formulas written out, with finite differences."""
    network, i, T, seed = tiny_uvit().double(), 4, 8, 3
    model = models.Model("uvit256", network, "dpm-solver-2s", T, 1.4)
    sampler = SAMPLERS["dpm-solver-2s"](T)
    router = train_ltc.make_router(T, 10, 0, train_ltc.learned_rows(T, "dpm-solver-2s")).double()
    assert [not row.requires_grad for row in router.rows] == [n % 2 == 1 for n in range(1, T)]
    noise, recorder = Noise(seed, range(2), 1), StandStill(router)
    images, labels = draw(Noise(53, range(2)))
    images = images.double()
    loss, error = train_ltc.train_row(model, router, recorder, sampler, i, images, labels, noise,
                                      TAU, 0.01, 2, before=2)

    def described(row):
        a, middle, after = (sampler.alpha_bar[n] for n in (i - 2, i - 1, i))
        h = [0.5 * math.log(b / (1 - b)) - 0.5 * math.log(a / (1 - a)) for b in (middle, after)]
        assert h[1] == pytest.approx(2 * h[0])
        x = math.sqrt(a) * images + math.sqrt(1 - a) * noise.step(i, images)
        t = [torch.full((2,), sampler.timesteps[n]) for n in (i - 2, i - 1, i)]
        kept = {}

        def fill(k, branch):
            kept[k] = branch()
            return kept[k]

        def mix(k, branch):
            return row[k] * branch() + (1 - row[k]) * kept[k]

        def data(x, a, eps):
            return (x - math.sqrt(1 - a) * eps) / math.sqrt(a)

        def lead(first, b, h):
            return (math.sqrt((1 - b) / (1 - a)) * x - math.sqrt(b) * math.expm1(-h) * first)

        first = data(x, a, network(x, t[0], labels))
        inner = lead(first, middle, h[0])
        second = data(inner, middle, network(inner, t[1], labels, cache=fill))
        x = lead(first, after, h[1]) - math.sqrt(after) * math.expm1(-h[1]) * (second - first)
        return F.mse_loss(network(x, t[2], labels, cache=mix), network(x, t[2], labels)), (
            0.01 * row.sum())

    logits = router.rows[i - 1].detach()
    expected_error, usage = described(torch.sigmoid(logits))
    assert error == pytest.approx(expected_error.item(), rel=1e-6)
    assert loss == pytest.approx((expected_error + usage).item(), rel=1e-6)
    for k in (0, 9):
        h = torch.zeros(10, dtype=torch.float64)
        h[k] = 1e-5
        up, down = (sum(described(torch.sigmoid(logits + d))) for d in (h, -h))
        gradient = recorder.gradients[0][i - 1][k].item()
        assert gradient == pytest.approx((up - down).item() / 2e-5, rel=1e-4)


# ------------------------------------------------------------------------------------------------
# Runs


def test_a_run_trains_its_rows_only_and_resumes_bitwise(tmp_path, monkeypatch):
    model = tiny_model()
    before = train_ltc.make_router(4, 6, 0, train_ltc.learned_rows(4)).logits()
    train_ltc.train(model, settings(), tmp_path / "whole", draw)
    after = logits_of(tmp_path / "whole")
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        True, False, True, False]
    assert (after[[0, 2]] == routers.LIMIT).all()

    save_state = command.save_state

    def save_and_stop(path, state):
        save_state(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "save_state", save_and_stop)
    for _ in range(6):  # 6 rounds of 2 iterations
        with pytest.raises(KeyboardInterrupt):
            train_ltc.train(model, settings(), tmp_path / "parts", draw, resume=True)
    monkeypatch.setattr(command, "save_state", save_state)
    train_ltc.train(model, settings(), tmp_path / "parts", draw, resume=True)
    assert torch.equal(after, logits_of(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    file = routers.load(tmp_path / "whole" / "router.safetensors")
    assert file.about["objective"] == "learning-to-cache" and file.about["guidance"] == "1.0"
    assert "images" not in file.about and file.about["iterations"] == "12"
    train_ltc.train(model, settings(seed=1), tmp_path / "other", draw)
    assert not torch.equal(after, logits_of(tmp_path / "other"))


def test_labels_are_dropped_at_the_published_rate(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_ltc, "train_row", lambda *args: seen.append(args[6]) or (0.0, 0.0))
    train_ltc.train(tiny_model(), settings(batch_size=500), tmp_path / "run", draw)
    assert len(seen) == 12 and 0.09 < (torch.cat(seen) == 5).double().mean() < 0.11


def test_another_sampler_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use --sampler ddim"):
        train_ltc.train(tiny_model(), settings(sampler="ddpm"), tmp_path / "run", draw)


def test_steps_that_leave_nothing_to_learn_are_refused():
    assert train_ltc.plan("uvit256", "dpm-solver-2s", 4)[1] == [2]
    with pytest.raises(ValueError, match="at T = 2 no evaluation may reuse"):
        train_ltc.plan("uvit256", "dpm-solver-2s", 2)


# ------------------------------------------------------------------------------------------------
# Images


class Flat:
    """An autoencoder whose latents are the colour of the image's middle, and the noise."""

    def encode(self, images, noise):
        return images[:, :2, 4:12, 4:12] + 0 * noise.mean()


def test_a_folder_of_classes(tmp_path):
    for k, name in enumerate("edcba"):  # sorted: a is class 0
        (tmp_path / name).mkdir()
        tall = np.zeros((40, 16, 3), np.uint8)
        tall[12:28] = 50 * k  # the middle
        Image.fromarray(tall).save(tmp_path / name / "x.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    model = tiny_model()
    model.autoencoder, model.scale = "some", 0.5
    model.size = (2, 2)
    images, labels = train_ltc.folder(tmp_path, model, Flat())(Noise(0, range(40)))
    assert set(labels.tolist()) == {0, 1, 2, 3, 4} and images.shape == (40, 2, 8, 8)
    expected = 0.5 * ((4 - labels) * 50 / 127.5 - 1)
    assert torch.allclose(images, expected[:, None, None, None].expand_as(images), atol=1e-6)
    (tmp_path / "a" / "y.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="y.png cannot be read as an image"):
        train_ltc.folder(tmp_path, model, Flat())(Noise(0, range(40)))
    (tmp_path / "f").mkdir()
    with pytest.raises(ValueError, match="has 6 folders, tiny 5 classes"):
        train_ltc.folder(tmp_path, model, Flat())


def crop_of_adm(image, size):
    """guided_diffusion.image_datasets.center_crop_arr, restated: means of 2 x 2 pixels as long as
    the shorter side is 2 size or more, then Pillow's bicubic resize to it, then a slice."""
    pixels = np.asarray(image)
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        assert pixels.shape == (2 * height, 2 * width, 3)  # the test's own: even at every halving
        mean = pixels.reshape(height, 2, width, 2, 3).astype(float).mean(axis=(1, 3))
        pixels = np.floor(mean + 0.5).astype(np.uint8)
    scale = size / min(pixels.shape[:2])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("height, width", [
    (16, 16), (16, 21), (40, 24), (31, 17), (32, 32), (128, 72), (96, 200), (9, 12), (64, 68),
])  # fmt: skip
def test_the_crop_is_adms(tmp_path, height, width):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    image.save(tmp_path / "x.png")
    expected = crop_of_adm(image, 16)
    assert np.abs(np.asarray(train_ltc.square(image, 16)).astype(int) - expected).max() <= 3
    pixels = train_ltc.centre(tmp_path / "x.png", (16, 16))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert np.abs((pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() <= 3.001
    assert torch.equal(train_ltc.centre(tmp_path / "x.png", (16, 16), True), pixels.flip(2))


def test_half_of_the_images_are_mirrored_by_seed_and_number_alone(tmp_path):
    for name in "abcde":
        (tmp_path / name).mkdir()
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[:, 8:] = 255  # the right half is white
        Image.fromarray(picture).save(tmp_path / name / "x.png")

    class Corner(Flat):
        def encode(self, images, noise):
            return images[:, :2, :8, :8]  # the left half of the upper half

    model = tiny_model()
    model.autoencoder, model.size = "some", (2, 2)
    draw = train_ltc.folder(tmp_path, model, Corner())
    images, labels = draw(Noise(3, range(400), 1))
    white = images[:, 0, 0, 0] == 1
    assert (images.flatten(1) == torch.where(white, 1.0, -1.0)[:, None]).all()
    assert 160 < white.sum() < 240  # 200 +- 4 deviations
    for label in range(5):  # whatever the image is
        assert 0.25 < white[labels == label].float().mean() < 0.75
    again, _ = draw(Noise(3, [7, 300, 5], 1))  # other batches, another order: a resumed run
    assert torch.equal(again, images[[7, 300, 5]])


def test_a_folder_of_classes_as_people_have_it(tmp_path):
    with pytest.raises(ValueError, match="no images in folders of"):
        train_ltc.list_classes(tmp_path)
    for name in ("b", "a", ".git"):
        (tmp_path / name).mkdir()
        for file in ("10.png", "2.gif", "._2.gif", "notes.txt"):
            Image.new("RGB", (4, 4)).save(tmp_path / name / file, "PNG")
    with pytest.warns(match=r"left out of .*a: 1 .txt, 1 hidden \(and files of 1 more classes\)"):
        classes = train_ltc.list_classes(tmp_path)
    assert [[path.name for path in files] for files in classes] == [["2.gif", "10.png"]] * 2
    assert classes[0][0].parent.name == "a"
    (tmp_path / "c").mkdir()
    model = tiny_model()
    model.network.num_classes = 3
    with pytest.warns(), pytest.raises(ValueError, match="no images in the folder of class 2"):
        train_ltc.folder(tmp_path, model, Flat())
    for name in ("none", "a/10.png"):
        with pytest.raises(OSError, match="10.png|none"):
            train_ltc.list_classes(tmp_path / name)


@pytest.mark.parametrize("flags, words", [
    (["--model", "dit256"], "every other model on --images"),
    (["--images", "x"], "digits are trained on the shipped ones"),
    (["--guidance", "3"], "leave --guidance out"),
    (["--model", "emoji", "--images", "x"], "emoji takes prompts"),  # all before a download
    (["--model", "dit256", "--images", "x"], "No such file or directory: 'x'"),
    (["--model", "dit256", "--images", "x", "--sampler", "ddpm"], "use --sampler ddim"),
    (["--target-cur", "40"], "a share, like 0.4"), (["--target-cur", "0.5"], "must be below 0.5"),
    (["--sampler", "ddpm"], "use --sampler ddim"),
    (["--batch-size", "0"], "--batch-size must be 1 or more"),
])
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["train_ltc", *flags, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as caught:
        command.run(train_ltc.main)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and words in err and len(err.splitlines()) == 1
