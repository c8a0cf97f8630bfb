"""The router on a real cluster."""
