"""The gateway's application graph."""

# No `from __future__ import annotations` here: Ray Serve reads the annotation of `args` to parse the config.

from ray.serve import Application
from ray.serve.context import _get_global_client

from deployments.gateway import gateway_deployment
from twinkle_serve.gateway.config import GatewayArgs, require_key_beyond_loopback
from twinkle_serve.gateway.keys import Keys


def build(args: GatewayArgs) -> Application:
    """Builds the application: one deployment, which finds its samplers by the names of their applications.

    Raises:
        ConfigError: Serve or the gateway listens beyond this machine and there is no key, or the keys cannot be read.
    """
    keys = Keys.read(args.keys_file)
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        require_key_beyond_loopback(str(client.http_config.host), bool(keys))
    if args.traces is not None:
        args.traces.check()
    if args.listen is not None:
        require_key_beyond_loopback(args.listen.host, bool(keys), "listen")
    application: Application = gateway_deployment.options(num_replicas=args.num_replicas).bind(args, keys)
    return application
