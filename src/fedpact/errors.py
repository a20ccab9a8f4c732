"""Everything that FedPact raises on purpose, each in one line: where, what was found, what was expected, the remedy.

FedPactError                1   our bug, unless a subclass says otherwise
├── ConfigError             2   a file or an option is wrong
│   ├── DataError           2   prompts cannot be read
│   └── RewardError         2   a member's reward function misbehaves
├── RefusedError            3   a safety rule said no
│   ├── UnacceptedError     3   a member has not accepted this contract
│   └── InadmissibleError   3   the server will not take this reply
├── StoreError              4   the run folder cannot be read or written
├── TooFewRepliesError      5   an exchange ended below `min_replies`
└── CheckFailedError        6   the work is done and a check failed
"""

from __future__ import annotations

from typing import ClassVar


class FedPactError(Exception):
    """Base of all errors; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class ConfigError(FedPactError):
    """A configuration file or option is wrong."""

    exit_code = 2


class DataError(ConfigError):
    """Prompts cannot be read, or lack a column."""


class RewardError(ConfigError):
    """A reward function could not be loaded, failed, hung, or returned something that is not a reward."""


class RefusedError(FedPactError):
    """A safety rule refused; nothing was sent."""

    exit_code = 3


class UnacceptedError(RefusedError):
    """A member has not accepted the run's contract."""


class InadmissibleError(RefusedError):
    """The server does not take this reply."""


class StoreError(FedPactError):
    """The run folder cannot be read or written, or is not what it says it is."""

    exit_code = 4


class TooFewRepliesError(FedPactError):
    """An exchange ended with fewer replies than `min_replies`."""

    exit_code = 5


class CheckFailedError(FedPactError):
    """The work finished, and a check on its result failed."""

    exit_code = 6
