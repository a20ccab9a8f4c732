"""Whether a jail on this machine holds: a correct program must still work, and every attack must be stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedpact.rewards.sandbox.confinement import ATTACK_LIMITS, ATTACKS, RUNNER, Scene, converse, stopped
from fedpact.rewards.sandbox.interpreter import MODULES
from fedpact.rewards.sandbox.jail import Jail, Limits
from fedpact.rewards.sandbox.verdict import verdict_attacks

_CONTROL = """
import MODULES
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
import sys
sys.setrecursionlimit(30000)
primes = [n for n in range(2, 60) if all(n % d for d in range(2, math.isqrt(n) + 1))]
word = collections.Counter(re.findall(r"[a-z]", "a jail that holds")).most_common(1)[0][0]
answers = {
    "primes": sum(primes),
    "word": word,
    "third": str(fractions.Fraction(1, 3)),
    "tenths": str(decimal.Decimal("0.1") + decimal.Decimal("0.2")),
    "mean": statistics.mean([1, 2, 6]),
    "heap": heapq.nsmallest(2, [3, 1, 2]),
    "at": bisect.bisect([1, 2, 4], 3),
    "pairs": len(list(itertools.combinations(string.ascii_lowercase, 2))),
    "depth": depth(20000),
    "day": datetime.date(2024, 2, 29).isocalendar()[1],
    "sum": functools.reduce(operator.add, [1, 2, 3]),
    "memory": len(b"x" * (50 << 20)),
    "digest": hashlib.sha256(b"jail").hexdigest()[:8],
    "type": str(typing.Optional[int]),
    "random": 0 <= random.random() < 1,
}
print(json.dumps(answers, sort_keys=True))
""".replace("MODULES", MODULES)
_ANSWER = (
    b'{"at": 2, "day": 9, "depth": 20000, "digest": "7d72fa80", "heap": [1, 2], "mean": 3, "memory": 52428800, '
    b'"pairs": 325, "primes": 440, "random": true, "sum": 6, "tenths": "0.3", "third": "1/3", '
    b'"type": "typing.Optional[int]", "word": "a"}\n'
)
POSITIVE_CONTROL = "a correct program works"


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was tried; `held` where the jail did what it should."""

    name: str
    held: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was tried on one jail, the positive control first."""

    jail: str
    lines: tuple[Line, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return bool(self.lines) and all(line.held for line in self.lines)

    @property
    def failures(self) -> list[str]:
        return [f"{line.name} ({line.note})" if line.note else line.name for line in self.lines if not line.held]


def self_test(jail: Jail) -> Report:
    """Tries the correct program, then every attack on confinement, then those on the verdict; seconds in all.

    A jail in which nothing runs stops every attack: after a failed control the rest is not tried.
    """
    began = time.monotonic()
    lines = [_positive_control(jail)]
    if lines[0].held:
        lines += _confinement(jail)
        lines += [Line(attack, held) for attack, held in verdict_attacks(jail)]
    return Report(jail.name, tuple(lines), time.monotonic() - began)


def _positive_control(jail: Jail) -> Line:
    limits = Limits()
    try:
        confined = jail.start(RUNNER, limits)
    except OSError as error:
        return Line(POSITIVE_CONTROL, False, str(error))
    try:
        heard = converse(confined, _CONTROL, limits)
    except OSError as error:
        return Line(POSITIVE_CONTROL, False, str(error))
    finally:
        confined.kill()
    return Line(POSITIVE_CONTROL, heard == _ANSWER, "" if heard == _ANSWER else f"{len(heard)} bytes of answer")


def _confinement(jail: Jail) -> list[Line]:
    lines = []
    with Scene(ATTACK_LIMITS) as scene:
        for attack in ATTACKS:
            try:
                lines.append(Line(attack.name, stopped(attack, jail, scene)))
            except OSError as error:  # what cannot be judged has not been stopped
                lines.append(Line(attack.name, False, str(error)))
        lines.append(Line("nothing outside was touched", not scene.victim_died() and not scene.changed()))
    return lines
