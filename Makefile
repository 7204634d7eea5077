.PHONY: check format test test-gpu bench

check:  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	pytest

test-gpu:  ## skips with a reason where there is no CUDA device
	pytest tests/gpu

bench:  ## figures of the README, as JSON under benchmarks/results
	python -m benchmarks.planning
	python -m benchmarks.smoothing
