"""The local engine and its peers, measured in one run: `make bench-engine`, or `python -m benchmarks.engine`.

Our side is measured as a user meets it, through the HTTP of a real `softcue serve`; only the fraction of the matmul
rate (`decode_peak`) drives the engine in its own process.
"""
