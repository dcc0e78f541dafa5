"""What README and the shipped files claim is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
import router
import shipped
from sample import denoise
from samplers import Noise, make_sampler

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (?:-m )?(\S+)(.*?)(?:  +#.*)?$", README, re.MULTILINE)


def test_the_first_command_comes_by_line_30():
    assert "make demo" in README.splitlines()[:30]


def test_files_that_readme_names_exist():
    named = re.findall(r"`([\w/]+(?:\.(?:py|md|txt)|/))`|\]\((docs/[^)]+)\)", README)
    paths = [a or b for a, b in named]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_flags_that_readme_names_exist(name):
    module = name.removesuffix(".py")
    answer = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    for other, flags in COMMANDS:
        for flag in re.findall(r"--[\w-]+", flags if other == name else ""):
            assert flag in answer


def test_the_shipped_router_is_the_one_that_readme_tells_of():
    model = models.load("digits", device="cpu")
    file = router.load(model.router)
    file.check("digits", model.sampler, model.steps, len(model.network.branches))
    cur = router.cur(file.schedule())
    assert cur >= 0.3 and f"the shipped router | {100 * cur:.1f} %" in README
    assert float(file.about["guidance"]) == model.guidance


def test_the_shipped_model_is_small_and_draws_digits():
    """Trained weights predict the noise in real digits; random ones do not."""
    from samplers import ALPHA_BAR

    assert (ROOT / "checkpoints" / "digits_dit.safetensors").stat().st_size < 12e6
    network = models.load("digits", device="cpu").network
    images, labels = shipped.digits("held-out")
    images, labels = images[::20] / 127.5 - 1, labels[::20]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(images),), 400)
    a = ALPHA_BAR[400]
    with torch.no_grad():
        eps = network(a**0.5 * images + (1 - a) ** 0.5 * noise, t, labels)[:, :1]
    assert (eps - noise).square().mean() < 0.05


def test_the_shipped_emoji_model_is_small_and_knows_its_captions():
    """Of 100 captions that nobody chose, at least 80 give an image among whose 3 nearest training
    images is the caption's own."""
    assert (ROOT / "checkpoints" / "emoji_pixart.safetensors").stat().st_size < 16e6
    model = models.load("emoji", device="cpu")
    prompts = shipped.emoji_prompts()[:100]
    noise = Noise(0, range(100))
    with sdpa_kernel(SDPBackend.MATH):
        drawn = denoise(model.network, make_sampler(model.sampler, model.steps),
                        noise.start(model.shape), model.condition(prompts), model.guidance)
    images, captions = shipped.emoji()
    distances = torch.cdist(drawn.clamp(-1, 1).flatten(1), images.flatten(1) / 127.5 - 1)
    own = distances[range(100), [captions.index(prompt) for prompt in prompts]]
    assert ((distances < own[:, None]).sum(1) < 3).sum() >= 80
