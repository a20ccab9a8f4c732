"""The program that runs a candidate: loads it, calls what it is told to call, replies with plain data.

It shares its process with hostile code, so nothing that it says is more than the candidate's claim about the value of a
call. It is never told the tests. Its source runs confined; nothing else uses it.
"""

from __future__ import annotations

import builtins
import io
import sys
from typing import Any

from fedpact.rewards.sandbox.inside import open_pipes
from fedpact.rewards.sandbox.wire import NotPlainError, TooLargeError, decode, encode

NONCE_BYTES = 16


def serve(max_bytes: int) -> None:
    """Replies to one request after the other until the pipe is closed."""
    receive, send = open_pipes()
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # usually there, by `site`
    candidate = Candidate(max_bytes)
    while True:
        request = receive()
        send(request[:NONCE_BYTES] + candidate.reply(request[NONCE_BYTES:]))


class Candidate:
    """The candidate's names, and those of its objects that the tests have made."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.names: dict[str, Any] = {}
        self.objects: list[Any] = []

    def reply(self, request: bytes) -> bytes:
        """One letter, `v` value, `o` object, `f` method, `e` exception or `m` too much, and what belongs to it."""
        try:
            asked = decode(request[1:], self.objects)
            match request[:1]:
                case b"L":
                    self.load(*asked)
                    return b"v" + encode((None, None))
                case b"I":
                    return b"v" + encode(self.printed(*asked), self.max_bytes)
                case b"C":
                    name, args, kwargs = asked
                    return self.value(self.named(name)(*args, **kwargs), args)
                case b"N":
                    name, args, kwargs = asked
                    return self.anything(self.named(name)(*args, **kwargs), new=True)
                case b"M":
                    one, name, args, kwargs = asked
                    return self.value(getattr(one, name)(*args, **kwargs), args)
                case b"G":
                    return self.anything(getattr(*asked), new=False)
                case _:
                    setattr(*asked)
                    return b"v" + encode((None, None))
        except (MemoryError, TooLargeError):
            return b"m"
        except BaseException as error:  # whatever a candidate raises, SystemExit too
            return b"e" + exception_name(error)

    def load(self, prompt: str, program: str) -> None:
        """Runs the prompt's code, then the program; a mere body of a function is read as going on from the prompt."""
        self.names = {"__name__": "candidate", "__builtins__": builtins}
        try:
            parts = [compile(program, "<candidate>", "exec", dont_inherit=True)]
        except SyntaxError:
            parts = [compile(prompt + "\n" + program, "<candidate>", "exec", dont_inherit=True)]
        else:
            try:
                parts.insert(0, compile(prompt, "<prompt>", "exec", dont_inherit=True))
            except SyntaxError:  # a signature that nothing follows
                if not prompt.strip():
                    raise
        if "random" in prompt + program:  # so that a candidate fares the same twice
            import random

            random.seed(0)
        for part in parts:
            exec(part, self.names)

    def printed(self, program: str, given: str) -> bytes:
        """What the program prints when it reads `given`."""
        output = io.BytesIO()
        before = sys.stdin, sys.stdout
        sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode("utf-8", "replace")), encoding="utf-8")
        sys.stdout = io.TextIOWrapper(output, encoding="utf-8", errors="replace", write_through=True)

        def open_(file: Any, *rest: Any, **more: Any) -> Any:
            return sys.stdin if file == 0 else io.open(file, *rest, **more)  # noqa: UP020

        names = {"__name__": "__main__", "__builtins__": builtins, "open": open_}
        try:
            exec(compile(program, "<candidate>", "exec", dont_inherit=True), names)
        except SystemExit as left:
            if left.code:  # a program that says that it failed
                raise
        finally:
            sys.stdout.flush()
            text = output.getvalue()
            sys.stdin, sys.stdout = before
        return text

    def named(self, name: str) -> Any:
        if name not in self.names:
            raise NameError(name)
        return self.names[name]

    def value(self, value: Any, args: tuple[Any, ...]) -> bytes:
        """The value and, where it is None, the arguments as they are now: what changes them returns nothing."""
        if value is None and any(isinstance(arg, list | dict | set) for arg in args):
            try:
                return b"v" + encode((None, args), self.max_bytes)
            except NotPlainError:  # they hold objects of its classes
                pass
        return b"v" + encode((value, None), self.max_bytes)

    def anything(self, value: Any, new: bool) -> bytes:
        """The value, if it is plain; else the number of the object, which is a new one only where tests make one."""
        for number, one in enumerate(self.objects):
            if one is value:
                return b"o" + encode(number)
        try:
            return b"v" + encode((value, None), self.max_bytes)
        except NotPlainError:
            if new:
                self.objects.append(value)
                return b"o" + encode(len(self.objects) - 1)
            if callable(value):
                return b"f"
            raise TypeError from None


def exception_name(error: BaseException) -> bytes:
    """The name of the nearest built-in class of the error's."""
    for kind in type(error).__mro__:
        name: str = kind.__name__
        if getattr(builtins, name, None) is kind:
            return name.encode()
    return b"RuntimeError"
