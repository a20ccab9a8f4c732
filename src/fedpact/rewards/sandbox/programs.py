"""The text of the two programs that run confined.

A jail takes a program's text. Compiling ours would cost half as much as starting the interpreter, so the text holds it
compiled already, for the interpreter that this is.
"""

from __future__ import annotations

import ast
import functools
import marshal
from pathlib import Path

SHARED = ("wire.py", "inside.py")


@functools.cache
def candidate_program(max_bytes: int) -> str:
    """Serves one candidate, whose replies may have `max_bytes` each."""
    return _program((*SHARED, "candidate_side.py"), f"serve({max_bytes})")


@functools.cache
def tests_program() -> str:
    """Runs tests for one candidate after another."""
    return _program((*SHARED, "tests_side.py"), "serve()")


def _program(names: tuple[str, ...], call: str) -> str:
    codes = []
    for name in names:
        tree = ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8"))
        tree.body = [part for part in tree.body if not (isinstance(part, ast.ImportFrom) and _is_left_out(part))]
        codes.append(compile(tree, name, "exec", dont_inherit=True, optimize=2))
    held = marshal.dumps(tuple(codes)).hex()
    return (
        "import marshal\n"
        "space = {'__name__': 'confined'}\n"
        f"for code in marshal.loads(bytes.fromhex('{held}')):\n"
        "    exec(code, space)\n"
        f"space[{call.partition('(')[0]!r}]({call.partition('(')[2]}"
    )


def _is_left_out(part: ast.ImportFrom) -> bool:
    """What the program holds itself, and what only annotations need, which would double the time of a start."""
    return part.module in ("typing", "types", "collections.abc") or (part.module or "").startswith("fedpact.")
