PYTHON ?= $(shell for minor in 11 12 13 14; do command -v python3.$$minor && break; done)
INSTALLED := .venv/.installed

.PHONY: help
help: ## List these targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(INSTALLED) ## Install brokertask and its tools into .venv

$(INSTALLED): pyproject.toml
	@sh infra/setup.sh venv "$(PYTHON)"
	@touch $@

.PHONY: tools
tools:
	@sh infra/setup.sh test-tools

BROKER ?= memory
url-of-memory := echo unix:.brokertask/demo/.brokertask/dev.sock
url-of-rabbitmq = $(PYTHON) infra/rabbitmq/node.py find

.PHONY: demo
demo: setup ## Process documents and kill a worker half-way (INPUT=folder BROKER=memory|rabbitmq CONSOLE=1)
	@url=$$($(or $(url-of-$(BROKER)),$(error BROKER is memory or rabbitmq, not "$(BROKER)"))) && \
	BROKERTASK_AMQP_URL=$$url .venv/bin/python -m workers.documents $(if $(INPUT),--input "$(INPUT)") $(if $(CONSOLE),--console)

.PHONY: test
test: setup tools ## Run every test, on a private RabbitMQ too
	@.venv/bin/pytest

.PHONY: check
check: setup tools ## Check format, lint, types and the direction of imports
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/pyright
	.venv/bin/lint-imports

.PHONY: format
format: setup ## Format the code and fix what can be fixed
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

.PHONY: chaos
chaos: setup tools ## Kill workers and brokers under load, and count what was lost
	@.venv/bin/python -m tests.crash.chaos

.PHONY: chaos-steps
chaos-steps: setup tools ## The same under runs of five steps, and count what was repeated
	@.venv/bin/python -m tests.crash.stepping

BENCH := .brokertask/bench

.PHONY: bench
bench: setup tools $(BENCH)/venv/.installed $(BENCH)/client ## Compare with the peers (QUICK=1 CASES=a,b ROUNDS=n MORE=1 GATE=1)
	@.venv/bin/python -m tests.bench $(if $(QUICK),--quick) $(if $(CASES),--cases $(CASES)) \
	$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(MORE),--more) $(if $(GATE),--gate)

$(BENCH)/venv/.installed: tests/bench/peers/requirements.txt
	@echo "Installing the peers into $(@D) (a minute, once)" >&2
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(BENCH)/client: tests/bench/peers/client.c
	@mkdir -p $(@D)
	@command -v gcc >/dev/null && [ -e /usr/include/amqp.h ] || sh infra/setup.sh packages gcc libc6-dev librabbitmq-dev
	@gcc -O2 -Wall -Wextra -Werror -o $@ $< -lrabbitmq

STORE ?= sqlite

.PHONY: history
history: setup tools ## Kill servers that record, hold history to the workers' log (STORE=postgresql ARGS=)
	@.venv/bin/python -m tests.crash.history --store $(STORE) $(ARGS)

.PHONY: bench-history
bench-history: setup tools ## Time pages and counts of a million runs (STORE=postgresql ARGS=)
	@.venv/bin/python -m tests.bench.history --store $(STORE) $(ARGS)

.PHONY: bench-console
bench-console: setup tools ## Time pages of the console over a million runs (STORE=postgresql ARGS=)
	@.venv/bin/python -m tests.bench.console --store $(STORE) $(ARGS)

.PHONY: screenshots
screenshots: setup tools ## Take the pictures of the console that are in the documentation
	@.venv/bin/python -m tests.browser.pictures

.PHONY: rabbitmq
rabbitmq: ## Start a private RabbitMQ and print its URL
	@$(PYTHON) infra/rabbitmq/node.py up

.PHONY: rabbitmq-down
rabbitmq-down: ## Stop the private RabbitMQ; its messages stay
	@$(PYTHON) infra/rabbitmq/node.py down

.PHONY: clean
clean: ## Stop the private RabbitMQ and delete all that make has made
	@$(PYTHON) infra/rabbitmq/node.py down
	@$(PYTHON) infra/rabbitmq/node.py cluster down
	rm -rf .brokertask .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
