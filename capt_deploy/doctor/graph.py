"""The smallest graph that a backend can be tried on, written byte by byte: no onnx is needed.

It takes and gives what the graphs of bundles do. An image's embedding is its mean colour, 0-1.
"""

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs
from capt_deploy.metrics.calibration import softmax

SIDE = 8  # pixels, height and width
_IR_VERSION, _OPSET = 8, 17  # the last opset in which the axes of a mean are attributes
# ONNX's own numbers of types, of tensors and of attributes.
_FLOAT, _UINT8 = 1, 2
_INT, _INTS = 2, 7
_TO_EMBEDDING = (np.eye(3) / 255).astype(np.float32)
_TO_LOGITS = np.array([[0.02, 0.0], [0.0, 0.02], [-0.01, 0.01]], dtype=np.float32)


def expected_outputs(images: NDArray[np.uint8]) -> Outputs:
    """Return what the graph says of (batch, 8, 8, 3) images, computed by numpy."""
    means = images.astype(np.float32).mean(axis=(1, 2))
    logits = means @ _TO_LOGITS
    return Outputs(logits, softmax(logits).astype(np.float32), means @ _TO_EMBEDDING)


def make_graph() -> bytes:
    """Return the ONNX file: Cast, ReduceMean, two matrix products, Softmax."""
    nodes = [
        _node("Cast", ["images"], "floats", _integer("to", _FLOAT)),
        _node("ReduceMean", ["floats"], "means", _integers("axes", (1, 2)), _integer("keepdims")),
        _node("MatMul", ["means", "to_embedding"], "embedding"),
        _node("MatMul", ["means", "to_logits"], "logits"),
        _node("Softmax", ["logits"], "probabilities", _integer("axis", 1)),
    ]
    weights = {"to_embedding": _TO_EMBEDDING, "to_logits": _TO_LOGITS}
    classes = _TO_LOGITS.shape[1]
    shapes = {"logits": (classes,), "probabilities": (classes,), "embedding": (3,)}
    graph = [
        *(_message(1, node) for node in nodes),
        _text(2, "doctor"),
        *(_message(5, _tensor(name, values)) for name, values in weights.items()),
        _message(11, _value("images", _UINT8, (SIDE, SIDE, 3))),
        *(_message(12, _value(name, _FLOAT, shape)) for name, shape in shapes.items()),
    ]
    opset = _message(8, _text(1, ""), _number(2, _OPSET))
    return _number(1, _IR_VERSION) + opset + _message(7, *graph)


# The numbers below are those of the fields in onnx.proto.


def _node(kind: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    words = [*(_text(1, name) for name in inputs), _text(2, output), _text(4, kind)]
    return b"".join([*words, *(_message(5, one) for one in attributes)])


def _integer(name: str, value: int = 0) -> bytes:
    return _text(1, name) + _number(3, value) + _number(20, _INT)


def _integers(name: str, values: Sequence[int]) -> bytes:
    return _text(1, name) + b"".join(_number(8, one) for one in values) + _number(20, _INTS)


def _tensor(name: str, values: NDArray[np.float32]) -> bytes:
    shape = b"".join(_number(1, size) for size in values.shape)
    content = struct.pack(f"<{values.size}f", *values.flat)
    return shape + _number(2, _FLOAT) + _text(8, name) + _message(9, content)


def _value(name: str, kind: int, shape: Sequence[int]) -> bytes:
    """Return an input or output whose first axis is the batch."""
    axes = [_text(2, "batch"), *(_number(1, size) for size in shape)]
    tensor = _number(1, kind) + _message(2, *(_message(1, axis) for axis in axes))
    return _text(1, name) + _message(2, _message(1, tensor))


# Protobuf: every field is its number and kind, then a number or some bytes with their length.


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
