"""Imports point down, and help costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedpact"
BOTTOM = {"types", "messages", "protocols", "errors", "seeding", "settings", "secrets", "screen", "faults"}
ALLOWED = {
    "core": BOTTOM,
    "policy": BOTTOM | {"core"},
    "algorithms": {"types", "messages", "protocols", "errors", "core"},
    "rewards": BOTTOM | {"core", "policy"},
    "tasks": BOTTOM | {"core", "rewards", "files"},
    "runtime": BOTTOM | {"core", "policy", "algorithms", "rewards", "tasks"},
    "report": {"errors", "screen"},
    "edge": BOTTOM | {"core", "policy", "algorithms", "rewards", "tasks", "runtime"},
    "audit": BOTTOM | {"core", "policy", "algorithms", "rewards", "tasks", "runtime", "report", "edge"},
    "cli": BOTTOM | {"core", "policy", "algorithms", "rewards", "tasks", "runtime", "report", "edge", "audit"},
}


def imported(path: Path) -> set[str]:
    """The second part of every `fedpact.x...` that the file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedpact."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "fedpact":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fedpact."))
    return names


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_lies_below_it(layer: str) -> None:
    for path in (SOURCE / layer).rglob("*.py"):
        strangers = imported(path) - ALLOWED[layer] - {layer, "__version__"}
        assert not strangers, f"{path.relative_to(SOURCE)} imports {strangers}"


def test_the_mathematics_knows_torch_and_nothing_else() -> None:
    for path in (SOURCE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in modules:
                root = module.split(".")[0]
                assert root in {"torch", "fedpact"} or root in sys.stdlib_module_names, f"{path.name}: {module}"


def test_no_file_holds_two_ideas() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 280} == {}


@pytest.mark.parametrize(
    "command",
    [["--help"], ["--version"], ["algorithms"], ["demo", "--help"], ["no-such-command"]],
    ids=lambda command: " ".join(command),
)
def test_help_and_usage_errors_load_no_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom fedpact.cli.main import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_importing_fedpact_loads_no_torch() -> None:
    code = "import sys, fedpact; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
