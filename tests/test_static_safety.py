"""What the source may not do anywhere, read from its syntax, and what its dependencies may not be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SOURCE = Path(__file__).parents[1] / "src" / "fedpact"
APP = Path(__file__).parents[1] / "fedpact_app"

MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle", "joblib", "yaml", "code"),
    *("requests", "urllib.request", "urllib3", "http.client", "ftplib", "smtplib", "telnetlib", "socket", "aiohttp"),
    *("imp", "pty", "commands", "popen2", "xml", "ctypes", "telemetry", "sentry_sdk", "webbrowser"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "breakpoint", "input"),
    *("os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.fork", "os.spawnv", "pty.spawn"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("numpy.load", "numpy.fromfile", "tempfile.mktemp", "tempfile.TemporaryFile", "subprocess.getoutput"),
    *("yaml.load", "pickle.loads", "shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile", "os.tmpnam"),
    *("asyncio.create_subprocess_shell", "joblib.load", "pandas.read_pickle", "importlib.reload"),
}
GLOBAL_RANDOM = {
    *(f"torch.{name}" for name in ("manual_seed", "seed", "set_rng_state", "cuda.manual_seed", "cuda.manual_seed_all")),
    *("torch.random.manual_seed", "torch.random.seed", "numpy.random.seed", "uuid.uuid1"),
}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"}

ALLOWED = {
    # A program that a model wrote is what these exist for: they run in a jail, in a process of their own. What is
    # marshalled is our own code, on its way into that process.
    "rewards/sandbox/": {"exec", "compile", "__import__", "marshal", "socket", "os.fork", "ctypes", "random"},
    "edge/service.py": {"socket"},  # a Unix socket of this machine, like the next
    "fedpact_app/frames.py": {"socket"},
    "tasks/warmstart.py": {"torch.manual_seed"},  # transformers draws initial weights from it; the state is restored
    "report/frontier.py": {"random"},  # a generator of its own, by seed
}
"""Where something of the lists may stand."""


def sources() -> dict[str, Path]:
    """All files by their places: in the package, or fedpact_app/... for what is shipped to SuperNodes."""
    return {
        path.relative_to(root).as_posix(): path
        for root, below in ((SOURCE, SOURCE), (APP.parent, APP))
        for path in sorted(below.rglob("*.py"))
    }


def allowed(path: str, what: str) -> bool:
    return any(path.startswith(place) and what in words for place, words in ALLOWED.items())


def dotted(node: ast.expr) -> str:
    """`a.b.c` as written; "" if the expression is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f"{front}.{node.attr}"
    return ""


def names_in(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` for `numpy`, `load` for `torch.load`."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {one.asname: one.name for one in node.names if one.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def offences(path: str, text: str) -> Iterator[str]:
    """What a file does that it may not, as `line: what`."""
    tree = ast.parse(text)
    names = names_in(tree)
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
        for module in modules:
            parents = {module, *(module[: dot.start()] for dot in re.finditer(r"\.", module))}
            for bad in sorted(parents & (MODULES | {"random"})):
                if not allowed(path, bad):
                    yield f"{node.lineno}: imports {bad}"
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__") and not allowed(path, node.id):
            yield f"{node.lineno}: {node.id}"
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = dotted(node.func).partition(".")
        called = ".".join(filter(None, [names.get(first, first), rest])).removeprefix("builtins.")
        settings = {one.arg: one.value for one in node.keywords}
        if called in CALLS | GLOBAL_RANDOM and not allowed(path, called):
            yield f"{node.lineno}: calls {called}"
        if "shell" in settings and not is_false(settings["shell"]):
            yield f"{node.lineno}: a shell"
        if "trust_remote_code" in settings and is_constant(settings["trust_remote_code"], True):
            yield f"{node.lineno}: trusts remote code"
        if "weights_only" in settings or "allow_pickle" in settings:
            yield f"{node.lineno}: a pickle that is half allowed"
        if called.startswith("torch.") and called.removeprefix("torch.") in DRAWS and "generator" not in settings:
            yield f"{node.lineno}: {called} without a generator"
        if called.startswith("numpy.random.") and called != "numpy.random.Generator":
            yield f"{node.lineno}: {called}"
        loads = called.endswith("from_pretrained") and not called.startswith("peft.")
        if loads and "tasks/" not in path and not settings.keys() & {"trust_remote_code", None}:
            yield f"{node.lineno}: {called} without trust_remote_code: transformers would ask at the terminal"


def is_false(node: ast.expr) -> bool:
    return is_constant(node, False)


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_the_source_loads_no_code_starts_no_shell_and_draws_from_no_global_generator() -> None:
    found = []
    for where, path in sources().items():
        found += [f"{where}:{offence}" for offence in offences(where, path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml as y",
        "import requests.adapters",
        "from urllib import request",
        "import random",
        "from random import random",
        "eval('1')",
        "run = exec",
        "import builtins\nbuiltins.eval('1')",
        "import torch\ntorch.load('x')",
        "from torch import load as l\nl('x')",
        "import torch as t\nt.manual_seed(1)",
        "import torch\ntorch.randn(3)",
        "import numpy as np\nnp.random.rand(3)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import os\nos.system('ls')",
        "from os import system\nsystem('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ns.run('ls', shell=bool(1))",
        "import tempfile\ntempfile.mktemp()",
        "from transformers import AutoModel\nAutoModel.from_pretrained('x')",
        "from transformers import AutoModel\nAutoModel.from_pretrained('x', trust_remote_code=True)",
        "input('run the code?')",
        "import shutil\nshutil.unpack_archive('x')",
    ],
)
def test_the_gate_sees_what_it_is_there_for(text: str) -> None:
    assert list(offences("core/example.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.Generator().manual_seed(3)\ntorch.randn(3, generator=g)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "model.eval()\nre.compile('x')\nself.load('x')",
        "import secrets\nfrom fedpact.secrets import masked",
        "from transformers import AutoModel\nAutoModel.from_pretrained('x', trust_remote_code=False)",
    ],
)
def test_the_gate_lets_pass_what_is_harmless(text: str) -> None:
    assert list(offences("core/example.py", text)) == []


def test_a_permission_is_used_where_it_stands() -> None:
    for place, words in ALLOWED.items():
        files = [path for where, path in sources().items() if where.startswith(place)]
        assert files, place
        if place.endswith(".py"):
            text = files[0].read_text(encoding="utf-8")
            assert all(word.rpartition(".")[2] in text for word in words), place


# --- what others say is printed in one place --------------------------------------------------------------------------

PRINTS = {
    "screen.py": 1,
    "cli/commands.py": 8,  # versions and figures of our own
    "cli/compare.py": 1,  # Markdown, escaped
    "cli/demo.py": 5,
    "cli/listing.py": 1,
    "rewards/verifier.py": 1,  # a child's first word to its parent
    "rewards/sandbox/": None,
}
"""Files that may call `print` for anything but JSON, and how often; the others use `screen.say`. None: any number."""


def prints_text(node: ast.AST) -> bool:
    """Whether this is a `print` of something else than JSON, which has no control characters."""
    if not (isinstance(node, ast.Call) and dotted(node.func) == "print"):
        return False
    first = node.args[0] if node.args else None
    return not (isinstance(first, ast.Call) and dotted(first.func) == "json.dumps")


def test_what_people_read_goes_through_one_function() -> None:
    for path in SOURCE.rglob("*.py"):
        where = path.relative_to(SOURCE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = sum(prints_text(node) for node in ast.walk(tree))
        most = next((count for place, count in PRINTS.items() if where.startswith(place)), 0)
        assert most is None or calls <= most, f"{where} prints {calls} times; use fedpact.screen.say"


# --- licences ---------------------------------------------------------------------------------------------------------


def core_packages() -> set[str]:
    """What an installation without extras brings, as far as it is installed here."""
    found: set[str] = set()
    waiting = ["fedpact"]
    while waiting:
        name = waiting.pop()
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # for another system or Python
            continue
        found.add(name)
        for one in map(Requirement, needs):
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                waiting += [one.name.lower()] if one.name.lower() not in found else []
    return found - {"fedpact"}


def licence(name: str) -> str:
    facts = distribution(name).metadata
    classifiers = [one for one in facts.get_all("Classifier") or [] if one.startswith("License")]
    return " ".join(filter(None, [facts.get("License-Expression"), *classifiers, (facts.get("License") or "")[:200]]))


def test_no_core_dependency_is_under_the_gpl() -> None:
    packages = core_packages()
    assert {"torch", "transformers", "peft", "pydantic", "jinja2", "numpy"} <= packages
    found = {name: licence(name) for name in packages}
    assert {n: said for n, said in found.items() if re.search(r"\b[AL]?GPL|General Public", said)} == {}
    assert {name for name, said in found.items() if not said} == set()
