"""The sampler's application graph: every edge of the service is in `build`."""

# No `from __future__ import annotations` here: Ray Serve reads the annotation of `args` to parse the config.

from pathlib import Path

import ray
from ray.serve import Application

from deployments.engine import engine_deployment, engine_name
from deployments.router import router_deployment
from deployments.store import store_deployment
from graphs.versions import common_parts, engine_parts, versioned
from twinkle_serve import hub
from twinkle_serve.adapter_description import describe_adapter
from twinkle_serve.adapters import read_adapter
from twinkle_serve.config import ServiceArgs
from twinkle_serve.engines import check_engine_args
from twinkle_serve.placement import NodeResources, Placement, place, place_in_group
from twinkle_serve.remote import group_devices
from twinkle_serve.remote.clusters import living_nodes

NODE_SHARE = 0.001
"""Share of a node's own resource (each node has 1) that pins an engine there without excluding others."""


def build(args: ServiceArgs) -> Application:
    """Builds the application: store -> engine x dp_size -> router; store -> router.

    If it is deployed again with another dp_size, the store, the router and the remaining engines keep running.

    Raises:
        MeshError: the mesh does not fit the cluster or its group.
        EngineArgsError: engine_args that the engine does not have or does not accept.
        ModelNotFoundError: no such model.
        AdapterError: an adapter cannot be read.
    """
    mesh = args.device_mesh.mesh()
    if args.device_group is None:
        placement = place(mesh, cluster())
    else:
        cluster()
        placement = place_in_group(mesh, group_devices(args.device_group))
    check_engine_args(args.engine, args.engine_args)
    if args.traces is not None:
        args.traces.check()
    model = hub.resolve(args.model_id, revision=args.revision, weights=False)
    if hub.is_path(args.model_id):
        # Replicas may run in another working directory.
        args = args.model_copy(update={"model_id": str(model.absolute())})
    for path in args.adapters.values():
        describe_adapter(read_adapter(path))
    adapters = {name: str(Path(path).expanduser().absolute()) for name, path in args.adapters.items()}
    args = args.model_copy(update={"adapters": adapters})
    common = common_parts(args)
    weights = versioned(store_deployment, common).bind(args)
    tracks = args.tracks_of([engine_name(rank) for rank in range(mesh.dp_size)])
    engines = {}
    for rank, (name, track) in enumerate(tracks.items()):
        options = engine_deployment.options(name=name, **engine_options(placement, rank))
        parts = engine_parts(placement, rank, track)
        engines[name] = versioned(options, common, parts).bind(args, rank, track, placement, weights)
    # A running router gets the new names by user_config; a starting one gets the handles.
    router = router_deployment.options(user_config={"engines": tracks})
    application: Application = versioned(router, common, args.track_names).bind(args, engines, weights)
    return application


def engine_options(placement: Placement, rank: int) -> dict[str, object]:
    """Resources that an engine's deployment requests from Ray: devices of one node, a placement group over several
    nodes, or only a place on the node of its group's devices, which the group holds."""
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
    """Returns the resources of each living node; joins or starts a cluster if this process is not in one."""
    if not ray.is_initialized():
        ray.init(namespace="serve")
    return living_nodes()
