"""What the service adds to a call of a provider, beside other gateways: `python -m benchmarks.gateway`."""
