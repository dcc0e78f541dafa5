"""Runs pytest on one submission, for grade.py, and records each event when it happens.

The settings come on standard input and are read before the submission runs. So neither the command
line nor the environment shows the submission where the record is. The record is a file of JSON
lines: a test collected, with its tasks; a test started; an error; a test done.
"""

import json
import sys

import pytest


class Recorder:
    """A pytest plugin. A test is done after its teardown. It has passed if setup, call and teardown
    were all reported as passed; a skipped test, or one expected to fail, has not passed."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="ascii", buffering=1)  # noqa: SIM115 (kept open)
        self.phases = {}

    def write(self, **record):
        self.file.write(json.dumps(record) + "\n")

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.write(collected=item.nodeid, marks=[mark.name for mark in item.iter_markers()])

    def pytest_runtest_logstart(self, nodeid):
        self.write(started=nodeid)

    def pytest_exception_interact(self, node, call):
        error = call.excinfo
        cause = error.value.__cause__  # of an error at import: the submission's own exception
        if isinstance(error.value, pytest.Collector.CollectError) and cause is not None:
            error = pytest.ExceptionInfo.from_exception(cause)
        text = error.exconly()
        if isinstance(error.value, SyntaxError):  # the first line of its text only names the file
            text = f"{type(error.value).__name__}: {error.value}"
        self.write(failed=node.nodeid, error=text.strip().split("\n")[0][:300])

    def pytest_runtest_logreport(self, report):
        if report.passed and not hasattr(report, "wasxfail"):
            self.phases.setdefault(report.nodeid, []).append(report.when)
        if report.when == "teardown":
            passed = self.phases.get(report.nodeid) == ["setup", "call", "teardown"]
            self.write(done=report.nodeid, passed=passed)


def limit_memory(number):
    """Limits this process to `number` bytes of data, where the platform can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (number, number))


if __name__ == "__main__":
    settings = json.load(sys.stdin)
    sys.path.pop(0)  # this folder, where the solutions are
    limit_memory(settings["bytes"])
    pytest.main(settings["arguments"], plugins=[Recorder(settings["record"])])
