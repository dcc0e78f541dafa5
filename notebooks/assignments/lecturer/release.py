"""Makes the zip for students: the modules, their tests, data, models, notebooks and assignments,
without this folder, the tests of grading, and a line of any solution.

    python notebooks/assignments/lecturer/release.py --out release.zip

It takes the files on the disk, so it also works in a copy, and for an assignment that is not
committed yet. It takes known files only (KNOWN), and in a clone only those that git tracks or that
belong to a new assignment: submissions, grades and withheld cases stay where they are.

Before it writes, it looks for the solutions and the withheld cases in every file of the release: a
stub that no longer raises for one of its tasks, or a line of 30 characters or more from the body of
a solution's function, in a module, a notebook or a text. If it finds any, it names them and writes
nothing.
"""

import sys
from pathlib import Path

LECTURER = Path(__file__).resolve().parent
ASSIGNMENTS = LECTURER.parent
ROOT = ASSIGNMENTS.parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    import startup  # noqa: F401, before the slow imports

import ast  # noqa: E402
import collections  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import warnings  # noqa: E402
import zipfile  # noqa: E402

import command  # noqa: E402

ASSIGNMENT = ("README.md", "student.py", "cases.py", "test_student.py", "plots.ipynb",
              "probes.py", "leaderboard.py", "conftest.py")  # what belongs to an assignment
COMMON = "conftest", "folders", "comparing", "messages", "runner", "sandbox"  # to all of them
KNOWN = (
    "*.py", "README.md", "LICENSE*", "Makefile", "pyproject.toml", "requirements*.txt",
    "constraints.txt", "data/*.npz", "data/*.csv", "data/*.txt", "data/README.md",
    "checkpoints/*.safetensors", "checkpoints/*.npz", "checkpoints/README.md",
    "checkpoints/table/*.json", "checkpoints/table/*.safetensors", "docs/*.md", "docs/*.png",
    "experiments/*.py", "notebooks/*.ipynb", "notebooks/*.py", "notebooks/README.md", "tests/*.py",
    "notebooks/assignments/README.md",
    *(f"notebooks/assignments/{name}.py" for name in COMMON),
    *(f"notebooks/assignments/a[0-9]*/{name}" for name in ASSIGNMENT),
)  # fmt: skip
KEPT_BACK = "test_assignments.py", "test_grading.py"  # they need the lecturer's folder
SUBSTANTIAL = 30  # characters


def released_files():
    """The files of the release, as paths from the root, sorted. A warning counts the files beside
    them that are left out."""
    foreign = untracked()
    found = {path.relative_to(ROOT) for pattern in KNOWN for path in ROOT.glob(pattern)
             if is_own(path)}
    found = {path for path in found
             if path.as_posix() not in foreign and path.name not in KEPT_BACK}
    folders = ("data", "checkpoints", "docs", "experiments", "notebooks")
    beside = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")}
    stay = collections.Counter(
        path.parent.as_posix() for path in sorted(beside - found)
        if not (ROOT / path).is_dir() and not path.is_relative_to(LECTURER.relative_to(ROOT))
        and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    )
    if stay:
        words = ", ".join(f"{count} in {folder}" for folder, count in stay.items())
        warnings.warn(f"not known as a part of the course, so left out: {words}", stacklevel=2)
    return sorted(found)


def is_own(path):
    """Whether a path is an ordinary file of this repository, not a link to one elsewhere."""
    return path.is_file() and path.resolve().is_relative_to(ROOT.resolve())


def untracked():
    """In a clone, the files that git does not track: a set of paths from the root, as text. Those
    of an assignment that is not committed yet do not count: without its test_student.py nobody
    could have put it there by mistake."""
    if not (ROOT / ".git").exists():
        return set()
    try:
        listed = subprocess.run(["git", "ls-files", "--others", "-z"], cwd=ROOT, check=True,
                                capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        warnings.warn("git does not say what it tracks here: every file with a known name goes out",
                      stacklevel=2)
        return set()
    names = {name.decode(errors="surrogateescape") for name in listed.split(b"\0") if name}
    new = {Path(name).parent for name in names if Path(name).name == "test_student.py"}
    return {name for name in names if Path(name).parent not in new}


# ------------------------------------------------------------------------------------------------
# What must not be released


def functions(path):
    """The functions of a file: yields the name, the tree and the lines of the body, stripped and
    without the docstring."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            first = body[0].lineno - 1 if body else node.end_lineno
            yield node.name, node, [line.strip() for line in lines[first : node.end_lineno]]


def raised_tasks(node):
    """The tasks that are named in the `raise` statements under a node."""
    raises = [ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Raise)]
    return set(re.findall(r"NotImplementedError\(.(task\d+_\d+)", " ".join(raises)))


def check_stub(folder):
    """Raises ValueError if the stub does not raise for every task of its tests."""
    tasks = set(re.findall(r"task\d+_\d+", (folder / "test_student.py").read_text("utf-8")))
    raised = raised_tasks(ast.parse((folder / "student.py").read_text("utf-8")))
    if tasks - raised:
        missing = ", ".join(sorted(tasks - raised))
        raise ValueError(f"{folder.relative_to(ROOT)}/student.py does not raise "
                         f"NotImplementedError for {missing}: it seems to be solved; restore it")


def solution_lines(folder):
    """The substantial lines of a solution's own code. These are the lines of its functions' bodies,
    without the heads of loops, which all code shares, and without the functions that the stub
    already contains."""
    solution = LECTURER / "solutions" / folder.name / "student.py"
    if not solution.is_file():
        raise FileNotFoundError(f"no {solution}: what it holds cannot be kept out of the release")
    stub = functions(folder / "student.py")
    given = {line for _, node, lines in stub if not raised_tasks(node) for line in lines}
    lines = {line for _, _, lines in functions(solution) for line in lines}
    return sorted(line for line in lines - given
                  if len(line) >= SUBSTANTIAL and not re.match(r"for .* in .*:$", line))


def withheld_lines(folder):
    """The substantial lines of the withheld cases that are not in those that students see.
    Raises ValueError if the seeds of both are the same: then the withheld file was put there."""
    withheld = LECTURER / "solutions" / folder.name / "cases.py"
    if not withheld.is_file() or not (folder / "cases.py").is_file():
        return []
    theirs, ours = (path.read_text(encoding="utf-8") for path in (folder / "cases.py", withheld))
    seeds = [re.findall(r"^SEEDS *=.*", text, re.MULTILINE) for text in (theirs, ours)]
    if theirs == ours or (seeds[0] and seeds[0] == seeds[1]):
        raise ValueError(f"{folder.relative_to(ROOT)}/cases.py has the withheld numbers: restore "
                         "the one that students see")
    lines = {line.strip() for line in ours.splitlines()} - {
        line.strip() for line in theirs.splitlines()}
    return sorted(line for line in lines if len(line) >= SUBSTANTIAL and "=" in line)


def squeezed(text):
    """A text without white space, quotes, backslashes and pictures. In it a line of code is the
    same however it is indented or stored (a notebook is JSON)."""
    return re.sub(r"[\s\"'\\]+", "", re.sub(r"[A-Za-z0-9+/=]{300,}", "", text))


def check(paths):
    """Raises ValueError if a file in `paths` holds a line of a solution. The message names both."""
    folders = sorted(file.parent for file in ASSIGNMENTS.glob("a*/student.py"))
    for folder in folders:
        check_stub(folder)
    forbidden = [(folder.name, line) for folder in folders
                 for line in [*solution_lines(folder), *withheld_lines(folder)]]
    forbidden = [(name, line, squeezed(line)) for name, line in forbidden]
    leaks = []
    for path in paths:
        try:
            text = squeezed((ROOT / path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # an array or a picture
            continue
        leaks += [f"{path} holds `{line}` of the solution of {name}"
                  for name, line, short in forbidden if short in text]
    if leaks:
        raise ValueError("; ".join(leaks) + ": remove it, or write it differently in one of them")


def make(out):
    """Writes the zip, with every file under a folder of the zip's name. -> the paths in it. The
    same files always make the same zip. Raises ValueError if it would contain a solution."""
    command.check_writable(out)
    paths = released_files()
    check(paths)
    with command.replacing(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for path in paths:
            # ZipInfo has a fixed date, so equal files make an equal zip.
            entry = zipfile.ZipInfo(f"{out.stem}/{path.as_posix()}")
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (ROOT / path).read_bytes(), zipfile.ZIP_DEFLATED)
    return paths


def main():
    parser = command.Parser(__doc__)
    parser.add_argument("--out", type=command.path, default=Path("release.zip"),
                        help="(release.zip)")
    args = parser.parse_args()
    if args.out.suffix != ".zip":
        raise ValueError(f"--out is a NAME.zip, not {args.out}")
    paths = make(args.out)
    size = args.out.stat().st_size / 1e6
    print(f"wrote {args.out}: {len(paths)} files, {size:.1f} MB, no line of a solution in them")


if __name__ == "__main__":
    command.run(main)
