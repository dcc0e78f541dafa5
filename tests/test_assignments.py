"""The course assignments: the solutions earn all points, the stubs none, planted mistakes lose
some, the release contains no solution, and no submission stops the grading of the others."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = ROOT / "notebooks" / "assignments"
SOLUTIONS = HERE / "lecturer" / "solutions"
NAMES = sorted(file.parent.name for file in HERE.glob("a*/test_student.py"))


def script(name, root=ROOT):
    """release.py or grade.py as a module; each works on the repository that contains it."""
    path = root / "notebooks" / "assignments" / "lecturer" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_{abs(hash(root))}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, cwd):
    """A Python command -> the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The root of the release, made by the command and unpacked."""
    folder = tmp_path_factory.mktemp("course")
    made = run(HERE / "lecturer" / "release.py", "--out", folder / "release.zip", cwd=folder)
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(folder / "release.zip") as archive:
        archive.extractall(folder)
    return folder / "release"


# ------------------------------------------------------------------------------------------------
# The assignments


@pytest.fixture(scope="module", params=NAMES)
def graded(request, unpacked, tmp_path_factory):
    """An assignment's name, its points, and the grades of the solution, the stub and the wrong
    answers. They are graded in the release, with the lecturer's folder added: this shows that the
    release lacks nothing."""
    name, lecturer = request.param, unpacked / "notebooks" / "assignments" / "lecturer"
    if not lecturer.exists():
        shutil.copytree(HERE / "lecturer", lecturer)
    submissions = tmp_path_factory.mktemp(name)
    answers = {file.stem: file for file in (SOLUTIONS / name).glob("wrong_*.py")}
    answers |= {"solution": SOLUTIONS / name / "student.py", "stub": HERE / name / "student.py"}
    for answer, file in answers.items():
        (submissions / answer).mkdir()
        shutil.copy(file, submissions / answer / "student.py")
    grade = script("grade", unpacked)
    assert unpacked == grade.ROOT
    return name, grade.read_points(unpacked / "notebooks" / "assignments" / name), grade.grade(
        name, submissions
    )


def test_there_are_assignments():
    assert NAMES and sorted(folder.name for folder in SOLUTIONS.iterdir()) == NAMES


def test_the_solution_earns_all_points_in_the_unpacked_release(graded):
    _, points, results = graded
    assert results["solution"]["points"] == points and not results["solution"]["failures"]
    assert 10 <= sum(points.values()) <= 20


def test_the_stub_fails_every_task_with_a_message_that_names_it(graded):
    _, points, results = graded
    assert results["stub"]["total"] == 0
    for task in points:
        assert results["stub"]["failures"][task].startswith(f"NotImplementedError: {task}: ")


def test_each_planted_wrong_answer_loses_points_and_not_all(graded):
    _, points, results = graded
    wrong = [result["total"] for answer, result in results.items() if answer.startswith("wrong_")]
    assert len(wrong) >= 3 and all(0 < total < sum(points.values()) for total in wrong), results


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_fits_the_stub_and_the_withheld_cases_differ(name):
    def signatures(file):
        nodes = [node for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.FunctionDef)]
        return {node.name: ast.unparse(node.args) for node in nodes}

    stub, solution = (signatures(folder / "student.py") for folder in (HERE / name,
                                                                      SOLUTIONS / name))
    assert stub.items() <= solution.items()

    def constants(file):
        nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)]
        return {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in nodes}

    shown, withheld = (constants(folder / "cases.py") for folder in (HERE / name,
                                                                     SOLUTIONS / name))
    assert shown.keys() == withheld.keys()
    assert shown["SEEDS"] != withheld["SEEDS"]


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_thin_and_stored_without_outputs(name):
    notebook = json.loads((HERE / name / "plots.ipynb").read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and len("".join(cell["source"]).splitlines()) <= 12


@pytest.mark.parametrize("name", NAMES)
def test_the_handouts_name_every_task_with_its_points(name):
    points = script("grade").read_points(HERE / name)
    handout, overview = (HERE / name / "README.md").read_text(), (HERE / "README.md").read_text()
    for task, number in points.items():
        assert f"`{task}` ({number} point" in handout
    assert f"[{name}]({name}/README.md) | {sum(points.values())} |" in overview


# ------------------------------------------------------------------------------------------------
# As a student runs them


def test_students_commands(unpacked, tmp_path):
    """From the release's root, with the cases that students see: one task of one assignment as
    released, then all assignments with the solutions, and the tests of the code that look at its
    files. `make test` there runs tests/ only, not the unsolved stubs."""
    assert 'testpaths = ["tests"]' in (unpacked / "pyproject.toml").read_text()
    name, task = NAMES[0], list(script("grade").read_points(HERE / NAMES[0]))[0]
    one = run("-m", "pytest", f"notebooks/assignments/{name}", "-m", task, cwd=unpacked)
    assert f"NotImplementedError: {task}: " in one.stdout and "deselected" in one.stdout
    assert one.returncode == 1 and "Warning" not in one.stdout

    solved = shutil.copytree(unpacked, tmp_path / "solved")
    for name in NAMES:
        shutil.copy(SOLUTIONS / name / "student.py", solved / "notebooks" / "assignments" / name)
    answer = run("-m", "pytest", "-q", "notebooks/assignments", "tests/test_size.py",
                 "tests/test_readme.py::test_files_that_the_texts_name_exist", cwd=solved)
    assert answer.returncode == 0, answer.stdout[-3000:]
    assert "Warning" not in answer.stdout


# ------------------------------------------------------------------------------------------------
# The release


def test_the_release_holds_what_students_need_and_nothing_of_the_lecturer(unpacked):
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")
             if path.is_file() and "lecturer" not in path.parts[-4:]}
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules <= files and {"README.md", "LICENSE", "requirements.txt"} <= files
    assert {"checkpoints/digits_dit.safetensors", "data/digits28.npz"} <= files
    for name in NAMES:
        for file in ("README.md", "student.py", "cases.py", "test_student.py", "plots.ipynb"):
            assert f"notebooks/assignments/{name}/{file}" in files
    names = zipfile.ZipFile(unpacked.parent / "release.zip").namelist()
    assert all(name.startswith("release/") for name in names)
    for word in ("lecturer/", "solution", "wrong_", "test_assignments", "__pycache__", "/."):
        assert not [name for name in names if word in name]
    tests = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert {path.name for path in (unpacked / "tests").glob("*.py")} == (
        tests - set(script("release").KEPT_BACK))
    assert "lecturer" not in (unpacked / "notebooks" / "assignments" / "README.md").read_text()


@pytest.fixture
def course(tmp_path):
    """A small copy of the repository, in which tests plant leaks."""
    shutil.copytree(HERE, tmp_path / "notebooks" / "assignments")
    for name in ("README.md", "command.py", "startup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_equal_files_make_equal_zips(course):
    release = script("release", course)
    release.make(course / "release.zip")
    first = (course / "release.zip").read_bytes()
    release.make(course / "release.zip")
    assert (course / "release.zip").read_bytes() == first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["README.md", "notebooks/walk.ipynb", "notes.py"])
def test_a_line_of_a_solution_is_found_and_nothing_is_written(course, where, name):
    release = script("release", course)
    line = release.solution_lines(course / "notebooks" / "assignments" / name)[-1]
    text = f"some text\n        {line}\nmore\n"
    if where.endswith(".ipynb"):
        text = json.dumps({"cells": [{"cell_type": "code", "source": text.splitlines(True)}]})
    (course / where).write_text(text)
    with pytest.raises(ValueError) as error:
        release.make(course / "release.zip")
    assert where in str(error.value) and line in str(error.value) and name in str(error.value)
    assert not list(course.glob("*.zip"))


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_that_was_solved_is_found(course, name):
    folder = course / "notebooks" / "assignments" / name
    shutil.copy(SOLUTIONS / name / "student.py", folder)
    with pytest.raises(ValueError, match=f"{name}/student.py does not raise"):
        script("release", course).make(course / "release.zip")


def test_the_release_command_exits_with_2_on_a_leak(course):
    folder = course / "notebooks" / "assignments"
    shutil.copy(SOLUTIONS / NAMES[0] / "student.py", course / "my_notes.py")
    answer = run(folder / "lecturer" / "release.py", "--out", "release.zip", cwd=course)
    assert answer.returncode == 2 and "my_notes.py" in answer.stderr
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1


PRIVATE = ("submissions/ada/student.py", "submissions.py", "grades.csv", "grades.json",
           "a1_samplers/cases_graded.py", "a1_samplers/student_ada.py", "a1_samplers/grades.csv",
           "a1_samplers/old/student.py", "._README.md", "../../data/names.json", "../ada.py.txt",
           "../../checkpoints/ada/router.safetensors", "../../experiments/grades.json")


def plant(course):
    """Puts private files beside the assignments. -> their paths from the root, as text."""
    for name in PRIVATE:
        path = course / "notebooks" / "assignments" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("ada: 3 points\n")
    (course / "data" / "names.npz").symlink_to("/etc/hostname")
    return {(course / "notebooks" / "assignments" / name).resolve().relative_to(
        course.resolve()).as_posix() for name in PRIVATE} | {"data/names.npz"}


def test_what_lies_beside_the_assignments_stays(course):
    """The right value: the files of the release without them."""
    release = script("release", course)
    before = release.released_files()
    private = plant(course)
    with pytest.warns(UserWarning, match="left out: .* in notebooks/assignments/submissions/ada"):
        after = release.released_files()
    assert after == before and not private & {path.as_posix() for path in after}
    assert {path.name for path in after if path.parent.name == "a5_competition"} == {
        "README.md", "student.py", "cases.py", "test_student.py", "plots.ipynb", "leaderboard.py"}


def test_in_a_clone_only_what_git_tracks_goes_out(course):
    """With known names too. But a new assignment goes out before it is committed."""
    release = script("release", course)
    before = release.released_files()
    run("-c", "import subprocess\nfor words in (['init', '-q'], ['add', '-A']):\n"
        "    subprocess.run(['git', *words], check=True)", cwd=course)
    (course / "ada_grades.py").write_text("ada = 3\n")
    (course / "notebooks" / "ada.ipynb").write_text("{}")
    new = course / "notebooks" / "assignments" / "a6_new"
    shutil.copytree(course / "notebooks" / "assignments" / NAMES[0], new)
    with pytest.warns(UserWarning, match="left out: 1 in notebooks"):
        after = release.released_files()
    assert {path.as_posix() for path in set(after) - set(before)} == {
        f"notebooks/assignments/a6_new/{name}"
        for name in ("README.md", "student.py", "cases.py", "test_student.py", "plots.ipynb")}


@pytest.mark.parametrize("name", NAMES)
def test_the_withheld_cases_do_not_go_out_in_the_place_of_the_others(course, name):
    folder = course / "notebooks" / "assignments" / name
    withheld = (SOLUTIONS / name / "cases.py").read_text()
    for text in (withheld, withheld.replace('"""', '"""Mine. ', 1)):
        (folder / "cases.py").write_text(text)
        with pytest.raises(ValueError, match=f"{name}/cases.py has the withheld numbers"):
            script("release", course).make(course / "release.zip")
    assert not list(course.glob("*.zip"))


# ------------------------------------------------------------------------------------------------
# Grading, on an assignment without torch, so that a run takes half a second

TESTS = '''
import pytest
import student
from cases import SEEDS
POINTS = {"task9_1": 1, "task9_2": 2, "task9_3": 4}
@pytest.mark.task9_1
@pytest.mark.parametrize("seed", SEEDS)
def test_one(seed):
    assert student.one(seed) == seed + 1
@pytest.mark.task9_2
def test_two():
    assert student.two() == 2
@pytest.mark.task9_3
def test_three():
    assert student.three() == 3
'''
SOLUTION = '''
def one(x): return x + 1
def two(): return 2
def three(): return 3
'''
SUBMISSIONS = {  # name: (its student.py, the points it earns, (a failed task, its message))
    "fine": (SOLUTION, 7, None),
    "seeds_by_heart": (SOLUTION.replace("x + 1", "{0: 1, 1: 2}[x]"), 6,
                       ("task9_1", "KeyError")),
    "null_bytes": ("\0" * 99, 0, ("task9_1", "null bytes")),
    "huge": ("#" * 1_000_001, 0, ("task9_1", "1,000,001 bytes: 1,000,000 at most")),
    "a notebook": ('{"cells": [], "nbformat": 4, "x": null}', 0, ("task9_1", "NameError")),
    "syntax_error": ("def one(x) return", 0, ("task9_1", "SyntaxError")),
    "not_text": ("\udcff\udcfe", 0, ("task9_2", "SyntaxError")),
    "missing": (None, 0, ("task9_3", "no student.py")),
    "endless": (SOLUTION.replace("return 2", "\n while True: pass"), 5,
                ("task9_2", "it took more than")),
    "endless_import": (SOLUTION + "while True: pass", 0, ("task9_1", "it took more than")),
    "exits": ("import os\n" + SOLUTION.replace("return 2", "os._exit(0)"), 5,
              ("task9_2", "it ended the process")),
    "exits_at_once": ("import sys; sys.exit(0)", 0, ("task9_1", "it ended the process")),
    "ends_pytest": ("import pytest\n" + SOLUTION.replace("return x + 1", "pytest.exit('', 0)"), 6,
                    ("task9_1", "it ended the process")),
    "skips": ("import pytest\n" + SOLUTION.replace("return 2", "pytest.skip()"), 5,
              ("task9_2", "skipped")),
    "expected_to_fail": ("import pytest\n" + SOLUTION.replace("return 2", "pytest.xfail()"), 5,
                         ("task9_2", "skipped")),
    "fewer_cases": ("import cases\ncases.SEEDS = cases.SEEDS[:1]\n" +
                    SOLUTION.replace("x + 1", "51"), 6, ("task9_1", "")),
    "prints": ("import sys\n" + SOLUTION.replace(
        "return 2", "print('=== 4 passed in 0.01s ===\\n' * 99, file=sys.__stdout__); sys.stdout = "
        "sys.stderr = None; return 1"), 5, ("task9_2", "assert")),
    "hungry": (SOLUTION.replace("return 2", "return len(bytearray(3_000_000_000)) and 2"), 5,
               ("task9_2", "MemoryError")),
    "starts_others": ("import subprocess, sys\n" + SOLUTION.replace(
        "return 2", "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "return 2"), 7, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Another repository, with one assignment, and a folder of submissions: -> root, folder."""
    root, submissions = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("submissions")
    folder = root / "notebooks" / "assignments"
    solution = folder / "lecturer" / "solutions" / "a9_tiny"
    solution.mkdir(parents=True)
    (folder / "a9_tiny").mkdir()
    for name in ("conftest.py", "folders.py", "lecturer/grade.py", "lecturer/recorder.py"):
        shutil.copy(HERE / name, folder / name)
    for name in ("command.py", "startup.py"):
        shutil.copy(ROOT / name, root)
    (folder / "a9_tiny" / "test_student.py").write_text(TESTS)
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
    return script("grade", root).grade("a9_tiny", submissions, times=6, memory=1e9)


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


def test_the_grade_command_writes_csv_and_json(tiny, tmp_path):
    root, submissions = tiny
    few = tmp_path / "few"
    for name in ("fine", "skips", "missing"):
        shutil.copytree(submissions / name, few / name)
    answer = run(root / "notebooks/assignments/lecturer/grade.py", "a9_tiny", few, "--out",
                 "out/grades", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "3 submissions, 4.0 of 7 points on average" in answer.stdout
    assert (tmp_path / "out" / "grades.csv").read_text().split() == [
        "submission,task9_1,task9_2,task9_3,total", "fine,1,2,4,7", "missing,0,0,0,0",
        "skips,1,0,4,5",
    ]  # fmt: skip
    content = json.loads((tmp_path / "out" / "grades.json").read_text())
    assert content["points"] == {"task9_1": 1, "task9_2": 2, "task9_3": 4}
    assert list(content["submissions"]["skips"]["failures"]) == ["task9_2"]


def test_mistakes_of_the_lecturer_are_errors(tiny, tmp_path):
    root, submissions = tiny
    grade = script("grade", root)
    with pytest.raises(ValueError, match="no assignment a8: there are a9_tiny"):
        grade.grade("a8", submissions)
    with pytest.raises(FileNotFoundError, match="no folder of submissions"):
        grade.grade("a9_tiny", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="NAME/student.py"):
        grade.grade("a9_tiny", tmp_path)
    broken = shutil.copytree(root, tmp_path / "broken")
    cases = broken / "notebooks/assignments/lecturer/solutions/a9_tiny/cases.py"
    cases.write_text("SEEDS = ('x',)\n")
    with pytest.raises(ValueError, match="the solution itself fails task9_1"):
        script("grade", broken).grade("a9_tiny", submissions)


# ------------------------------------------------------------------------------------------------
# A folder of submissions as people have it, and a grading that ends early

GRADE = "notebooks/assignments/lecturer/grade.py"


def few(tiny, folder, *names):
    for name in names:
        shutil.copytree(tiny[1] / name, folder / name)
    return folder


def test_what_is_left_out_of_a_folder_is_told_in_one_line(tiny, tmp_path):
    folder = few(tiny, tmp_path / "few", "fine")
    for name in (".DS_Store", "__MACOSX", "ada.py", "bob_student.py"):
        (folder / name).touch()
    (folder / "nested" / "inner").mkdir(parents=True)
    shutil.copy(folder / "fine" / "student.py", folder / "nested" / "inner")
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "student.py")
    answer = run(tiny[0] / GRADE, "a9_tiny", folder, "--out", "out/grades", cwd=tmp_path)
    assert answer.returncode == 0 and "3 submissions, 2.3 of 7" in answer.stdout
    warnings = [line for line in answer.stderr.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: left out of {folder}: 2 hidden (.DS_Store, __MACOSX); "
                        "2 not in a folder of its own (ada.py, bob_student.py)"]
    content = json.loads((tmp_path / "out" / "grades.json").read_text())["submissions"]
    assert content["nested"]["failures"]["task9_1"] == (
        f"there is no student.py, but inner{os.sep}student.py: move it up")
    assert content["pipe"]["failures"]["task9_1"] == "its student.py is not an ordinary file"


def test_a_grading_that_is_killed_goes_on_and_ends_with_the_same_bytes(tiny, tmp_path):
    """Killed once a submission is graded, as by a lack of power. The right value: the two files of
    a grading that was not killed. What was graded before is not graded again."""
    names = ("exits", "expected_to_fail", "fewer_cases", "fine", "prints", "skips")
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
    assert [row.split(",")[0] for row in rows[1:] if row.endswith(",,,,")] == [
        name for name in names if name not in done]
    shutil.copy(tmp_path / "parts.json", tmp_path / "other.json")
    answer = run(*command, "parts", cwd=tmp_path)
    assert f"{len(done)} of 6 submissions were graded before" in answer.stdout
    for suffix in ("csv", "json"):
        assert (tmp_path / f"parts.{suffix}").read_bytes() == (
            tmp_path / f"whole.{suffix}").read_bytes()
    other = run(*command, "other", "--times", 9, cwd=tmp_path)
    assert other.returncode == 2 and "unfinished grading with other settings" in other.stderr


@pytest.mark.parametrize("flags, words", [
    (["--times", "nan"], "a finite number, not nan"), (["--times", "inf"], "a finite number"),
    (["--times", "0.5"], "--times must be from 2"), (["--times", "1e300"], "--times must be"),
    (["--memory", "nan"], "a finite number"), (["--memory", "1e300"], "--memory must be"),
    (["--jobs", "0"], "--jobs 1 or more"), (["--out", "foreign"], "foreign.json is no grades"),
    (["--out", "folder"], "it is a folder"), (["--out", ".."], "beginning of a file"),
    (["--out", "mine"], "mine.csv is no grades"),
])
def test_flags_of_grading_out_of_range_end_with_2(tiny, tmp_path, flags, words):
    """--times nan once gave a right solution 0 points."""
    folder = few(tiny, tmp_path / "few", "fine")
    (tmp_path / "foreign.json").write_text("[1, 2]")
    (tmp_path / "mine.csv").write_text("name,age\n")
    (tmp_path / "folder.csv").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    answer = run(tiny[0] / GRADE, "a9_tiny", folder, *flags, cwd=tmp_path)
    assert answer.returncode == 2 and words in answer.stderr and "Traceback" not in answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("change", [
    {"unfinished": 3}, {"unfinished": {}}, {"submissions": [1]}, {"submissions": {"fine": 3}},
    {"submissions": {"fine": {"total": 9, "points": {"task9_1": 9, "task9_2": 0, "task9_3": 0},
                              "failures": {}}}},
])
def test_an_unfinished_grading_is_checked_when_it_is_read(tiny, tmp_path, change):
    root, _ = tiny
    grade = script("grade", root)
    points = {"task9_1": 1, "task9_2": 2, "task9_3": 4}
    progress = grade.Progress(tmp_path / "g", "a9_tiny", points, 6, 1e9, {"fine": "a", "ada": "b"})
    progress.tests, progress.seconds = {task: [task] for task in points}, 1.0
    progress.add("fine", {"total": 7, "points": points, "failures": {}})
    again = grade.Progress(tmp_path / "g", "a9_tiny", points, 6, 1e9, {"fine": "a", "ada": "b"})
    assert again.results == progress.results and again.tests == progress.tests
    changed = grade.Progress(tmp_path / "g", "a9_tiny", points, 6, 1e9, {"fine": "c", "ada": "b"})
    assert changed.results == {"fine": None, "ada": None}  # it has another student.py now
    content = json.loads((tmp_path / "g.json").read_text()) | change
    (tmp_path / "g.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"g\.json is"):
        grade.Progress(tmp_path / "g", "a9_tiny", points, 6, 1e9, {"fine": "a", "ada": "b"})
