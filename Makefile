BIN := .venv/bin

.PHONY: help env format lint check unit test test-server docs docs-site golden

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1	\2/p' Makefile | expand -t 12

env: ## make .venv with the pinned packages
	@./scripts/setup_env.sh dev

format: env ## format the code and apply ruff's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: ## check format, lint rules, types, spelling and links
	@./scripts/lint.sh

check: env ## lint and the fast unit tests, side by side
	@$(MAKE) --no-print-directory --jobs 2 lint unit

unit: ## run the fast unit tests, one process per core
	@./scripts/test.sh tests/unit -m "not slow" --numprocesses $$(nproc)

test: ## run all tests
	./scripts/test.sh

test-server: ## test against a real vLLM, with its figures: DPO_DIST_VLLM=PATH/bin/vllm DPO_DIST_MODEL=FOLDER
	./scripts/test.sh tests/server --numprocesses 0 -rP

docs: env ## write the generated tables of docs/
	$(BIN)/python scripts/write_key_docs.py
	$(BIN)/python scripts/write_fits.py

docs-site: env ## build a searchable site of README.md and docs/ in build/site
	$(BIN)/mkdocs build --strict

golden: env ## record the golden trajectories again (see CONTRIBUTING.md)
	$(BIN)/python scripts/record_golden.py
