"""How the shipped networks are trained: data, losses, and a training that resumes bitwise."""

import argparse
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import command
import features
import metrics
import pixart
import shipped
from experiments import pretrain
from samplers import DDPM


class Interrupted(Exception):
    pass


class Oracle(torch.nn.Module):
    """A network whose output is always `answer`, noise and variance channels."""

    num_classes = 10

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        return self.answer


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_loss_against_gaussians(seed):
    """Both terms from the definitions of q and p at each step, the KL by torch.distributions."""
    torch.manual_seed(seed)
    schedule, B = DDPM(1000), 6
    images = torch.rand(B, 1, 4, 4) * 2 - 1
    network = Oracle(torch.randn(B, 2, 4, 4))
    mse, kl = pretrain.training_loss(
        network, schedule, images, torch.zeros(B).long(), torch.Generator().manual_seed(seed)
    )
    eps, variance = network.answer.double().chunk(2, dim=1)
    expected_mse, expected_kl = 0.0, 0.0
    for b in range(B):
        i = schedule.timesteps.index(network.t[b].item())
        a, x, x0 = schedule.alpha_bar[i], network.x[b].double(), images[b].double()
        noise = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        expected_mse += (eps[b] - noise).square().mean() / B
        guess = (x - math.sqrt(1 - a) * eps[b]) / math.sqrt(a)
        q = Normal(schedule.posterior_mean(x0, x, i), math.exp(0.5 * schedule.log_beta_tilde[i]))
        p = Normal(schedule.posterior_mean(guess, x, i),
                   (0.5 * schedule.log_variance(variance[b], i)).exp())
        expected_kl += kl_divergence(q, p).mean() / math.log(2) / B
    assert mse.item() == pytest.approx(expected_mse.item(), rel=1e-2)
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-2)


def test_labels_are_dropped_for_guidance():
    network = Oracle(torch.zeros(2000, 2, 1, 1))
    pretrain.training_loss(network, DDPM(1000), torch.zeros(2000, 1, 1, 1),
                           torch.zeros(2000).long(), torch.Generator().manual_seed(0))
    assert 0.08 < (network.y == 10).float().mean() < 0.12


def arguments(folder, **changes):
    settings = dict(steps=5, batch_size=2, lr=1e-3, ema=0.9, seed=0, resume=True, compile=False,
                    out=str(folder / "weights.safetensors"), state=str(folder / "state.pt"))
    return argparse.Namespace(**{**settings, **changes})


def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    pretrain.train_digits(arguments(tmp_path / "whole"))

    save_state = command.save_state

    def save_and_stop(path, state):
        save_state(path, state)
        raise Interrupted

    monkeypatch.setattr(command, "save_state", save_and_stop)
    for _ in range(3):  # after steps 2, 4 and 5
        with pytest.raises(Interrupted):
            pretrain.train_digits(arguments(tmp_path / "parts"))
    monkeypatch.setattr(command, "save_state", save_state)
    pretrain.train_digits(arguments(tmp_path / "parts"))
    pretrain.train_digits(arguments(tmp_path / "other", seed=1))
    whole, parts, other = (load_file(tmp_path / name / "weights.safetensors")
                           for name in ("whole", "parts", "other"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not torch.equal(whole["final_layer.linear.weight"], other["final_layer.linear.weight"])


def test_another_runs_state_is_refused(tmp_path):
    command.save_state(tmp_path / "state.pt", {"settings": {"steps": 7}})
    with pytest.raises(ValueError, match="not the state of a run with these settings"):
        pretrain.train_digits(arguments(tmp_path))
    assert not (tmp_path / "weights.safetensors").exists()


def test_the_classifiers_training_holds_out_what_it_tests(tmp_path, monkeypatch, capsys):
    """Three short trainings. The saved statistics are those of the saved weights."""
    seen, augmented = [], pretrain.augmented

    def recorded(images, generator):
        seen.append(images)
        return augmented(images, generator)

    monkeypatch.setattr(pretrain, "augmented", recorded)
    args = arguments(tmp_path, steps=2, batch_size=50, ema=0.0, resume=False)
    pretrain.train_classifier(args)
    _, labels = shipped.digits("all")
    images = shipped.digits("all")[0]
    for fold, batches in zip((2, 1, 0), (seen[:2], seen[2:4], seen[4:]), strict=True):
        held_out = {image.numpy().tobytes() for image in images[shipped.held_out(labels, fold)]}
        assert not any(image.numpy().tobytes() in held_out for batch in batches for image in batch)
    network = features.load("digits", tmp_path / "weights.safetensors")
    statistics = metrics.load_statistics(tmp_path / "digits_held_out_statistics.npz")
    held_out = shipped.digits("held-out")[0]
    pooled = network(held_out[:20].expand(-1, 3, -1, -1))[0]
    assert torch.allclose(statistics.pooled[:20], pooled, rtol=1e-4, atol=1e-5)
    assert statistics.count == 1000 and "mean of three splits" in capsys.readouterr().out


def test_augmented_digits_stay_digits():
    """The centre of mass moves little more than the largest shift, and most of the ink stays."""
    images = shipped.digits("held-out")[0][::10]
    moved = pretrain.augmented(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved, images.float())
    place = torch.arange(28.0)

    def centre(batch, axis):
        return (batch.float().sum((1, axis)) * place).sum(1) / batch.float().sum((1, 2, 3))

    for axis in (2, 3):
        assert (centre(moved, axis) - centre(images, axis)).abs().max() < 4.5
    ratio = moved.sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert ratio.min() > 0.65 and ratio.max() < 1.5


def test_the_loss_of_v_by_its_definition():
    torch.manual_seed(0)
    schedule, B = DDPM(1000), 64
    images = torch.rand(B, 1, 2, 2) * 2 - 1
    network = Oracle(torch.randn(B, 2, 2, 2))
    mse, _ = pretrain.training_loss(network, schedule, images, torch.zeros(B).long(),
                                    torch.Generator().manual_seed(0), of_v=True)
    expected = 0.0
    for b in range(B):
        a = schedule.alpha_bar[schedule.timesteps.index(network.t[b].item())]
        x, eps = network.x[b].double(), network.answer[b, :1].double()
        noise = (x - math.sqrt(a) * images[b]) / math.sqrt(1 - a)
        guess = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        v, v_guess = (math.sqrt(a) * e - math.sqrt(1 - a) * x0
                      for e, x0 in ((noise, images[b]), (eps, guess)))
        expected += (v - v_guess).square().mean().item() / B
    assert mse.item() == pytest.approx(expected, rel=1e-3)


def test_the_emojis_training_resumes_bitwise_and_sees_each_once_an_epoch(tmp_path, monkeypatch):
    order = torch.cat([pretrain.epoch_order(step, 10, 4, seed=3) for step in range(5)])
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()

    monkeypatch.setitem(pixart.SIZES, "emoji", {**pixart.SIZES["emoji"], "hidden_size": 24,
                                                "depth": 1, "num_heads": 2})
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    changes = dict(steps=3, batch_size=3, compile=False)
    pretrain.train_emoji(arguments(tmp_path / "whole", **changes))
    save_state = command.save_state

    def save_and_stop(path, state):
        save_state(path, state)
        raise Interrupted

    monkeypatch.setattr(command, "save_state", save_and_stop)
    with pytest.raises(Interrupted):
        pretrain.train_emoji(arguments(tmp_path / "parts", **changes))
    monkeypatch.setattr(command, "save_state", save_state)
    pretrain.train_emoji(arguments(tmp_path / "parts", **changes))
    whole, parts = (load_file(tmp_path / name / "weights.safetensors")
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert all(value.dtype == torch.float16 for value in whole.values())  # half the file size


def test_the_null_caption_is_shown_with_every_number_of_tokens():
    network = pixart.PixArt(**{**pixart.SIZES["emoji"], "hidden_size": 24, "depth": 1,
                               "num_heads": 2})
    seen = {}
    network.forward = lambda x, t, y, mask: seen.update(y=y, mask=mask)
    captioned = pretrain.Captioned(network, ["red apple", "dog"])
    captioned(None, None, torch.tensor([0, 2, 1, 2]))
    null = network.y_embedder.y_embedding
    assert seen["mask"].sum(1).tolist() == [2, 2, 1, 4]
    assert torch.equal(seen["y"][1], null) and torch.equal(seen["y"][3], null)
    assert torch.equal(seen["y"][0], captioned.features[0])


def test_contrastive_loss_by_hand():
    """Two pairs, each caption equal to its image: -log of the softmax of (scale, 0)."""
    loss = pretrain.contrastive_loss(torch.eye(2), torch.eye(2), 3.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-3)))
    crossed = pretrain.contrastive_loss(torch.eye(2), torch.eye(2).flip(0), 3.0)
    assert crossed.item() == pytest.approx(3 + math.log(1 + math.exp(-3)))


def test_the_encoders_training_holds_out_what_it_tests(tmp_path, monkeypatch, capsys):
    seen, augmented = [], pretrain.augmented

    def recorded(images, generator):
        seen.append(255 - images)
        return augmented(images, generator)

    monkeypatch.setattr(pretrain, "augmented", recorded)
    pretrain.train_emoji_encoder(arguments(tmp_path, steps=2, batch_size=1000, ema=0.0))
    held_out = {image.numpy().tobytes() for image in shipped.emoji()[0][::10]}
    assert not any(image.numpy().tobytes() in held_out for batch in seen for image in batch)
    assert "of 103" in capsys.readouterr().out
    assert features.load("emoji", tmp_path / "weights.safetensors").name == "emoji encoder"
