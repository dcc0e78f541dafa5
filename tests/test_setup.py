"""What `pip install .` takes along."""

import runpy
from pathlib import Path

import pytest

import models
import shipped

setuptools = pytest.importorskip("setuptools")  # pip brings it for the building
ROOT = Path(__file__).parent.parent


def test_modules_data_and_small_models_are_installed_side_by_side(monkeypatch, tmp_path):
    """All that the modules look for beside them, found from any folder."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **words: given.update(words))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "setup.py"))
    assert {f"{name}.py" for name in given["py_modules"]} == {
        path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    folders = {ROOT / name.replace(".", "/") for name in given["packages"]}
    assert {models.SHIPPED, models.SHIPPED / "table", shipped.DATA, ROOT / "experiments"} == folders
    assert given["package_data"] == {"": ["*"]}  # of each, every file
    assert not [path for folder in folders - {models.SHIPPED} for path in folder.iterdir()
                if path.is_dir() and path.name != "__pycache__"]  # no folder is forgotten
    assert "torch>=2.6" in given["install_requires"]
    assert not [line for line in given["install_requires"] if "#" in line or not line]
