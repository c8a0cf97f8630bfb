"""Policies and bookkeeping of the router, free of Ray."""
