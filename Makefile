.PHONY: setup test lint format docs

PYTHON ?= python3
BIN := .venv/bin

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[test]'
	touch $@

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix src tests
	$(BIN)/ruff format src tests

# docs/config.md and the text of `fourscore ppo --help`, from the table in config_fields.py
docs: setup
	$(BIN)/python -m fourscore.config_fields
