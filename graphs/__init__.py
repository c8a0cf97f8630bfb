"""Wires deployments into applications. No other module knows which deployment owns which."""

from twinkle_serve.extras import require_extra

require_extra("a service", "server", "torch", "transformers", "blake3")
