"""Single calls, conversations and batches through this service, the bare engine and vLLM's own server."""
