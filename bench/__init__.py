"""``python -m bench SECTION`` compares results, then times, and writes ``bench/results/*.csv`` and pictures."""
