BIN := .venv/bin

.PHONY: help env format lint check test docs golden

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1	\2/p' Makefile | expand -t 10

env: ## make .venv with the pinned packages
	@./scripts/setup_env.sh dev

format: env ## format the code and apply ruff's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: ## check format, lint rules, types and spelling
	@./scripts/lint.sh

check: lint ## lint, then the unit tests
	./scripts/test.sh tests/unit

test: ## run all tests
	./scripts/test.sh

docs: env ## write the generated tables of README.md and docs/ again
	$(BIN)/python scripts/write_key_docs.py

golden: env ## record the golden trajectories again (see CONTRIBUTING.md)
	$(BIN)/python scripts/record_golden.py
