"""Swapping two steps of a schedule keeps its CUR and changes these two steps only."""

import sys

import pytest
import torch

import command
import router as routers
from experiments import swap


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_a_swap_keeps_the_cur(seed):
    schedule = routers.random(6, 8, 0.4, seed)
    schedule[2, 1:] = False
    first = swap.computing(schedule, 2)
    count = int((first.sum() - schedule.sum()).item())
    assert first[2].all() and torch.equal(first[[0, 1, 3, 4, 5]], schedule[[0, 1, 3, 4, 5]])
    first[4] = schedule[4] = True
    swapped = swap.reusing(first, 4, count)
    assert swapped[4].tolist() == [True] * (8 - count) + [False] * count
    assert routers.cur(swapped) == pytest.approx(routers.cur(schedule))
    assert torch.equal(swapped[[0, 1, 2, 3, 5]], first[[0, 1, 2, 3, 5]])


def test_the_command(tmp_path, monkeypatch, capsys):
    """On 3 steps: of the second everything is reused, of the third nothing."""
    logits = torch.full((3, 16), 4.0)
    logits[1] = -4
    routers.save(tmp_path / "r.safetensors", logits, model="digits", sampler="ddim", steps=3,
                 guidance=2.5, tau=0.1)
    monkeypatch.setattr(sys, "argv", ["swap", "--router", str(tmp_path / "r.safetensors"),
                                      "--num-samples", "2"])
    command.run(swap.main)
    lines = [line for line in capsys.readouterr().out.splitlines() if "CUR" in line]
    assert [float(line.split("CUR")[1].split("%")[0]) for line in lines] == [
        33.3, 0.0, 33.3, 33.3, 33.3]
    errors = [float(line.split()[-1]) for line in lines]
    assert errors[1] == 0 < errors[0] and errors[2] > 0
    assert errors[3] == errors[4] == errors[0]  # at T = 3 both kinds of FORA are this very router


def test_a_router_without_a_long_reuse_is_refused(tmp_path, monkeypatch, capsys):
    routers.save(tmp_path / "r.safetensors", torch.full((3, 16), 4.0), model="digits",
                 sampler="ddim", steps=3, guidance=2.5, tau=0.1)
    monkeypatch.setattr(sys, "argv", ["swap", "--router", str(tmp_path / "r.safetensors"),
                                      "--num-samples", "1"])
    with pytest.raises(SystemExit):
        command.run(swap.main)
    assert "no step of this router reuses three quarters" in capsys.readouterr().err
