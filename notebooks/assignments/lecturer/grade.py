"""Grades a folder of submissions of one assignment.

    python notebooks/assignments/lecturer/grade.py a2_cache SUBMISSIONS --out grades

SUBMISSIONS/<name>/student.py is a submission. Each runs in a process of its own, several at once,
beside a copy of the modules that the assignment needs. This process sends it the inputs, gets plain
numbers and tensors back, and compares them here by the original test_student.py, with the withheld
cases.py. It never imports a submission. A task earns its points if all of its tests pass.

grades.csv gets one row per submission, with the reason for lost points; grades.json has the reason
of each task. Both are written after every submission (one that is still to come has no points yet),
and the same command goes on from there.

The solution is graded first: this shows that everything works on this machine, and how long each
task takes. A submission gets `--times` as long for it, and 10 seconds at least. A submission that
ends its process or takes too long loses the task in which it did so, and starts anew for the next.

What a submission can do depends on the system; the first line says it. README.md in this folder
says what that means.
"""

import sys
from pathlib import Path

LECTURER = Path(__file__).resolve().parent
ASSIGNMENTS = LECTURER.parent
ROOT = ASSIGNMENTS.parent.parent
sys.path[:0] = [str(ROOT), str(ASSIGNMENTS)]

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import concurrent.futures  # noqa: E402
import csv  # noqa: E402
import hashlib  # noqa: E402
import importlib.util  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402

import folders  # noqa: E402
import sandbox  # noqa: E402
import torch  # noqa: E402

import command  # noqa: E402

FIRST_LIMIT = 1800  # time limit of an answer of the solution, seconds
LEAST = 10  # seconds that a task always gets
MOST = 1e6  # of --times, and of --memory in GB
LONGEST = 500  # characters of a reason

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


def points_of(assignment):
    """{task: points} of an assignment."""
    return folders.read_points(find(assignment)[0] / "test_student.py")


def load_tests(assignment):
    """Imports test_student.py with the withheld cases.py. -> the tests of each task, {task:
    [(function, its arguments)]}, and the modules that a submission may import."""
    folder, solution = find(assignment)
    module = None
    for file in (solution / "cases.py", folder / "probes.py", folder / "test_student.py"):
        sys.modules.pop(file.stem, None)
        if file.is_file():
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    tests = {task: [] for task in module.POINTS}
    for name, function in vars(module).items():  # in the order of the file
        if name.startswith("test_"):
            marks = function.pytestmark
            task = next(mark.name for mark in marks if mark.name in tests)
            tests[task] += [(function, arguments) for arguments in combinations(marks)]
    return tests, module.NEEDS


def combinations(marks):
    """The arguments of a test, as pytest's parametrize marks give them: a list of dicts."""
    choices = []
    for mark in reversed(marks):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            choices.append([dict(zip(names, values if len(names) > 1 else [values], strict=True))
                            for values in mark.args[1]])
    return [{name: value for part in parts for name, value in part.items()}
            for parts in itertools.product(*choices)]


# ------------------------------------------------------------------------------------------------
# Grading


def why(error):
    """The reason of a failed test, in one line."""
    own = isinstance(error, AssertionError | sandbox.Failed)
    words = str(error) if own and str(error) else f"{type(error).__name__}: {error}"
    return command.one_line(words)[:LONGEST]


def grade_task(submission, tests, seconds):
    """Runs the tests of a task up to the first that fails. -> "" if all pass, else the reason.
    Raises sandbox.Ended if the process is gone then."""
    submission.give(seconds)
    for function, arguments in tests:
        try:
            function(submission, **arguments)
        except sandbox.Ended:
            raise
        except Exception as error:  # what a submission returns may fail in any way
            return why(error)
    return ""


def grade_one(course, student, tests, limits, memory):
    """-> {task: "" if it earns its points, else the reason}. `tests` is {task: [test]}, `limits`
    the seconds of each task."""
    if reason := folders.trouble(student.parent):
        return dict.fromkeys(tests, reason)
    verdicts, submission = {}, None
    try:
        for task in tests:
            if submission is None:
                try:
                    submission = sandbox.Submission(course, student, max(limits.values()), memory)
                except (sandbox.Failed, ValueError) as error:  # at its import: no task can run
                    return {name: verdicts.get(name, why(error)) for name in tests}
            try:
                verdicts[task] = grade_task(submission, tests[task], limits[task])
            except sandbox.Ended as error:
                verdicts[task] = why(error)
                submission.close()
                submission = None
    finally:
        if submission is not None:
            submission.close()
    return verdicts


def grade_solution(course, student, tests, memory):
    """Runs the solution. -> {task: the seconds that it took}. Raises ValueError if it does not earn
    every point. It also makes this process compute the right answers once, before there are
    threads."""
    taken = {}
    try:
        with sandbox.Submission(course, student, FIRST_LIMIT, memory) as submission:
            for task in tests:
                start = time.monotonic()
                reason = grade_task(submission, tests[task], FIRST_LIMIT)
                if reason or not tests[task]:
                    raise ValueError(f"the solution itself fails {task} here "
                                     f"({reason or 'it has no tests'}): repair that first")
                taken[task] = time.monotonic() - start
    except sandbox.Failed as error:
        raise ValueError(f"the solution itself cannot be graded here: {why(error)}") from error
    return taken


def grade(assignment, submissions, times=10, memory=4e9, jobs=None, out=None):
    """Grades every folder of `submissions`. -> {name: {"total": points, "points": {task: points},
    "failures": {task: reason}}}, sorted by name. A submission's errors never stop the others.
    With `out`, writes out.csv and out.json after each, and goes on where such a grading stopped.
    Raises ValueError or FileNotFoundError if the assignment or the folder is wrong."""
    _, solution = find(assignment)
    submissions = Path(submissions)
    names = folders.names_in(submissions)
    progress = Progress(out, assignment, times, memory,
                        {name: digest(submissions / name / "student.py") for name in names},
                        folders.loose(submissions))
    points = progress.points
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a submission's process: the same numbers to the last bit
    try:
        tests, needs = load_tests(assignment)
        with sandbox.Course(ASSIGNMENTS / assignment, needs) as course:
            print(f"Submissions run {course.words}.", flush=True)
            taken = grade_solution(course, solution / "student.py", tests, int(memory))
            limits = {task: max(LEAST, times * seconds) for task, seconds in taken.items()}

            def work(name):
                try:
                    verdicts = grade_one(course, submissions / name / "student.py", tests, limits,
                                         int(memory))
                except Exception as error:  # for example an unreadable file
                    verdicts = dict.fromkeys(points, f"could not be graded: {error}")
                earned = {task: 0 if verdicts[task] else points[task] for task in points}
                failures = {task: verdict for task, verdict in verdicts.items() if verdict}
                return {"total": sum(earned.values()), "points": earned, "failures": failures}

            grade_all(work, progress, jobs or cores())
    finally:
        torch.set_num_threads(threads)
    progress.finish()
    return progress.results


def grade_all(work, progress, jobs):
    """Calls work(name) for every submission without a result, `jobs` at once."""
    names = list(progress.results)
    pending = [name for name in names if progress.results[name] is None]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, name): name for name in pending}
        try:
            for future in command.progress(concurrent.futures.as_completed(futures),
                                           initial=len(names) - len(pending), total=len(names),
                                           unit="submission"):
                progress.add(futures[future], future.result())
        except BaseException:  # an interruption, or a full disk
            pool.shutdown(cancel_futures=True)  # running ones end at their time limit
            raise


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
    Until all are there, out.json also has `unfinished`: the settings, and each submission's digest.
    A submission that has changed since is graded again. `loose` is {name: why it is no submission}.

    Raises ValueError if out.json or out.csv is somebody else's, or unfinished with other settings.
    """

    def __init__(self, out, assignment, times, memory, digests, loose):
        self.out, self.assignment, self.digests, self.loose = out, assignment, digests, loose
        self.points, self.results = points_of(assignment), dict.fromkeys(digests)
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
            whole = all(result is None or fits(result, self.points) for result in before.values())
            done = {name for name in self.results if before.get(name) is not None
                    and digests.get(name) == self.digests[name]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole grading: remove it, or choose another --out"
                             ) from error
        if about != self.about or not whole:
            raise ValueError(f"{path} is an unfinished grading with other settings, or another "
                             "version of the assignment: remove it, or choose another --out")
        self.results |= {name: before[name] for name in self.results if name in done}
        print(f"{len(done)} of {len(self.results)} submissions were graded before")

    def add(self, name, result):
        self.results[name] = result
        self._write({"unfinished": {"about": self.about, "digests": self.digests}})

    def finish(self):
        self._write({})

    def _write(self, more):
        if self.out is not None:
            write(self.out, self.assignment, self.points, self.results, self.loose, more)


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


def reason(result):
    """Why a submission lost points, in one line: the task and the words, once if all are equal."""
    failures = result["failures"]
    if len(set(failures.values())) == 1 and len(failures) == len(result["points"]) > 1:
        return f"all tasks: {next(iter(failures.values()))}"
    return "; ".join(f"{task}: {words}" for task, words in failures.items())


def write(out, assignment, points, results, loose, more):
    """Writes out.csv and out.json, with `more` in the latter. None is a result to come."""
    with command.replacing(f"{out}.csv") as temporary, \
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["submission", *points, "total", "reason"])
        for name, result in results.items():
            cells = [""] * (len(points) + 2)
            if result is not None:
                cells = [*result["points"].values(), result["total"], reason(result)]
            rows.writerow([name, *cells])
        for name, words in loose.items():
            rows.writerow([name, *[""] * (len(points) + 1), f"not graded: {words}"])
    with command.replacing(f"{out}.json") as temporary:
        content = {"assignment": assignment, "points": points, "submissions": results,
                   "not_graded": loose, **more}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("assignment", help="the folder's name, like a2_cache")
    parser.add_argument("submissions", type=command.path, help="a folder of NAME/student.py")
    parser.add_argument("--out", type=command.path, default=Path("grades"),
                        help="writes OUT.csv and OUT.json (default: grades)")
    parser.add_argument("--times", type=command.finite, default=10,
                        help="time limit of a task, as a multiple of the solution's (10)")
    parser.add_argument("--memory", type=command.finite, default=4,
                        help="memory limit of a submission, GB beside torch (4)")
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
    points = points_of(args.assignment)
    for name, result in results.items():
        words = reason(result)
        print(command.one_line(f"{name}: {result['total']}" + (f" ({words})" if words else "")))
    for name, words in folders.loose(args.submissions).items():
        print(command.one_line(f"{name}: not graded ({words})"))
    mean = statistics.mean(result["total"] for result in results.values())
    print(f"{len(results)} submissions, {mean:.1f} of {sum(points.values())} points on average; "
          f"wrote {args.out}.csv and {args.out}.json")


if __name__ == "__main__":
    command.run(main)
