"""Speed and memory against the peers, side by side in one process: `make bench`, or `python -m benchmarks NAME`."""
