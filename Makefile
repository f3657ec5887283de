BIN := .venv/bin

.PHONY: check format test env

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test:
	./scripts/test.sh

env:
	@./scripts/setup_env.sh dev
