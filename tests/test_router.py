"""The router: schedules, the learnable table and its files."""

import argparse
import math
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import command
import models
import router
import sample
import samplers
from cache import Cache

from .small import tiny_dit

SEEDS = (0, 1, 2)
ABOUT = dict(
    model="digits", sampler="ddim", steps=4, guidance=1.5, tau=0.1, beta=1e-7, objective="iepo",
    proxy="leave-one-out", seed=0, iterations=24, cur="0.4000",
)


def random_logits(seed, steps=4, branches=6):
    return torch.randn(steps, branches, generator=torch.Generator().manual_seed(seed))


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


# ------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("seed", SEEDS)
def test_threshold(seed):
    scores = torch.sigmoid(random_logits(seed))
    tau = scores[2, 3].item()  # a score of exactly tau is reused
    schedule = router.threshold(scores, tau)
    for i in range(4):
        for k in range(6):
            assert schedule[i, k].item() == (i == 0 or scores[i, k].item() > tau)
    assert router.threshold(torch.zeros(3, 2), 0.5).tolist() == [[True] * 2, *[[False] * 2] * 2]


@pytest.mark.parametrize("tau", (0, 1, -0.1, 1.5, math.nan, math.inf))
def test_threshold_refuses_tau(tau):
    with pytest.raises(ValueError, match="tau must be between 0 and 1"):
        router.threshold(torch.full((2, 2), 0.5), tau)


@pytest.mark.parametrize("seed", SEEDS)
def test_cur_counts_reuses(seed):
    schedule = random_logits(seed, 7, 5) > 0
    reused = sum(not computed for row in schedule.tolist() for computed in row)
    assert router.cur(schedule) == pytest.approx(reused / 35, abs=1e-6)


def test_cur_of_both_readings_of_fora():
    assert router.cur(router.fora(20, 56, 2)) == pytest.approx(0.45, abs=1e-6)
    assert router.cur(router.fora_paper(20, 56, 2)) == pytest.approx(0.50, abs=1e-6)


@pytest.mark.parametrize("steps", (2, 3, 4, 7, 10, 19, 20, 50))
@pytest.mark.parametrize("interval", (1, 2, 3, 5, 60))
def test_fora_against_its_descriptions(steps, interval):
    released = router.fora(steps, 3, interval)
    paper = router.fora_paper(steps, 3, interval)
    assert released.shape == paper.shape == (steps, 3)
    for row, i in enumerate(range(steps - 1, -1, -1)):  # the respaced index, executed order
        assert released[row].tolist() == [i == steps - 1 or i % interval == 0] * 3
        assert paper[row].tolist() == [row % interval == 0] * 3


def test_a_schedule_of_whole_steps_can_be_written_to():
    schedule = router.fora(4, 3, 2)
    schedule[1, 0] = not schedule[1, 0]
    assert schedule[1, 0] != schedule[1, 1]


def test_none_computes_everything():
    assert router.none(5, 3).tolist() == [[True] * 3] * 5
    assert router.cur(router.none(5, 3)) == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cur", (0, 0.1, 0.333, 0.5, 0.75))
def test_random_has_exactly_the_reuses_asked_for(seed, cur):
    before = torch.get_rng_state()
    schedule = router.random(8, 7, cur, seed)
    assert (~schedule).sum() == round(cur * 8 * 7)
    assert schedule.shape == (8, 7) and schedule[0].all()
    assert torch.equal(schedule, router.random(8, 7, cur, seed))
    assert cur == 0 or not torch.equal(schedule, router.random(8, 7, cur, seed + 1))
    assert torch.equal(before, torch.get_rng_state())


def test_random_up_to_everything_but_row_0():
    assert router.random(4, 5, 0.75).tolist() == [[True] * 5, *[[False] * 5] * 3]
    for cur in (0.8, 1, 2, -0.1):
        with pytest.raises(ValueError, match="not from 0 to 0.750"):
            router.random(4, 5, cur)


def test_random_is_even_over_the_rows():
    counts = sum(~router.random(5, 4, 0.4, seed) for seed in range(400)).float()
    # 8 of the 16 free cells, 400 draws: each cell 200 times, with a deviation of 10
    assert (counts[1:] - 200).abs().max() < 45 and counts[0].sum() == 0


def test_named():
    assert torch.equal(router.named("none", 6, 4), router.none(6, 4))
    assert torch.equal(router.named("fora:3", 6, 4), router.fora(6, 4, 3))
    assert torch.equal(router.named("fora-paper:4", 6, 4), router.fora_paper(6, 4, 4))
    assert torch.equal(router.named("random:0.4", 6, 4, 9), router.random(6, 4, 0.4, 9))


@pytest.mark.parametrize(
    "name",
    ("", "bogus", "none:3", "fora", "fora:", "fora:0", "fora:-2", "fora:x", "fora:2:3", "fora:1.5",
     "fora-paper", "fora-paper:0", "fora:99999999999999999999", "random", "random:x", "random:2",
     "random:-0.5", "random:nan", "random:inf", "random:1e400", "Fora:2"),
)
def test_named_refuses_nonsense(name):
    with pytest.raises(ValueError, match="schedule") as error:
        router.named(name, 6, 4)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# The learnable router


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_start_normal_with_row_0_fixed(seed):
    before = torch.get_rng_state()
    table = router.Router(100, 50, seed)
    logits = table.logits()
    free = logits[1:]
    assert logits.shape == (100, 50) and not logits.requires_grad
    assert abs(free.mean()) < 5 / math.sqrt(free.numel())
    assert abs(free.std() - 1) < 5 / math.sqrt(2 * free.numel())
    assert (logits[0] == 5).all()
    assert sum(parameter.numel() for parameter in table.parameters()) == 99 * 50
    assert torch.equal(logits, router.Router(100, 50, seed).logits())
    assert not torch.equal(free, router.Router(100, 50, seed + 1).logits()[1:])
    assert torch.equal(before, torch.get_rng_state())


def test_logits_start_clamped(monkeypatch):
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **named: 10 * randn(*a, **named))
    logits = router.Router(20, 10).logits()
    assert logits[1:].min() == -5 and logits[1:].max() == 5


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_the_rows(seed):
    table = router.Router(5, 4, seed)
    for i in range(5):
        expected = [1 / (1 + math.exp(-logit)) for logit in table.logits()[i].tolist()]
        assert table.scores(i).tolist() == pytest.approx(expected, rel=1e-6)
        assert table.scores(i).requires_grad == (i > 0)


def test_clamp_touches_its_row_only():
    table = router.Router(4, 3)
    with torch.no_grad():
        for row in table.rows:
            row.copy_(torch.tensor([-9.0, 0.5, 9.0]))
    table.clamp(2)
    wide, narrow = [-9, 0.5, 9], [-5, 0.5, 5]
    assert table.logits().tolist() == [[5, 5, 5], wide, narrow, wide]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_on_one_row_leaves_all_others_bitwise(seed):
    table = router.Router(6, 5, seed)
    optimizer = torch.optim.AdamW(table.parameters(), 0.1, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)

    def train(i):
        (table.scores(i) * torch.randn(5, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        table.clamp(i)

    for i in (1, 2, 3, 4, 5, 3, 1):  # every row has momentum, and rows differ in their counts
        train(i)

    def snapshot():
        state = [optimizer.state[row] for row in table.rows]
        return [
            [row.detach().clone(), *(s[key].clone() for key in ("exp_avg", "exp_avg_sq", "step"))]
            for row, s in zip(table.rows, state, strict=True)
        ]

    before = snapshot()
    train(4)
    for i, (old, new) in enumerate(zip(before, snapshot(), strict=True), start=1):
        same = [same_bits(a, b) for a, b in zip(old, new, strict=True)]
        assert same == [i != 4] * 4
    assert [s[3].item() for s in snapshot()] == [2, 1, 2, 2, 1]


# ------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_keeps_every_bit(tmp_path, seed):
    path = tmp_path / "new" / "router.safetensors"
    logits = random_logits(seed)
    logits[1, :4] = torch.tensor([-0.0, 1e-45, 5.0, -5.0])
    router.save(path, logits, **ABOUT)
    file = router.load(path)
    assert same_bits(file.logits, logits)
    assert file.about == {key: str(value) for key, value in ABOUT.items()}
    assert file.tau == 0.1
    assert torch.equal(file.schedule(), router.threshold(torch.sigmoid(logits), 0.1))
    assert torch.equal(file.schedule(0.6), router.threshold(torch.sigmoid(logits), 0.6))
    with pytest.raises(ValueError, match="tau"):
        file.schedule(0)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_same_router_makes_the_same_bytes(tmp_path):
    path = tmp_path / "r.safetensors"
    contents = set()
    for _ in range(8):
        router.save(path, random_logits(0), **ABOUT)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_check(tmp_path):
    path = tmp_path / "r.safetensors"
    router.save(path, random_logits(0), **ABOUT)
    file = router.load(path)
    file.check("digits", "ddim", 4, 6)
    for other in (("dit256", "ddim", 4, 6), ("digits", "ddpm", 4, 6),
                  ("digits", "ddim", 5, 6), ("digits", "ddim", 4, 7)):
        with pytest.raises(ValueError, match="cannot be used for") as error:
            file.check(*other)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def assert_refused(path, kind=ValueError):
    with pytest.raises(kind) as error:
        router.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_load_needs_a_file(tmp_path):
    assert_refused(tmp_path / "nowhere.safetensors", FileNotFoundError)
    assert_refused(tmp_path, FileNotFoundError)


def test_load_refuses_a_truncated_file(tmp_path):
    path = tmp_path / "r.safetensors"
    router.save(path, random_logits(0), **ABOUT)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 96, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(path)


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "r.safetensors"
    about = {key: str(value) for key, value in ABOUT.items()}
    save_file({"weight": torch.zeros(4, 6)}, path, about)  # no logits
    assert_refused(path)
    save_file({"logits": torch.zeros(4, 6)}, path)  # no metadata
    assert_refused(path)
    path.write_text("this is no safetensors file, but it is a long one")
    assert_refused(path)


@pytest.mark.parametrize("key", ("model", "sampler", "guidance", "tau"))
def test_load_names_what_the_metadata_lacks(tmp_path, key):
    path = tmp_path / "r.safetensors"
    router.save(path, random_logits(0), **{k: v for k, v in ABOUT.items() if k != key})
    with pytest.raises(ValueError, match=key):
        router.load(path)


@pytest.mark.parametrize("key", ("guidance", "tau"))
def test_load_refuses_numbers_that_are_none(tmp_path, key):
    path = tmp_path / "r.safetensors"
    router.save(path, random_logits(0), **{**ABOUT, key: "a little"})
    assert_refused(path)


@pytest.mark.parametrize("tau", ("0", "2"))
def test_a_file_with_a_tau_out_of_range_gives_no_schedule(tmp_path, tau):
    path = tmp_path / "r.safetensors"
    router.save(path, random_logits(0), **{**ABOUT, "tau": tau})
    with pytest.raises(ValueError, match="tau must be between 0 and 1"):
        router.load(path).schedule()


@pytest.mark.parametrize("logits", (
    torch.full((4, 6), math.nan), torch.full((4, 6), -math.inf), torch.zeros(24),
    torch.zeros(1, 4, 6), torch.tensor(0.0),
))
def test_load_refuses_logits_that_are_no_table(tmp_path, logits):
    path = tmp_path / "r.safetensors"
    router.save(path, logits, **ABOUT)
    assert_refused(path)


@pytest.mark.parametrize("dtype", (torch.int32, torch.bool, torch.complex64))
def test_load_refuses_logits_that_are_no_numbers_of_a_router(tmp_path, dtype):
    logits, about = torch.ones(4, 6, dtype=dtype), {k: str(v) for k, v in ABOUT.items()}
    save_file({"logits": logits}, tmp_path / "r.safetensors", about)
    assert_refused(tmp_path / "r.safetensors")
    rows = {f"{i}.prob": row for i, row in enumerate(logits)}
    torch.save({"routers": rows, "args": about}, tmp_path / "r.pt")
    assert_refused(tmp_path / "r.pt")


@pytest.mark.parametrize("change", (dict(guidance="nan"), dict(guidance="inf"), dict(tau="nan"),
                                    dict(tau="high")))
def test_load_refuses_settings_that_are_no_numbers(tmp_path, change):
    router.save(tmp_path / "r.safetensors", random_logits(0), **{**ABOUT, **change})
    assert_refused(tmp_path / "r.safetensors")


def half_a_write(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("no space left on device")


def no_replace(source, target):
    raise OSError("cannot rename")


@pytest.mark.parametrize("where, name, broken", (
    (command.os, "replace", no_replace), (Path, "write_bytes", half_a_write),
))
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, where, name, broken):
    path = tmp_path / "r.safetensors"
    router.save(path, random_logits(0), **ABOUT)
    old = path.read_bytes()
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(OSError):
        router.save(path, random_logits(1), **ABOUT)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------
# The official code's files

STEP_COUNTS = (4, 10)


class OfficialRow(torch.nn.Module):
    """One row, named as in the official code."""

    def __init__(self, branches, value=None):
        super().__init__()
        row = torch.randn(branches) if value is None else torch.full((branches,), value)
        self.prob = torch.nn.Parameter(row)


def official_file(path, kind, steps=4, branches=6, args=True, seed=0):
    """Saves a router as the training code of `kind` does: -> the module list."""
    torch.manual_seed(seed)
    last = OfficialRow(branches, 5.0 if kind == "harmonica" else None)
    rows = torch.nn.ModuleList([*(OfficialRow(branches) for _ in range(steps - 1)), last])
    optimizer = torch.optim.AdamW(rows.parameters(), lr=0.01, weight_decay=0)
    sum(row.prob.sum() for row in rows).backward()
    optimizer.step()
    if kind == "harmonica":
        last.prob.data.fill_(5)  # it takes no part in the training
    flags = dict(model="DiT-XL/2", image_size=256, num_sampling_steps=steps, l1=7e-8, lr=0.01,
                 global_seed=42, ckpt=None, wandb=True, ste_threshold=None)
    more = dict(cfg_scale=1.75, ste_threshold=0.2, lambda_c=500)
    flags = {**flags, **(more if kind == "harmonica" else dict(data_path="train"))}
    content = {"routers": rows.state_dict(), "opt": optimizer.state_dict()}
    torch.save({**content, "args": argparse.Namespace(**flags)} if args else content, path)
    return rows


def official_decisions(rows, kind, tau):
    """What the official sampling code computes, walking its timestep indices down: (T, K)."""
    decisions, cached = [], False
    for index in reversed(range(len(rows))):
        if kind == "learning-to-cache" and index % 2 == 1:
            cached = False
        active = torch.sigmoid(rows[index].prob) > tau
        decisions.append(active | (not cached))
        cached = True
    return torch.stack(decisions)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps", STEP_COUNTS)
@pytest.mark.parametrize("args", (True, False))
@pytest.mark.parametrize("kind", ("harmonica", "learning-to-cache"))
def test_official_files_give_the_official_decisions(tmp_path, kind, args, steps, seed):
    rows = official_file(tmp_path / "r.pt", kind, steps, args=args, seed=seed)
    file = router.load(tmp_path / "r.pt")
    assert file.logits.shape == (steps, 6) and file.logits.dtype == torch.float32
    for tau in (0.1, 0.4, 0.6, 0.999):
        assert torch.equal(file.schedule(tau), official_decisions(rows, kind, tau))
    reused = router.cur(file.schedule(0.6))
    assert 0.1 < reused < (0.5 if kind == "learning-to-cache" else 0.8)
    trained = [i for i in range(steps) if kind == "harmonica" or i % 2 == 0]
    for index in trained:
        assert same_bits(file.logits[steps - 1 - index], rows[index].prob.detach())
    assert "opt" not in file.about and not file.logits.requires_grad


def test_settings_of_official_files(tmp_path):
    def about(kind, **changes):
        official_file(tmp_path / "r.pt", kind, **changes)
        return router.load(tmp_path / "r.pt").about

    assert about("harmonica") == dict(
        model="dit256", sampler="ddim", guidance="1.75", tau="0.2", beta="7e-08", objective="iepo"
    )
    assert about("learning-to-cache") == dict(
        model="dit256", sampler="ddim", guidance="1.0", tau="0.1", beta="7e-08",
        objective="learning-to-cache",
    )
    for kind, guidance in (("harmonica", "1.5"), ("learning-to-cache", "1.0")):
        bare = about(kind, args=False)
        assert (bare["guidance"], bare["tau"]) == (guidance, "0.1") and "beta" not in bare


def test_an_official_file_is_checked(tmp_path):
    official_file(tmp_path / "r.pt", "harmonica")
    file = router.load(tmp_path / "r.pt")
    file.check("dit256", "ddim", 4, 6)
    wrong = (("dit256", "ddpm", 4, 6), ("dit256", "ddim", 5, 6), ("dit256", "ddim", 4, 7))
    for other in (*wrong, ("digits", "ddim", 4, 6)):
        with pytest.raises(ValueError, match="cannot be used for"):
            file.check(*other)
    official_file(tmp_path / "bare.pt", "harmonica", args=False)
    bare = router.load(tmp_path / "bare.pt")
    bare.check("digits", "ddim", 4, 6)  # it does not name its model
    for other in wrong:
        with pytest.raises(ValueError, match="a router of an unnamed model with ddim, T = 4"):
            bare.check(*other)
    router.save(tmp_path / "r.safetensors", bare.logits, **bare.about)
    router.load(tmp_path / "r.safetensors").check("digits", "ddim", 4, 6)


@pytest.mark.parametrize("seed", SEEDS)
def test_export_and_back(tmp_path, seed):
    logits = random_logits(seed)
    logits[0] = 5
    router.save(tmp_path / "r.safetensors", logits, **ABOUT)
    file = router.load(tmp_path / "r.safetensors")
    checkpoint.export_router(tmp_path / "r.pt", file)
    again = router.load(tmp_path / "r.pt")
    assert same_bits(again.logits, logits) and again.about == file.about

    # The official code's way to load it; torch's default there is weights_only=True.
    rows = torch.nn.ModuleList(OfficialRow(6) for _ in range(4))
    rows.load_state_dict(torch.load(tmp_path / "r.pt", map_location="cpu")["routers"])
    for tau in (0.1, 0.5, 0.9):
        assert torch.equal(official_decisions(rows, "harmonica", tau), file.schedule(tau))


@pytest.mark.parametrize("kind", ("harmonica", "learning-to-cache"))
def test_an_official_file_exported_again_is_the_same_router(tmp_path, kind):
    rows = official_file(tmp_path / "a.pt", kind, steps=10)
    file = router.load(tmp_path / "a.pt")
    checkpoint.export_router(tmp_path / "b.pt", file)
    again = router.load(tmp_path / "b.pt")
    assert same_bits(again.logits, file.logits) and again.about == file.about
    written = torch.load(tmp_path / "b.pt")["routers"]
    assert list(written) == list(rows.state_dict())
    for name, row in list(rows.state_dict().items())[:: 1 if kind == "harmonica" else 2]:
        assert same_bits(written[name], row)  # Learning-to-Cache's odd rows were noise


class Planted:
    """A pickled object whose loading runs a command."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_pickled_object_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = official_file(tmp_path / "good.pt", "harmonica").state_dict()
    for content in (
        {"routers": rows, "args": Planted()},
        {"routers": rows, "args": argparse.Namespace(seed=Planted())},
        {"routers": Planted()},
        {"routers": rows, "args": SimpleNamespace(seed=1)},  # harmless, but not the one allowed
        Planted(),
    ):
        torch.save(content, "bad.pt")
        assert_refused("bad.pt")
    assert not Path("planted").exists()
    # What was allowed while loading is not allowed afterwards.
    router.load("good.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load("good.pt", weights_only=True)


@pytest.mark.parametrize("content", (
    {}, [], "routers", {"0.prob": torch.zeros(6)}, {"routers": {}}, {"routers": [1.0]},
    {"routers": {"0.prob": torch.zeros(6), "2.prob": torch.zeros(6)}},
    {"routers": {"0.prob": torch.zeros(6), "1.prob": torch.zeros(5)}},
    {"routers": {"0.prob": 3.0}}, {"routers": {"0.prob": torch.tensor(1.0)}},
    {"routers": {"0.prob": torch.full((6,), math.nan)}},
    {"routers": {"0.prob": torch.zeros(6)}, "args": 3},
    {"routers": {"0.prob": torch.zeros(6)}, "args": argparse.Namespace(cfg_scale="strong")},
    {"routers": {"0.prob": torch.zeros(6)}, "args": argparse.Namespace(model=["a"])},
    {"routers": {"0.prob": torch.zeros(6)}, "args": {"model": "digits"}},
))  # fmt: skip
def test_other_pt_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "r.pt")
    assert_refused(tmp_path / "r.pt")


def test_a_truncated_pt_is_refused(tmp_path):
    path = tmp_path / "r.pt"
    official_file(path, "harmonica")
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(path)


def test_sampling_with_an_official_file(tmp_path, monkeypatch, capsys):
    """The command, on a tiny network in the place of dit256."""
    network = tiny_dit(num_classes=1000)
    tiny = models.Model("dit256", network, "ddim", steps=4, guidance=1.5, autoencoder="x/y")
    monkeypatch.setitem(models.MODELS, "dit256", lambda weights: tiny)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        argv = ["sample.py", "--model", "dit256", "--device", "cpu", "--num-samples", "2"]
        monkeypatch.setattr(sys, "argv", [*argv, "--latents", "--out", "x.npz", *flags])
        command.run(sample.main)
        with np.load("x.npz") as data:
            return capsys.readouterr().out, data["latents"]

    for kind, guidance in (("harmonica", "1.75"), ("learning-to-cache", "1.0")):
        rows = official_file("router.pt", kind)
        said, latents = run("--router", "router.pt", "--tau", "0.5")
        schedule = official_decisions(rows, kind, 0.5)
        cur = f"{100 * (~schedule).float().mean():.1f} %"
        assert f"router router.pt, tau 0.5, trained at guidance {guidance}, CUR {cur}" in said
        noise = samplers.Noise(0, range(2))
        expected = samplers.denoise(
            network, samplers.DDIM(4), noise.start(tiny.shape), network.condition([0, 1]), 1.5,
            Cache(schedule), noise,
        )
        np.testing.assert_allclose(latents, expected.numpy(), rtol=1e-5, atol=1e-5)
        torch.save({"routers": Planted()}, "router.pt")
        for flags in (("--steps", "5"), ()):
            official_file("other.pt", kind)
            with pytest.raises(SystemExit) as caught:
                run("--router", "other.pt" if flags else "router.pt", *flags)
            error = capsys.readouterr().err
            assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not Path("planted").exists()
