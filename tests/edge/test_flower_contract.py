"""What FedPact uses of Flower beyond its documentation is still there, as it was in 1.41.0."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedpact[flower]'")

import flwr

from fedpact.edge import flower_private

SOURCE = Path(flower_private.__file__)
USED = {
    "ActivateNodeRequest": "public_key heartbeat_interval",
    "DeactivateNodeRequest": "node_id",
    "NodeInfo": "name node_id last_activated_at status",
    "get_all_nested_objects": "obj",
    "get_object_tree": "obj",
    "iterate_object_tree": "tree",
    "no_object_id_recompute": "",
    "inflate_object_from_contents": "object_id object_contents",
    "pull_objects": "object_ids pull_object_fn max_concurrent_pulls max_time",
    "push_objects": "objects push_object_fn object_ids_to_push",
    "RuntimeVersionHttpInterceptor": "component_name",
    "HttpGrid.get_nodes": "self",
    "InMemoryGrid": "state_factory",
    "FleetHttpClient.ActivateNode": "self request",
    "FleetHttpClient.DeactivateNode": "self request",
    "FleetHttpClient.from_server_address": "server_address insecure root_certificates interceptors",
    "http_request_response": "server_address insecure root_certificates authentication_keys max_retries",
    "NodeAuthHttpInterceptor": "private_key public_key",
}


def changed(what: str) -> str:
    return f"flwr {flwr.__version__} changed {what}: read it, then adapt {SOURCE.name} and this test"


def found(module: str, name: str) -> object:
    value: object = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(value, part), changed(f"{module}.{name} (it is gone)")
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("module", "name"), flower_private.TOUCH_POINTS, ids=lambda value: value)
def test_a_private_name_exists_with_the_parameters_that_we_pass(module: str, name: str) -> None:
    value = found(module, name)
    if name not in USED:
        return
    descriptor = getattr(value, "DESCRIPTOR", None)  # of a protobuf
    names = set(descriptor.fields_by_name) if descriptor else set(inspect.signature(value).parameters)  # type: ignore[arg-type]
    missing = set(USED[name].split()) - names
    assert not missing, changed(f"{module}.{name} (it has no {', '.join(sorted(missing))})")


def test_what_is_passed_by_position_is_still_in_that_place() -> None:
    for module, name in flower_private.TOUCH_POINTS:
        if name in ("http_request_response", "pull_objects", "push_objects", "inflate_object_from_contents"):
            first = [key for key in USED[name].split() if key not in ("max_retries", "object_ids_to_push")]
            parameters = list(inspect.signature(found(module, name)).parameters)  # type: ignore[arg-type]
            assert parameters[: len(first)] == first, changed(
                f"{module}.{name} (its first parameters are {parameters})"
            )


def test_a_connection_still_has_eight_parts_in_the_order_that_we_unpack() -> None:
    function = found("flwr.supernode.fleet_http_connection", "http_request_response")
    tree = ast.parse(inspect.getsource(inspect.unwrap(function)))  # type: ignore[arg-type]
    yielded = next(node.value for node in ast.walk(tree) if isinstance(node, ast.Yield))
    assert isinstance(yielded, ast.Tuple)
    assert [ast.unparse(part) for part in yielded.elts] == [
        "node.node_id", "receive", "send", "get_run", "get_fab", "pull_object", "push_object",
        "confirm_message_received",
    ], changed("flwr.supernode.fleet_http_connection.http_request_response (what it yields)")  # fmt: skip


def test_an_ended_run_is_still_reported_by_what_is_no_exception() -> None:
    value = found("flwr.supercore.run", "RunNotRunningException")
    assert isinstance(value, type)
    assert issubclass(value, BaseException), changed("RunNotRunningException")
    assert not issubclass(value, Exception), changed("RunNotRunningException (it is an Exception now)")


def test_every_import_from_flower_beyond_its_public_modules_is_a_touch_point() -> None:
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    imported = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flwr.")
        for alias in node.names
        if node.module not in public
    }
    listed = {(module, name.split(".")[0]) for module, name in flower_private.TOUCH_POINTS}
    assert imported <= listed
    assert listed - imported == {("flwr.proto.node_pb2", "NodeInfo"), ("flwr.superlink.grid.http_grid", "HttpGrid")}


def test_no_other_module_reaches_into_flower() -> None:
    root = SOURCE.parents[3]
    for path in [*(root / "src").rglob("*.py"), *(root / "fedpact_app").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            private = {
                name
                for name in names
                if name.startswith("flwr.") and name not in ("flwr.app", "flwr.clientapp", "flwr.serverapp")
            }
            assert path == SOURCE or not private, f"{path.name} imports {private}; put it into {SOURCE.name}"


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ("1.40.9", "flwr: found 1.40.9, expected at least 1.41, below 1.43; pip install 'fedpact[flower]'"),
        ("1.43.0", "flwr: found 1.43.0, expected at least 1.41, below 1.43; pip install 'fedpact[flower]'"),
        ("2.0", "flwr: found 2.0, expected at least 1.41, below 1.43; pip install 'fedpact[flower]'"),
        (None, "flwr: not installed, expected at least 1.41, below 1.43; pip install 'fedpact[flower]'"),
    ],
)
def test_without_a_known_version_of_flower_there_is_one_line(version: str | None, outcome: str, tmp_path: Path) -> None:
    if version is not None:
        metadata = tmp_path / f"flwr-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: flwr\nVersion: {version}\n")
    code = (
        f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(SOURCE.parents[2])!r}]\n"
        "from fedpact.errors import ConfigError\n"
        "try:\n    import fedpact.edge.flower_private\nexcept ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout == outcome + "\n", done.stderr


def test_flower_is_told_to_stay_silent_before_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nimport fedpact.edge.flower_private\nimport os\n"
        "from flwr.supercore import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_DISABLE_UPDATE_CHECK'], "
        "os.environ['FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"HOME": str(tmp_path)}
    )
    assert done.stdout == "0 1 1 0\n"
