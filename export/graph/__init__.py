"""The visual network in torch, made ready for export, and its ONNX graph."""
