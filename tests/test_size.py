"""What keeps the core readable: sizes that were reached once and are to stay."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHOD = ("cache.py", "router.py", "proxy.py", "train_stepwise.py")


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def imported(path):
    """The project's modules that a file imports, directly or not, with the file itself: a set."""
    found, paths = {path}, [path]
    while paths:
        for node in ast.walk(ast.parse(paths.pop().read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            new = {ROOT / f"{name.replace('.', '/')}.py" for name in names} - found
            new = {file for file in new if file.is_file()}
            found |= new
            paths += new
    return found


def code():
    """The project's own code, without tests and notebooks."""
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")])


def test_the_method_is_read_in_one_sitting():
    assert sum(lines(ROOT / name) for name in METHOD) < 700
    assert {path.name: lines(path) for path in code() if lines(path) > 530} == {}


def test_the_proxy_needs_little_beside_it():
    files = imported(ROOT / "proxy.py")
    assert {path.name for path in files} == {"proxy.py", "cache.py", "samplers.py"}
    assert sum(lines(path) for path in files - {ROOT / "proxy.py"}) < 600


def test_networks_cache_and_proxy_import_no_command():
    commands = {"sample.py", "train_stepwise.py", "metrics.py", "training.py"}
    for name in ("dit.py", "pixart.py", "vae.py", "text.py", "cache.py", "proxy.py", "router.py",
                 "samplers.py", "models.py"):
        assert not {path.name for path in imported(ROOT / name)} & commands, name


def test_functions_are_short():
    length = {}
    for path in code():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length[f"{path.name}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert statistics.median(length.values()) < 10
    assert {name: count for name, count in length.items() if count >= 60} == {}


def test_readme_is_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 2000
