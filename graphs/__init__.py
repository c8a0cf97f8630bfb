"""Wires deployments into applications. Nothing else knows who owns whom."""

from twinkle_serve.extras import require_extra

require_extra("a service", "server", "torch", "transformers", "blake3")
