"""Grades a folder of submissions of one assignment.

    python notebooks/assignments/lecturer/grade.py a2_cache SUBMISSIONS --out grades

SUBMISSIONS/<name>/student.py is a submission. Each runs in a temporary folder and a process of its
own, beside the original test_student.py and conftest.py and the withheld cases.py, several at once.
A task earns its points if all of its tests pass. grades.csv gets one row per submission;
grades.json also holds the first line of each task's first failure. Both are written after every
submission (one that is still to come has no points yet), and the same command goes on from there.

The solution is graded first. This shows which tests each task has, that everything works on this
machine, and how long the tests take: a submission gets `--times` as long. A submission that ends
the process or takes too long loses the task in which it did so. Its other tasks run again without
that one.

This is no sandbox. A submission runs as you, sees your files and shares its process with the tests.
Its output and its exit code count for nothing, but code written to deceive can make tests pass:
read what looks odd, and grade strangers' code in a container.
"""

import sys
from pathlib import Path

LECTURER = Path(__file__).resolve().parent
ASSIGNMENTS = LECTURER.parent
ROOT = ASSIGNMENTS.parent.parent
sys.path[:0] = [str(ROOT), str(ASSIGNMENTS)]

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import ast  # noqa: E402
import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import csv  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import secrets  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import folders  # noqa: E402

import command  # noqa: E402

FIRST_LIMIT = 1800  # time limit of the solution, seconds
MOST = 1e6  # of --times, and of --memory in GB
TEMPORARY = "grade.{}."  # the temporary folders' prefix, with the number of the process

# ------------------------------------------------------------------------------------------------
# The assignment


def find(assignment):
    """-> the folders of the assignment and of its solution. Raises ValueError for another name."""
    folders = sorted(file.parent for file in ASSIGNMENTS.glob("a*/test_student.py"))
    names = [folder.name for folder in folders]
    if assignment not in names:
        raise ValueError(f"no assignment {assignment}: there are {', '.join(names)}")
    solution = LECTURER / "solutions" / assignment
    for name in ("student.py", "cases.py"):
        if not (solution / name).is_file():
            raise FileNotFoundError(f"{solution} has no {name}: grading needs it")
    return ASSIGNMENTS / assignment, solution


def read_points(folder):
    """Reads POINTS from a test_student.py without running it: {task: points}."""
    for node in ast.parse((folder / "test_student.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "POINTS":
            return ast.literal_eval(node.value)
    raise ValueError(f"{folder}/test_student.py has no POINTS")


# ------------------------------------------------------------------------------------------------
# One run of the tests


def lay_out(folder, assignment, student):
    """Fills `folder` with the files that the tests need. -> the folder to run them in."""
    original, solution = find(assignment)
    here = folder / "notebooks" / "assignments"
    (here / assignment).mkdir(parents=True)
    (here / "pytest.ini").write_text("[pytest]\n")  # keeps out settings from folders above
    shutil.copy(ASSIGNMENTS / "conftest.py", here)
    for file in [*original.glob("*.py"), solution / "cases.py"]:
        shutil.copy(file, here / assignment)
    (here / assignment / "student.py").write_bytes(student.read_bytes())
    return here


def environment():
    """The environment variables of a run: one thread, the modules of this repository, and none of
    the lecturer's own pytest settings. Sets keep their order, so that a message stays the same."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {
        **kept, **dict.fromkeys(threads, "1"), "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip


def end(process):
    """Ends a process and the processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def attempt(assignment, student, tasks, seconds, memory):
    """Runs the tests of `tasks` on a student.py, within `seconds` and `memory` bytes.
    -> the record, a list of dicts, and a message about how the process ended."""
    prefix = TEMPORARY.format(os.getpid())
    with (
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as private,
    ):
        here = lay_out(Path(folder), assignment, student)
        record = Path(private) / secrets.token_hex(16)  # a path that no submission can guess
        arguments = ["-p", "no:cacheprovider", "--capture=no", "-m", " or ".join(tasks), assignment]
        settings = {"record": str(record), "bytes": memory, "arguments": arguments}
        process = subprocess.Popen(
            [sys.executable, LECTURER / "recorder.py"], cwd=here, env=environment(),
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(settings).encode(), timeout=seconds)
            ended = f"it ended the process (exit code {process.returncode})"
        except subprocess.TimeoutExpired:
            ended = "it took more than the time limit"
        finally:
            end(process)
        return read_record(record, folder), ended


def read_record(path, folder):
    """The complete lines. There is no file if the process ended before the first one. What differs
    from run to run, the temporary `folder` and addresses, is taken out of the errors."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    records = [record for record in records if isinstance(record, dict)]
    for record in records:
        if "error" in record:
            error = str(record["error"]).replace(folder + os.sep, "")
            record["error"] = re.sub(r"0x[0-9a-f]{6,}", "0x...", error)
    return records


def clear_left_behind():
    """Removes the temporary folders of a grading that was killed."""
    for path in Path(tempfile.gettempdir()).glob(TEMPORARY.format("*") + "*"):
        process = path.name.split(".")[1]
        if process.isdecimal() and not command.is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# Grading


def judge(record, task, tests):
    """Whether a task's `tests` passed -> "" if all did, the first error, or None if some are not
    done."""
    done = {line["done"]: line["passed"] for line in record if "done" in line}
    if not all(test in done for test in tests):
        return None
    errors = {line["failed"]: line["error"] for line in reversed(record) if "failed" in line}
    failed = [test for test in tests if done[test] is not True]
    return "" if not failed else errors.get(failed[0], f"{task}: a test was skipped")


def grade_one(assignment, student, tests, seconds, memory):
    """-> {task: "" if it earns its points, else the first line of the error}.

    `tests` is {task: [test]}. If the process ends within a test, the task of that test has failed,
    and the tasks without a verdict run again.
    """
    if why := folders.trouble(student.parent):
        return dict.fromkeys(tests, why)
    verdicts, pending = {}, list(tests)
    while pending:
        record, ended = attempt(assignment, student, pending, seconds, memory)
        for task in pending:
            verdict = judge(record, task, tests[task])
            if verdict is not None:
                verdicts[task] = verdict
        pending = [task for task in pending if task not in verdicts]
        done = {line["done"] for line in record if "done" in line}
        inside = [line["started"] for line in record if "started" in line]
        culprits = [task for task in pending if set(tests[task]) & (set(inside) - done)]
        if not culprits:  # no test was running: the import failed, or pytest was ended
            errors = [line["error"] for line in record if "failed" in line]
            verdicts.update(dict.fromkeys(pending, errors[0] if errors and not done else ended))
            break
        verdicts.update(dict.fromkeys(culprits, ended))
        pending = [task for task in pending if task not in verdicts]
    return {task: verdicts[task] for task in tests}


def grade_solution(assignment, memory):
    """Runs the solution. -> the tests of each task, {task: [test]}, and the seconds that they took.
    Raises ValueError if the solution does not earn every point."""
    folder, solution = find(assignment)
    tasks, start = list(read_points(folder)), time.monotonic()
    record, ended = attempt(assignment, solution / "student.py", tasks, FIRST_LIMIT, memory)
    seconds = time.monotonic() - start
    tests = {
        task: [line["collected"] for line in record if task in line.get("marks", ())]
        for task in tasks
    }
    for task in tasks:
        errors = [line["error"] for line in record if "failed" in line] or [ended]
        verdict = judge(record, task, tests[task]) if tests[task] else errors[0]
        if verdict != "":
            raise ValueError(f"the solution itself fails {task} here ({verdict or ended}): "
                             "repair that first")
    return tests, seconds


def grade(assignment, submissions, times=10, memory=4e9, jobs=None, out=None):
    """Grades every folder of `submissions`. -> {name: {"total": points, "points": {task: points},
    "failures": {task: first line}}}, sorted by name. A submission's errors never stop the others.
    With `out`, writes out.csv and out.json after each, and goes on where such a grading stopped.
    Raises ValueError or FileNotFoundError if the assignment or the folder is wrong."""
    folder, _ = find(assignment)
    points = read_points(folder)
    submissions = Path(submissions)
    names = folders.names_in(submissions)
    clear_left_behind()
    progress = Progress(out, assignment, points, times, memory,
                        {name: digest(submissions / name / "student.py") for name in names})
    if progress.tests is None:
        progress.tests, progress.seconds = grade_solution(assignment, int(memory))

    def work(name):
        try:
            verdicts = grade_one(assignment, submissions / name / "student.py", progress.tests,
                                 times * progress.seconds, int(memory))
        except Exception as error:  # for example an unreadable file
            verdicts = dict.fromkeys(points, f"could not be graded: {error}")
        earned = {task: 0 if verdicts[task] else points[task] for task in points}
        failures = {task: command.one_line(verdict) for task, verdict in verdicts.items()
                    if verdict}
        return {"total": sum(earned.values()), "points": earned, "failures": failures}

    pending = [name for name in names if progress.results[name] is None]
    with concurrent.futures.ThreadPoolExecutor(jobs or cores()) as pool:
        futures = {pool.submit(work, name): name for name in pending}
        try:
            for future in command.progress(concurrent.futures.as_completed(futures),
                                           initial=len(names) - len(pending), total=len(names),
                                           unit="submission"):
                progress.add(futures[future], future.result())
        except BaseException:  # an interruption, or a full disk
            pool.shutdown(cancel_futures=True)  # running ones end at their time limit
            raise
    progress.finish()
    return progress.results


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------------------
# What is written


def digest(path):
    """What tells a submission from what it was before: a string."""
    if not path.is_file() or path.stat().st_size > folders.LARGEST:
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Progress:
    """The results so far, {name: result or None}, written to out.csv and out.json as they come.
    Until all are there, out.json also has `unfinished`: the settings, what the solution's run told,
    and each submission's digest. A submission that has changed since is graded again.

    Raises ValueError if out.json or out.csv is somebody else's, or unfinished with other settings.
    """

    def __init__(self, out, assignment, points, times, memory, digests):
        self.out, self.assignment, self.points, self.digests = out, assignment, points, digests
        self.results, self.tests, self.seconds = dict.fromkeys(digests), None, None
        folder, solution = find(assignment)
        files = [*sorted(folder.glob("*.py")), solution / "student.py", solution / "cases.py"]
        self.about = {"assignment": assignment, "times": times, "memory": memory,
                      "files": [digest(file) for file in files if file.name != "leaderboard.py"]}
        if out is not None:
            check_own(out)
            self._go_on(Path(f"{out}.json"))

    def _go_on(self, path):
        content = read_grades(path) if path.is_file() else {}
        if "unfinished" not in content:
            return
        state, before = content["unfinished"], content["submissions"]
        try:
            about, digests = state["about"], state["digests"]
            tests, seconds = state["tests"], float(state["seconds"])
            whole = tests.keys() == self.points.keys() and 0 < seconds <= 2 * FIRST_LIMIT and all(
                names and all(isinstance(name, str) for name in names) for names in tests.values()
            ) and all(result is None or fits(result, self.points) for result in before.values())
            done = {name for name in self.results if before.get(name) is not None
                    and digests.get(name) == self.digests[name]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole grading: remove it, or choose another --out"
                             ) from error
        if about != self.about or not whole:
            raise ValueError(f"{path} is an unfinished grading with other settings, or another "
                             "version of the assignment: remove it, or choose another --out")
        self.tests, self.seconds = tests, seconds
        self.results |= {name: before[name] for name in self.results if name in done}
        print(f"{len(done)} of {len(self.results)} submissions were graded before")

    def add(self, name, result):
        self.results[name] = result
        state = {"about": self.about, "digests": self.digests, "tests": self.tests,
                 "seconds": self.seconds}
        self._write({"unfinished": state})

    def finish(self):
        self._write({})

    def _write(self, more):
        if self.out is not None:
            write(self.out, self.assignment, self.points, self.results, more)


def fits(result, points):
    """Whether a result read from a file is one."""
    earned = result["points"]
    return earned.keys() == points.keys() and result["total"] == sum(earned.values()) and all(
        earned[task] == (0 if task in result["failures"] else points[task]) for task in points)


def read_grades(path):
    """out.json -> a dict. Raises ValueError if it is something else."""
    try:
        content = json.loads(command.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is no grades: remove it, or choose another --out") from error
    if not isinstance(content, dict) or not {"assignment", "points", "submissions"} <= set(content):
        raise ValueError(f"{path} is no grades: remove it, or choose another --out")
    return content


def check_own(out):
    """Raises ValueError or OSError if out.csv or out.json cannot be written, or is not grade.py's.
    """
    for suffix in (".csv", ".json"):
        command.check_writable(f"{out}{suffix}")
    if Path(f"{out}.json").is_file():
        read_grades(Path(f"{out}.json"))
    if Path(f"{out}.csv").is_file():
        with open(f"{out}.csv", "rb") as file:
            if not file.read(11).startswith(b"submission,"):
                raise ValueError(f"{out}.csv is no grades: remove it, or choose another --out")


def write(out, assignment, points, results, more):
    """Writes out.csv and out.json, with `more` in the latter. None is a result to come."""
    with command.replacing(f"{out}.csv") as temporary, \
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["submission", *points, "total"])
        for name, result in results.items():
            cells = [""] * (len(points) + 1)
            if result is not None:
                cells = [*result["points"].values(), result["total"]]
            rows.writerow([name, *cells])
    with command.replacing(f"{out}.json") as temporary:
        content = {"assignment": assignment, "points": points, "submissions": results, **more}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("assignment", help="the folder's name, like a2_cache")
    parser.add_argument("submissions", type=command.path, help="a folder of NAME/student.py")
    parser.add_argument("--out", type=command.path, default=Path("grades"),
                        help="writes OUT.csv and OUT.json (default: grades)")
    parser.add_argument("--times", type=command.finite, default=10,
                        help="time limit of a run, as a multiple of the solution's (10)")
    parser.add_argument("--memory", type=command.finite, default=4,
                        help="memory limit of a run, GB (4)")
    parser.add_argument("--jobs", type=int, help="submissions at once (default: one a core)")
    args = parser.parse_args()
    if not 2 <= args.times <= MOST:  # with less a right answer may be late by chance
        raise ValueError(f"--times must be from 2 to {MOST:g}, not {args.times:g}")
    if not 0 < args.memory <= MOST or (args.jobs is not None and args.jobs < 1):
        raise ValueError(f"--memory must be more than 0 and {MOST:g} at most, --jobs 1 or more")
    if args.out.name in ("", ".."):
        raise ValueError(f"--out is the beginning of a file's name, not {args.out}")
    find(args.assignment)  # a wrong name is told before a folder is made
    folders.names_in(args.submissions)
    with command.locked(args.out.parent):
        results = grade(args.assignment, args.submissions, args.times, args.memory * 1e9,
                        args.jobs, args.out)
    points = read_points(ASSIGNMENTS / args.assignment)
    mean = statistics.mean(result["total"] for result in results.values())
    print(f"{len(results)} submissions, {mean:.1f} of {sum(points.values())} points on average; "
          f"wrote {args.out}.csv and {args.out}.json")


if __name__ == "__main__":
    command.run(main)
