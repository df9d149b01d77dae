"""TensorRT and TensorRT-RTX: build engines, keep them, run them."""
