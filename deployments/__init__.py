"""The Ray Serve deployments. Thin: what they decide lives in twinkle_serve."""
