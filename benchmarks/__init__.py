"""Measurements. Each prints its command's numbers and can write them to benchmarks/results/."""
