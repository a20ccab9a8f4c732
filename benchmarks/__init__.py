"""What FedPact costs beside the usual tools, as ratios measured side by side. `python -m benchmarks` runs all of them."""
