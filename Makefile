.DEFAULT_GOAL := help
.PHONY: help check format docs test test-gpu sanitize bench bench-gpu

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check:  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

format:  ## fix what ruff can fix
	ruff check --fix .
	ruff format .

docs:  ## what is written from docstrings and from raw results
	python -m docs.api > docs/api.md.new && mv docs/api.md.new docs/api.md
	python -m benchmarks.document > BENCHMARKS.md.new && mv BENCHMARKS.md.new BENCHMARKS.md

test:  ## all tests, a file to a worker; those that need a GPU skip themselves
	pytest -n auto --dist loadfile

test-gpu:  ## the tests of the kernels, on a CUDA device, one after the other
	pytest tests/gpu

sanitize:  ## every kernel under compute-sanitizer, on a CUDA device
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python tests/gpu/sanitize.py

bench:  ## the figures of the README, as JSON
	python -m benchmarks.planning
	python -m benchmarks.smoothing
	python -m benchmarks.accuracy
	python -m benchmarks.attention_accuracy

bench-gpu:  ## the kernels at the sizes of real models, on a CUDA device
	mkdir -p benchmarks/results
	python -m benchmarks.kernels benchmarks/results/kernels.json
