# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install install-dev install-peers demo test test-fast test-beam check format bench chaos wheel wheel-test clean

install: .venv/.installed
install-dev: .venv/.installed-dev
install-peers: .venv/.installed-peers

.venv/.installed: requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -r requirements.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv/.installed-peers: .venv/.installed-dev requirements-peers.txt
	$(BIN)/python -m pip install --quiet -r requirements-peers.txt
	touch $@

# On Linux glibc then asks for huge pages: steps on a CPU take a tenth less. Elsewhere it is nothing.
demo bench: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

demo: install  ## pretrain on the bundled images, k-NN, attention picture
	$(BIN)/dino-jax demo --workdir=runs/demo

test: install-dev  ## the whole test suite
	$(BIN)/python -m pytest

test-fast: install-dev  ## what takes less than seconds a test, for work in progress
	$(BIN)/python -m pytest -m "not slow"

# Beam 2.77 needs older Pillow, protobuf and pyarrow than the other libraries, so it does not go into .venv.
.venv-beam/.installed: requirements.txt requirements-beam.txt
	$(PYTHON) -m venv .venv-beam
	.venv-beam/bin/python -m pip install --quiet -r requirements.txt -r requirements-beam.txt
	touch $@

test-beam: .venv-beam/.installed  ## what runs on Apache Beam, in an environment of its own
	PYTHONPATH=. .venv-beam/bin/python -m pytest tests/data/test_beam.py

check: install-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dino_jax train.py evaluate.py

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install-peers  ## speed of every stage on this machine, beside PyTorch's
	$(BIN)/python -m benchmarks

chaos: install  ## the demo killed at 20 random moments, and stopped at 10: the same bits at the end
	$(BIN)/python -m benchmarks.chaos --kills=20
	$(BIN)/python -m benchmarks.chaos --kills=10 --signal=SIGTERM --config.epochs=12

wheel: install-dev  ## the sdist and the wheel, in dist/
	$(BIN)/python -m build

wheel-test: install-dev  ## the wheel in a fresh environment, outside the checkout
	.ci/wheel

clean:
	rm -rf .venv .venv-beam build dist dino_jax.egg-info .pytest_cache .ruff_cache .mypy_cache
