"""Step-wise denoising training: against a restatement in slow words; and its command, killed,
resumed and given bad input."""

import copy
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
from safetensors.torch import load_file, save_file

import command
import models
import router as routers
import train_stepwise
from samplers import DDIM, Noise, make_sampler
from tests.small import digits_weights, tiny_dit, tiny_model
from tests.test_training import (
    assert_same_run,
    contents,
    log_of,
    logits_of,
    tiny_settings,
)

SEEDS = (0, 1, 2)
SCALE, TAU = 1.5, 0.5
ROOT = Path(__file__).parent.parent


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


def test_compiled_branches_train_the_same_router():
    """The backend `aot_eager` traces forward and backward, and computes as torch does otherwise."""
    logits = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, router, make_chunks = double_case(0)
        if compiled:
            assert len(models.compile_branches(model.network, "aot_eager")) == 6
        optimizer = torch.optim.AdamW(router.parameters(), 0.1, weight_decay=0)
        train_stepwise.train_trajectory(model, router, optimizer, make_chunks(), [0.0, 1, 1, 1],
                                        SCALE, TAU, 0.01)
        logits.append(router.logits())
    assert (logits[0] - logits[1]).abs().max() < 1e-9


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
# The command, on the digits network with random weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return digits_weights(tmp_path_factory.mktemp("weights"))


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
    assert not (out / "results.json").exists()
    code, _, stderr = call(*flags(weights, out, "--resume"))
    assert code == 0 and stderr == ""
    assert_same_run(out, full_run)


def test_interrupted_ends_with_a_line_and_resumes(weights, full_run, tmp_path, call):
    out = tmp_path / "run"
    code, _, stderr = run_process(weights, out, end=signal.SIGINT, after=2)
    assert code == 130
    assert stderr == f"interrupted: the same command with --resume goes on with {out}\n"
    assert {path.name for path in out.iterdir()} == {"settings.json", "log.jsonl", "state.pt",
                                                     "router.safetensors"}
    routers.load(out / "router.safetensors").check("digits", "ddim", 4, 16)
    assert call(*flags(weights, out, "--resume"))[0] == 0
    assert_same_run(out, full_run)


def test_the_advice_of_a_short_run_can_be_followed(weights, tmp_path, call):
    words = flags(weights, tmp_path / "run", "--lr", "4", "--iterations", "4")
    code, stdout, _ = call(*words)
    advice = stdout.partition("to train longer: the same command with ")[2].splitlines()[0]
    assert code == 0 and advice == "--resume --iterations 8"
    code, stdout, stderr = call(*words, *advice.split())
    assert code == 0 and stderr == "" and "lr x updates per row 8\n" in stdout
    assert call(*flags(weights, tmp_path / "whole", "--lr", "4", "--iterations", "8"))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


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
    ("--objective", "ltc"), ("--proxy", "cumulative"),
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


@pytest.mark.parametrize("words, said", (
    ("--steps 1", "steps must be from 2 to 1000"), ("--sampler euler", "unknown sampler euler"),
    ("--start nope", "unknown schedule nope"), ("--start fora:2 --tau 0.99", "--start needs a"),
    ("--prompts nope", "takes labels, not prompts"), ("--dtype int8", "unknown dtype int8"),
    ("--model pixart256 --prompts nope", "nope"), ("--raw-captions", "captions by T5"),
    ("--out run", "run holds a run: --resume goes on with it"),
    ("--out run --resume", "model digits, steps 4, "),
    ("--weights nope", "no weights at nope"),
))
def test_mistakes_are_found_before_a_download(full_run, tmp_path, monkeypatch, call, words, said):
    def offline(*args):
        pytest.fail(f"asked the network for {args}")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes((full_run / "state.pt").read_bytes())
    before = contents(tmp_path / "run")
    for module, name in ((command, "download"), (models, "hugging_face"), (models.text, "load_t5")):
        monkeypatch.setattr(module, name, offline)
    assert_refused(call("--model", "dit256", "--device", "cpu", *words.split()), said)
    assert contents(tmp_path / "run") == before


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
    assert_refused(call(*flags(path, out)), str(path), "trained at another resolution")
    save_file(tiny_dit(input_size=14).state_dict(), path)
    assert_refused(call(*flags(path, out)), str(path), "does not fit", "missing blocks.3")
    assert not out.exists()


@pytest.mark.parametrize("value", (3e38, -3e38))
@pytest.mark.parametrize("objective", ("iepo", "ltc"))
def test_a_loss_that_is_not_finite_ends_the_run(weights, tmp_path, call, value, objective):
    state = load_file(weights)
    state["blocks.3.mlp.fc2.weight"].fill_(value)
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


def test_a_run_that_another_process_works_in_is_left_alone(weights, full_run, call):
    before = contents(full_run)
    with command.locked(full_run):
        answer = call(*flags(weights, full_run, "--resume"))
    assert_refused(answer, str(full_run), "in use by another process")
    assert contents(full_run) == before


def test_weights_under_another_name_are_the_same_run(weights, full_run, tmp_path, call):
    before = contents(full_run)
    (tmp_path / "copy.safetensors").write_bytes(Path(weights).read_bytes())
    code, _, stderr = call(*flags(tmp_path / "copy.safetensors", full_run, "--resume"))
    assert code == 0, stderr
    assert logits_of(full_run).equal(load_file(full_run / "router.safetensors")["logits"])
    (full_run / "settings.json").write_bytes(before["settings.json"])
    (full_run / "router.safetensors").write_bytes(before["router.safetensors"])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_gradients_of_half_precision_agree_with_float32s(dtype):
    """A gradient of 1e-4 times the mean squared error is below float16's smallest number: without
    the loss's scale most rows would get 0."""
    def gradients(dtype):
        model, router = tiny_model(), routers.Router(4, 6, seed=0)
        model.network.to(dtype)
        still = StandStill(router)
        chunks = train_stepwise.chunks_of(model, DDIM(4), 0, range(2), 2, 1)
        train_stepwise.train_trajectory(model, router, still, chunks, [1e-4] * 4, 1.5, 0.1, 0.0)
        return torch.stack([rows[i] for i, rows in enumerate(still.gradients)])  # row i at step i

    ratio = gradients(dtype).norm(dim=1) / gradients(torch.float32).norm(dim=1)
    assert ((ratio - 1).abs() < 0.1).all()


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
    assert not {"raw_captions", "prompts", "start"} & file.about.keys()  # not set: not mentioned
    file.check("digits", "ddim", 4, 16)
    with pytest.raises(ValueError, match="cannot be used for"):
        file.check("digits", "ddim", 20, 16)


def test_chunks_leave_the_sampler_alone():
    sampler = DDIM(4)
    chunks = train_stepwise.chunks_of(tiny_model(), sampler, 0, range(5), 2, 1)
    assert [chunk.share for chunk in chunks] == [0.4, 0.4, 0.2]
    assert [chunk.noise.numbers for chunk in chunks] == [[0, 1], [2, 3], [4]]
    assert all(chunk.sampler is not sampler for chunk in chunks)
    assert copy.copy(sampler).timesteps == chunks[0].sampler.timesteps
