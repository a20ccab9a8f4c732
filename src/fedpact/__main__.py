"""`python -m fedpact` is `fedpact`."""

from __future__ import annotations

from fedpact.cli.main import main

main()
