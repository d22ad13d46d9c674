"""Benchmarks: ``python -m bench`` compares results, then times, and writes ``bench/results/*.csv`` and pictures."""
