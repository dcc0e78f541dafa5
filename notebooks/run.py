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

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import ast  # noqa: E402
import atexit  # noqa: E402
import base64  # noqa: E402
import copy  # noqa: E402
import hashlib  # noqa: E402
import importlib.util  # noqa: E402
import io  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from decimal import Decimal  # noqa: E402

import nbformat  # noqa: E402
from jupyter_client.kernelspec import KernelSpec  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import (  # noqa: E402
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)
from PIL import Image  # noqa: E402

import command  # noqa: E402

NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
LINE = re.compile(rf"(.*\s)({NUMBER})((?:\s.*)?)\s\(\+- ({NUMBER})\)\s*")  # name, value, unit
SECONDS = 600  # time limit of a cell
QUIET = ["--log-level=ERROR"]  # no warning about encryption: the kernel is on this machine

# ------------------------------------------------------------------------------------------------
# Notebooks


def read(path):
    """A notebook of Python cells. Raises ValueError if the file is something else, or OSError."""
    data = command.read_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what an old notebook lacks is added
            notebook = nbformat.reads(data.decode("utf-8-sig"), as_version=4)
            nbformat.validate(notebook)
    except Exception as error:  # a foreign file may hold anything anywhere
        raise ValueError(f"{path} is not a notebook: {command.one_line(error)[:200]}") from error
    language = notebook.metadata.get("kernelspec", {}).get("language") or (
        notebook.metadata.get("language_info", {}).get("name", "python"))
    if language != "python":
        raise ValueError(f"{path} is a notebook of {command.one_line(language)}, not of Python")
    return notebook


def find(names):
    """The notebooks that were named, or all: a list of paths. One line says what is left out.
    Raises ValueError or OSError, before any is executed."""
    if names:
        paths = [path if path.exists() else HERE / path for path in names]
        missing = [str(name) for name, path in zip(names, paths, strict=True) if not path.exists()]
        if missing:
            raise FileNotFoundError(f"no such notebook: {', '.join(missing)}")
    else:
        found = sorted(HERE.glob("*.ipynb"))
        paths = [path for path in found if not path.name.startswith(".") and path.is_file()]
        if len(found) > len(paths):
            warnings.warn(f"left out of {HERE}: {len(found) - len(paths)} hidden or no files",
                          stacklevel=2)
    for path in paths:
        read(path)
    return list(dict.fromkeys(paths))


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
        if any(abs(Decimal(number).adjusted()) > 300 for number in (value, tolerance)):
            raise ValueError(f"a number beyond 1e300 cannot be compared: {line}")
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
    """The modules that a source text imports, anywhere in it. Raises ValueError if it is not plain
    Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"a cell is not plain Python, so it is not known what it imports: {error}"
                         ) from error
    for node in ast.walk(tree):
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
    """A hash of a notebook's code, its data and its stored numbers: a string. Hidden files do not
    count. Raises ValueError if a cell is not plain Python."""
    source = "\n".join(cell.source for cell in code_cells(notebook))
    shipped = {path for folder in ("data", "checkpoints") for path in (ROOT / folder).rglob("*")}
    files = imported_files(source) | {ROOT / "constraints.txt"} | shipped
    digest = hashlib.sha256(source.encode())
    for path in sorted(path for path in files if path.is_file() and path.suffix != ".md"
                       and not path.name.startswith(".")):
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


class ThisPython(AsyncKernelManager):
    """Starts a kernel of the Python that runs this, whatever other kernels are called python3."""

    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(notebook, folder):
    """Executes a copy of the notebook from top to bottom, with `folder` as the working directory.
    -> the copy, with fresh outputs. Raises one of nbclient's errors if a cell fails, OSError if
    there is no kernel."""
    if importlib.util.find_spec("ipykernel") is None:
        raise OSError(f"{sys.executable} has no ipykernel: install requirements-dev.txt")
    fresh = copy.deepcopy(notebook)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(fresh, timeout=SECONDS, kernel_name="python3", record_timing=False,
                            resources=resources, extra_arguments=QUIET,
                            kernel_manager_class=ThisPython)
    try:
        client.execute()
    except DeadKernelError:
        raise
    except RuntimeError as error:  # it died before its first cell
        atexit.unregister(client._cleanup_kernel)  # which would complain that there is none
        raise OSError(f"the kernel does not start: {error}") from error
    return fresh


def check(path, write=False):
    """Executes one notebook, prints the result of the comparison, and stores the new outputs if
    `write`. -> False if a cell failed or, without `write`, if a number disagrees."""
    notebook = read(path)
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
        with command.replacing(path) as temporary:
            temporary.write_text(nbformat.writes(fresh) + "\n", encoding="utf-8")
    elif complaints:
        return False
    print(f"{path.name}: {len(numbers(fresh))} numbers {'stored' if write else 'agree'}, "
          f"{seconds:.0f} s")
    return True


def changed(path):
    """Whether anything that a notebook's numbers depend on has changed since it was stored."""
    notebook = read(path)
    return notebook.metadata.get("fingerprint") != fingerprint(notebook)


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("notebooks", nargs="*", type=command.path, help="files (default: all)")
    parser.add_argument("--changed", action="store_true", help="only those that changed")
    parser.add_argument("--write", action="store_true", help="store the fresh outputs")
    args = parser.parse_args()
    paths = find(args.notebooks)
    if args.changed:
        old = [path for path in paths if not changed(path)]
        skipped = ", ".join(path.name for path in old)
        print(f"not changed since they were stored: {skipped or 'none'}")
        paths = [path for path in paths if path not in old]
    if args.write:
        for path in paths:
            fingerprint(read(path))  # found out now, not after minutes
            command.check_writable(path)
    passed = [check(path, args.write) for path in paths]  # all of them, even after a failure
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    command.run(main)
