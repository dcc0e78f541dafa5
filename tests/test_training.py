"""What surrounds a training: the search for beta, settings, runs that are killed and resumed."""

import copy
import functools
import json
import math
import random
import sys
import time
import types

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import command
import pictures
import router as routers
import samplers
import train_stepwise
import training
from samplers import DDIM, make_sampler
from tests.small import tiny_model

SEEDS = (0, 1, 2)
SCALE, TAU = 1.5, 0.5

# ------------------------------------------------------------------------------------------------
# The search for beta


@pytest.mark.parametrize("start", (5e-7, 1e-5))
@pytest.mark.parametrize("target", (0.25, 0.4, 0.55))
def test_a_target_cur_is_found(target, start):
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

    search, logits = training.BetaSearch(start, target, 0.1, lr), first
    for n in range(200):  # as long as a run of 100 goes on at most
        logits = moved(logits, search.beta)
        if n == 50:  # saved and loaded
            state = copy.deepcopy(search.state_dict())
            search = training.BetaSearch(start, target, 0.1, lr)
            search.load_state_dict(state)
        search.update(logits)
        if n >= 99 and search.reached(cur(logits)):
            break
    assert abs(cur(logits) - target) < 0.01
    logits = first
    for _ in range(100):  # a fresh run with the beta found
        logits = moved(logits, search.found)
    assert abs(cur(logits) - target) < 0.1


def test_without_a_target_cur_beta_stands_still():
    search = training.BetaSearch(3e-7, None, 0.1, 0.1)
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
        lambda_every=8, batch_size=2, micro_batch=2, target_cur=None, start=None,
        forecast=0,
    )
    return {**settings, **changes}


def log_of(out):
    """The log's lines, without the one thing that time changes."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def results_of(out):
    """The results, without what differs from process to process."""
    results = json.loads((out / "results.json").read_text())
    assert results.pop("seconds") > 0 and results.pop("peak_memory") > 1e6
    return results


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
            lambda_ = train_stepwise.measure_weights(
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
    """Runs a function until it has executed `count` lines of the trainer, and kills it there.
    -> the lines executed, if it ended before."""
    files, lines = (train_stepwise.__file__, training.__file__, command.__file__), 0

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


def test_from_the_first_save_on_there_is_a_router(tmp_path, monkeypatch):
    """After every save the file is the router of a run that ended there."""
    save, out, seen = command.save_state, tmp_path / "run", []

    def looking(path, state):
        if state["trajectories"] > 1:
            seen.append((out / "router.safetensors").read_bytes())
        save(path, state)

    monkeypatch.setattr(command, "save_state", looking)
    train_stepwise.train(tiny_model(), tiny_settings(), out)
    monkeypatch.undo()
    assert len(seen) == 5
    for n in (1, 4):
        (tmp_path / "seen.safetensors").write_bytes(seen[n - 1])
        file = routers.load(tmp_path / "seen.safetensors")
        file.check("tiny", "ddim", 4, 6)
        assert file.about["iterations"] == str(4 * n)
        train_stepwise.train(tiny_model(), tiny_settings(iterations=4 * n), tmp_path / str(n))
        assert (tmp_path / str(n) / "router.safetensors").read_bytes() == seen[n - 1]


def test_pictures_are_drawn_once_a_minute_and_at_the_end(tmp_path, monkeypatch, tiny_run):
    """Six trajectories of 25 seconds: after the third, the sixth, and at the end."""
    now, drawn, save, heat_map = [0.0], [], command.save_state, pictures.heat_map

    def slowly(path, state):
        now[0] += 25
        save(path, state)

    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(command, "save_state", slowly)
    monkeypatch.setattr(pictures, "heat_map", lambda *args: drawn.append(now[0]) or heat_map(*args))
    train_stepwise.train(tiny_model(), tiny_settings(), tmp_path / "run")
    assert drawn == [75, 150, 150]
    assert_same_run(tmp_path / "run", tiny_run)


def test_an_interruption_says_how_to_go_on(tmp_path, tiny_run):
    for out, words in ((tiny_run, f"the same command with --resume goes on with {tiny_run}"),
                       (tmp_path / "new", "")):
        with pytest.raises(KeyboardInterrupt) as caught, training.run_folder(out):
            raise KeyboardInterrupt
        assert str(caught.value) == words
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("sampler", ("ddpm", "dpm-solver++", "sa-solver"))
def test_every_sampler_trains_and_resumes(tmp_path, monkeypatch, sampler, tiny_run):
    settings, save, guided = tiny_settings(sampler=sampler), command.save_state, samplers.guided
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
    names, heat_map = [], pictures.heat_map

    def noting(scores, tau, timesteps, branches):
        names.extend(map(str, timesteps))
        return heat_map(scores, tau, timesteps, branches)

    monkeypatch.setattr(pictures, "heat_map", noting)
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
    settings = json.loads((tiny_run / "settings.json").read_text())
    assert settings == tiny_settings(dtype="float32")  # None by its one name
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
# What is resumed, and what is not


def test_a_longer_run_goes_on_to_the_same_bits(tmp_path, tiny_run):
    out = tmp_path / "run"
    train_stepwise.train(tiny_model(), tiny_settings(iterations=9), out)
    train_stepwise.train(tiny_model(), tiny_settings(), out, resume=True)
    assert_same_run(out, tiny_run)
    assert results_of(out) == results_of(tiny_run)  # renewed
    with pytest.raises(ValueError, match="is a run of 24 iterations: --iterations can only be"):
        train_stepwise.train(tiny_model(), tiny_settings(iterations=20), out, resume=True)


def test_with_a_target_cur_too_a_longer_run_goes_on_to_the_same_bits(tmp_path):
    """What the search does depends on the trajectories before, not on how many are planned: also
    where a run stopped late, because the CUR was not there yet."""
    def train(name, iterations, **more):
        settings = tiny_settings(target_cur=0.5, lr=1.0, iterations=iterations)
        return train_stepwise.train(tiny_model(), settings, tmp_path / name, **more)["iterations"]

    ends = [train("steps", 4), train("steps", 12, resume=True), train("steps", 24, resume=True)]
    assert train("whole", 24) == ends[-1]
    assert ends == sorted(set(ends)) and ends[0] > 4  # the first stopped late
    assert_same_run(tmp_path / "steps", tmp_path / "whole")
    assert results_of(tmp_path / "steps") == results_of(tmp_path / "whole")


def test_a_run_that_went_on_and_was_killed_has_no_results_of_the_shorter_one(
    tmp_path, monkeypatch, tiny_run
):
    out = tmp_path / "run"
    train_stepwise.train(tiny_model(), tiny_settings(iterations=9), out)
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "finish", lambda run: 1 / 0)  # after the last trajectory
        with pytest.raises(ZeroDivisionError):
            train_stepwise.train(tiny_model(), tiny_settings(), out, resume=True)
    assert not (out / "results.json").exists()
    train_stepwise.train(tiny_model(), tiny_settings(), out, resume=True)
    assert_same_run(out, tiny_run)
    assert results_of(out) == results_of(tiny_run)


def test_a_folder_in_place_of_any_file_of_a_run_is_found_before_the_first(tmp_path):
    for name in training.FILES:
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(OSError, match=f"cannot write .*{name}: it is a folder"):
            train_stepwise.train(tiny_model(), tiny_settings(), tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]


def test_equal_settings_in_other_words_go_on(tmp_path, tiny_run):
    """The same bits, also from a state that was saved in the other words."""
    out = tmp_path / "run"
    train_stepwise.train(tiny_model(), tiny_settings(iterations=9), out)
    for words in (dict(sampler="ddim:0", dtype="fp32"), dict(dtype="float32")):
        train_stepwise.train(tiny_model(), tiny_settings(**words), out, resume=True)
        assert_same_run(out, tiny_run)
    state = command.load_state(out / "state.pt")
    command.save_state(out / "state.pt", {**state, "settings": tiny_settings(sampler="ddim:0.0")})
    train_stepwise.train(tiny_model(), tiny_settings(), out, resume=True)
    for words in (dict(sampler="ddim:0.5"), dict(dtype="bf16")):
        with pytest.raises(ValueError, match="is a run with other settings: "):
            train_stepwise.train(tiny_model(), tiny_settings(**words), out, resume=True)


def test_a_run_goes_on_with_its_own_weights_and_prompts_only(tmp_path):
    out = tmp_path / "run"
    train_stepwise.train(tiny_model(), tiny_settings(), out)
    before = contents(out)
    with pytest.raises(ValueError, match="is a run with other weights"):
        train_stepwise.train(tiny_model(1), tiny_settings(), out, resume=True)
    with pytest.raises(ValueError, match="is a run with other prompts or images"):
        train_stepwise.train(tiny_model(), tiny_settings(), out, True, ["a prompt that is new"])
    assert contents(out) == before


STATE = ("version", "settings", "contents", "router", "optimizer", "search", "lambda",
         "trajectories", "curs", "seconds")


@pytest.mark.parametrize("key", STATE)
def test_a_state_that_is_none_ends_in_one_line(tmp_path, key):
    """Whatever stands in one place of the file: the reason is named, and nothing is written."""
    out, settings = tmp_path / "run", tiny_settings(iterations=8)
    train_stepwise.train(tiny_model(), settings, out)
    whole = command.load_state(out / "state.pt")
    for value in (None, "text", -1, math.nan, [], [math.nan] * 4, {}, {"beta": math.nan},
                  {"state": {}, "param_groups": []}, torch.zeros(3), "missing"):
        state = {**whole, key: value}
        if value == "missing":
            del state[key]
        command.save_state(out / "state.pt", state)
        before = contents(out)
        with pytest.raises(ValueError, match="state|settings|weights|iterations") as caught:
            train_stepwise.train(tiny_model(), settings, out, resume=True)
        assert "\n" not in command.one_line(caught.value)
        assert contents(out) == before


def test_a_state_of_a_smaller_router_ends_in_one_line(tmp_path):
    out, settings = tmp_path / "run", tiny_settings(iterations=8)
    train_stepwise.train(tiny_model(), settings, out)
    state = command.load_state(out / "state.pt")
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"][:3]
    command.save_state(out / "state.pt", state)
    with pytest.raises(ValueError, match="not a whole state of this training.*exp_avg is"):
        train_stepwise.train(tiny_model(), settings, out, resume=True)


@pytest.mark.parametrize("factor", (1.0, 1e-4, 3e-9, 1e-30, 7.0))
def test_the_loss_scale_is_a_power_of_two_near_the_inverse(factor):
    scale = training.loss_scale(factor)
    assert math.frexp(scale)[0] == 0.5 and 0.7 < scale * factor < 1.5
    assert training.loss_scale(0.0) == 1


# ------------------------------------------------------------------------------------------------
# What a run is said to have come to


def told(capsys, curs, start, lr=0.1, target=None, T=4):
    """What is printed of a run whose CUR went from `start` through `curs`."""
    n = len(curs)
    results = {"cur": curs[-1], "cur_at_start": start, "trajectories": n, "iterations": T * n,
               "cur_before_last_quarter": [start, *curs][n * 3 // 4], "lr_updates": lr * n,
               "beta": 1e-7, "seconds": 1.0, "peak_memory": None}
    training.report(results, {"target_cur": target, "lr": lr}, "out")
    return capsys.readouterr().out


@pytest.mark.parametrize("curs, start, words", (
    ([0.5], 0.5, "it moved by +0.0 points in the last 1 of 1 trajectories (too early to tell)"),
    ([0.5, 0.5, 0.5], 0.5, "+0.0 points in the last 1 of 3 trajectories (too early to tell)"),
    ([0.006] * 20, 0.006, "+0.0 points in the last 5 of 20 trajectories (too early to tell)"),
    ([0.006] * 79, 0.006, "(too early to tell)"), ([0.006] * 81, 0.006, "(where it started)"),
    ([0.3] * 100, 0.01, "at the start 1.0 %; it moved by +0.0 points in the last 25 of 100 "
                        "trajectories (settled)"),
    ([0.3] * 79 + [0.34] * 21, 0.01, "+4.0 points in the last 25 of 100 trajectories (still mov"),
    ([0.5, 0.48], 0.5, "-2.0 points in the last 1 of 2 trajectories (still moving)"),
))
def test_the_closing_line_is_true(capsys, curs, start, words):
    assert words in told(capsys, curs, start)


@pytest.mark.parametrize("curs, target, more", (
    ([0.3] * 100, None, None), ([0.3] * 79 + [0.4] * 21, None, 800),  # still moving
    ([0.3] * 20, None, 320), ([0.3], None, 320),  # 80 updates of 0.1 make 8
    ([0.3] * 100, 0.4, 800), ([0.395] * 100, 0.4, None),
))
def test_the_advice_is_what_to_type(capsys, curs, target, more):
    lines = told(capsys, curs, 0.0, target=target).splitlines()
    advice = [line for line in lines if line.startswith("to train longer")]
    words = f"to train longer: the same command with --resume --iterations {more}"
    assert advice == ([words] if more else [])
    assert ("a CUR of 40 % is not reached" in "".join(lines)) == (target == 0.4 and curs[0] == 0.3)


def test_results_tell_where_the_run_started(tmp_path):
    """From alternation at 50 % a short run has not moved by 50 points."""
    settings = tiny_settings(start="fora-paper:2", iterations=8)
    results = train_stepwise.train(tiny_model(), settings, tmp_path / "run")
    assert results["cur_at_start"] == results["cur_before_last_quarter"] == results["cur"] == 0.5
    again = train_stepwise.train(tiny_model(), settings, tmp_path / "run", resume=True)
    assert again["cur_at_start"] == 0.5


# ------------------------------------------------------------------------------------------------
# Settings


def test_settings_for_other_numbers_of_steps():
    for objective, beta in (("iepo", 4e-7), ("ltc", 1e-4)):
        usual = training.defaults_of("digits", objective, None)
        assert usual == training.defaults_of("digits", objective, 20)
        assert usual == {"beta": beta, **training.SMALL}
        for steps in range(2, 1001):
            settings = training.defaults_of("digits", objective, steps)
            assert settings["iterations"] == 100 * steps and settings["lambda_every"] == 20 * steps
            assert settings["beta"] * steps**2 == pytest.approx(beta * 20**2)
            assert settings["lr"] == 0.1


def test_published_settings_hold_for_every_number_of_steps():
    for name in ("dit256", "pixart1024"):
        for steps in (None, 10, 50):
            settings = training.defaults_of(name, "iepo", steps)
            assert settings == {"beta": 4e-8, **training.PUBLISHED}


def test_the_help_says_the_defaults():
    for key, words in (("lr", "digits: 0.1; emoji: 0.1; official: 0.01"),
                       ("beta", "T = 20: digits: 4e-07; emoji: 1e-07; official: 4e-08")):
        assert training.in_words(training.USUAL, key) == words
    for name, values in training.USUAL.items():
        model = "dit256" if name == "official" else name
        assert values == training.defaults_of(model, "iepo", None)
