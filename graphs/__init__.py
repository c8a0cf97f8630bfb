"""Wires deployments into applications. Nothing else knows who owns whom."""
