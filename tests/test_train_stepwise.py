"""Step-wise denoising training: against a restatement in slow words, and runs that are killed,
resumed and given bad input."""

import copy
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import command
import dit
import models
import router as routers
import sample
import samplers
import train_stepwise
from samplers import DDIM, Noise, make_sampler
from tests.small import tiny_dit

SEEDS = (0, 1, 2)
SCALE, TAU = 1.5, 0.5
ROOT = Path(__file__).parent.parent


def tiny_model(seed=0):
    return models.Model("tiny", tiny_dit(seed), "ddim", steps=4, guidance=SCALE)


def double_case(seed, T=4, images=range(3), sampler="ddim"):
    """Everything that a trajectory needs, in float64: model, router, make_chunks. The router has
    logits on both sides of tau, some of them near the limits."""
    model = tiny_model(seed)
    model.network.double()
    router = routers.Router(T, len(model.network.branches), seed).double()
    with torch.no_grad():
        for row in router.rows:
            row.mul_(1.5)
            row[:2] = torch.tensor([4.95, -4.95])

    def make_chunks(images=images):
        chunks = train_stepwise.chunks_of(model, make_sampler(sampler, T), seed, images, 99, 1)
        chunks[0].x = chunks[0].x.double()
        return chunks

    return model, router, make_chunks


class StandStill:
    """An optimiser that notes every row's gradient at each step, and moves nothing."""

    def __init__(self, router):
        self.router, self.gradients = router, []

    def step(self):
        self.gradients.append([row.grad for row in self.router.rows])

    def zero_grad(self):
        for row in self.router.rows:
            row.grad = None


# ------------------------------------------------------------------------------------------------
# The method


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_against_finite_differences(seed):
    model, router, make_chunks = double_case(seed)
    lambda_, beta, h = [0.0, 0.7, 1.3, 0.4], 0.01, 1e-5

    def run():
        recorder = StandStill(router)
        losses, _ = train_stepwise.train_trajectory(
            model, router, recorder, make_chunks(), lambda_, SCALE, TAU, beta
        )
        return losses, recorder.gradients

    _, gradients = run()
    assert len(gradients) == 3
    for i in (1, 2, 3):
        row = router.rows[i - 1]
        assert [gradient is None for gradient in gradients[i - 1]] == [j != i for j in (1, 2, 3)]
        for k in (0, 3, 4):
            logit, losses = row[k].item(), []
            for moved in (logit - h, logit + h):
                row.data[k] = moved
                losses.append(run()[0][i])
            row.data[k] = logit
            expected = (losses[1] - losses[0]) / (2 * h)
            assert gradients[i - 1][i - 1][k].item() == pytest.approx(expected, rel=1e-5, abs=1e-10)


def restated(model, table, lambda_, seed, numbers, beta, optimizers, sampler_name):
    """One trajectory of the method, image by image and half by half; moves the rows of `table`, a
    list of T tensors (K,), by an optimiser of their own. -> losses and mean squared errors."""
    network, T = model.network, len(table)
    C, solvers = network.in_channels, [make_sampler(sampler_name, T) for _ in numbers]

    def predict(x, t, label, mixers):
        """With and without the label, guided in the noise and not in the variance."""
        halves = []
        for y, mixer in zip((label, network.num_classes), mixers, strict=True):
            halves.append(network(x, torch.tensor([t]), torch.tensor([y]), cache=mixer))
        cond, null = halves
        eps = cond[:, :C] + (SCALE - 1) * (cond[:, :C] - null[:, :C])
        return [torch.cat([eps, half[:, C:]], dim=1) for half in halves]

    def mixer(kept, i):
        def run(k, branch):
            if i == 0:
                kept[k] = branch().detach()
                return kept[k]
            r = 1 / (1 + torch.exp(-table[i][k]))
            output = kept[k] + r * (branch() - kept[k])
            if r > TAU:
                kept[k] = output.detach()
            return output

        return run

    noises = [Noise(seed, [j], purpose=1) for j in numbers]
    x = [noise.start(model.shape).double() for noise in noises]
    labels = [noise.labels(network.num_classes).item() for noise in noises]
    kept = [({}, {}) for _ in numbers]
    losses, errors = [0.0], [0.0]
    for i, t in enumerate(solvers[0].timesteps):
        error = 0
        for j in range(len(numbers)):
            with torch.no_grad():
                target = predict(x[j], t, labels[j], (None, None))
            student = predict(x[j], t, labels[j], [mixer(half, i) for half in kept[j]])
            for half in (0, 1):
                error = error + ((student[half] - target[half]) ** 2).mean() / 2 / len(numbers)
            x[j] = solvers[j].step(student[0].detach(), i, x[j], noises[j])
        if i > 0:
            loss = lambda_[i] * error + beta * (1 / (1 + torch.exp(-table[i]))).sum()
            table[i].grad = torch.autograd.grad(loss, table[i])[0]
            optimizers[i].step()
            table[i].data.clamp_(-5, 5)
            losses.append(loss.item())
            errors.append(error.item())
    return losses, errors


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("objective, sampler", (
    ("iepo", "ddim"), ("ltc", "ddim"), ("iepo", "dpm-solver++"), ("iepo", "sa-solver"),
))  # fmt: skip
def test_trajectories_against_the_restatement(objective, sampler, seed):
    model, router, make_chunks = double_case(seed, sampler=sampler)
    table = [row.clone().requires_grad_() for row in router.logits()]
    own = [torch.optim.AdamW([row], 0.3, weight_decay=0) for row in table]
    optimizer = torch.optim.AdamW(router.parameters(), 0.3, weight_decay=0)
    beta = 0.02
    for n in (0, 1, 2):  # momentum matters from the second on
        lambda_ = [1.0] * 4 if objective == "ltc" else [0.0, 0.2 + n, 3.0 - n, 0.05]
        numbers = range(3 * n, 3 * n + 3)
        losses, errors = train_stepwise.train_trajectory(
            model, router, optimizer, make_chunks(numbers), lambda_, SCALE, TAU, beta
        )
        expected = restated(model, table, lambda_, seed, numbers, beta, own, sampler)
        assert losses == pytest.approx(expected[0], rel=1e-8)
        assert errors == pytest.approx(expected[1], rel=1e-8)
        assert torch.allclose(router.logits(), torch.stack(table), rtol=0, atol=1e-8)
    assert router.logits()[1:].abs().max() == 5  # the clamp had something to do


@pytest.mark.parametrize("seed", SEEDS)
def test_every_step_moves_its_row_and_no_other(seed, monkeypatch):
    model, T = tiny_model(seed), 5
    router = routers.Router(T, len(model.network.branches), seed)
    optimizer = torch.optim.AdamW(router.parameters(), 0.1, weight_decay=0)
    tables, step = [], optimizer.step

    def noting():
        tables.append(router.logits())
        step()

    monkeypatch.setattr(optimizer, "step", noting)
    for n in (0, 1, 2):
        chunks = train_stepwise.chunks_of(model, DDIM(T), seed, range(2 * n, 2 * n + 2), 2, 1)
        train_stepwise.train_trajectory(
            model, router, optimizer, chunks, [1.0] * T, SCALE, TAU, 1e-3
        )
    tables.append(router.logits())
    moved = [
        (after != before).any(1).nonzero().flatten().tolist()
        for before, after in zip(tables, tables[1:], strict=False)
    ]
    assert moved == [[1], [2], [3], [4]] * 3
    assert [optimizer.state[row]["step"].item() for row in router.rows] == [3] * 4


def test_the_network_is_untouched(tmp_path):
    model = tiny_model()
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    train_stepwise.train(model, tiny_settings(), tmp_path / "run")
    after = model.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_iepo_with_lambda_0_is_the_usage_alone():
    model, router, make_chunks = double_case(0)
    recorder = StandStill(router)
    losses, errors = train_stepwise.train_trajectory(
        model, router, recorder, make_chunks(), [0.0] * 4, SCALE, TAU, 0.1
    )
    for i in (1, 2, 3):
        r = router.scores(i).detach()
        assert losses[i] == pytest.approx(0.1 * r.sum().item(), rel=1e-12) and errors[i] > 0
        assert torch.allclose(recorder.gradients[i - 1][i - 1], 0.1 * r * (1 - r), rtol=1e-12)


@pytest.mark.parametrize("T", (2, 3, 6))
def test_evaluations_are_counted(T):
    """Row 0 is one evaluation, the student's; every other step is a teacher's and a student's."""
    model = tiny_model()
    router = routers.Router(T, len(model.network.branches))
    optimizer = torch.optim.AdamW(router.parameters(), 0.1)
    graphs = []
    model.network.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad))
    chunks = train_stepwise.chunks_of(model, DDIM(T), 0, range(4), 2, 1)
    train_stepwise.train_trajectory(model, router, optimizer, chunks, [1.0] * T, SCALE, TAU, 0.0)
    assert graphs == [False, False] + [False, True] * 2 * (T - 1)  # two chunks


# ------------------------------------------------------------------------------------------------
# The search for beta


@pytest.mark.parametrize("start", (5e-7, 1e-5))
@pytest.mark.parametrize("target", (0.25, 0.4, 0.55))
def test_a_wanted_cur_is_found(target, start):
    """On made-up branches, each worth its own beta, over three decades: a logit falls while beta is
    above that, and rises while it is below, by lr a trajectory at most, as AdamW moves it. The run
    lands within a point; the beta that it found, fixed from the start, here within ten."""
    generator = torch.Generator().manual_seed(0)
    worth = -4 - 3 * torch.rand(20, 16, generator=generator)  # log10
    first = torch.randn(20, 16, generator=generator)
    lr = 0.1

    def moved(logits, beta):
        noise = 0.3 * torch.randn(20, 16, generator=generator)
        return (logits - lr * (2 * (math.log10(beta) - worth) + noise).clamp(-1, 1)).clamp(-5, 5)

    def cur(logits):
        return routers.cur(routers.threshold(torch.sigmoid(logits), 0.1))

    search, logits = train_stepwise.BetaSearch(start, target, 0.1, lr), first
    for n in range(200):  # as long as a run of 100 goes on at most
        logits = moved(logits, search.beta)
        if n == 50:  # saved and loaded
            state = copy.deepcopy(search.state_dict())
            search = train_stepwise.BetaSearch(start, target, 0.1, lr)
            search.load_state_dict(state)
        search.update(logits)
        if n >= 99 and search.reached(cur(logits)):
            break
    assert abs(cur(logits) - target) < 0.01
    logits = first
    for _ in range(100):  # a fresh run with the beta found
        logits = moved(logits, search.found)
    assert abs(cur(logits) - target) < 0.1


def test_without_a_wanted_cur_beta_stands_still():
    search = train_stepwise.BetaSearch(3e-7, None, 0.1, 0.1)
    search.update(torch.zeros(4, 6))
    assert search.beta == search.found == 3e-7 and search.reached(0.9)


@pytest.mark.parametrize("target", (0.2, 0.5))
def test_a_run_ends_where_it_was_told_to(tmp_path, target):
    settings = tiny_settings(target_cur=target, lr=1.0, iterations=80)
    results = train_stepwise.train(tiny_model(), settings, tmp_path / "run")
    assert 80 <= results["iterations"] <= 160
    assert abs(results["cur"] - target) < 0.01 or results["iterations"] == 160
    about = routers.load(tmp_path / "run" / "router.safetensors").about
    assert float(about["target_cur"]) == target and float(about["beta"]) == results["beta"] != 1e-3
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved == results and saved["images"] == 0 and saved["peak_memory"] > 1e6


# ------------------------------------------------------------------------------------------------
# Runs in this process, on the tiny network


def tiny_settings(**changes):
    settings = dict(
        model="tiny", weights=None, steps=4, sampler="ddim", guidance=SCALE, seed=0, dtype=None,
        beta=1e-3, objective="iepo", proxy="leave-one-out", tau=TAU, lr=0.2, iterations=24,
        lambda_every=8, batch_size=2, micro_batch=2, target_cur=None,
    )
    return {**settings, **changes}


def log_of(out):
    """The log's lines, without the one thing that time changes."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def state_of(out):
    state = command.load_state(out / "state.pt")
    state.pop("seconds")
    return state


def same(a, b):
    """Bitwise equality of trees of dicts, lists, numbers and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    assert torch.equal(logits_of(a), logits_of(b))
    for name in ("router.safetensors", "router.png", "lambda.png", "settings.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert log_of(a) == log_of(b)
    assert same(state_of(a), state_of(b))


def logits_of(out):
    return load_file(out / "router.safetensors")["logits"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "run"
    train_stepwise.train(tiny_model(), tiny_settings(), out)
    return out


def test_a_run_is_its_trajectories(tiny_run):
    """What `train` adds to the method: the optimiser, fresh noise, and when lambda is measured."""
    model, sampler, router = tiny_model(), DDIM(4), routers.Router(4, 6, seed=0)
    optimizer = torch.optim.AdamW(router.parameters(), 0.2, weight_decay=0)
    for n in range(6):
        training, measuring = (
            train_stepwise.chunks_of(model, sampler, 0, range(2 * n, 2 * n + 2), 2, purpose)
            for purpose in (1, 2)
        )
        if n % 2 == 0:  # every 8 iterations
            lambda_ = train_stepwise.measure_lambda(
                model, router, measuring, SCALE, TAU, "leave-one-out"
            )
        train_stepwise.train_trajectory(
            model, router, optimizer, training, lambda_, SCALE, TAU, 1e-3
        )
    assert torch.equal(router.logits(), logits_of(tiny_run))


@pytest.mark.parametrize("micro_batch, sampler", ((3, "ddim"), (4, "ddim"), (3, "sa-solver")))
def test_micro_batches_give_the_same(tmp_path, micro_batch, sampler):
    for name, size in (("whole", 8), ("split", micro_batch)):
        settings = tiny_settings(batch_size=8, micro_batch=size, iterations=12, sampler=sampler)
        train_stepwise.train(tiny_model(), settings, tmp_path / name)
    assert torch.allclose(
        logits_of(tmp_path / "whole"), logits_of(tmp_path / "split"), rtol=0, atol=1e-6
    )
    for whole, split in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "split"), strict=True):
        assert whole.keys() == split.keys() and whole["computed"] == split["computed"]
        for key in {"loss", "mse", "lambda"} & whole.keys():
            assert split[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6)


class Killed(BaseException):
    pass


def run_lines(function, count=math.inf):
    """Runs a function until it has executed `count` lines of train_stepwise.py and command.py, and
    kills it there. -> the lines executed, if it ended before."""
    files, lines = (train_stepwise.__file__, command.__file__), 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            if lines == count:
                raise Killed
        return trace

    tracing = sys.gettrace()
    try:
        with torch.enable_grad():  # a death in a no_grad block may leave that behind
            sys.settrace(trace)
            function()
    finally:
        sys.settrace(tracing)
    return lines


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_any_line_and_resumed_is_bitwise_the_same(tmp_path, seed, tiny_run):
    model, out = tiny_model(), tmp_path / "run"
    train = functools.partial(train_stepwise.train, model, tiny_settings(), out, resume=True)
    total = run_lines(
        lambda: train_stepwise.train(model, tiny_settings(), tmp_path / "another")
    )
    dice, deaths = random.Random(seed), 0
    while True:
        try:
            run_lines(train, dice.randint(1, total // 2))
            break
        except Killed:
            deaths += 1
            assert deaths < 60
            if (out / "state.pt").exists():
                assert state_of(out)["trajectories"] >= 1  # whole, or not there
    assert deaths >= 2
    assert_same_run(out, tiny_run)


def test_killed_between_log_and_state_repeats_no_line(tmp_path, monkeypatch, tiny_run):
    save, out = command.save_state, tmp_path / "run"

    def dies_in_the_third(path, state):
        if state["trajectories"] == 3:
            raise Killed
        save(path, state)

    monkeypatch.setattr(command, "save_state", dies_in_the_third)
    with pytest.raises(Killed):
        train_stepwise.train(tiny_model(), tiny_settings(), out)
    assert len(log_of(out)) == 3 and state_of(out)["trajectories"] == 2
    monkeypatch.undo()
    train_stepwise.train(tiny_model(), tiny_settings(), out, resume=True)
    assert_same_run(out, tiny_run)


@pytest.mark.parametrize("sampler", ("ddpm", "dpm-solver++", "sa-solver"))
def test_every_sampler_trains_and_resumes(tmp_path, monkeypatch, sampler, tiny_run):
    settings, save, guided = tiny_settings(sampler=sampler), command.save_state, sample.guided
    seen = set()

    def dies_in_the_third(path, state):
        save(path, state)
        if state["trajectories"] == 3:
            raise Killed

    def noting(*args, channels):
        seen.add(channels)
        return guided(*args, channels=channels)

    train_stepwise.train(tiny_model(), settings, tmp_path / "whole")
    monkeypatch.setattr(train_stepwise, "guided", noting)
    monkeypatch.setattr(command, "save_state", dies_in_the_third)
    with pytest.raises(Killed):
        train_stepwise.train(tiny_model(), settings, tmp_path / "run")
    monkeypatch.undo()
    train_stepwise.train(tiny_model(), settings, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not torch.equal(logits_of(tmp_path / "run"), logits_of(tiny_run))
    assert seen == {make_sampler(sampler, 4).guidance_channels}


def test_fractional_timesteps_are_named_in_short(tmp_path, monkeypatch):
    names, heat_map = [], routers.heat_map

    def noting(scores, tau, timesteps, branches):
        names.extend(map(str, timesteps))
        return heat_map(scores, tau, timesteps, branches)

    monkeypatch.setattr(routers, "heat_map", noting)
    train_stepwise.train(tiny_model(), tiny_settings(sampler="sa-solver"), tmp_path / "run")
    assert names == ["999", "749.25", "499.5", "249.75"]


@pytest.mark.parametrize("change", (dict(seed=1), dict(objective="ltc"), dict(sampler="ddpm"),
                                    dict(proxy="cumulative"), dict(beta=1e-2), dict(lr=0.1)))
def test_what_is_set_matters(tmp_path, change, tiny_run):
    train_stepwise.train(tiny_model(), tiny_settings(**change), tmp_path / "run")
    ours, theirs = logits_of(tmp_path / "run"), logits_of(tiny_run)
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[1:], theirs[1:])


def test_fresh_noise_in_every_trajectory_and_measure(monkeypatch, tmp_path):
    drawn, start = [], samplers.Noise.start

    def noting(noise, shape, device="cpu"):
        x = start(noise, shape, device)
        drawn.extend(x.flatten(1).tolist())
        return x

    monkeypatch.setattr(samplers.Noise, "start", noting)
    train_stepwise.train(tiny_model(), tiny_settings(), tmp_path / "run")
    assert len(drawn) == 6 * 2 + 3 * 2  # six trajectories and three measures of two images
    assert len({tuple(x) for x in drawn}) == len(drawn)


def test_a_run_folder_is_complete(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names == {"router.safetensors", "router.png", "lambda.png", "settings.json",
                     "log.jsonl", "state.pt", "results.json"}
    assert json.loads((tiny_run / "settings.json").read_text()) == tiny_settings()
    for name in ("router.png", "lambda.png"):
        with Image.open(tiny_run / name) as image:
            image.verify()

    file, settings = routers.load(tiny_run / "router.safetensors"), tiny_settings()
    for key in ("model", "sampler", "steps", "guidance", "tau", "beta", "objective", "proxy",
                "seed", "iterations"):
        assert file.about[key] == str(settings[key]), key
    assert float(file.about["cur"]) == pytest.approx(routers.cur(file.schedule()), abs=5e-5)
    file.check("tiny", "ddim", 4, 6)


def test_the_log_says_what_happened(tiny_run):
    log, file = log_of(tiny_run), routers.load(tiny_run / "router.safetensors")
    assert [line["trajectory"] for line in log] == [0, 1, 2, 3, 4, 5]
    assert [line["iteration"] for line in log] == [4, 8, 12, 16, 20, 24]
    assert ["lambda" in line for line in log] == [True, False] * 3  # every 8 iterations
    for line in log:
        assert line["cur"] == pytest.approx(1 - sum(line["computed"]) / 24, abs=1e-6)
        assert line["computed"][0] == 6
        assert len(line["mse"]) == 4 and line["mse"][0] == 0 and min(line["mse"][1:]) > 0
        assert line["loss"] > 0
    assert all(line["lambda"][0] == 0 and len(line["lambda"]) == 4 for line in log[::2])
    assert log[-1]["computed"] == file.schedule().sum(1).tolist()


def test_iterations_are_rounded_up_to_whole_trajectories(tmp_path):
    settings = tiny_settings(iterations=9, lambda_every=5)
    results = train_stepwise.train(tiny_model(), settings, tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert results["iterations"] == 12 and len(log) == 3
    assert ["lambda" in line for line in log] == [True, False, True]
    assert routers.load(tmp_path / "run" / "router.safetensors").about["iterations"] == "12"


def test_an_ltc_run_measures_nothing(tmp_path):
    out = tmp_path / "run"
    train_stepwise.train(tiny_model(), tiny_settings(objective="ltc"), out)
    assert not (out / "lambda.png").exists()
    assert not any("lambda" in line for line in log_of(out))
    assert routers.load(out / "router.safetensors").about["proxy"] == "none"


def test_without_weight_on_usage_the_error_falls(tmp_path):
    """A router that may use everything learns to: the scores rise."""
    settings = tiny_settings(objective="ltc", beta=0.0, lr=0.5, iterations=60)
    train_stepwise.train(tiny_model(), settings, tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert log[-1]["loss"] < 0.3 * log[0]["loss"] and log[-1]["cur"] < log[0]["cur"]


def test_with_all_weight_on_usage_everything_is_reused(tmp_path):
    settings = tiny_settings(beta=1e6, lr=0.5, iterations=60)
    results = train_stepwise.train(tiny_model(), settings, tmp_path / "run")
    assert results["cur"] == pytest.approx(3 / 4, abs=1e-6)  # row 0 always computes


# ------------------------------------------------------------------------------------------------
# The command, on the digits network with random weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    network = dit.DiT(**dit.SIZES["digits"])
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(network.state_dict(), path)
    return path


def flags(weights, out, *more):
    return [
        "--model", "digits", "--weights", str(weights), "--device", "cpu", "--steps", "4",
        "--batch-size", "2", "--iterations", "24", "--lambda-every", "8", "--beta", "1e-5",
        "--out", str(out), *more,
    ]


def run_process(weights, out, *more, end=None, after=0, delay=0.0):
    """The command as a process of its own, sent the signal `end` `delay` seconds after the log has
    `after` lines: -> exit code, stdout, stderr."""
    log = out / "log.jsonl"
    with subprocess.Popen(
        [sys.executable, ROOT / "train_stepwise.py", *flags(weights, out, *more)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:
        try:
            while end and process.poll() is None:
                if log.exists() and log.read_bytes().count(b"\n") >= after:
                    time.sleep(delay)
                    process.send_signal(end)
                    break
                time.sleep(0.002)
            stdout, stderr = process.communicate(timeout=900)
        finally:
            process.kill()
    return process.returncode, stdout, stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the command in this process: -> exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_stepwise.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            command.run(train_stepwise.main)
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def full_run(weights, tmp_path_factory):
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("full") / "run"
    code, stdout, stderr = run_process(weights, out)
    assert code == 0 and stderr == ""
    assert f"digits on cpu: iepo, beta 1e-05, ddim, T = 4, seed 0 -> {out}" in stdout
    assert "lr x updates per row 0.6 (below 8" in stdout
    assert "CUR " in stdout and f"wrote {out}/router.safetensors" in stdout
    return out


def test_killed_twice_and_resumed_is_bitwise_the_same(weights, full_run, tmp_path, call):
    out, dice = tmp_path / "run", random.Random(0)
    for lines in (1, 3):
        delay = 0.05 * dice.random()
        code, *_ = run_process(
            weights, out, "--resume", end=signal.SIGKILL, after=lines, delay=delay
        )
        assert code == -signal.SIGKILL
    assert not (out / "router.safetensors").exists()
    code, _, stderr = call(*flags(weights, out, "--resume"))
    assert code == 0 and stderr == ""
    assert_same_run(out, full_run)


def test_interrupted_ends_with_a_line_and_resumes(weights, full_run, tmp_path, call):
    out = tmp_path / "run"
    code, _, stderr = run_process(weights, out, end=signal.SIGINT, after=2)
    assert code == 130 and stderr == "interrupted\n"
    assert {path.name for path in out.iterdir()} == {"settings.json", "log.jsonl", "state.pt"}
    assert call(*flags(weights, out, "--resume"))[0] == 0
    assert_same_run(out, full_run)


def test_another_seed_is_another_run(weights, full_run, tmp_path, call):
    assert call(*flags(weights, tmp_path / "run", "--seed", "1"))[0] == 0
    assert not torch.equal(logits_of(tmp_path / "run")[1:], logits_of(full_run)[1:])
    assert log_of(tmp_path / "run")[0]["mse"] != log_of(full_run)[0]["mse"]


def test_resuming_a_finished_run_changes_nothing(weights, full_run, call):
    before = contents(full_run)
    code, stdout, stderr = call(*flags(weights, full_run, "--resume"))
    assert code == 0 and stderr == "" and "CUR " in stdout
    assert contents(full_run) == before


def assert_refused(answer, *words):
    """Exit code 2 and one line that says why."""
    code, _, stderr = answer
    assert code == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
    assert all(word in stderr for word in words), stderr


def test_an_existing_run_is_not_overwritten(weights, full_run, call):
    before = contents(full_run)
    assert_refused(call(*flags(weights, full_run)), str(full_run), "--resume")
    assert contents(full_run) == before


@pytest.mark.parametrize("change", (
    ("--beta", "1e-4"), ("--steps", "5"), ("--seed", "3"), ("--lr", "0.3"), ("--tau", "0.2"),
    ("--iterations", "28"), ("--objective", "ltc"), ("--proxy", "cumulative"),
    ("--sampler", "ddim:1"), ("--guidance", "2"), ("--batch-size", "3"), ("--micro-batch", "1"),
    ("--lambda-every", "4"), ("--dtype", "bfloat16"),
))
def test_a_run_is_not_resumed_with_other_settings(weights, full_run, call, change):
    before = contents(full_run)
    answer = call(*flags(weights, full_run, "--resume", *change))
    assert_refused(answer, str(full_run), "other settings", change[0].strip("-").replace("-", "_"))
    assert contents(full_run) == before


@pytest.mark.parametrize("change", (
    ("--beta", "-1"), ("--beta", "nan"), ("--beta", "inf"), ("--tau", "0"), ("--tau", "1.5"),
    ("--tau", "nan"), ("--steps", "1"), ("--steps", "0"), ("--steps", "-3"), ("--steps", "1001"),
    ("--sampler", "euler"), ("--sampler", "ddim:2"), ("--lr", "0"), ("--lr", "nan"),
    ("--iterations", "0"), ("--lambda-every", "0"), ("--batch-size", "0"), ("--micro-batch", "-1"),
    ("--model", "dalle"), ("--device", "abacus"), ("--dtype", "float8"),
))
def test_bad_settings_are_refused(weights, tmp_path, call, change):
    out = tmp_path / "run"
    assert_refused(call(*flags(weights, out, *change)), change[1])
    assert not out.exists() or set(contents(out)) <= {"settings.json", "log.jsonl"}


@pytest.mark.parametrize("change", (
    ("--objective", "gan"), ("--proxy", "all"), ("--seed", "-1"), ("--seed", "x"),
    ("--beta", "much"), ("--bogus", "1"),
))
def test_what_argparse_refuses(weights, tmp_path, call, change):
    code, _, stderr = call(*flags(weights, tmp_path / "run", *change))
    assert code == 2 and "error: " in stderr.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ("", "run", "a/b"))
def test_an_out_that_cannot_be_made_is_refused(weights, tmp_path, call, below):
    (tmp_path / "file").write_text("in the way")
    assert_refused(call(*flags(weights, tmp_path / "file" / below)), "file")
    assert contents(tmp_path) == {"file": b"in the way"}


def test_bad_weights_are_refused(weights, tmp_path, call):
    path, out = tmp_path / "w.safetensors", tmp_path / "run"
    assert_refused(call(*flags(path, out)), str(path))  # not there
    whole = weights.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(call(*flags(path, out)), str(path))
    save_file(tiny_dit().state_dict(), path)
    assert_refused(call(*flags(path, out)), str(path), "does not fit", "missing blocks.7")
    assert not out.exists()


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("objective", ("iepo", "ltc"))
def test_a_loss_that_is_not_finite_ends_the_run(weights, tmp_path, call, value, objective):
    state = load_file(weights)
    state["blocks.3.mlp.fc2.bias"][5] = value
    path, out = tmp_path / "w.safetensors", tmp_path / "run"
    save_file(state, path)
    assert_refused(call(*flags(path, out, "--objective", objective)), "not finite", "step 1")
    assert set(contents(out)) <= {"settings.json", "log.jsonl"}
    save_file(load_file(weights), path)  # and the folder takes another run
    assert call(*flags(path, out, "--objective", objective, "--iterations", "4"))[0] == 0
    assert len(log_of(out)) == 1


def test_a_loss_that_is_not_finite_moves_no_row():
    model, router, make_chunks = double_case(0)
    before = router.logits().clone()
    model.network.blocks[1].mlp.fc2.bias[0] = math.nan
    optimizer = torch.optim.AdamW(router.parameters(), 0.1)
    with pytest.raises(ValueError, match="not finite at step 1"):
        train_stepwise.train_trajectory(
            model, router, optimizer, make_chunks(), [1.0] * 4, SCALE, TAU, 0.1
        )
    assert torch.equal(router.logits(), before)


def test_a_broken_state_is_refused(weights, full_run, tmp_path, call):
    out = tmp_path / "run"
    out.mkdir()
    for name, data in contents(full_run).items():
        (out / name).write_bytes(data)
    whole = (out / "state.pt").read_bytes()
    torch.save({"some": "thing else"}, tmp_path / "other.pt")
    broken = [whole[:n] for n in (0, 1, 2, 50, len(whole) // 2, len(whole) - 1)]
    for data in [*broken, b"hello world\n", (tmp_path / "other.pt").read_bytes()]:
        (out / "state.pt").write_bytes(data)
        before = contents(out)
        assert_refused(call(*flags(weights, out, "--resume")), str(out))
        assert contents(out) == before


def test_state_runs_no_code_from_the_file(weights, full_run, tmp_path, call):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    out = tmp_path / "run"
    out.mkdir()
    torch.save({"settings": Evil()}, out / "state.pt")
    assert_refused(call(*flags(weights, out, "--resume")), str(out))
    assert not (tmp_path / "evil").exists()


def test_the_trained_router_loads_for_its_own_use_only(full_run):
    file = routers.load(full_run / "router.safetensors")
    file.check("digits", "ddim", 4, 16)
    with pytest.raises(ValueError, match="cannot be used for"):
        file.check("digits", "ddim", 20, 16)


def test_chunks_leave_the_sampler_alone():
    sampler = DDIM(4)
    chunks = train_stepwise.chunks_of(tiny_model(), sampler, 0, range(5), 2, 1)
    assert [chunk.share for chunk in chunks] == [0.4, 0.4, 0.2]
    assert [chunk.noise.images for chunk in chunks] == [[0, 1], [2, 3], [4]]
    assert all(chunk.sampler is not sampler for chunk in chunks)
    assert copy.copy(sampler).timesteps == chunks[0].sampler.timesteps


def test_settings_for_other_numbers_of_steps():
    defaults = train_stepwise.DEFAULTS["digits"]
    assert train_stepwise.for_steps(defaults, None) == train_stepwise.for_steps(defaults, 20)
    assert train_stepwise.for_steps(defaults, 20) == defaults
    for steps in range(2, 1001):
        settings = train_stepwise.for_steps(defaults, steps)
        assert settings["iterations"] == 100 * steps and settings["lambda_every"] == 20 * steps
        for objective, beta in defaults["beta"].items():
            assert settings["beta"][objective] * steps**2 == pytest.approx(beta * 20**2)
        assert settings["lr"] == 0.1
