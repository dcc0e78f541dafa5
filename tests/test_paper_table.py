"""The paper's table: its rows, their numbers against the files that they wrote, what it keeps."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import command
import metrics
import models
import pictures
import router as routers
import train_stepwise
from cache import Cache
from experiments import paper_table, table_figures, table_files, train_direct, train_ltc
from experiments.paper_table import Row
from tests.small import tiny_uvit


def test_the_rows_of_a_table():
    model = models.load("digits")
    rows = paper_table.plan(model, "ddim", 20, [0.25, 0.55], seeds=2)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) == 4 + 2 * 5 + 2 * 4  # Learning-to-Cache stops at 50 %
    assert names[:2] == ["digits-ddim-20-no_cache", "digits-ddim-14-fewer_steps"]
    assert "digits-ddim-20-learning-to-cache-25-1" in names
    assert not any("learning-to-cache-55" in name for name in names)
    assert all(name == name.lower() and " " not in name and "," not in name for name in names)


def test_rows_of_equal_arithmetic(table, monkeypatch, capsys):
    """Each speed-up has fewer steps, three even schedules and a searched one for each seed; all but
    the first within 1 % of it."""
    model = models.load("digits", device="cpu")
    rows = paper_table.plan(model, "ddim", 20, [0.4], 2, methods=[], speedups=[1.5, 2.5])
    assert [(row.name, row.speedup) for row in rows[4:9]] == [
        ("digits-ddim-13-fewer_steps-1.5x-0", 1.5), ("digits-ddim-20-even-1.5x-0", 1.5),
        ("digits-ddim-20-even_forecast_1-1.5x-0", 1.5),
        ("digits-ddim-20-even_forecast_2-1.5x-0", 1.5), ("digits-ddim-20-searched-1.5x-0", 1.5)]
    assert [row.steps for row in rows[9:]] == [20, 8, 20, 20, 20, 20, 20]
    for row, order in zip(rows[5:8], (0, 1, 2), strict=True):
        schedule, found, training = paper_table.schedule_of(row, model, None, None)
        full = model.flops(20) / model.flops(20, (~schedule).sum(0).tolist())
        assert full == pytest.approx(1.5, rel=0.01) and found == order and not training
    drawn, orders = paper_table.draw, {}

    def draw(model, row, steps, cache, *others):
        orders[row.method] = cache.order
        return drawn(model, row, steps, cache, *others)

    monkeypatch.setattr(paper_table, "draw", draw)
    rows, _ = numbers(table("--speedups", 1.3, "--methods", "random"))
    plain, line = (rows[f"digits-ddim-3-even{name}-1.3x-0.json"] for name in ("", "_forecast_1"))
    assert plain["gflop"] == line["gflop"]
    assert [orders[method] for method in paper_table.EVEN] == [0, 1, 2]
    assert "| even, forecast 1 | 3 |" in capsys.readouterr().out


def test_the_rows_of_a_u_vit(tmp_path):
    """DeepCache and Faster Diffusion beside the rest; evaluations in pairs; one row's numbers."""
    network = tiny_uvit(in_chans=1)
    model = models.Model("uvit256", network, "dpm-solver-2s", steps=8, guidance=1.4)
    rows = paper_table.plan(model, "dpm-solver-2s", 8, [0.25], 1, ["Learning-to-Cache"], [1.5])
    assert [row.method for row in rows[4:10]] == [*paper_table.HIDDEN, "Learning-to-Cache"]
    assert [row.steps for row in rows] == [8, 6, *[8] * 8, 6, *[8] * 4]
    full = model.flops(8, guidance=1.4)
    for row in rows[4:9]:
        cache, computed, training = paper_table.cache_of(row, model, None, None)
        values = paper_table.draw(model, row, 8, cache, 1.4, [0, 1], 0, 2, pictures.to_pixels,
                                  tmp_path / "images.npz")
        assert len(computed) == 8 and max(computed) == 10 and training == {}
        assert 0 < values["cur"] == pytest.approx(1 - sum(computed) / 80)
        assert values["gflop"] < full / 1e9 and values["cache_mb"] > 0


def test_the_papers_u_vit_stands_beside_ours():
    words = paper_table.paper_figures("uvit256", "dpm-solver-2s")
    assert "FID 2.70" in words({"method": "DeepCache, m = 2", "steps": 20})
    assert "FID 2.61" in words({"method": "HarmoniCa", "steps": 20})
    assert words({"method": "DeepCache, m = 1", "steps": 20}) == ""


def test_fora_has_its_two_curs():
    model = models.load("digits", device="cpu")
    schedules = [paper_table.schedule_of(Row("digits", "ddim", 20, name), model, None, None)[0]
                 for name in ("FORA, released code", "FORA, as reported")]
    assert [routers.cur(schedule) for schedule in schedules] == pytest.approx([0.45, 0.5])


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Runs the command on 3 steps and 12 images, the routers being random ones."""
    def find_router(row, args, out):
        path = out / "routers" / f"{row.name}.safetensors"
        if not path.exists():
            schedule = routers.random(3, 16, row.target or 0.3, seed=len(row.method))
            routers.save(path, schedule * 4.0 - 3, model="digits", sampler="ddim", steps=3,
                         guidance=2.5, tau=0.1)
        return path, {} if row.speedup else {"seconds": 5.0, "images": 7, "peak_memory": 2e6}

    monkeypatch.setattr(paper_table, "find_router", find_router)

    def run(*flags, out="table"):
        argv = ["paper_table", "--steps", 3, "--curs", 30, "--num-samples", 12, "--batch-size", 5,
                "--out", tmp_path / out, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        command.run(paper_table.main)
        return tmp_path / out

    return run


def numbers(out):
    """All that time does not change."""
    rows = {path.name: json.loads(path.read_text()) for path in (out / "rows").iterdir()}
    assert all(row.pop(key) > 0 for row in rows.values() for key in ("seconds", "faster"))
    return rows, json.loads((out / "table.json").read_text())["errors"]


def test_a_table_is_what_its_files_say(table, capsys):
    out = table()
    rows, errors = numbers(out)
    assert len(rows) == 9
    reference = metrics.statistics_of("digits", paper_table.features.load("digits"))
    uncached = np.load(out / "images" / "digits-ddim-3-no_cache.npz")["arr_0"]
    for name in ("digits-ddim-3-random-30-0", "digits-ddim-3-fora_released_code",
                 "digits-ddim-3-harmonica-30-0", "digits-ddim-2-fewer_steps"):
        row = rows[f"{name}.json"]
        path = out / "images" / f"{name}.npz"
        for key, value in metrics.evaluate(str(path), reference).items():
            assert row[key] == pytest.approx(value, rel=1e-6)
        images = np.load(path)["arr_0"]
        assert images.shape == (12, 28, 28, 3)
        assert row["error"] == pytest.approx(metrics.paired_error(images, uncached)[0], rel=1e-9)
        assert row["cur"] == pytest.approx(1 - sum(row["computed"]) / (16 * row["about"]["steps"]))
    assert rows["digits-ddim-3-no_cache.json"]["error"] == 0
    # The error of x_t ends at that of the images, but these are clipped.
    steps = errors["HarmoniCa, CUR 29.2 %"][1]
    assert len(steps) == 3 and steps[0] == 0
    assert 0.5 < rows["digits-ddim-3-harmonica-30-0.json"]["error"] / steps[2] < 1
    text = capsys.readouterr().out
    assert (out / "table.md").read_text() in text and "| HarmoniCa | 3 | 29.2 |" in text
    assert all((out / name).stat().st_size > 10_000 for name in ("quality.png", "error.png"))


def test_a_table_goes_on_where_it_was(table, monkeypatch):
    few = ["--methods", "HarmoniCa"]  # and the four rows that every table has
    whole = table(*few)
    measured, count = paper_table.draw, []

    def draw(*args):
        count.append(args[1].name)
        if len(count) == 3:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(paper_table, "draw", draw)
    with pytest.raises(SystemExit):
        table(*few, out="parts")
    parts = table(*few, out="parts")
    assert len(count) == 3 + 3 and len(set(count)) == 5  # the third twice
    assert numbers(whole) == numbers(parts)
    table(*few, out="parts")
    assert len(count) == 6  # nothing is made again
    with pytest.raises(SystemExit):
        table(*few, "--guidance", 2, out="parts")
    uncached = [np.load(out / "images" / "digits-ddim-3-no_cache.npz")["arr_0"]
                for out in (whole, parts, table(*few, "--seed", 1, out="other"))]
    assert (uncached[0] == uncached[1]).all() and (uncached[0] != uncached[2]).mean() > 0.1


def test_real_speed_up_is_that_of_batches_in_turn(monkeypatch, tmp_path):
    """By a clock that counts steps and runs slower and slower."""
    model, items, clock = paper_table.models.load("digits", device="cpu"), [0] * 12, iter(range(99))

    def timed(model, sampler, x, condition, guidance, cache=None, noise=None):
        if cache:
            cache.computed[0] += 1
        return x, len(sampler.timesteps) * 2.0 ** next(clock)

    monkeypatch.setattr(paper_table.sample, "timed_denoise", timed)
    for steps, faster in ((6, 1 / 2), (3, 6 / 6)):
        row = Row("digits", "ddim", steps, "fewer steps")
        values = paper_table.draw(model, row, 6, Cache(routers.none(steps, 16)), 1.0, items, 0, 2,
                                  lambda x: x.numpy(), tmp_path / "images.npz")
        assert values["faster"] == pytest.approx(faster)


def test_seeds_have_a_mean_and_a_deviation():
    rows = [Row("digits", "ddim", 20, "no cache")]
    rows += [Row("digits", "ddim", 20, "HarmoniCa", 0.4, seed) for seed in range(3)]
    training = {"seconds": 60.0, "images": 0, "peak_memory": 5e8}
    values = [
        {"cur": cur, "fid": fid, "error": error, "seconds": 0.2, "faster": faster, "gflop": gflop,
         "cache_mb": 0.0, "training": training if cur else {}, "computed": [16]}
        for cur, fid, error, faster, gflop in (
            (0.0, 1.0, 0.0, 1.0, 6.0), (0.40, 2.0, 0.001, 1.8, 4.0), (0.41, 3.0, 0.002, 2.0, 4.0),
            (0.39, 4.0, 0.003, 2.2, 4.0))
    ]
    table = paper_table.summary(rows, values)
    assert [line["seeds"] for line in table] == [1, 3]
    assert table[1]["fid"] == [3.0, 1.0] and table[0]["fid"] == [1.0, None]
    assert table[1]["faster"][0] == pytest.approx(2) and table[1]["less"][0] == pytest.approx(1.5)
    lines = paper_table.markdown(table, lambda line: "").splitlines()
    assert lines[0].startswith("| method | T | CUR % | FID | error | ms / image | real |")
    assert "3.00 ± 1.00" in lines[3] and "2.00 ± 1.00" in lines[3] and "40.0 ± 1.0" in lines[3]
    assert "paper" not in lines[0]


def test_the_papers_own_figures_stand_beside_their_rows():
    words = paper_table.paper_figures("dit256", "ddim")
    assert words({"method": "no cache", "steps": 20}) == "FID 3.52, sFID 4.96, IS 224.37, x 1.00"
    assert words({"method": "fewer steps", "steps": 14}).startswith("FID 5.77")
    assert words({"method": "HarmoniCa", "steps": 10}) == (
        "CUR 22.86, FID 13.35, sFID 11.13, IS 151.83, x 1.23")
    assert words({"method": "random", "steps": 20}) == ""
    assert paper_table.paper_figures("digits", "ddim")({"method": "HarmoniCa", "steps": 20}) == ""
    words = paper_table.paper_figures("pixart256", "dpm-solver++")
    assert words({"method": "FORA, as reported", "steps": 20}).startswith("CUR 50.00, FID 27.42")


@pytest.mark.parametrize("method", list(paper_table.TRAINED))
def test_a_missing_router_is_trained_by_readers_own_commands(tmp_path, monkeypatch, method):
    """The trainer gets the flags that it knows, with the row's method, CUR and seed."""
    row, seen = Row("digits", "ddim", 4, method, 0.35, 3), {}
    trainer = {"Learning-to-Cache": train_ltc, "direct": train_direct}.get(method, train_stepwise)

    def train(model, settings, out, *others):
        seen.update(settings, out=out)
        out.mkdir(parents=True, exist_ok=True)  # the lock made it
        routers.save(out / "router.safetensors", torch.zeros(4, 16), model="digits", tau=0.1,
                     sampler="ddim", guidance=2.5)
        (out / "results.json").write_text('{"seconds": 1.0, "images": 0, "peak_memory": null}')
        return dict(cur=0.35, cur_before_last_quarter=0.35, cur_at_start=0.0, trajectories=100,
                    iterations=400, lr_updates=10, beta=1e-6, seconds=1.0, peak_memory=None)

    def run(argv, cwd):
        assert argv[1:3] == ["-m", paper_table.TRAINED[method][0]]
        monkeypatch.setattr(sys, "argv", argv[2:])
        trainer.main()
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(paper_table.subprocess, "run", run)
    args = argparse.Namespace(images=None, guidance=2.5, weights=None, device="cpu",
                                          dtype=None, prompts=None, vae=None)
    path, training = paper_table.find_router(row, args, tmp_path)
    assert path == tmp_path / "routers" / f"{row.name}.safetensors" and training["seconds"] == 1.0
    assert seen["target_cur"] == 0.35 and seen["seed"] == 3 and seen["steps"] == 4
    assert seen["iterations"] == (200 if method == "Learning-to-Cache" else 400)
    objective, proxy = {
        "SDT + LTC": ("ltc", "leave-one-out"), "HarmoniCa, cumulative": ("iepo", "cumulative"),
        "Learning-to-Cache": ("learning-to-cache", "none"), "direct": ("direct", "none"),
        "sensitivity": ("sensitivity", "leave-one-out"),
        "sensitivity, forecast 1": ("sensitivity", "leave-one-out"),
    }.get(method, ("iepo", "leave-one-out"))
    assert seen["objective"] == objective and seen["proxy"] == proxy
    assert seen.get("start") == (
        "fora-paper:2" if "from alternation" in method or "forecast" in method else None)
    assert (seen.get("forecast") or 0) == (1 if "forecast" in method else 0)
    monkeypatch.setattr(paper_table.subprocess, "run", None)  # the second time it is there
    assert paper_table.find_router(row, args, tmp_path)[0] == path


@pytest.mark.parametrize("flags, words", [
    (["--curs", "0.4,x"], "--curs takes percentages"), (["--curs", "120"], "--curs takes"),
    (["--seeds", "0"], "must be 1 or more"), (["--num-samples", "2"], "4 or more"),
    (["--sampler", "euler"], "euler"), (["--methods", "random;LTC"], "no method LTC: use random;"),
    (["--prompts", "words.txt"], "takes labels, not prompts"),
    (["--methods", "random;random"], "name everything once"), (["--curs", "40,40"], "name every"),
    (["--speedups", "1,2"], "--speedups takes"), (["--speedups", "2,2"], "--speedups takes"),
    (["--speedups", "2,2.0000001"], "--speedups takes"), (["--speedups", "9"], "at most 2.9"),
    (["--speedups", "nan"], "--speedups takes"), (["--curs", "nan"], "--curs takes"),
    (["--curs", "66.7"], "a CUR is 66.67 % at most"),
    (["--curs", "40,40.00000001"], "name every"), (["--methods", ""], "a name, not an empty one"),
    (["--reference", ""], "a name, not an empty one"), (["--guidance", "nan"], "a finite number"),
    (["--reference", "no/such.npz"], "no/such.npz"), (["--seeds", "9" * 10], "--seeds 1 to"),
    (["--num-samples", "9" * 10], "at most"), (["--out", ""], "a name, not an empty one"),
    (["--model", "emoji", "--methods", "direct"], "direct needs a model that takes labels"),
])
def test_mistakes_end_in_one_line(table, capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        table(*flags)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and words in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1


ROW = {"about": {"steps": 3}, "computed": [16, 8, 8], "training": {}, "cur": 0.3, "seconds": 0.1,
       "faster": 1.5, "gflop": 0.2, "cache_mb": 0.1, "error": 0.01, "fid": 2.0}


@pytest.mark.parametrize("change", [
    None, [], 3, "text", {"about": None}, {"about": {}}, {"computed": None}, {"computed": [16]},
    {"computed": [1.5, 2, 3]}, {"training": None}, {"training": {"seconds": 3}}, {"cur": 1.0},
    {"cur": "0.3"}, {"fid": math.nan}, {"gflop": 0}, {"seconds": -1}, {"is": math.inf},
    {"faster": True}, {"fid": None},
])
def test_a_row_that_is_no_row_is_refused_in_one_line(tmp_path, change):
    """The right end: ValueError that names the file."""
    path = tmp_path / "row.json"
    path.write_text(json.dumps(ROW))
    assert table_files.read_json(path, table_files.is_row) == ROW
    path.write_text(json.dumps(ROW | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match="row.json is not what this command writes"):
        table_files.read_json(path, table_files.is_row)
    path.write_text(json.dumps(ROW)[:-9])
    with pytest.raises(ValueError, match="row.json is not what this command writes"):
        table_files.read_json(path, table_files.is_row)


@pytest.mark.parametrize("name", ["table.md", "error.png", "rows/digits-ddim-3-no_cache.json",
                                  "images/digits-ddim-2-fewer_steps.npz"])
def test_a_folder_with_the_name_of_an_output_is_found_before_the_work(
    table, tmp_path, monkeypatch, capsys, name
):
    (tmp_path / "table" / name).mkdir(parents=True)
    monkeypatch.setattr(paper_table, "draw", None)  # it would be a TypeError
    with pytest.raises(SystemExit) as caught:
        table()
    assert caught.value.code == 2 and "it is a folder" in capsys.readouterr().err


def test_a_table_that_another_process_makes_is_refused(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper_table, "draw", None)
    with command.locked(tmp_path / "table"), pytest.raises(SystemExit) as caught:
        table()
    assert caught.value.code == 2 and "in use by another process" in capsys.readouterr().err


def test_files_named_from_here_are_found_by_the_trainer(tmp_path, monkeypatch):
    """The trainer runs in the clone. The right value: whole paths; a relative --out too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    seen = []
    monkeypatch.setattr(paper_table.subprocess, "run", lambda argv, cwd: seen.extend(argv) or
                        type("Done", (), {"returncode": 1}))
    args = argparse.Namespace(images=None, guidance=2.5, weights="w.safetensors",
                                          device="cpu", dtype=None, prompts=None, vae=None)
    with pytest.raises(ValueError, match="ended as said above"):
        paper_table.find_router(Row("digits", "ddim", 4, "HarmoniCa", 0.35), args, Path("t"))
    assert seen[seen.index("--weights") + 1] == str(tmp_path / "w.safetensors")
    assert seen[seen.index("--out") + 1].startswith(str(tmp_path / "t" / "training"))
    assert seen[seen.index("--device") + 1] == "cpu"


def test_figures_need_matplotlib_and_say_so(table, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "experiments.table_figures", None)
    with pytest.raises(SystemExit) as caught:
        table()
    assert caught.value.code == 2 and "install requirements-dev.txt" in capsys.readouterr().err


def test_every_method_has_a_look():
    methods = {*paper_table.FIXED, "random", *paper_table.TRAINED, *paper_table.AT_SPEEDUPS,
               *paper_table.HIDDEN}
    assert set(table_figures.LOOKS) == methods


def test_shipped_tables_and_routers_are_whole():
    """The command's own results, with what they are of; routers with the CUR in their name."""
    for path in paper_table.SHIPPED.glob("*.safetensors"):
        file = routers.load(path)
        target = float(path.stem.rsplit("-", 2)[1]) / 100
        assert abs(routers.cur(file.schedule()) - target) < 0.011, path.name
        training = json.loads(path.with_suffix(".json").read_text())
        assert training["cur"] == pytest.approx(routers.cur(file.schedule()))
    tables = [path for path in paper_table.SHIPPED.glob("*.json")
              if not path.with_suffix(".safetensors").exists()]
    assert tables
    for path in tables:
        content = json.loads(path.read_text())
        assert content["about"]["images"] == 2000 and content["errors"]
        lines = content["table"]
        assert lines[0]["method"] == "no cache" and lines[0]["error"][0] == 0
        assert all(line["fid"][0] > 0 and line["seconds"][0] > 0 for line in lines)
