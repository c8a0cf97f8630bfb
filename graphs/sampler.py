"""The sampler: every edge of the service is in `build`."""

# No `from __future__ import annotations` here: Ray Serve reads the annotation of `args` to parse the config.

from pathlib import Path

import ray
from ray.serve import Application

from deployments.engine import engine_deployment, engine_name
from deployments.router import router_deployment
from deployments.store import store_deployment
from graphs.versions import common_parts, engine_parts, versioned
from twinkle_serve import hub
from twinkle_serve.adapters import describe_adapter, read_adapter
from twinkle_serve.config import ServiceArgs
from twinkle_serve.engines import check_engine_args
from twinkle_serve.placement import NodeResources, Placement, place, place_in_group
from twinkle_serve.remote import group_devices

NODE_SHARE = 0.001
"""Of the resource that names a node, which has 1 of it: to be there, without keeping others away."""


def build(args: ServiceArgs) -> Application:
    """store -> engine x dp_size -> router; store -> router.

    Deployed again with another dp_size, store, router and the engines that stay go on.

    Raises:
        MeshError: the mesh is larger than the cluster, or than its group.
        EngineArgsError: engine_args that the engine does not have.
        ModelNotFoundError: no such model.
        AdapterError: an adapter that cannot be read.
    """
    mesh = args.device_mesh.mesh()
    if args.device_group is None:
        placement = place(mesh, cluster())
    else:
        cluster()
        placement = place_in_group(mesh, group_devices(args.device_group))
    check_engine_args(args.engine, args.engine_args)
    model = hub.resolve(args.model_id, revision=args.revision, weights=False)
    if hub.is_path(args.model_id):
        # Replicas may run in another directory.
        args = args.model_copy(update={"model_id": str(model.absolute())})
    for path in args.adapters.values():
        describe_adapter(read_adapter(path))
    adapters = {name: str(Path(path).expanduser().absolute()) for name, path in args.adapters.items()}
    args = args.model_copy(update={"adapters": adapters})
    common = common_parts(args)
    weights = versioned(store_deployment, common).bind(args)
    engines = {}
    for rank in range(mesh.dp_size):
        options = engine_deployment.options(name=engine_name(rank), **engine_options(placement, rank))
        bound = versioned(options, common, engine_parts(placement, rank)).bind(args, rank, placement, weights)
        engines[engine_name(rank)] = bound
    # user_config reaches a router that runs; the handles, one that starts.
    router = router_deployment.options(user_config={"engines": list(engines)})
    application: Application = versioned(router, common).bind(args, engines, weights)
    return application


def engine_options(placement: Placement, rank: int) -> dict[str, object]:
    """What an engine's deployment asks of Ray: devices of one node, a placement group over several, or a place by its
    group's devices, which the group holds."""
    resources: dict[str, object] = {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus}
    if placement.engines:
        resources["resources"] = {placement.engines[rank][0].resource: NODE_SHARE}
    if not placement.bundles:
        return {"ray_actor_options": resources}
    bundles = [dict(bundle) for bundle in placement.bundles]
    return {
        "ray_actor_options": resources,
        "placement_group_bundles": bundles,
        "placement_group_strategy": "PACK",
    }


def cluster() -> list[NodeResources]:
    """What each living node has; starts or joins a cluster if this process is in none."""
    if not ray.is_initialized():
        ray.init(namespace="serve")
    return [
        NodeResources(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
