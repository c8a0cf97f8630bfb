"""How soon samples come from new weights, how updates affect running samples, and their cost in memory."""
