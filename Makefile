BIN := .venv/bin

.PHONY: help env docs format lint check test golden

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1	\2/p' Makefile | expand -t 10

env: ## make .venv with the pinned packages
	@./scripts/setup_env.sh dev

docs: env ## write the tables of keys and losses in README.md and docs/
	$(BIN)/python scripts/write_key_docs.py

format: env ## format the code and apply ruff's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: ## check format, lint rules, types and spelling
	@./scripts/lint.sh

check: lint ## lint, then the unit tests
	./scripts/test.sh tests/unit

test: ## run all tests
	./scripts/test.sh

golden: env ## record the golden trajectories again (see CONTRIBUTING.md)
	$(BIN)/python scripts/record_golden.py
