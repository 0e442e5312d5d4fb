"""Everything about the GPU path in one command: ``python -m benchmarks.gpu``."""
