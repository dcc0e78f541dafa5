"""The command for a GPU, on the CPU: its checks pass, and fail where something is broken."""

import json
import math
import sys

import pytest
import torch

import command
import dit
import pixart
import router
import train_stepwise
import training
from experiments import benchmark_networks, gpu, gpu_checks
from experiments.benchmark import random_model
from samplers import DDIM

SMALL = dict(hidden_size=32, depth=2, num_heads=2, input_size=8, patch_size=2)
TINY = gpu.Plan(
    {"DiT": (dit.DiT, {**SMALL, "num_classes": 5}),
     "PixArt": (pixart.PixArt, {**SMALL, "caption_channels": 16, "model_max_length": 24})},
    reference_steps=3, steps=4, repeats=1, batches=(1, 2), dtypes=("float32", "bfloat16"),
    images=2, depth=1,
)


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """Runs the command on tiny networks: -> its exit code and what it wrote, rows by name."""

    def run(*flags):
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv",
                            ["gpu.py", "--model", "digits", "--device", "cpu", "--out", str(out),
                             *flags])
        code = 0
        try:
            command.run(gpu.main)
        except SystemExit as end:
            code = end.code
        found = json.loads(out.read_text()) if out.exists() else {"rows": []}
        found["rows"] = {row["name"]: row for row in found["rows"]}
        return code, found

    def no_diffusers(*_):
        raise ValueError("diffusers cannot be imported")

    monkeypatch.setitem(gpu.PLANS, "digits", TINY)
    monkeypatch.setattr(benchmark_networks, "pair", no_diffusers)
    return run


@pytest.fixture
def short(answer, monkeypatch):
    """The same with nothing but the checks of resuming and of batch size."""
    for name in ("measure_sampling", "measure_samplings", "measure_iteration"):
        monkeypatch.setattr(gpu, name, lambda *_: [])
    for name in ("check_reference", "check_memory"):
        monkeypatch.setattr(gpu_checks, name, lambda *_: [])
    return answer


def failed(found):
    return [name for name, row in found["rows"].items() if row["ok"] is False]


def tiny(name):
    kind, sizes = TINY.networks[name]
    return gpu_checks.strong(random_model(sizes, kind))


def test_all_checks_are_there_and_pass(answer, capsys):
    code, found = answer()
    rows = found["rows"]
    assert code == 0 and failed(found) == []
    checked = {name for name, row in rows.items() if row["ok"]}
    assert {f"{network}, {what}, float32 against float64" for network in ("DiT", "PixArt")
            for what in ("forward", "sampling", "gradient")} < checked
    assert {"training repeated: logits that differ",
            "training interrupted and resumed: logits that differ",
            "batch of 8 against single images, schedule none",
            "batch of 8 against single images, schedule random:0.375"} < checked
    # One graph for attention and one for the MLP: the schedules need none of their own.
    graphs = [row["value"] for name, row in rows.items() if name.endswith("graphs")]
    assert graphs == [2] * 4
    assert all(row["value"] > 0 for name, row in rows.items() if "differ" not in name)
    assert set(found["not_measured"]) == {
        f"{name}, {dtype}" for name in ("diffusers, DiT-XL/2", "diffusers, PixArt-XL/2",
                                        "cache-dit, DiT-XL/2")
        for dtype in TINY.dtypes}
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows) and "not measured: diffusers" in printed


def test_the_arithmetic_is_that_of_the_schedule():
    model = tiny("DiT")
    each, rest = model.network.flops()
    schedule = router.fora(4, 4, 2)
    cached = 4 * rest + (schedule * torch.tensor(each)).sum().item()
    _, row, _ = gpu.measure_sampling("DiT", model, images=2, steps=4, repeats=2)
    assert row.name == "DiT, fora:2" and row.against == "arithmetic"
    assert row.reference == pytest.approx(4 * (sum(each) + rest) / cached)


def test_a_sampler_that_minds_the_batch_size_fails(short, monkeypatch, capsys):
    class Minds(DDIM):
        def step(self, prediction, i, x, noise=None):
            return super().step(prediction, i, x, noise) * (1 + 1e-4 * len(x))

    monkeypatch.setattr(gpu_checks, "DDIM", Minds)
    code, found = short()
    assert code == 1 and failed(found) == [
        f"batch of 8 against single images, schedule {name}" for name in ("none", "random:0.375")]
    assert found["rows"][failed(found)[0]]["value"] > 1e-4
    assert capsys.readouterr().out.count("FAILED") >= 2


@pytest.mark.parametrize("name", TINY.networks)
def test_a_wrong_gradient_fails(name, monkeypatch):
    """The forward is right, and the backward of the MLP half of it in float32."""
    forward = dit.Mlp.forward

    def wrong(self, x):
        out = forward(self, x)
        return out if x.dtype != torch.float32 else 0.5 * out + 0.5 * out.detach()

    monkeypatch.setattr(dit.Mlp, "forward", wrong)
    checked = gpu_checks.check_reference(name, tiny(name), 3, "cpu")
    assert [row.ok for row in checked] == [True, True, False]


def test_a_training_that_is_not_reproducible_fails(monkeypatch):
    trajectory = train_stepwise.train_trajectory

    def noisy(model, router, *args):
        result = trajectory(model, router, *args)
        with torch.no_grad():
            router.rows[0][0] += 1e-3 * torch.rand(())  # from a generator that nobody seeds anew
        return result

    monkeypatch.setattr(train_stepwise, "train_trajectory", noisy)
    repeated, resumed = gpu_checks.check_resume(tiny("DiT"), batch_size=2)
    assert repeated.ok is False and resumed.ok is False and repeated.value >= 1


def test_a_run_that_starts_anew_instead_of_resuming_fails(monkeypatch):
    """Its second and third trajectories are right, but the first came twice."""
    load = training.Run._load

    def forgets(self, state):
        load(self, state)
        self.done = 0

    monkeypatch.setattr(training.Run, "_load", forgets)
    repeated, resumed = gpu_checks.check_resume(tiny("DiT"), batch_size=2)
    assert repeated.ok and resumed.ok is False


@pytest.mark.parametrize("name", TINY.networks)
def test_a_network_that_rounds_fails(name, monkeypatch):
    forward = dit.Mlp.forward

    def rounded(self, x):
        return forward(self, x if x.dtype != torch.float32 else x.bfloat16().float())

    monkeypatch.setattr(dit.Mlp, "forward", rounded)
    forward, sampling, _ = gpu_checks.check_reference(name, tiny(name), 3, "cpu")
    assert forward.ok is False and sampling.ok is False


def test_a_part_that_breaks_fails_and_the_others_go_on(short, monkeypatch):
    def broken(*_):
        raise ArithmeticError("no such kernel")

    monkeypatch.setattr(gpu_checks, "check_resume", broken)
    code, found = short()
    assert code == 1 and failed(found) == ["resume: ArithmeticError: no such kernel"]
    assert math.isnan(found["rows"][failed(found)[0]]["value"])
    assert len(found["rows"]) == 3  # and the two batch sizes


def test_what_no_time_is_left_for_is_listed(answer):
    code, found = answer("--minutes", "1e-9")
    assert code == 0 and found["rows"] == {}
    assert len(found["not_measured"]) == 6 + 4 + 2 + 8 + 1
    assert all("left" in reason for reason in found["not_measured"].values())


def test_a_part_that_would_last_too_long_is_not_begun(tmp_path, monkeypatch):
    """From the first batch size on, the speed is known: here 1e9 seconds an image."""
    for name in ("measure_sampling", "measure_compiled"):
        monkeypatch.setattr(gpu, name, lambda *_: [gpu.Row("slow", 1e12)])
    report = gpu.Report(tmp_path / "gpu.json", 8, {})
    gpu.measure_samplings(report, "DiT", tiny("DiT"), TINY)
    assert len(report.rows) == 2 and len(report.not_measured) == 6  # one row each dtype


def test_lack_of_memory_is_no_failure(short, monkeypatch):
    def greedy(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "measure_iteration", greedy)
    monkeypatch.setattr(gpu_checks, "check_resume", lambda *_: [])
    code, found = short()
    assert code == 0 and found["not_measured"]["iteration"] == "out of memory"


@pytest.mark.parametrize("flags", [("--minutes", "0"), ("--device", "tpu")])
def test_bad_flags_end_in_one_line(answer, capsys, flags):
    code, _ = answer(*flags)
    words = capsys.readouterr().err
    assert code == 2 and words.startswith("error: ") and words.count("\n") == 1
