"""Compression of trained models: pruning, low-rank factors, fewer layers, int8 weights and ONNX Runtime."""
