"""Makespan of a batch on many simulated engines, by policy."""
