"""The HTTP gateway against vLLM's own server, and its parts: Serve's proxy, replicas, `/sample` and sessions."""
