"""Benchmarks of the CUDA backend and of the GPUs that it runs on."""
