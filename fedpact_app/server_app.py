"""The Flower ServerApp: FedPact's round loop over Flower's Grid."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs, or goes on with, the run that the run's configuration names."""
    try:
        from fedpact.edge.server_app import serve
    except ImportError as error:
        raise RuntimeError(
            "fedpact exit 2: the ServerApp's host lacks FedPact, or has another version than whoever submitted this "
            f"run ({type(error).__name__}: {error}); install the same there"
        ) from None
    serve(grid, context)
