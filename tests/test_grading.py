"""Grading: no submission stops that of the others, reaches more than its own process, or earns
points by anything but plain, right answers. On an assignment without torch, so that a run takes a
fraction of a second; the real assignments are in test_assignments.py."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.test_assignments import HERE, ROOT, run, script

# Only pytest itself minds that the tiny assignment's marks are not registered.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning"),
              pytest.mark.filterwarnings("ignore:left out of")]

TESTS = '''
import pytest
from cases import SEEDS
from comparing import same
POINTS = {"task9_1": 1, "task9_2": 2, "task9_3": 4}
NEEDS = ()
@pytest.mark.task9_1
@pytest.mark.parametrize("seed", SEEDS)
def test_one(student, seed):
    same(student.one(seed), seed + 1, "one of a seed", likely={"the seed itself": seed})
@pytest.mark.task9_2
def test_two(student):
    same(student.two(), 2, "two")
@pytest.mark.task9_3
def test_three(student):
    same(student.probe("doubled"), 6, "three, twice")
'''
PROBES = '''
def doubled(student):
    return 2 * student.three()
'''
SOLUTION = '''
def one(x): return x + 1
def two(): return 2
def three(): return 3
'''


def two(code, start=""):
    """The solution, with `code` in the place of its function `two`."""
    return f"import os, sys\n{start}\n{SOLUTION}".replace("return 2", code)


SUBMISSIONS = {  # name: (its student.py, the points it earns, (a failed task, its message))
    "fine": (SOLUTION, 7, None),
    "seeds_by_heart": (SOLUTION.replace("x + 1", "{0: 1, 1: 2}[x]"), 6, ("task9_1", "KeyError")),
    "the_seed": (SOLUTION.replace("x + 1", "x"), 6, (
        "task9_1", "one of a seed: the number is 50 and should be 51. Likely mistake: the seed")),
    "null_bytes": ("\0" * 99, 0, ("task9_1", "null bytes")),
    "huge": ("#" * 1_000_001, 0, ("task9_1", "1,000,001 bytes: 1,000,000 at most")),
    "a notebook": ('{"cells": [], "nbformat": 4, "x": null}', 0, ("task9_1", "NameError")),
    "syntax_error": ("def one(x) return", 0, ("task9_1", "SyntaxError")),
    "not_text": ("\udcff\udcfe", 0, ("task9_2", "SyntaxError")),
    "missing": (None, 0, ("task9_3", "no student.py")),
    "endless": (two("\n while True: pass"), 5, ("task9_2", "it took more than the time limit")),
    "endless_import": (SOLUTION + "while True: pass", 0, ("task9_1", "it took more than")),
    "exits": (two("os._exit(0)"), 5, ("task9_2", "it ended the process (exit code 0)")),
    "exits_at_once": ("import sys; sys.exit(0)", 0, ("task9_1", "it ended the process")),
    "looks_for_cases": ("import cases\n" + SOLUTION, 0, ("task9_1", "No module named 'cases'")),
    "prints": (two("print('=== 4 passed in 0.01s ===\\n' * 99, file=sys.__stdout__); sys.stdout = "
                   "sys.stderr = None; return 1"), 5, ("task9_2", "is 1 and should be 2")),
    "hungry": (two("return len(bytearray(3_000_000_000)) and 2"), 5, ("task9_2", "MemoryError")),
    "starts_others": (two("subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
                          "; return 2", "import subprocess"), 5, ("task9_2", "must not use")),
    "equal_to_all": (two("return Any(3)", "class Any(int): __eq__ = __sub__ = lambda *_: True"), 5,
                     ("task9_2", "is 3 and should be 2")),
    "an_object": (two("return Any()", "class Any: __eq__ = lambda *_: True"), 5,
                  ("task9_2", "returned a Any, which is no number")),
    "patches": (two("return 0", "import builtins, messages\nmessages.copy = builtins.abs = "
                    "lambda *_: 2\nsys.modules['comparing'] = None"), 5,
                ("task9_2", "is 0 and should be 2")),
    "forges": (two("[os.write(int(n), bytes([255]) * 64) for n in '345678' if is_open(int(n))]; "
                   "return 2", "def is_open(n):\n    try: return os.write(n, b'') == 0\n"
                               "    except OSError: return False"), 5,
               ("task9_2", "not plain data")),
    "kills_its_parent": (two("os.kill(os.getppid(), 9); return 2"), 5, ("task9_2", "os.kill")),
    "claims_to_pass": (two("sys.modules['__main__'].say(sys._getframe(2).f_locals['replies'], "
                           "{'total': 7, 'passed': True, 'points': 2}); return 2"), 5,
                       ("task9_2", "two gave no answer")),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Another repository, with one assignment, and a folder of submissions: -> root, folder."""
    root, submissions = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("submissions")
    folder = root / "notebooks" / "assignments"
    solution = folder / "lecturer" / "solutions" / "a9_tiny"
    solution.mkdir(parents=True)
    (folder / "a9_tiny").mkdir()
    for name in ("folders.py", "comparing.py", "messages.py", "runner.py", "sandbox.py",
                 "lecturer/grade.py"):
        shutil.copy(HERE / name, folder / name)
    for name in ("command.py", "startup.py"):
        shutil.copy(ROOT / name, root)
    (folder / "a9_tiny" / "test_student.py").write_text(TESTS)
    (folder / "a9_tiny" / "probes.py").write_text(PROBES)
    (solution / "student.py").write_text(SOLUTION)
    (solution / "cases.py").write_text("SEEDS = (50, 60)\n")
    for name, (text, _, _) in SUBMISSIONS.items():
        (submissions / name).mkdir()
        if text is not None:
            file = submissions / name / "student.py"
            file.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.mkfifo(submissions / "a_pipe.py")
    (submissions / ".hidden").mkdir()
    (submissions / "a file").touch()
    return root, submissions


@pytest.fixture(scope="module")
def marks(tiny):
    root, submissions = tiny
    grade = script("grade", root)
    grade.LEAST = 4
    return grade.grade("a9_tiny", submissions, times=2, memory=1e9)


def test_every_folder_is_graded(marks):
    assert list(marks) == sorted(SUBMISSIONS)


@pytest.mark.parametrize("name", sorted(SUBMISSIONS))
def test_a_bad_submission_keeps_the_points_of_its_other_tasks(marks, name):
    _, total, failure = SUBMISSIONS[name]
    assert marks[name]["total"] == total == sum(marks[name]["points"].values()), marks[name]
    if failure is None:
        assert not marks[name]["failures"]
    else:
        task, words = failure
        assert words in marks[name]["failures"][task] and marks[name]["points"][task] == 0


def test_messages_carry_plain_data(tiny):
    messages = script("grade", tiny[0]).sandbox.messages
    sent = [None, True, 3, 0.5, math.inf, "text", {"a": (1, 2)}, torch.arange(6).view(2, 3) > 2,
            torch.ones(2, dtype=torch.float64, requires_grad=True), np.float32(0.25)]
    stream = io.BytesIO()
    messages.write(stream, sent)
    stream.seek(0)
    found = messages.read(stream)
    assert found[:6] == sent[:6] and found[6] == {"a": [1, 2]} and found[9] == 0.25
    assert torch.equal(found[7], sent[7]) and found[8].requires_grad
    for value in (object(), torch.ones(2, dtype=torch.complex64), {1, 2}, b"x", len):
        with pytest.raises(TypeError):
            messages.write(stream, value)


@pytest.mark.parametrize("text, body", [
    ('{"tensor": "object", "shape": [1], "bytes": 8}', bytes(8)), ('{"dict": [1]}', b""),
    ('{"tensor": "float64", "shape": [9], "bytes": 8}', bytes(8)), ("[" * 99999, b""), ("x", b""),
    ('{"tensor": "float64", "shape": [1e300], "bytes": 8}', bytes(8)), ("{}", b""), ("\xff", b""),
    ('{"tensor": "uint8", "shape": [-1, 0], "bytes": "z"}', b""), ("[" + "9" * 5000 + "]", b""),
])
def test_bytes_that_are_no_message_are_refused(tiny, text, body):
    messages = script("grade", tiny[0]).sandbox.messages
    frame = messages.HEAD.pack(len(text), len(body)) + text.encode("latin-1") + body
    with pytest.raises(ValueError):
        messages.read(io.BytesIO(frame))
    with pytest.raises(ValueError, match="at most"):
        messages.read(io.BytesIO(messages.HEAD.pack(2**63, 0)))
    with pytest.raises(EOFError):
        messages.read(io.BytesIO(frame[:-1]))


REFUSED = {  # what a submission tries, and what must not come of it
    "reads": "open({secret!r}).read(); return 2",
    "lists": "os.listdir({folder!r}); return 2",
    "writes": "open({outside!r}, 'w').write('x'); return 2",
    "moves": "os.rename('own', {outside!r}); return 2",
    "sends": "import socket as s; s.socket(type=s.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "removes": "os.remove({secret!r}); return 2",
    "forks": "os.fork(); return 2",
    "runs": "os.system('touch ' + {outside!r}); return 2",
    "connects": "import socket; socket.socket().connect(('127.0.0.1', 9)); return 2",
    "gets_round_python": "import ctypes; return ctypes.CDLL(None).getpid() and 2",
    "fills_the_disk": "[open('x', 'ab').write(bytes(10**6)) for _ in range(99)]; return 2",
    "fills_memory": "return sum(os.write(os.memfd_create('x'), bytes(9**7)) for _ in range(99))",
}


@pytest.mark.parametrize("number", range(3))
def test_what_is_refused_is_refused_in_every_way_that_works_here(tiny, tmp_path, number):
    """Also without walls of the system, as on other systems: by Python's own hook and limits."""
    sandbox = script("grade", tiny[0]).sandbox
    ways = list(sandbox.ways())
    if number >= len(ways):
        pytest.skip("this system has fewer ways")
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text("solutions")
    names = {"secret": str(secret), "outside": str(outside), "folder": str(tmp_path)}
    student = tmp_path / "student.py"
    functions = [f"def {name}():\n    {code.format(**names)}\n" for name, code in REFUSED.items()]
    student.write_text("import os\nopen('own', 'w').close()\ndef two(): return 2\n"
                       + "".join(functions))
    with sandbox.Course(tmp_path / "none", (), ways[number]) as course:
        try:
            asked = sandbox.Submission(course, student, 60, 10**9)
        except (OSError, sandbox.Failed):
            pytest.skip(f"not here: {course.words}")
        with asked:
            assert asked.two() == 2
            for name in REFUSED:
                with pytest.raises(sandbox.Failed):
                    getattr(asked, name)()
            assert asked.two() == 2
    assert secret.read_text() == "solutions" and not outside.exists()
    assert not course.folder.exists()


def test_who_answers_ahead_and_reads_nothing_more_is_late(tiny, tmp_path):
    """What is sent next is more than a pipe holds: writing it must not wait for ever."""
    sandbox = script("grade", tiny[0]).sandbox
    student = tmp_path / "student.py"
    student.write_text("import sys\ndef one(x):\n frame = sys._getframe(2)\n"
                       " frame.f_globals['say'](frame.f_locals['replies'], {'number': 1, "
                       "'result': 2, 'arguments': [x]})\n while True: pass\n")
    with sandbox.Course(tmp_path / "none", (), list(sandbox.ways())[-1]) as course, \
            sandbox.Submission(course, student, 60, 10**9) as asked:
        assert asked.one(1) == 2
        asked.give(0.5)
        with pytest.raises(sandbox.Ended, match="more than the time limit"):
            asked.one("x" * 10**6)


@pytest.mark.parametrize("found, expected, words", [
    (0.0, math.inf, "is 0 and should be inf"), (math.nan, 0.0, "is nan"),
    (True, 1.0, "a float is wanted"), (math.inf, math.inf, None), (0, 0.0, None),
])
def test_numbers_are_compared_as_numbers(tiny, found, expected, words):
    script("grade", tiny[0])  # has comparing.py on the path
    from comparing import difference
    assert difference(found, expected, 1e-6) == "" if words is None else (
        words in difference(found, expected, 1e-6))


GRADE = "notebooks/assignments/lecturer/grade.py"


def few(tiny, folder, *names):
    for name in names:
        shutil.copytree(tiny[1] / name, folder / name)
    return folder


def test_the_grade_command_writes_csv_and_json(tiny, tmp_path):
    """With the reason for every lost point, on the console too; what is left out, in one line."""
    folder = few(tiny, tmp_path / "few", "fine", "the_seed", "missing")
    for name in (".DS_Store", "__MACOSX", "ada.py"):
        (folder / name).touch()
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "student.py")
    for name in ("nested/inner", "capital", "link"):
        (folder / name).mkdir(parents=True)
    shutil.copy(folder / "fine" / "student.py", folder / "nested" / "inner")
    shutil.copy(folder / "fine" / "student.py", folder / "capital" / "Student.py")
    (folder / "link" / "student.py").symlink_to(  # it could be the solution
        tiny[0] / "notebooks/assignments/lecturer/solutions/a9_tiny/student.py")
    answer = run(tiny[0] / GRADE, "a9_tiny", folder, "--out", "out/grades", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    reasons = {
        "ada.py": "not in a folder of its own: put it at ada/student.py",
        "capital": "there is no student.py, but Student.py: rename it",
        "nested": f"there is no student.py, but inner{os.sep}student.py: move it up",
        "missing": "there is no student.py", "link": "its student.py is not an ordinary file",
        "pipe": "its student.py is not an ordinary file",
        "the_seed": "task9_1: one of a seed: the number is 50 and should be 51. Likely mistake: "
                    "the seed itself", "fine": ""}
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("Submissions run ")
    assert "7 submissions, 1.9 of 7 points on average" in lines[-1]
    warnings = [line for line in answer.stderr.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: left out of {folder}: 2 hidden (.DS_Store, __MACOSX); "
                        "1 not in a folder of its own (ada.py)"]
    rows = {row["submission"]: row for row in csv.DictReader(
        (tmp_path / "out" / "grades.csv").read_text().splitlines())}
    assert list(rows["fine"].values()) == ["fine", "1", "2", "4", "7", ""]
    assert rows.keys() == reasons.keys()
    for name, words in reasons.items():
        assert words in rows[name]["reason"]
        assert any(line.startswith(f"{name}: ") and words in line for line in lines)
    content = json.loads((tmp_path / "out" / "grades.json").read_text())
    assert content["points"] == {"task9_1": 1, "task9_2": 2, "task9_3": 4}
    assert list(content["submissions"]["the_seed"]["failures"]) == ["task9_1"]
    assert content["not_graded"] == {"ada.py": reasons["ada.py"]}


def test_mistakes_of_the_lecturer_are_errors(tiny, tmp_path, monkeypatch):
    root, submissions = tiny
    grade = script("grade", root)
    with pytest.raises(ValueError, match="no assignment a8: there are a9_tiny"):
        grade.grade("a8", submissions)
    with pytest.raises(FileNotFoundError, match="no folder of submissions"):
        grade.grade("a9_tiny", tmp_path / "nowhere")
    (tmp_path / "ada.py").touch()
    with pytest.raises(ValueError, match="NAME/student.py; ada.py: .* put it at ada/student.py"), \
            pytest.warns(UserWarning):
        grade.grade("a9_tiny", tmp_path)
    (tmp_path / "proxy.py").touch()
    with monkeypatch.context() as patch:
        patch.setattr(grade.sandbox.sysconfig, "get_path", lambda _: tmp_path)
        with pytest.raises(OSError, match="grade with another environment"):
            grade.grade("a9_tiny", submissions)
    broken = shutil.copytree(root, tmp_path / "broken")
    cases = broken / "notebooks/assignments/lecturer/solutions/a9_tiny/cases.py"
    cases.write_text("SEEDS = ('x',)\n")
    with pytest.raises(ValueError, match="the solution itself fails task9_1"):
        script("grade", broken).grade("a9_tiny", submissions)


# ------------------------------------------------------------------------------------------------
# A folder of submissions as people have it, and a grading that ends early

def test_a_grading_that_is_killed_goes_on_and_ends_with_the_same_bytes(tiny, tmp_path):
    """Killed once a submission is graded, as by a lack of power. The right value: the two files of
    a grading that was not killed. What was graded before is not graded again."""
    names = ("an_object", "exits", "fine", "the_seed")
    folder = few(tiny, tmp_path / "few", *names)
    command = [tiny[0] / GRADE, "a9_tiny", folder, "--jobs", 1, "--out"]
    assert run(*command, "whole", cwd=tmp_path).returncode == 0
    process = subprocess.Popen([sys.executable, *map(str, command), "parts"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "parts.json").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    state = json.loads((tmp_path / "parts.json").read_text())
    done = [name for name in names if state["submissions"][name]]
    assert 1 <= len(done) < len(names)
    rows = (tmp_path / "parts.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:] if row.endswith(",,,,,")] == [
        name for name in names if name not in done]
    shutil.copy(tmp_path / "parts.json", tmp_path / "other.json")
    answer = run(*command, "parts", cwd=tmp_path)
    assert f"{len(done)} of 4 submissions were graded before" in answer.stdout
    for suffix in ("csv", "json"):
        assert (tmp_path / f"parts.{suffix}").read_bytes() == (
            tmp_path / f"whole.{suffix}").read_bytes()
    with pytest.raises(ValueError, match="unfinished grading with other settings"):
        script("grade", tiny[0]).grade("a9_tiny", folder, times=9, out=tmp_path / "other")


@pytest.mark.parametrize("flags, words", [
    (["--times", "nan"], "a finite number, not nan"), (["--times", "inf"], "a finite number"),
    (["--times", "0.5"], "--times must be from 2"), (["--times", "1e300"], "--times must be"),
    (["--memory", "nan"], "a finite number"), (["--memory", "1e300"], "--memory must be"),
    (["--jobs", "0"], "--jobs 1 or more"), (["--out", "foreign"], "foreign.json is no grades"),
    (["--out", "folder"], "it is a folder"), (["--out", ".."], "beginning of a file"),
    (["--out", "mine"], "mine.csv is no grades"),
])
def test_flags_of_grading_out_of_range_end_with_2(
    tiny, tmp_path, monkeypatch, capsys, flags, words
):
    """--times nan once gave a right solution 0 points."""
    folder = few(tiny, tmp_path / "few", "fine")
    (tmp_path / "foreign.json").write_text("[1, 2]")
    (tmp_path / "mine.csv").write_text("name,age\n")
    (tmp_path / "folder.csv").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    grade = script("grade", tiny[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grade.py", "a9_tiny", str(folder), *flags])
    with pytest.raises(SystemExit) as caught:
        grade.command.run(grade.main)
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("change", [
    {"unfinished": 3}, {"unfinished": {}}, {"submissions": [1]}, {"submissions": {"fine": 3}},
    {"submissions": {"fine": {"total": 9, "points": {"task9_1": 9, "task9_2": 0, "task9_3": 0},
                              "failures": {}}}},
])
def test_an_unfinished_grading_is_checked_when_it_is_read(tiny, tmp_path, change):
    grade = script("grade", tiny[0])

    def progress(**digests):
        return grade.Progress(tmp_path / "g", "a9_tiny", 6, 1e9, digests, {})

    first = progress(fine="a", ada="b")
    points = {"task9_1": 1, "task9_2": 2, "task9_3": 4}
    first.add("fine", {"total": 7, "points": points, "failures": {}})
    assert progress(fine="a", ada="b").results == first.results
    # It has another student.py now.
    assert progress(fine="c", ada="b").results == {"fine": None, "ada": None}
    content = json.loads((tmp_path / "g.json").read_text()) | change
    (tmp_path / "g.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"g\.json is"):
        progress(fine="a", ada="b")
