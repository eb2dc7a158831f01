"""What experiments cost: assignments, recording beside requests, reports. `python -m benchmarks.experiments`."""
