"""Grades a folder of submissions of one assignment.

    python notebooks/assignments/lecturer/grade.py a2_cache SUBMISSIONS --out grades

SUBMISSIONS/<name>/student.py is a submission. Each runs in a temporary folder and a process of its
own, beside the original test_student.py and conftest.py and the withheld cases.py, several at once.
A task earns its points if all of its tests pass. grades.csv gets one row per submission;
grades.json also holds the first line of each task's first failure.

The solution is graded first. This shows which tests each task has, that everything works on this
machine, and how long the tests take: a submission gets `--times` as long. A submission that ends
the process or takes too long loses the task in which it did so. Its other tasks run again without
that one.

This is no sandbox. A submission runs as you, sees your files and shares its process with the tests.
Its output and its exit code count for nothing, but code written to deceive can make tests pass:
read what looks odd, and grade strangers' code in a container.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import csv
import json
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

LECTURER = Path(__file__).resolve().parent
ASSIGNMENTS = LECTURER.parent
ROOT = ASSIGNMENTS.parent.parent
sys.path.insert(0, str(ROOT))

import command  # noqa: E402 (found on the path from here on)

FIRST_LIMIT = 1800  # time limit of the solution, seconds

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
    the lecturer's own pytest settings."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {
        **kept, **dict.fromkeys(threads, "1"), "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
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
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as private,
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
            ended = f"it took more than {seconds:.0f} s"
        finally:
            end(process)
        return read_record(record), ended


def read_record(path):
    """The complete lines. There is no file if the process ended before the first one."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


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
    if not student.is_file():
        return dict.fromkeys(tests, "there is no student.py")
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


def grade(assignment, submissions, times=10, memory=4e9, jobs=None):
    """Grades every folder of `submissions`. -> {name: {"total": points, "points": {task: points},
    "failures": {task: first line}}}, sorted by name. A submission's errors never stop the others.
    Raises ValueError or FileNotFoundError if the assignment or the folder is wrong."""
    folder, _ = find(assignment)
    points = read_points(folder)
    submissions = Path(submissions)
    if not submissions.is_dir():
        raise FileNotFoundError(f"no folder of submissions at {submissions}")
    names = sorted(path.name for path in submissions.iterdir()
                   if path.is_dir() and not path.name.startswith((".", "__")))
    if not names:
        raise ValueError(f"{submissions} holds no folders: a submission is NAME/student.py")
    tests, seconds = grade_solution(assignment, int(memory))

    def work(name):
        try:
            verdicts = grade_one(assignment, submissions / name / "student.py", tests,
                                 times * seconds, int(memory))
        except Exception as error:  # for example an unreadable file
            verdicts = dict.fromkeys(points, f"could not be graded: {error}")
        earned = {task: 0 if verdicts[task] else points[task] for task in points}
        failures = {task: verdict for task, verdict in verdicts.items() if verdict}
        return {"total": sum(earned.values()), "points": earned, "failures": failures}

    with concurrent.futures.ThreadPoolExecutor(jobs or cores()) as pool:
        futures = {pool.submit(work, name): name for name in names}
        try:
            for _ in tqdm(concurrent.futures.as_completed(futures), total=len(names),
                          unit="submission", disable=None):
                pass
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # running ones end at their time limit
            raise
    return {name: future.result() for future, name in futures.items()}


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write(out, assignment, points, results):
    """Writes out.csv and out.json."""
    with command.replacing(f"{out}.csv") as temporary, \
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["submission", *points, "total"])
        for name, result in results.items():
            rows.writerow([name, *result["points"].values(), result["total"]])
    with command.replacing(f"{out}.json") as temporary:
        content = {"assignment": assignment, "points": points, "submissions": results}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("assignment", help="the folder's name, like a2_cache")
    parser.add_argument("submissions", type=Path, help="a folder of NAME/student.py")
    parser.add_argument("--out", type=Path, default=Path("grades"),
                        help="writes OUT.csv and OUT.json (default: grades)")
    parser.add_argument("--times", type=float, default=10,
                        help="time limit of a run, as a multiple of the solution's (10)")
    parser.add_argument("--memory", type=float, default=4, help="memory limit of a run, GB (4)")
    parser.add_argument("--jobs", type=int, help="submissions at once (default: one a core)")
    args = parser.parse_args()
    if min(args.times, args.memory, 1 if args.jobs is None else args.jobs) <= 0:
        raise ValueError("--times, --memory and --jobs must be more than 0")
    for suffix in (".csv", ".json"):
        command.check_writable(f"{args.out}{suffix}")
    results = grade(args.assignment, args.submissions, args.times, args.memory * 1e9, args.jobs)
    points = read_points(ASSIGNMENTS / args.assignment)
    write(args.out, args.assignment, points, results)
    mean = statistics.mean(result["total"] for result in results.values())
    print(f"{len(results)} submissions, {mean:.1f} of {sum(points.values())} points on average; "
          f"wrote {args.out}.csv and {args.out}.json")


if __name__ == "__main__":
    command.run(main)
