"""Tinker's sampling protocol, as its public SDK speaks it."""
