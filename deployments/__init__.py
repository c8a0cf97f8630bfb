"""The Ray Serve deployments of the classes in twinkle_serve."""
