"""A folder of submissions, NAME/student.py, as people have it: one rule for grading and for the
leaderboard."""

import warnings

LARGEST = 1_000_000  # bytes of a student.py


def names_in(folder):
    """The names of the submissions in a folder, sorted: those of its sub-folders. One line says how
    many hidden ones, those that begin with __, and loose files are left out. A submission whose
    student.py is missing or cannot be used stays in the list (`trouble` says why).

    Raises FileNotFoundError, or ValueError if there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of submissions at {folder}")
    names, left_out = [], {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):
            left_out.setdefault("hidden", []).append(path.name)
        elif not path.is_dir():
            left_out.setdefault("not in a folder of its own", []).append(path.name)
        else:
            names.append(path.name)
    if left_out:
        words = "; ".join(f"{len(found)} {kind} ({', '.join(found[:3])}"
                          f"{', ...' if len(found) > 3 else ''})"
                          for kind, found in sorted(left_out.items()))
        # stacklevel=1, so that a folder that is listed twice is told about once
        warnings.warn(f"left out of {folder}: {words}", stacklevel=1)
    if not names:
        raise ValueError(f"{folder} holds no submissions: one is NAME/student.py")
    return names


def trouble(folder):
    """Why the submission in a folder cannot be run, in words; "" if it can."""
    student = folder / "student.py"
    if student.is_file():
        size = student.stat().st_size
        return "" if size <= LARGEST else f"its student.py has {size:,} bytes: {LARGEST:,} at most"
    if student.exists():
        return "its student.py is not an ordinary file"
    nested = sorted(path.relative_to(folder) for path in folder.glob("*/student.py"))
    return "there is no student.py" + (f", but {nested[0]}: move it up" if nested else "")
