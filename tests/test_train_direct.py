"""Direct training on the image error: its gradient against finite differences."""

import sys

import pytest

import command
import router as routers
import train_stepwise
from cache import SoftCache
from experiments import train_direct
from samplers import denoise
from tests.test_train_stepwise import SCALE, TAU, StandStill, double_case


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("sampler", ("ddim", "dpm-solver++"))
def test_gradients_against_finite_differences(seed, sampler):
    model, router, make_chunks = double_case(seed, sampler=sampler)
    beta, h = 0.01, 1e-5

    def run():
        recorder = StandStill(router)
        loss, error = train_direct.train_direct_trajectory(
            model, router, recorder, make_chunks(), SCALE, TAU, beta)
        return loss, error, recorder.gradients

    loss, error, (gradients,) = run()
    # The error is that of the images which the soft cache of the other trainer makes.
    (chunk,) = make_chunks()
    images = [denoise(model.network, chunk.sampler, chunk.x, chunk.condition, SCALE, cache,
                      chunk.noise) for cache in (None, SoftCache(router.scores, TAU))]
    assert error == pytest.approx((images[0] - images[1]).square().mean().item(), rel=1e-9)
    usage = sum(router.scores(i).sum().item() for i in (1, 2, 3))
    assert loss == pytest.approx(error + beta * usage, rel=1e-9)
    for i in (1, 2, 3):
        for k in (0, 3, 4):
            row, losses = router.rows[i - 1], []
            logit = row[k].item()
            for moved in (logit - h, logit + h):
                row.data[k] = moved
                losses.append(run()[0])
            row.data[k] = logit
            expected = (losses[1] - losses[0]) / (2 * h)
            assert gradients[i - 1][k].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_what_it_keeps_for_the_backward_grows_with_the_steps(capsys):
    model, _, _ = double_case(0)
    ratios = []
    for steps in (3, 6, 12):
        settings = dict(steps=steps, guidance=SCALE, tau=TAU, batch_size=2, sampler="ddim", seed=0)
        model.network.float()
        train_direct.cost(model, settings, rounds=1)
        ratios.append(float(capsys.readouterr().out.splitlines()[-1].split()[-1]))
    assert 1.3 < ratios[0] < 3 and ratios[1] > 1.6 * ratios[0] and ratios[2] > 1.6 * ratios[1]


def test_it_can_start_from_a_schedule(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_direct", "--steps", "4", "--iterations", "4",
                                      "--batch-size", "1", "--start", "fora-paper:2", "--lr",
                                      "0.01", "--out", str(tmp_path / "run")])
    command.run(train_direct.main)
    file = routers.load(tmp_path / "run" / "router.safetensors")
    assert file.about["start"] == "fora-paper:2"
    assert file.schedule().equal(routers.fora_paper(4, 16, 2))
    assert (file.logits[1:].abs() - 3).abs().max() <= 0.011  # one update
    assert (file.logits[1:].abs() != 3).any()


@pytest.mark.parametrize("trainer", (train_stepwise, train_direct))
@pytest.mark.parametrize("flags, words", [
    (["--start", "every-other"], "unknown schedule every-other"),
    (["--start", "fora:2", "--tau", "0.04"], "--start needs a --tau from 0.05 to 0.95, not 0.04"),
])
def test_starts_that_cannot_be(trainer, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "4", *flags, "--out",
                                      str(tmp_path / "run")])
    with pytest.raises(SystemExit) as caught:
        command.run(trainer.main)
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_direct", "--steps", "2", "--iterations", "4",
                                      "--batch-size", "1", "--out", str(tmp_path / "run")])
    command.run(train_direct.main)
    file = routers.load(tmp_path / "run" / "router.safetensors")
    assert file.about["objective"] == "direct" and file.logits.shape == (2, 16)
    assert "lr x updates per row 0.2" in capsys.readouterr().out
