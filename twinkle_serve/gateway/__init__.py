"""The HTTP gateway: OpenAI, Anthropic, Tinker and native HTTP over routers. Free of Ray."""
