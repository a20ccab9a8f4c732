"""Grades by two processes: the candidate in one, the tests in the other, plain data between them."""

from __future__ import annotations

import collections
import hashlib
import threading
import time
from collections.abc import Sequence

from fedpact.rewards.outcome import Outcome
from fedpact.rewards.sandbox import ferry
from fedpact.rewards.sandbox.jail import Jail, Limits
from fedpact.rewards.sandbox.pool import Pool
from fedpact.rewards.sandbox.task import Grade, Task, free_names
from fedpact.rewards.sandbox.wire import encode

_ATTEMPTS = 2


class Grader:
    """Grades candidates in `jail`, up to `workers` at a time, and remembers the last `cache_size` grades.

    `limits.seconds` are for all the tests of one candidate. With `go_on`, tests follow a failed one, for a share.
    """

    def __init__(
        self, jail: Jail, limits: Limits, *, workers: int = 1, cache_size: int = 4096, go_on: bool = False
    ) -> None:
        self.jail, self.limits, self.workers, self.go_on = jail, limits, workers, go_on
        self._cache: collections.OrderedDict[str, Grade] = collections.OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self._pool = Pool(jail, limits, workers)

    def grades(self, pairs: Sequence[tuple[str, Task]]) -> list[Grade]:
        """One grade for each program and task, in order; the same pair twice is run once.

        A grade that is an error was tried twice. Raises RewardError for tests that make no sense.
        """
        free = {task: free_names(task) for _, task in pairs if task.tests}
        keys = [self._key(program, task) for program, task in pairs]
        found: dict[str, Grade] = {}
        with self._lock:
            for key in keys:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    found[key] = self._cache[key]
        waiting = collections.deque({k: pair for k, pair in zip(keys, pairs, strict=True) if k not in found}.items())
        failed: list[BaseException] = []

        def work() -> None:
            while waiting and not failed:
                try:
                    key, (program, task) = waiting.popleft()
                except IndexError:
                    return
                try:
                    found[key] = self._grade(program, task, free.get(task, ([], [])))
                except BaseException as error:
                    failed.append(error)

        # daemons, because the caller may have run out of patience: they keep no process from exiting
        count = min(self.workers, len(waiting))
        threads = [threading.Thread(target=work, daemon=True, name="fedpact-grading") for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        with self._lock:
            for key in keys:
                if found[key].outcome in (Outcome.PASS, Outcome.FAIL):  # a limit may be met on a quieter day
                    self._cache[key] = found[key]
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def close(self) -> None:
        """Kills the processes that wait."""
        self._pool.close()

    @property
    def num_processes(self) -> int:
        return self._pool.num_processes

    def _key(self, program: str, task: Task) -> str:
        limits = (self.limits.seconds, self.limits.cpu_seconds, self.limits.memory_mb, self.limits.output_bytes)
        return hashlib.sha256(encode((program, task.digest, limits, self.go_on))).hexdigest()

    def _grade(self, program: str, task: Task, free: ferry.Free) -> Grade:
        for _ in range(_ATTEMPTS):
            grade = self._attempt(program, task, free)
            if grade.outcome is not Outcome.ERROR:
                break
        return grade

    def _attempt(self, program: str, task: Task, free: ferry.Free) -> Grade:
        try:
            with self._pool.candidate() as channel:
                if not task.tests:
                    return ferry.run_inputs(self._candidate(channel), program, task, self.go_on)
                with self._pool.tests(task.digest) as tests:
                    return ferry.run_tests(self._candidate(channel), tests, program, task, free, self.go_on)
        except (ferry.LateError, ferry.FloodError) as error:
            return ferry.limit_of(error)
        except ferry.BrokenTestsError as error:
            return Grade(Outcome.ERROR, reason=str(error))
        except (OSError, ferry.GoneError) as error:
            return Grade(Outcome.ERROR, reason=f"{type(error).__name__}: {error}")

    def _candidate(self, channel: ferry.Channel) -> ferry.Candidate:
        return ferry.Candidate(channel, self.limits.output_bytes, time.monotonic() + self.limits.seconds)
