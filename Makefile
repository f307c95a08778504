# Two commands for a fresh clone: `make demo` and `make test`. Both make .venv first.
# Tests run in two processes of one thread each, a file at a time, so that fixtures are shared.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-executorch quick coverage install

demo: .venv/installed
	$(BIN)/torchclust run recipes/mnist_cnn.yaml --output runs/mnist_cnn --overwrite

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

# For the inner loop: the same checks, and the quick tests of the rooms that convert nothing.
QUICK := $(addprefix tests/,fitting activations weight data_aware model allocation zoo \
	test_house.py test_api_names.py test_error_messages.py)
quick: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --quiet -m "not slow" $(QUICK)

# ExecuTorch programs, in an environment of their own: their packages want an older numpy and Vela.
# The tests are those marked `executorch`, which `make test` skips.
test-executorch: .venv-executorch/installed
	OMP_NUM_THREADS=1 .venv-executorch/bin/pytest --numprocesses 2 -m executorch \
		$(shell grep --files-with-matches --recursive --include="*.py" "executorch" tests)

# The same tests, slower, and a failure below 95 % of the package's lines and branches.
coverage: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --cov --cov-fail-under=95

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-executorch/installed: pyproject.toml constraints-executorch.txt
	test -x .venv-executorch/bin/python || $(PYTHON) -m venv .venv-executorch
	.venv-executorch/bin/python -m pip install --quiet --constraint constraints-executorch.txt \
		--editable ".[executorch,export,recipes]" hypothesis pytest pytest-xdist
	.venv-executorch/bin/python -m pip check
	touch $@
