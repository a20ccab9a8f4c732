"""What a candidate is graded against, and which names in it are the candidate's."""

from __future__ import annotations

import ast
import builtins
import hashlib
import sys
from dataclasses import dataclass

from fedpact.errors import RewardError
from fedpact.rewards.outcome import Outcome
from fedpact.rewards.sandbox.wire import encode


@dataclass(frozen=True, slots=True)
class Task:
    """Tests to run, or pairs of an input and the output that it should lead to."""

    tests: tuple[str, ...] = ()
    """One script, or one statement or more for each test."""
    entry_point: str = ""
    """The function that is asked for; it is handed to `check`, if the tests define that."""
    prompt: str = ""
    """The code that the prompt begins with: imports, helpers, the signature."""
    setup: str = ""
    """Runs before the tests."""
    stdin_tests: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> int:
        return len(self.tests) or len(self.stdin_tests)

    @property
    def digest(self) -> str:
        """The same for the same tests, whoever is tested."""
        content = (self.tests, self.entry_point, self.prompt, self.setup, self.stdin_tests)
        return hashlib.sha256(encode(content)).hexdigest()


@dataclass(frozen=True, slots=True)
class Grade:
    """How a candidate fared. A reason is for people; it never holds a test or a value."""

    outcome: Outcome
    share: float = 0.0
    """Of the tests that it passed."""
    reason: str = ""


def free_names(task: Task) -> tuple[list[str], list[str]]:
    """The names that stand for the candidate's functions and classes while the tests run, and modules to import.

    The entry point, and every name that the tests use and that neither they, nor the prompt, nor Python defines. This
    is read from trusted text alone: a candidate that could name its functions would name one `abs` or `sorted`. A
    module of the standard library of which the tests use an attribute is imported for them (MBPP has such tests). Where
    nothing is left (MBPP has a task whose function is `sum`), the one built-in function that every test calls. Raises
    RewardError where that leaves a doubt, and for tests that are no Python.
    """
    try:
        trees = [ast.parse(text) for text in (task.setup, *task.tests)]
    except (SyntaxError, ValueError) as error:
        raise RewardError(f"tests: not Python ({error}); expected assert statements or a script of them") from None
    defined = set().union(*map(_defined, trees)) | set(dir(builtins))
    if task.prompt:
        defined |= _defined(_prompt_tree(task.prompt))
    names = set().union(*map(_used, trees)) - defined
    modules = sorted(name for name in names & sys.stdlib_module_names if name in set().union(*map(_dotted, trees)))
    names -= set(modules)
    if task.entry_point:
        return sorted(names | {task.entry_point}), modules
    if not names:
        called = [set(_called(tree)) for tree in trees[1:]]
        names = set.intersection(*called) if called else set()
        if len(names) != 1:
            raise RewardError("tests: they call no name of the candidate's; give its name in the column entry_point")
    return sorted(names), modules


def _prompt_tree(prompt: str) -> ast.AST:
    for text in (prompt, prompt + "\n    pass\n"):
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            continue
    raise RewardError(
        "prompt_code: not Python; expected what the program begins with, up to the signature or docstring"
    )


def _called(tree: ast.AST) -> list[str]:
    functions = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [function.id for function in functions if isinstance(function, ast.Name)]


def _used(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _dotted(tree: ast.AST) -> set[str]:
    """The names that stand before a dot."""
    dotted = (node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {value.id for value in dotted if isinstance(value, ast.Name)}


def _defined(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names
