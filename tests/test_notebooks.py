"""The stored walkthrough notebooks are well-formed, and the runner's comparison works. `make
notebooks` executes the notebooks themselves."""

import ast
import json
import os
import re
import shutil
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebooks import run, walkthrough

WALKTHROUGHS = pytest.mark.parametrize(
    "path", sorted(run.HERE.glob("*.ipynb")), ids=lambda path: path.stem
)


def read(path):
    return nbformat.read(path, as_version=4)


def texts(value):
    """Every string in a tree of dicts and lists, except those of images."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from () if key.startswith("image/") else texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


# ------------------------------------------------------------------------------------------------
# The form of the stored notebooks


@WALKTHROUGHS
def test_form(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = run.code_cells(notebook)
    assert notebook.cells[0].cell_type == "markdown" and "**" in notebook.cells[0].source
    assert "walkthrough.begin()" in cells[0].source
    assert all(0 < len(cell.source.splitlines()) <= 12 for cell in cells)
    assert max(len(line) for cell in cells for line in cell.source.splitlines()) <= 100
    assert all(len(cell.source) < 1000 for cell in notebook.cells if cell not in cells)
    assert path.stat().st_size < 1e6


@WALKTHROUGHS
def test_outputs_are_stored_without_errors_or_this_machines_paths(path):
    cells = run.code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)  # no warnings
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert len(run.numbers(read(path))) >= 3
    for text in texts(outputs):
        assert not re.search(r"(?<![\w.])(/[\w.-]+){2,}|\b[A-Z]:\\|0x[0-9a-f]{6,}", text), text


@WALKTHROUGHS
def test_nothing_of_the_project_is_defined_again(path):
    """No notebook defines a function or class that a top-level module defines."""
    source = "\n".join(cell.source for cell in run.code_cells(read(path)))
    kinds = ast.FunctionDef | ast.ClassDef
    defined = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}
    for file in run.ROOT.glob("*.py"):
        theirs = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)}
        assert not defined & theirs


def test_every_notebook_is_in_the_readme():
    readme = (run.HERE / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in run.HERE.glob("*.ipynb"))


# ------------------------------------------------------------------------------------------------
# The comparison, on made-up notebooks


def printing(*texts, source="pass"):
    """A notebook with one cell for each text, which prints it."""
    cells = [new_markdown_cell("**A question?**")]
    for text in texts:
        output = new_output("stream", name="stdout", text=text)
        cells.append(new_code_cell(source, outputs=[output], execution_count=1))
    return new_notebook(cells=cells)


STORED = printing("hello\nCUR 30.3 % (+- 0.1)\n", "seconds 1.5\nerror of fora:2 2.4e-3 (+- 1e-4)\n")


def test_numbers_are_read():
    assert run.numbers(STORED) == {
        "CUR ... % (+- 0.1)": (run.Decimal("30.3"), run.Decimal("0.1")),
        "error of fora:2 ... (+- 1e-4)": (run.Decimal("0.0024"), run.Decimal("0.0001")),
    }


@pytest.mark.parametrize("cur, error", [("30.3", "2.4e-3"), ("30.4", "0.00230"), ("30.2", "25e-4")])
def test_numbers_within_their_tolerance_agree(cur, error):
    """The tolerance itself is allowed. Times, other text and the cells do not matter."""
    fresh = printing(f"seconds 99\nCUR {cur} % (+- 0.1)\nerror of fora:2 {error} (+- 1e-4)\n")
    assert run.compare(STORED, fresh) == []


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("CUR 30.41 % (+- 0.1)", "CUR ... % (+- 0.1): stored 30.3, now 30.41"),
        ("CUR -30.3 % (+- 0.1)", "CUR ... % (+- 0.1): stored 30.3, now -30.3"),
        ("", "no longer printed: CUR ... % (+- 0.1)"),
        ("CUR 30.3 % (+- 9)", "no longer printed: CUR ... % (+- 0.1)"),
        ("CUR 30.3 (+- 0.1)", "no longer printed: CUR ... % (+- 0.1)"),
        ("CUR 30.3 % (+- 0.1)\nnew 1 (+- 0)", "printed but not stored: new ... (+- 0)"),
    ],
)
def test_disagreements_are_reported(text, complaint):
    fresh = printing(f"{text}\nerror of fora:2 2.4e-3 (+- 1e-4)\n")
    assert complaint in run.compare(STORED, fresh)


@pytest.mark.parametrize("text", ["CUR nan % (+- 0.1)", "CUR inf % (+- 0.1)", "CUR (+- 0.1)",
                                  "a 1 (+- 0), b 2 (+- 0)", "a 1 (+- 0)\na 2 (+- 0)"])
def test_lines_that_cannot_be_compared_are_errors(text):
    with pytest.raises(ValueError):
        run.compare(STORED, printing(text))


def test_a_notebook_without_stored_numbers_does_not_pass():
    assert run.compare(printing("hello"), printing("hello"))


# ------------------------------------------------------------------------------------------------
# Which notebooks are executed again


def test_imports_are_followed():
    files = {path.name for path in run.imported_files("def f():\n    import sample\n")}
    assert {"sample.py", "cache.py", "models.py", "dit.py", "checkpoint.py"} <= files
    assert "train_stepwise.py" not in files and "metrics.py" not in files
    files = {path.name for path in run.imported_files("from experiments import pretrain")}
    assert {"pretrain.py", "shipped.py"} <= files


def test_the_fingerprint_changes_with_what_the_numbers_depend_on(tmp_path, monkeypatch):
    """It changes with cells, numbers, modules that are imported directly or by another module, and
    shipped files. It does not change with text, times, or modules that are not imported."""
    for name in ("data", "checkpoints", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoints" / "table").mkdir()
    files = {"one.py": "import two", "two.py": "", "other.py": "", "constraints.txt": "",
             "data/digits.npz": "", "data/README.md": "", "checkpoints/table/a.json": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "HERE", tmp_path / "notebooks")

    def fingerprint(text="a 1 (+- 0)\n", source="import one", change=None):
        if change:
            (tmp_path / change).write_text("# changed")
        notebook = printing(text, source=source)
        notebook.cells[0].source = str(change)
        result = run.fingerprint(notebook)
        if change:
            (tmp_path / change).write_text(files[change])
        return result

    same = fingerprint()
    assert fingerprint("seconds 3\na 1 (+- 0)\n") == same
    assert fingerprint(change="other.py") == fingerprint(change="data/README.md") == same
    changed = {fingerprint("a 2 (+- 0)\n"), fingerprint(source="import one\n"), same,
               *(fingerprint(change=name) for name in ("one.py", "two.py", "data/digits.npz"))}
    assert len(changed) == 6
    assert fingerprint(change="constraints.txt") not in changed
    assert fingerprint(change="checkpoints/table/a.json") != same


def test_running_storing_and_failing(tmp_path, monkeypatch, capsys):
    """One made-up notebook, really executed: stored, then failing. Then its comparison with stored
    numbers: it agrees, disagrees, and counts as changed after its stored number was edited."""
    path = tmp_path / "made_up.ipynb"
    source = 'import os\nprint("in", os.path.basename(os.getcwd()), 7, "(+- 0)")'
    nbformat.write(printing("", source=source), path)
    assert run.changed(path) and run.check(path, write=True) and not run.changed(path)
    stored = path.read_text()
    assert list(run.numbers(read(path))) == [f"in {tmp_path.name} ... (+- 0)"]
    path.write_text(stored.replace("import os", "import no_such_module"))
    assert not run.check(path) and "no_such_module" in capsys.readouterr().out

    path.write_text(stored)
    fresh = read(path)
    monkeypatch.setattr(run, "execute", lambda notebook, folder: fresh)  # a kernel takes seconds
    assert run.check(path) and "1 numbers agree" in capsys.readouterr().out
    path.write_text(stored.replace(f"{tmp_path.name} 7", f"{tmp_path.name} 8"))
    assert run.changed(path) and not run.check(path)
    assert "stored 8, now 7" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The first cell


def test_the_first_cell_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(walkthrough, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="in a clone of the repository"):
        walkthrough.begin()
    shutil.copy(run.ROOT / "dit.py", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch>=2.6\nno_such_package  # for nothing\n")
    with pytest.raises(ImportError, match="not installed: no_such_package; .*pip install -r"):
        walkthrough.begin()


def test_the_first_cell_outside_of_a_clone():
    first = run.code_cells(read(run.HERE / "1_dit.ipynb"))[0].source
    with pytest.raises(ImportError, match="a clone of the repository"):
        exec(first, {})  # the tests' path has no walkthrough.py


# ------------------------------------------------------------------------------------------------
# The command

CELL = {"cell_type": "code", "source": "print('x 1 (+- 0)')", "metadata": {}, "outputs": [],
        "execution_count": None, "id": "a"}
GOOD = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [CELL]}
BAD = {  # name: (the file's content, what is said of it)
    "no_json": ("import torch\n", "is not a notebook"), "empty": ("", "is not a notebook"),
    "binary": (b"\xff\xfe\x00" * 9, "is not a notebook"), "list": ([], "is not a notebook"),
    "nothing_in_it": ({}, "is not a notebook"), "number": (3, "is not a notebook"),
    "no_cells": ({**GOOD, "cells": None}, "is not a notebook"),
    "cells_of_text": ({**GOOD, "cells": ["x"]}, "is not a notebook"),
    "future": ({**GOOD, "nbformat": 99}, "is not a notebook"),
    "source_of_numbers": ({**GOOD, "cells": [{**CELL, "source": 3}]}, "is not a notebook"),
    "julia": ({**GOOD, "metadata": {"kernelspec": {"name": "julia", "display_name": "Julia",
                                                   "language": "julia"}}}, "of julia, not of Py"),
    "no_python": ({**GOOD, "cells": [{**CELL, "source": "def f(:"}]}, "is not plain Python"),
    "magic": ({**GOOD, "cells": [{**CELL, "source": "%time 3"}]}, "is not plain Python"),
}


def run_main(monkeypatch, capsys, *argv):
    """-> exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["run.py", *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        run.command.run(run.main)
    return caught.value.code, *capsys.readouterr()


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_notebook_of_python_ends_in_one_line_before_any_is_executed(
    tmp_path, monkeypatch, capsys, name
):
    content, words = BAD[name]
    (tmp_path / "good.ipynb").write_text(json.dumps(GOOD))
    path = tmp_path / f"{name}.ipynb"
    path.write_bytes(content if isinstance(content, bytes) else content.encode()
                     if isinstance(content, str) else json.dumps(content).encode())
    before = path.read_bytes()
    monkeypatch.setattr(run, "execute", None)  # it would be a TypeError
    code, out, err = run_main(monkeypatch, capsys, tmp_path / "good.ipynb", path, "--write")
    assert code == 2 and words in err and len(err.splitlines()) == 1 and out == ""
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_folders_pipes_and_missing_files_are_told(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "folder.ipynb").mkdir()
    for name, words in (("pipe.ipynb", "not an ordinary file"), ("none.ipynb", "no such notebook"),
                        ("folder.ipynb", "folder.ipynb")):
        code, _, err = run_main(monkeypatch, capsys, tmp_path / name)
        assert code == 2 and words in err and len(err.splitlines()) == 1


def test_hidden_notebooks_are_left_out_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "good.ipynb").write_text(json.dumps(GOOD))
    (tmp_path / "._good.ipynb").write_bytes(b"\0\5\26\7")
    with pytest.warns(UserWarning, match="1 hidden"):
        assert run.find([]) == [tmp_path / "good.ipynb"]


def test_two_notebooks_of_one_name_are_two(tmp_path, monkeypatch, capsys):
    """Of two folders; one is as it was stored, and only that one is skipped."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        nbformat.write(printing("a 1 (+- 0)\n"), tmp_path / folder / "x.ipynb")
    notebook = read(tmp_path / "a" / "x.ipynb")
    notebook.metadata["fingerprint"] = run.fingerprint(notebook)
    nbformat.write(notebook, tmp_path / "a" / "x.ipynb")
    seen = []
    monkeypatch.setattr(run, "check", lambda path, write: seen.append(path) or True)
    code, _, _ = run_main(monkeypatch, capsys, "--changed", tmp_path / "a" / "x.ipynb",
                          tmp_path / "b" / "x.ipynb")
    assert code == 0 and seen == [tmp_path / "b" / "x.ipynb"]


def test_the_kernel_is_the_python_that_runs_this(tmp_path, monkeypatch):
    """Though another kernel is called python3 where Jupyter looks first. The right value:
    sys.executable."""
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(
        {"argv": ["/nowhere/python", "{connection_file}"], "display_name": "x",
         "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    fresh = run.execute(printing("", source="import sys\nprint(sys.executable)"), tmp_path)
    assert list(run.printed_lines(fresh)) == [sys.executable]


@pytest.mark.parametrize("change", ["no ipykernel", "dies at once"])
def test_a_kernel_that_is_not_there_is_told(tmp_path, monkeypatch, change):
    if change == "no ipykernel":
        monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(run.ThisPython, "kernel_spec", run.KernelSpec(
            argv=[sys.executable, "-c", "0"], display_name="x", language="python"))
    with pytest.raises(OSError, match="has no ipykernel|does not start"):
        run.execute(printing("", source="3"), tmp_path)
