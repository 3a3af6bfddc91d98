"""Speed and memory compared with other libraries, interleaved: `make bench`, or `python -m benchmarks NAME`."""
