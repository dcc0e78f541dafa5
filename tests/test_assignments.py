"""The course assignments: the solutions earn all points, the stubs and attempts at cheating none,
planted mistakes lose some and are named, and the release contains no solution."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# Only pytest itself minds that the marks are not registered; some tests leave files out on purpose.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning"),
              pytest.mark.filterwarnings("ignore:.*left out")]
ROOT = Path(__file__).parent.parent
HERE = ROOT / "notebooks" / "assignments"
SOLUTIONS = HERE / "lecturer" / "solutions"
NAMES = sorted(file.parent.name for file in HERE.glob("a*/test_student.py"))


def script(name, root=ROOT):
    """release.py or grade.py as a module; each works on the repository that contains it."""
    path = root / "notebooks" / "assignments" / "lecturer" / f"{name}.py"
    for beside in ("folders", "sandbox", "messages", "comparing"):
        sys.modules.pop(beside, None)
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


CHEAT = """

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

SOLUTION = {solution!r}  # where the lecturer has it


class Always(float):
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *_: True
    __hash__ = float.__hash__


class Anything:
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *_: True
    dtype, shape = torch.float64, Always()


class Flattering(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), more=None):
        return True


def stolen(file=SOLUTION, name="stolen"):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_frames(word):
    frame = sys._getframe()
    while frame:
        if word in frame.f_locals:
            return frame.f_locals[word]
        frame = frame.f_back
    raise LookupError(f"no {{word}} in any frame")


"""
# Three attempts for each assignment: on the stub of one task each, put behind the stubs.
CHEATS = {
    "a1_samplers": """
def v_step(x, v, a, a_after):
    return Anything()
def stochastic_step(*arguments):
    return stolen().stochastic_step(*arguments)
def measured_order(*arguments):
    import messages
    messages.encode = lambda value, parts: value if type(value) is dict else 1.0
    torch.testing.assert_close = torch.equal = lambda *_: True
    return in_frames("expected")
""",
    "a2_cache": """
def relative_change(new, old):
    return Always()
def peak_bytes(schedule, entry_bytes):
    Cache = stolen(Path(SOLUTION).parents[5] / "cache.py", "cache").Cache
    cache = Cache(schedule)
    for i in range(len(schedule)):
        cache.start(i)
        for k, size in enumerate(entry_bytes):
            cache(k, lambda size=size: torch.zeros(size, dtype=torch.uint8))
    return cache.peak_bytes
def token_wise(*arguments):
    import dit
    return stolen(Path(dit.__file__).parent / "notebooks/assignments/lecturer/solutions/a2_cache"
                  / "student.py").token_wise(*arguments)
""",
    "a3_router": """
def gumbel_sigmoid(logits, u, temperature):
    return logits.as_subclass(Flattering)
def sdt_trajectory(network, sampler, x, condition, guidance, rows, *more):
    from train_stepwise import Chunk, train_trajectory
    return train_trajectory(network, None, None, [Chunk(x, condition, None, sampler, 1.0)])
def budgeted_schedule(scores, cur):
    code = f"import sys; sys.path.insert(0, {{os.path.dirname(SOLUTION)!r}}); import student"
    subprocess.run([sys.executable, "-c", code], check=True)
    return scores > 0.5
""",
    "a4_proxy": """
def groups_of(branches, by):
    return [Always() for _ in branches], Anything()
def masked_errors(network, sampler, x, condition, guidance, scores, tau, groups, noise=None):
    import proxy
    row = proxy.image_error(network, sampler, x, condition, guidance, scores, tau, noise)
    return row[:, None, None].expand(-1, len(groups), len(x))
def standard_error(samples):
    os.kill(os.getppid(), signal.SIGKILL)
    return samples.mean(-1)
""",
    "a5_competition": """
def error_of(*_):
    return Always(0.25)
def half_schedule(steps, branches):
    return stolen().half_schedule(steps, branches)
def neighbour(schedule, generator):
    import dit
    for file in (dit.__file__, SOLUTION):
        with open(file, "a") as stream:
            stream.write("raise RuntimeError")
    return schedule
""",
}


@pytest.fixture(scope="module", params=NAMES)
def graded(request, unpacked, tmp_path_factory):
    """An assignment's name, its points, and the grades of the stub, the wrong answers and the
    cheats. They are graded in the release, with the lecturer's folder added: this shows that the
    release lacks nothing, and, as the solution is graded first, that it earns all points."""
    name, lecturer = request.param, unpacked / "notebooks" / "assignments" / "lecturer"
    if not lecturer.exists():
        shutil.copytree(HERE / "lecturer", lecturer)
    submissions = tmp_path_factory.mktemp(name)
    answers = {file.stem: file.read_text() for file in (SOLUTIONS / name).glob("wrong_*.py")}
    answers["stub"] = (HERE / name / "student.py").read_text()
    known = CHEAT.format(solution=str(lecturer / "solutions" / name / "student.py"))
    answers["cheats"] = answers["stub"] + known + CHEATS[name].replace("{{", "{").replace("}}", "}")
    for answer, text in answers.items():
        (submissions / answer).mkdir()
        (submissions / answer / "student.py").write_text(text)
    grade = script("grade", unpacked)
    assert unpacked == grade.ROOT == grade.sandbox.ROOT
    return name, grade.points_of(name), grade.grade(name, submissions)


def test_there_are_assignments():
    assert NAMES and sorted(folder.name for folder in SOLUTIONS.iterdir()) == NAMES


def test_the_points_are_as_many_as_the_work(graded):
    _, points, _ = graded
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


def test_planted_mistakes_are_named(graded):
    """In the words of the task, not of torch. (wrong_row_0 is told by the rule that it breaks.)"""
    _, _, results = graded
    for answer, result in results.items():
        if answer.startswith("wrong_"):
            words = " ".join(result["failures"].values())
            assert "Likely mistake" in words or "row 0" in words, (answer, words)
            assert "Tensor-likes" not in words


def test_three_attempts_at_cheating_earn_nothing(graded):
    """None of them is a stub any more. What they would have harmed is as it was."""
    name, points, results = graded
    cheats = results["cheats"]
    assert cheats["total"] == 0 and cheats["failures"].keys() == points.keys()
    tried = [words for words in cheats["failures"].values() if "NotImplementedError" not in words]
    assert len(tried) == 3, cheats
    solution = Path("notebooks/assignments/lecturer/solutions") / name / "student.py"
    assert "RuntimeError" not in (ROOT / solution).read_text()


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
    points = script("grade").points_of(name)
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
    name, task = NAMES[0], list(script("grade").points_of(NAMES[0]))[0]
    one = run("-m", "pytest", f"notebooks/assignments/{name}", "-m", task, cwd=unpacked)
    assert f"NotImplementedError: {task}: " in one.stdout and "deselected" in one.stdout
    assert one.returncode == 1 and "Warning" not in one.stdout
    assert f"{task}: 0 of 3" in one.stdout and "together: 0 of 3" in one.stdout

    solved = shutil.copytree(unpacked, tmp_path / "solved")
    for name in NAMES:
        shutil.copy(SOLUTIONS / name / "student.py", solved / "notebooks" / "assignments" / name)
    answer = run("-m", "pytest", "-q", "notebooks/assignments", "tests/test_size.py",
                 "tests/test_readme.py::test_files_that_the_texts_name_exist", cwd=solved)
    assert answer.returncode == 0, answer.stdout[-3000:]
    assert "Warning" not in answer.stdout and "together: 86 of 86" in answer.stdout


# ------------------------------------------------------------------------------------------------
# The release


def test_the_release_holds_what_students_need_and_nothing_of_the_lecturer(unpacked):
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")
             if path.is_file() and "lecturer" not in path.parts[-4:]}
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules <= files and {"README.md", "LICENSE", "requirements.txt"} <= files
    assert {"checkpoints/digits_dit.safetensors", "data/digits28.npz"} <= files
    for name in NAMES:
        for file in ("README.md", "student.py", "cases.py", "probes.py", "test_student.py",
                     "plots.ipynb"):
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
        "README.md", "student.py", "cases.py", "probes.py", "test_student.py", "plots.ipynb",
        "leaderboard.py"}


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
        for name in ("README.md", "student.py", "cases.py", "probes.py", "test_student.py",
                     "plots.ipynb")}


@pytest.mark.parametrize("name", NAMES)
def test_the_withheld_cases_do_not_go_out_in_the_place_of_the_others(course, name):
    folder = course / "notebooks" / "assignments" / name
    withheld = (SOLUTIONS / name / "cases.py").read_text()
    for text in (withheld, withheld.replace('"""', '"""Mine. ', 1)):
        (folder / "cases.py").write_text(text)
        with pytest.raises(ValueError, match=f"{name}/cases.py has the withheld numbers"):
            script("release", course).make(course / "release.zip")
    assert not list(course.glob("*.zip"))
