"""TensorRT and TensorRT-RTX: build engines, keep them on disk, run them."""
