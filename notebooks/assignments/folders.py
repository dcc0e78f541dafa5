"""A folder of submissions, NAME/student.py, as people have it: one rule for grading and for the
leaderboard. And the points of an assignment's tasks."""

import ast
import warnings

LARGEST = 1_000_000  # bytes of a student.py


def names_in(folder):
    """The names of the submissions in a folder, sorted: those of its sub-folders. One line says how
    many hidden ones, which begin with . or __, and loose files are left out. A submission whose
    student.py is missing or cannot be used stays in the list (`trouble` says why).

    Raises FileNotFoundError, or ValueError if there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of submissions at {folder}")
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__"))]
    names = [path.name for path in paths if path.is_dir()]
    hidden = sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "__")))
    kinds = {"hidden": hidden, "not in a folder of its own": list(loose(folder))}
    words = "; ".join(f"{len(found)} {kind} ({few(found)})" for kind, found in kinds.items()
                      if found)
    if words:
        # stacklevel=1, so that a folder that is listed twice is told about once
        warnings.warn(f"left out of {folder}: {words}", stacklevel=1)
    if not names:
        reason = "".join(f"; {name}: {why}" for name, why in list(loose(folder).items())[:1])
        raise ValueError(f"{folder} holds no submissions: one is NAME/student.py{reason}")
    return names


def few(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def loose(folder):
    """{name: why it is no submission} of the files that lie in no folder of their own."""
    return {path.name: f"not in a folder of its own: put it at {path.stem}/student.py"
            for path in sorted(folder.iterdir())
            if not path.name.startswith((".", "__")) and not path.is_dir()}


def trouble(folder):
    """Why the submission in a folder cannot be run, in words; "" if it can."""
    found = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    student = found.get("student.py")  # not by its path: some systems take Student.py for it
    if student is not None and student.is_file() and not student.is_symlink():
        size = student.stat().st_size
        return "" if size <= LARGEST else f"its student.py has {size:,} bytes: {LARGEST:,} at most"
    if student is not None:
        return "its student.py is not an ordinary file"
    other = [name for name in sorted(found) if name.lower() == "student.py"] or [
        name for name in sorted(found) if name.endswith(".py")]
    if other:
        return f"there is no student.py, but {other[0]}: rename it"
    nested = sorted(path.relative_to(folder)
                    for path in [*folder.glob("*/student.py"), *folder.glob("*/*/student.py")])
    if nested:
        return f"there is no student.py, but {nested[0]}: move it up"
    packed = [name for name in sorted(found) if name.lower().endswith((".zip", ".ipynb", ".txt"))]
    return "there is no student.py" + (f", but {packed[0]}" if packed else "")


def read_points(file):
    """Reads POINTS from a test_student.py without running it: {task: points}."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "POINTS":
            return ast.literal_eval(node.value)
    raise ValueError(f"{file} has no POINTS")
