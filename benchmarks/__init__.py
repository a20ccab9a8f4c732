"""What FedPact costs beside the usual tools, in ratios taken side by side: `python -m benchmarks`."""
