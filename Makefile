# make demo   a fresh machine to pictures: environment, digits router, samples with and without it
# make test   a fresh machine to a tested clone
# make notebooks   executes notebooks/ and compares the numbers printed with the stored ones
# PYTHON=python3.12 make demo   with another Python (3.10 or later)

PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

demo: .venv/run
	.venv/bin/python train_stepwise.py --resume
	.venv/bin/python sample.py --router runs/digits/router.safetensors --compare --out compare.png
	@echo "look at compare.png, runs/digits/router.png and runs/digits/lambda.png"

test: .venv/develop
	.venv/bin/ruff check .
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

notebooks: .venv/develop
	.venv/bin/python notebooks/run.py

.venv/run: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --requirement requirements.txt
	touch $@

.venv/develop: .venv/run requirements-dev.txt
	$(PIP) --requirement requirements-dev.txt
	touch $@

.PHONY: demo test notebooks
