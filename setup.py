"""`pip install .` copies the modules, the data and the small models into an environment, side by
side as they are here. Their names are short (cache, data, models, text), so it should be one of
their own. To read and change the code, use a clone and `make demo` instead."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REQUIREMENTS = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()

setup(
    name="harmonica-in-plain-pytorch",
    version="0.1",
    python_requires=">=3.10",
    install_requires=[line.partition("#")[0].strip() for line in REQUIREMENTS],
    py_modules=sorted(path.stem for path in HERE.glob("*.py") if path.stem != "setup"),
    packages=["checkpoints", "checkpoints.table", "data", "experiments"],
    package_data={"": ["*"]},
)
