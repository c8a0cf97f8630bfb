"""Modules that scripts for Twinkle's sampler import beside it: `twinkle.infra` is `twinkle_serve.upstream.infra`.

They are served after `import twinkle_serve.as_twinkle`. Names and meanings follow Twinkle.
"""
