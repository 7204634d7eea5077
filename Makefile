.DEFAULT_GOAL := help
.PHONY: help check format test test-gpu bench bench-gpu

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check:  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

format:  ## fix what ruff can fix
	ruff check --fix .
	ruff format .

test:  ## all tests; those that need a GPU skip themselves
	pytest

test-gpu:  ## the tests of the kernels, on a CUDA device
	pytest tests/gpu

bench:  ## the figures of the README, as JSON
	python -m benchmarks.planning
	python -m benchmarks.smoothing
	python -m benchmarks.recognition

bench-gpu:  ## the kernels at the sizes of real models, on a CUDA device
	mkdir -p benchmarks/results
	python -m benchmarks.kernels benchmarks/results/kernels.json
