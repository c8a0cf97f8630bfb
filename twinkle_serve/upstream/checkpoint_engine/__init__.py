"""`twinkle.checkpoint_engine`: weights of a model in this process for a sampler, by `update_weights`."""

from twinkle_serve.upstream.checkpoint_engine.manager import CheckpointEngineManager

__all__ = ["CheckpointEngineManager"]
