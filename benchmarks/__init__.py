"""Measurements. Each prints its figures and can write them to benchmarks/results/."""
