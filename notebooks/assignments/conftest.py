"""What pytest needs to know about the assignments: where the modules are, the names of the tasks,
that each folder has a student.py and a cases.py of its own, and the points at the end."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import folders  # noqa: E402


def pytest_configure(config):
    """Registers one marker per task."""
    for file in sorted(HERE.glob("a*/test_student.py")):
        for task in sorted(set(re.findall(r"task\d+_\d+", file.read_text(encoding="utf-8")))):
            config.addinivalue_line("markers", f"{task}: a task of {file.parent.name}")


def pytest_collectstart(collector):
    """Unloads the modules of the previous folder: `import cases` must find the one beside these
    tests."""
    if isinstance(collector, pytest.Module):
        for name in ("student", "cases", "probes", "test_student"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def student(request):
    """What the tests ask: the student.py beside them."""
    import sandbox

    return sandbox.Local(request.path.parent, request.module.NEEDS)


def pytest_terminal_summary(terminalreporter):
    """The points of each task that was tested, as grading counts them."""
    points = {}
    for file in sorted(HERE.glob("a*/test_student.py")):
        points |= folders.read_points(file)
    passed = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports if outcome not in ("deselected", "warnings", "") else ():
            for task in points.keys() & getattr(report, "keywords", {}).keys():
                passed[task] = passed.get(task, True) and outcome == "passed"
    if not passed:
        return
    partly = {task for item in terminalreporter.stats.get("deselected", ())
              for task in points.keys() & set(item.keywords)}
    terminalreporter.section("points")
    earned = {task: points[task] if passed[task] else 0 for task in sorted(passed)}
    for task, number in earned.items():
        words = " (not all of its tests were run)" if task in partly else ""
        terminalreporter.line(f"{task}: {number} of {points[task]}{words}")
    total = sum(points[task] for task in earned)
    terminalreporter.line(f"together: {sum(earned.values())} of {total}")
