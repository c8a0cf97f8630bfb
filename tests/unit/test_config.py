"""The config: every YAML file in the repository is valid, and every mistake is reported."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graphs.cluster import http_host
from graphs.config_file import check_config_file
from twinkle_serve import errors
from twinkle_serve.config import ServiceArgs
from twinkle_serve.engines.vllm import cpu_defaults
from twinkle_serve.engines.vllm.args import limit_kv_cache
from twinkle_serve.errors import ConfigError, EngineArgsError, MeshError, ModelNotFoundError, TwinkleServeError
from twinkle_serve.gateway.config import GatewayArgs, LimitArgs
from twinkle_serve.hub import resolve
from twinkle_serve.mesh import DeviceMesh
from twinkle_serve.placement import NodeResources, cores_of_engine, place

ROOT = Path(__file__).parents[2]
CONFIGS = sorted([ROOT / "serve_config.yaml", *(ROOT / "configs").glob("*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_in_the_repository_is_valid(path: Path) -> None:
    """Keys at every level, and the arguments of the chosen engine."""
    assert check_config_file(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_has_http_listen_on_this_machine_alone(path: Path) -> None:
    """Under `serve run` too, where Ray Serve's own default would be every interface."""
    assert check_config_file(path).schema.http_options.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "host"),
    [("{}", "127.0.0.1"), ("{port: 8001}", "127.0.0.1"), ("{host: 0.0.0.0}", "0.0.0.0"), ("{host: '::1'}", "::1")],
)
def test_launcher_listens_where_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, host: str
) -> None:
    """On this machine alone where it says nothing. Beyond it the config's gateway needs a key."""
    monkeypatch.setenv("TWINKLE_SERVE_KEYS", "trainer:admin:0123456789abcdef")
    path = tmp_path / "config.yaml"
    _, _, applications = (ROOT / "serve_config.yaml").read_text().partition("\napplications:")
    path.write_text(f"http_options: {options}\napplications:{applications}")
    assert http_host(check_config_file(path).schema) == host


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("applications:", "aplications:"), "unknown key 'aplications', did you mean 'applications'"),
        (
            ("route_prefix:", "rout_prefix:"),
            "unknown key in applications[0] 'rout_prefix', did you mean 'route_prefix'",
        ),
        (("model_id:", "modelid:"), "unknown key 'modelid', did you mean 'model_id'"),
        (("{dp_size:", "{dp_sise:"), "unknown key in device_mesh 'dp_sise', did you mean 'dp_size'"),
        (("engine: vllm", "engine: vlm"), "engine: Input should be 'vllm', 'torch' or 'fake', got 'vlm'"),
        (("dp_size: 2", "dp_size: 0"), "device_mesh.dp_size must be at least 1, got 0"),
        (("dp_size: 2", "dp_size: two"), "device_mesh.dp_size: Input should be a valid integer, got 'two'"),
        (("dp_size: 2", "dp_size: .nan"), "device_mesh.dp_size: Input should be a valid integer, got nan"),
        (("tp_size: 1", "world_size: 3"), "world_size=3 contradicts its dimensions, dp_size=2 = 2"),
        (("tp_size: 1", "cp_size: 2"), "cp_size=2: a sampler has the dimensions dp, tp and pp"),
        (("template: Template", "request_timeout_s: 0"), "request_timeout_s: Input should be greater than 0, got 0"),
        (("enable_lora: true}", "enable_lora: false}\n      adapters: {a: /x}"), "adapters names a, and LoRA is"),
        (("template: Template", "template: {nam: Template}"), "unknown key in template 'nam', did you mean 'name'"),
        (("      model_id: demo", "      # none"), "model_id is missing"),
        (("applications:", "proxy_locations: Disabled\napplications:"), "did you mean 'proxy_location'"),
        (("applications:", "http_options: {prot: 1}\napplications:"), "in http_options 'prot', did you mean 'port'"),
        (("applications:", "applications: ["), "is not YAML"),
        (
            ("max_model_len:", "max_model_length:"),
            "vllm engine argument 'max_model_length', did you mean 'max_model_len'",
        ),
        (("max_model_len:", "tensor_parallel_size:"), "tensor_parallel_size is decided by device_mesh.tp_size"),
    ],
)
def test_config_mistake_is_reported_with_its_remedy(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    """Including misspelt keys at any level, which Ray Serve itself ignores."""
    text = (ROOT / "serve_config.yaml").read_text()
    assert change[0] in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError) as caught:
        check_config_file(path)
    assert message in str(caught.value)


def test_missing_config_file_is_reported(tmp_path: Path) -> None:
    """As a ConfigError."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        check_config_file(tmp_path / "none.yaml")


def nodes(*gpus: int, cpus: int = 8) -> list[NodeResources]:
    return [NodeResources(cpus=cpus, gpus=n) for n in gpus]


def test_placement_takes_gpus_of_one_node_if_a_replica_fits() -> None:
    """With vLLM's own executor within the node."""
    placement = place(DeviceMesh.from_sizes(dp_size=4, tp_size=2), nodes(4, 4))
    assert (placement.device, placement.num_gpus, placement.executor, placement.bundles) == ("cuda", 2, "mp", ())


def test_placement_spans_nodes_if_it_must() -> None:
    """One bundle per GPU, no GPU for the actor itself, Ray's executor."""
    placement = place(DeviceMesh.from_sizes(dp_size=1, tp_size=4, pp_size=2), nodes(4, 4))
    assert (placement.num_gpus, placement.executor) == (0, "ray")
    assert [bundle.get("GPU", 0) for bundle in placement.bundles] == [0] + [1] * 8


def test_placement_counts_whole_replicas_per_node() -> None:
    """3 + 3 GPUs hold two replicas of 3, but not three of 2 within nodes."""
    assert place(DeviceMesh.from_sizes(dp_size=2, tp_size=3), nodes(3, 3)).executor == "mp"
    assert place(DeviceMesh.from_sizes(dp_size=3, tp_size=2), nodes(3, 3)).executor == "ray"


def test_placement_on_cpu_leaves_room_for_router_and_store() -> None:
    """A full mesh of two engines fits on two cores."""
    placement = place(DeviceMesh.from_sizes(dp_size=2), nodes(0, cpus=2))
    assert placement.device == "cpu"
    assert 2 * placement.num_cpus + 0.2 <= 2


@pytest.mark.parametrize(
    ("mesh", "cluster", "message"),
    [
        ({"dp_size": 4, "tp_size": 2}, nodes(4), r"needs 8 GPUs \(dp_size=4 x tp_size=2\), the cluster has 4"),
        ({"dp_size": 4}, nodes(0, cpus=2), r"needs 4 CPUs \(dp_size=4 x tp_size=1\), the cluster has 2"),
        ({"dp_size": 1, "device_type": "cuda"}, nodes(0), r"needs 1 GPUs \(dp_size=1 x tp_size=1\), the cluster has 0"),
    ],
)
def test_placement_larger_than_the_cluster_is_an_error(mesh: Any, cluster: Any, message: str) -> None:
    """The message has both numbers and the remedy."""
    with pytest.raises(MeshError, match=message + r"\. Lower device_mesh"):
        place(DeviceMesh.from_sizes(**mesh), cluster)


def test_replica_that_fits_on_no_node_is_an_error() -> None:
    """Even if the nodes' sum is enough: Ray would wait forever. The same holds for engines without a CPU."""
    with pytest.raises(MeshError, match=r"needs 1 engines of 3.8 CPUs, each on one node; the cluster's nodes have 2"):
        place(DeviceMesh.from_sizes(tp_size=4), nodes(0, 0, cpus=2))
    with pytest.raises(MeshError, match=r"needs 4 engines of 1 CPUs, each on one node; .* have 2: room for 2"):
        place(DeviceMesh.from_sizes(dp_size=4), nodes(4, cpus=2))


def test_engines_on_a_node_share_no_core() -> None:
    """Each device has its own cores; with two or more, one is left to the scheduler and event loop."""
    assert [cores_of_engine(rank, 1, 2, [0, 1]) for rank in range(2)] == [[(0,)], [(1,)]]
    assert cores_of_engine(0, 2, 2, [0, 1]) == [(0,), (1,)]
    assert cores_of_engine(0, 1, 1, [0, 1]) == [(0,)]
    assert [cores_of_engine(rank, 2, 4, list(range(16))) for rank in range(2)] == [
        [(0, 1, 2), (4, 5, 6)],
        [(8, 9, 10), (12, 13, 14)],
    ]
    assert cores_of_engine(3, 1, 4, [4, 5]) == [(5,)]


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("/no/such/model", "no directory at /no/such/model"),
        ("./none", "no directory at none"),
        ("nonsense", "neither a directory here nor an id of the form org/name"),
        ("s3://a/b", "unknown hub 's3'"),
        ("ms://a", "neither a directory here nor an id"),
    ],
)
def test_missing_model_is_reported(model_id: str, message: str) -> None:
    """Immediately, without a network."""
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(model_id)
    assert message in str(caught.value)


def test_directory_without_a_config_json_is_refused(tmp_path: Path) -> None:
    """It is not a model."""
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_unknown_engine_arguments_are_refused() -> None:
    """The message suggests the closest name; a value of the wrong type is reported too."""
    from twinkle_serve.engines import build_engine, check_engine_args

    with pytest.raises(EngineArgsError, match="'max_model_length', did you mean 'max_model_len'"):
        check_engine_args("torch", {"max_model_length": 5})
    with pytest.raises(EngineArgsError, match=r"engine_args\.max_num_seqs=0"):
        check_engine_args("fake", {"max_num_seqs": 0})
    with pytest.raises(ConfigError, match="torch engine runs on one device, device_mesh gives each replica 2"):
        build_engine("torch", "t", "demo", {}, tp_size=2)


def test_importing_the_package_is_light() -> None:
    """At most half a second; neither it nor the config nor the data format loads torch, vllm or ray."""
    # CPU time: the machine may be busy.
    code = (
        "import time, sys; t = time.process_time(); import twinkle_serve; s = time.process_time() - t; "
        "twinkle_serve.SamplingParams, twinkle_serve.DeviceMesh; import twinkle_serve.config; "
        "print(s, [m for m in ('torch', 'vllm', 'ray', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = out.split(" ", 1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.5


def test_public_names_exist() -> None:
    """Every name in __all__ can be imported."""
    import twinkle_serve

    for name in twinkle_serve.__all__:
        if name not in ("connect", "RunningSampler"):  # these load ray
            value = getattr(twinkle_serve, name)
            assert value.__name__ == ("vLLMSampler" if name == "VLLMSampler" else name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = twinkle_serve.nonsense


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, TwinkleServeError)]
)
def test_errors_survive_pickling_and_are_in_the_tree(kind: type[TwinkleServeError]) -> None:
    """They are sent between actors, and the tree at the top of errors.py lists each."""
    again = pickle.loads(pickle.dumps(kind("what, 1 and 2, the remedy")))
    assert type(again) is kind and str(again) == "what, 1 and 2, the remedy"
    assert kind.__name__ in (errors.__doc__ or "")


def test_config_page_has_every_key() -> None:
    """docs/config.md lists every key of args, of samplers and gateways, and the arguments of torch and fake, with the
    default; docs/http.md the limits of gateways."""
    from twinkle_serve.engines.fake import FakeArgs
    from twinkle_serve.engines.torch import TorchArgs

    page = (ROOT / "docs" / "config.md").read_text()
    for name, field in ServiceArgs.model_fields.items():
        assert f"| `{name}` |" in page, name
        if isinstance(field.default, float):
            assert f"| `{name}` | `{field.default:g}` |" in page
    torch_keys, fake_keys = page.split("## `engine_args` of torch")[1].split("## `engine_args` of fake")
    for model, keys in ((TorchArgs, torch_keys), (FakeArgs, fake_keys)):
        for name in model.model_fields:
            assert f"`{name}`" in keys, name
    for name in GatewayArgs.model_fields:
        assert f"| `{name}` |" in page.split("graphs.gateway:build` is a gateway")[1], name
    limits = (ROOT / "docs" / "http.md").read_text().split("| key of `limits` |")[1]
    for name in LimitArgs.model_fields:
        assert f"| `{name}` |" in limits, name


@pytest.mark.parametrize(
    ("written", "given", "dtype"),
    [
        ({"dtype": "float32"}, {}, "float32"),
        ({"torch_dtype": "float32"}, {}, "float32"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, {}, None),
        ({}, {}, None),
    ],
)
def test_model_in_float32_stays_so_on_cpu(
    written: dict[str, str], given: dict[str, str], dtype: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert cpu_defaults(str(tmp_path), given, 1).get("dtype") == dtype


@pytest.mark.parametrize(
    ("given", "limit", "expected"),
    [
        ({}, 4 * 2**30, 4 * (1000 + 128) * 2 * 8 * 2 * 32 * 4),  # sequences x tokens x (K, V) x layers x heads x size
        ({}, 2**20, 2**20),
        ({"is_hybrid": True}, 4 * 2**30, 4 * 2**30),  # keeps more than keys and values
    ],
)
def test_kv_cache_is_no_larger_than_it_can_be_filled(given: dict[str, bool], limit: int, expected: int) -> None:
    model = {"is_hybrid": False, "use_mla": False, "max_model_len": 1000, "dtype": SimpleNamespace(itemsize=4)}
    shape: Any = {"get_num_layers": lambda _: 8, "get_num_kv_heads": lambda _: 2, "get_head_size": lambda: 32}
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(**{**model, **shape, **given}),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=limit, block_size=128),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=None,
    )
    limit_kv_cache(config)
    assert config.cache_config.kv_cache_memory_bytes == expected
