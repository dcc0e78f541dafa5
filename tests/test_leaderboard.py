"""The competition's leaderboard: what it refuses, what it survives, and how it ranks."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import router
from cache import Cache
from samplers import Noise, denoise, make_sampler

ASSIGNMENTS = Path(__file__).parent.parent / "notebooks" / "assignments"
SCRIPT = ASSIGNMENTS / "a5_competition" / "leaderboard.py"


@pytest.fixture(scope="module")
def leaderboard():
    for beside in ("folders", "sandbox", "messages"):
        sys.modules.pop(beside, None)
    spec = importlib.util.spec_from_file_location("leaderboard", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["leaderboard"] = module  # where its dataclass looks for the module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------
# Schedules

HALF = router.fora_paper(20, 16, 2)
ALMOST = HALF.clone()
ALMOST[1, 0] = True
NO_ROW_0 = HALF.clone()
NO_ROW_0[0, 3] = False


@pytest.mark.parametrize(
    "schedule, words",
    [
        (ALMOST, "its CUR is 49.69 %, below 50 %"),
        (NO_ROW_0, "row 0"),
        (HALF.int(), "bool"),
        (HALF.T, r"\(20, 16\)"),
        (HALF[None], r"\(20, 16\)"),
        (torch.tensor(True), r"\(20, 16\)"),
        (HALF.tolist(), "nothing else"),
    ],
)
def test_a_wrong_schedule_is_refused(leaderboard, schedule, words):
    leaderboard.check(HALF, 20, 16)
    with pytest.raises(ValueError, match=words):
        leaderboard.check(schedule, 20, 16)


@pytest.mark.parametrize("answer, words", [
    ([HALF, math.nan], "no time"), ([HALF, -1.0], "no time"), ([HALF, "1"], "no time"),
    ([HALF, True], "no time"), ([HALF, 1.7], "1.7 s of processor time, not 1"),
    (HALF, "no schedule"), ([HALF], "no schedule"), (None, "no schedule"),
    ([None, 1.0], "nothing else"),
])
def test_what_a_submission_returns_is_not_trusted(leaderboard, answer, words):
    assert leaderboard.accept([HALF, 1.5], 1, 20, 16)[1] == 1.5
    with pytest.raises(ValueError, match=words):
        leaderboard.accept(answer, 1, 20, 16)


def test_images_are_those_of_sampling_for_every_batch_size(leaderboard, monkeypatch):
    model, schedule = models.load("digits", device="cpu"), router.random(4, 16, 0.5)
    model.steps = 4
    images = leaderboard.sample(model, schedule, 3, seed=5)
    monkeypatch.setattr(leaderboard, "BATCH", 2)
    again = leaderboard.sample(model, schedule, 3, seed=5)
    torch.testing.assert_close(images, again, rtol=0, atol=1e-3)
    noise = Noise(5, range(3))
    expected = denoise(model.network, make_sampler("ddim", 4), noise.start(model.shape),
                       model.condition(noise.labels(10)), model.guidance, Cache(schedule))
    assert torch.equal(images, expected)


def test_the_table_is_in_order_and_only_submissions_have_a_place(leaderboard):
    rows = [leaderboard.Row("(none)", 1, 0, 0, None), leaderboard.Row("ada", 2, 0.5, 0.1, 3.0),
            leaderboard.Row("(fora)", 3, 0.5, 0.2, None), leaderboard.Row("bob", 4, 0.6, 0.3, 1.0)]
    lines = leaderboard.table(rows, {"eve": "late"}).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["(none)", "1.", "(fora)", "2."]
    assert lines[2].split() == ["1.", "ada", "2.000", "50.00", "0.10000", "3.0"]
    assert lines[5] == "eve: refused: late"


# ------------------------------------------------------------------------------------------------
# Submissions

FINE = "import router\ndef make_schedule(model, seconds): return router.fora_paper(20, 16, 2)\n"
SUBMISSIONS = {  # name: (student.py, the reason why it is refused)
    "fine": (FINE, None),
    "clears\x1b[2J": ("raise KeyError('table\x1b[2J')", "KeyError: 'table"),
    "endless": (FINE.replace("return", "\n while True: pass\n return"),
                "more than 2.25 s of processor time"),
    "greedy": (FINE.replace("return", "\n import mmap\n x = mmap.mmap(-1, 31 * 10**8)\n return"),
               "Cannot allocate memory"),
    "kills": (FINE.replace("return", "\n import os; os.kill(os.getppid(), 9)\n return"), "os.kill"),
    "no_time": ("import time\ntime.process_time = lambda: float('nan')\n" + FINE, "is no time"),
}


def test_bad_submissions_are_refused_and_the_others_ranked(tmp_path):
    if sys.platform != "linux":
        pytest.skip("the limits of memory and time are Linux's")
    for name, (text, _) in SUBMISSIONS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.py").write_text(text)
    answer = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--images", "2", "--seconds", "1", "--memory", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("Submissions run ") and "\x1b" not in answer.stdout
    for name, (_, why) in SUBMISSIONS.items():
        shown = name.replace("\x1b", "\\x1b")
        refused = [line for line in lines if line.startswith(f"{shown}: refused: ")]
        assert (why is None and not refused) or why in refused[0], refused
    ranked = {line[4:28].strip(): line[28:].split() for line in lines if "(" in line[:5]
              or line.startswith("1.")}
    assert set(ranked) == {"fine", "(none)", "(fora-paper:2)", "(random:0.5)"}
    assert ranked["fine"][:3] == ranked["(fora-paper:2)"]  # FID, CUR, error
    fids = [float(values[0]) for values in ranked.values()]
    assert fids == sorted(fids) and all(math.isfinite(fid) for fid in fids)
    assert ranked["(none)"][1:] == ["0.00", "0.00000"]
    assert ranked["(random:0.5)"][1] == "50.00"


def test_an_empty_folder_is_an_error(leaderboard, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no submissions: one is NAME/student.py"):
        leaderboard.main()


@pytest.mark.parametrize("flags, words", [
    (["--seconds", "nan"], "a finite number, not nan"), (["--memory", "inf"], "a finite number"),
    (["--seconds", "0"], "--seconds must be from 0.01"), (["--memory", "1e300"], "--memory"),
    (["--images", "1"], "--images must be from 2 to"), (["--images", "1" + "0" * 10], "--images"),
    (["--seconds", "1e300"], "--seconds must be"),
])
def test_flags_out_of_range_end_with_2(leaderboard, tmp_path, monkeypatch, capsys, flags, words):
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine" / "student.py").write_text(FINE)
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as caught:
        leaderboard.command.run(leaderboard.main)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_submissions_that_cannot_be_run_are_refused_and_others_told(
    leaderboard, tmp_path, monkeypatch
):
    """By the rule that grading has too. Each is in the list once, or in the warning."""
    for name in ("empty", "nested/inner", "pipe", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "nested" / "inner" / "student.py").write_text(FINE)
    (tmp_path / "loose.py").write_text(FINE)
    os.mkfifo(tmp_path / "pipe" / "student.py")
    with pytest.warns(UserWarning, match=r"1 hidden \(.hidden\); 1 not in a folder .*loose.py"):
        names = leaderboard.folders.names_in(tmp_path)
    assert names == ["empty", "nested", "pipe"]
    monkeypatch.setattr(leaderboard, "TO_COMPARE", ())
    monkeypatch.setattr(leaderboard, "sample", lambda *args: None)
    _, refused = leaderboard.rank([tmp_path / name / "student.py" for name in names], 2, 0, 1, 1)
    assert refused == {
        "empty": "there is no student.py", "pipe": "its student.py is not an ordinary file",
        "nested": f"there is no student.py, but inner{os.sep}student.py: move it up"}
