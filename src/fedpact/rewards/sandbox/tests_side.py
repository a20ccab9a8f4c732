"""The program that runs a member's tests, with stubs for the candidate: a call goes out, what it is worth comes in.

The tests are trusted, the values are not: a reply is decoded into built-in types and nothing else, and an exception
into a built-in one that no loop mistakes for its end. Its source runs confined; nothing else uses it.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import CodeType
from typing import Any

from fedpact.rewards.sandbox.inside import open_pipes
from fedpact.rewards.sandbox.wire import NotPlainError, Sent, TooLargeError, decode, encode

MAX_REQUEST = 1 << 23


class EndOfRunError(BaseException):
    """The tests cannot go on, and `except Exception` in them must not stop this."""


def serve() -> None:
    """Runs the tests that it is sent, once for each candidate, until the pipe is closed."""
    receive, send = open_pipes()
    while True:
        prompt, setup, tests, entry_point, names, modules, go_on = decode(receive())
        run = Run(receive, send, entry_point, names)
        results = run.results(run.space(prompt, setup, modules), tests, go_on)
        send(b"V" + encode((results, run.calls, run.trouble)))


class Run:
    """One run of the tests against one candidate."""

    def __init__(
        self, receive: Callable[[], bytes], send: Callable[[bytes], None], entry_point: str, names: list[str]
    ) -> None:
        self.receive, self.send, self.entry_point, self.names = receive, send, entry_point, names
        self.calls = 0
        self.trouble = ""
        """What the tests do that no candidate can be asked for."""
        self.gone = False
        self.objects: list[Any] = []

    def results(self, space: dict[str, Any], tests: list[str], go_on: bool) -> list[bool]:
        """Whether each test went through; without `go_on` the first that does not is the last."""
        results: list[bool] = []
        for text in tests if "__builtins__" in space else ():
            results.append(self.passes(text, space))
            if self.gone or self.trouble or not (results[-1] or go_on):
                break
        return results

    def space(self, prompt: str, setup: str, modules: list[str]) -> dict[str, Any]:
        """The names that the tests find: the prompt's helpers, stubs for the candidate's, and what the setup makes."""
        space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        space |= {name: __import__(name) for name in modules}
        if not self.runs(prompt, space):
            return {}
        space |= {name: self.stub(name) for name in self.names}
        return space if self.runs(setup, space) else {}

    def passes(self, text: str, space: dict[str, Any]) -> bool:
        """Whether the test runs to its end, and the `check` that it may define."""
        if not self.runs(text, space):
            return False
        if not self.entry_point or "check" in self.names or "check" not in space:
            return True
        space["_entry_point"] = space[self.entry_point]
        return self.runs("check(_entry_point)", space)

    def runs(self, text: str, space: dict[str, Any]) -> bool:
        try:
            if "random" in text:  # so that all candidates get the same
                __import__("random").seed(0)
            exec(compiled(text), space)
        except BaseException as error:  # an assertion, and whatever a strange value makes of the tests
            if not self.calls and not self.trouble:
                self.trouble = f"they fail before they call the candidate: {type(error).__name__}"
            return False
        return not (self.gone or self.trouble)

    def stub(self, name: str) -> Callable[..., Any]:
        kind = b"N" if name[:1].isupper() and "_" not in name else b"C"

        def candidate(*args: Any, **kwargs: Any) -> Any:
            return self.asked(kind, (name, args, kwargs), args)

        candidate.__name__ = candidate.__qualname__ = name
        return candidate

    def asked(self, kind: bytes, content: tuple[Any, ...], args: tuple[Any, ...] = ()) -> Any:
        """The candidate's reply: a value or object is returned, an exception raised."""
        if self.gone or self.trouble:
            raise EndOfRunError
        try:
            request = encode(shown(content), MAX_REQUEST)
        except ValueError as error:
            if self.objects or (self.calls and isinstance(error, TooLargeError)):
                raise  # a candidate's value may have led to this, and must not be excused for it
            self.trouble = f"they hand over what a candidate cannot be sent: {error}"
            raise EndOfRunError from None
        self.calls += 1
        self.send(kind + request)
        reply = self.receive()
        match reply[:1]:
            case b"v":
                value, changed = self.plain(reply)
                if value is None and changed is not None:
                    write_back(args, changed)
                return value
            case b"o":
                number = self.plain(reply)
                if type(number) is not int or not 0 <= number <= len(self.objects):
                    raise TypeError("the candidate returned an object that the tests did not make")
                if number == len(self.objects):
                    if kind != b"N":
                        raise TypeError("the candidate returned an object that the tests did not make")
                    self.objects.append(Remote(self, number))
                return self.objects[number]
            case b"f" if kind == b"G":
                one, name = content
                return lambda *args, **kwargs: self.asked(b"M", (one, name, args, kwargs), args)
            case b"e":
                raise EXCEPTIONS.get(reply[1:].decode("ascii", "replace"), RuntimeError)("raised by the candidate")
            case _:
                self.gone = True
                raise EndOfRunError

    def plain(self, reply: bytes) -> Any:
        """The reply's content, a pair for a value."""
        content = decode(reply[1:])
        if reply[:1] == b"v" and not (type(content) is tuple and len(content) == 2):
            raise NotPlainError("no pair")
        return content


class Remote:
    """An object that the tests made of a candidate's class.

    It has attributes and methods, whose values are plain data. It is equal to itself alone, and has no length, items or
    truth of its own: a candidate could answer such questions otherwise each time.
    """

    __slots__ = ("_number", "_run")

    def __init__(self, run: Run, number: int) -> None:
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._run.asked(b"G", (self, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._run.asked(b"A", (self, name, value))


def shown(value: Any) -> Any:
    """`value` with the number in place of each remote object: itself, or in lists, tuples and values of dicts."""
    if type(value) is Remote:
        return Sent(value._number)
    if type(value) is list or type(value) is tuple:
        return type(value)(map(shown, value))
    if type(value) is dict:
        return {key: shown(item) for key, item in value.items()}
    return value


def write_back(args: tuple[Any, ...], changed: Any) -> None:
    """Makes the lists, dicts and sets among `args` hold what the candidate left in them."""
    if type(changed) is not tuple or len(changed) != len(args):
        raise NotPlainError("not the arguments")
    for arg, new in zip(args, changed, strict=True):
        if type(arg) is list and type(new) is list:
            arg[:] = new
        elif (type(arg) is dict and type(new) is dict) or (type(arg) is set and type(new) is set):
            arg.clear()
            arg.update(new)


def raised() -> dict[str, type[Exception]]:
    """The exceptions that a candidate may raise in the tests.

    Not StopIteration, which would end a `map` over the candidate as if all had been said, nor one that needs arguments.
    """
    found = {}
    for name, kind in vars(builtins).items():
        if isinstance(kind, type) and issubclass(kind, Exception) and "Iteration" not in name and "Group" not in name:
            found[name] = UnicodeError if issubclass(kind, UnicodeError) else kind
    return found


EXCEPTIONS = raised()


def compiled(text: str) -> CodeType:
    """`text` as code, kept for the next candidate; a signature that nothing follows gets a body."""
    if text not in _CODE:
        if len(_CODE) > 1000:
            _CODE.clear()
        try:
            _CODE[text] = compile(text, "<tests>", "exec", dont_inherit=True)
        except SyntaxError:
            _CODE[text] = compile(text + "\n    pass\n", "<tests>", "exec", dont_inherit=True)
    return _CODE[text]


_CODE: dict[str, CodeType] = {}
