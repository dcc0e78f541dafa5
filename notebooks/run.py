"""Executes the notebooks of this folder and compares the numbers that they print with the stored
ones.

    make notebooks                                    # all; up to 3 minutes each
    python notebooks/run.py 2_feature_cache.ipynb     # one of them
    python notebooks/run.py --changed                 # those whose code or data changed since
    python notebooks/run.py --write                   # store the fresh outputs in the files

A number is compared if its line ends with a tolerance, in the number's own unit:

    CUR 30.3 % (+- 0.1)
    error of fora:2 0.0024 (+- 0.0001)

The last number before the tolerance is compared. The rest of the line is its name, which must be
unique in the notebook. Lines without a tolerance (times, for example) are not compared, and neither
are pictures.

`--write` also stores a fingerprint of everything that the numbers depend on: the code cells, the
project's modules that they import, directly or not, `data/`, `checkpoints/`, `constraints.txt`, and
the numbers themselves. `--changed` executes the notebooks whose fingerprint has changed. This needs
no git history, and a notebook that it skips was executed in exactly its present state.
"""

import argparse
import ast
import base64
import copy
import hashlib
import io
import re
import sys
import time
from decimal import Decimal
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
LINE = re.compile(rf"(.*\s)({NUMBER})((?:\s.*)?)\s\(\+- ({NUMBER})\)\s*")  # name, value, unit
SECONDS = 600  # time limit of a cell
QUIET = ["--log-level=ERROR"]  # no warning about encryption: the kernel is on this machine

# ------------------------------------------------------------------------------------------------
# Numbers


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed_lines(notebook):
    """What the cells print, line by line."""
    for cell in code_cells(notebook):
        text = "".join(output.text for output in cell.outputs
                       if output.output_type == "stream" and output.name == "stdout")
        yield from text.splitlines()


def numbers(notebook):
    """The numbers to compare: {the line, with ... for its number: (value, tolerance)}.
    Raises ValueError if a line has a tolerance but no number, if it has several tolerances, or if
    two lines have the same name."""
    found = {}
    for line in printed_lines(notebook):
        if "(+-" not in line:
            continue
        match = LINE.fullmatch(line)
        if match is None or line.count("(+-") > 1:
            raise ValueError(f"a line must end with one number and its tolerance: {line}")
        before, value, unit, tolerance = match.groups()
        name = f"{before}...{unit} (+- {tolerance})"
        if name in found:
            raise ValueError(f"two lines with the same name: {name}")
        found[name] = Decimal(value), Decimal(tolerance)
    return found


def compare(stored, fresh):
    """Compares two executions of a notebook -> a list of messages, one per disagreement.
    Raises ValueError as `numbers` does."""
    old, new = numbers(stored), numbers(fresh)
    if not new:
        return ["no number is printed with a tolerance, so there is nothing to compare"]
    complaints = [f"no longer printed: {name}" for name in old if name not in new]
    complaints += [f"printed but not stored: {name}" for name in new if name not in old]
    for name in old.keys() & new.keys():
        (a, tolerance), (b, _) = old[name], new[name]
        if abs(a - b) > tolerance:
            complaints.append(f"{name}: stored {a}, now {b}")
    return sorted(complaints)


# ------------------------------------------------------------------------------------------------
# What the numbers depend on


def imported_names(source):
    """The modules that a source text imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            # In `from experiments import swap` the imported name is itself a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_files(source):
    """The project's own files that a source text imports, directly or not: a set of paths."""
    found, sources = set(), [source]
    while sources:
        for name in imported_names(sources.pop()):
            for folder in (HERE, ROOT):
                path = folder / (name.replace(".", "/") + ".py")
                if path.is_file() and path not in found:
                    found.add(path)
                    sources.append(path.read_text(encoding="utf-8"))
    return found


def fingerprint(notebook):
    """A hash of a notebook's code, its data and its stored numbers: a string."""
    source = "\n".join(cell.source for cell in code_cells(notebook))
    shipped = {path for folder in ("data", "checkpoints") for path in (ROOT / folder).rglob("*")}
    files = imported_files(source) | {ROOT / "constraints.txt"} | shipped
    digest = hashlib.sha256(source.encode())
    for path in sorted(path for path in files if path.is_file() and path.suffix != ".md"):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {content}\n".encode())
    digest.update("\n".join(line for line in printed_lines(notebook) if "(+-" in line).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# Execution


def shrink(notebook, limit=100_000):
    """Reduces pictures of more than `limit` characters to 128 colours, which halves the file."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            if len(data.get("image/png", "")) > limit:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                file = io.BytesIO()
                picture.convert("RGB").quantize(128).save(file, "png", optimize=True)
                data["image/png"] = base64.b64encode(file.getvalue()).decode()


def execute(notebook, folder):
    """Executes a copy of the notebook from top to bottom, with `folder` as the working directory.
    -> the copy, with fresh outputs. Raises one of nbclient's errors if a cell fails."""
    fresh = copy.deepcopy(notebook)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(fresh, timeout=SECONDS, kernel_name="python3", record_timing=False,
                   resources=resources, extra_arguments=QUIET).execute()
    return fresh


def check(path, write=False):
    """Executes one notebook, prints the result of the comparison, and stores the new outputs if
    `write`. -> False if a cell failed or, without `write`, if a number disagrees."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    try:
        fresh = execute(notebook, path.parent)
        complaints = compare(notebook, fresh)
    except (CellExecutionError, CellTimeoutError, DeadKernelError, ValueError) as error:
        print(f"{path.name}: FAILED\n{error}")
        return False
    seconds = time.perf_counter() - start
    for line in complaints:
        print(f"{path.name}: {line}")
    if write:
        shrink(fresh)
        fresh.metadata["fingerprint"] = fingerprint(fresh)
        nbformat.write(fresh, path)
    elif complaints:
        return False
    print(f"{path.name}: {len(numbers(fresh))} numbers {'stored' if write else 'agree'}, "
          f"{seconds:.0f} s")
    return True


def changed(path):
    """Whether anything that a notebook's numbers depend on has changed since it was stored."""
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get("fingerprint") != fingerprint(notebook)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="files (default: all)")
    parser.add_argument("--changed", action="store_true", help="only those that changed")
    parser.add_argument("--write", action="store_true", help="store the fresh outputs")
    args = parser.parse_args()
    paths = [path if path.is_file() else HERE / path for path in args.notebooks]
    paths = paths or sorted(HERE.glob("*.ipynb"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        sys.exit(f"error: no such notebook: {', '.join(missing)}")
    if args.changed:
        skipped = [path.name for path in paths if not changed(path)]
        print(f"not changed since they were stored: {', '.join(skipped) or 'none'}")
        paths = [path for path in paths if path.name not in skipped]
    passed = [check(path, args.write) for path in paths]  # all of them, even after a failure
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
