"""The Flower ServerApp: FedPact's round loop over Flower's Grid."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs, or goes on with, the run that the run's configuration names."""
    from fedpact.edge.server_app import serve

    serve(grid, context)
