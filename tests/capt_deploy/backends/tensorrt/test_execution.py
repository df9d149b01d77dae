from types import SimpleNamespace

import numpy as np
import pytest

from capt_deploy.backends.tensorrt.execution import (
    INPUT,
    Execution,
    read_layout,
)
from capt_deploy.core.errors import BackendError
from tests.capt_deploy.backends.tensorrt.host_device import (
    LAYOUT,
    PIXELS,
    Context,
    Engine,
    HostDevice,
    answer,
)


@pytest.fixture
def device():
    return HostDevice()


def execution(device, capture=True, fails=False):
    return Execution(device, LAYOUT, lambda scratch: Context(device, fails), 64, capture=capture)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *PIXELS), dtype=np.uint8)


def same(outputs, wanted):
    return all(np.array_equal(own, other) for own, other in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("capture", [True, False])
def test_batches_of_all_sizes_in_any_order(device, capture):
    with device.active():
        own = execution(device, capture)
        for count in (1, 8, 3, 2, 8, 5, 1, 7, 4, 6):
            asked = images(count, seed=count)
            assert same(own.run(asked), answer(asked))
        assert len(device.launched) == (10 if capture else 0)
        assert len({id(graph) for graph in device.launched}) == (4 if capture else 0)


def test_outputs_are_the_callers_own(device):
    with device.active():
        own = execution(device)
        first, asked = own.run(images(2, 1)), images(2, 1)
        own.run(images(8, 2))
        own.close()
    assert same(first, answer(asked))
    assert all(values.flags.owndata and values.flags.writeable for values in first)


def test_images_in_any_memory_layout(device):
    asked = images(8)[::-2, :, ::-1]
    with device.active():
        assert same(execution(device).run(asked), answer(asked))


@pytest.mark.parametrize("capture", [True, False])
def test_everything_is_given_back(device, capture):
    with device.active():
        own = execution(device, capture)
        own.run(images(3))
        assert len(own.time(images(3), 4)) == 4
        own.close()
    assert device.leaks == []


def test_what_does_not_fit_is_an_error_and_gives_all_back():
    device = HostDevice(memory=700)
    with device.active(), pytest.raises(BackendError, match="out of memory"):
        execution(device)
    assert (device.leaks, device.left) == ([], 700)


def test_a_failed_run_and_a_failed_graph_say_what_to_do(device):
    with device.active():
        with pytest.raises(BackendError, match="failed to run"):
            execution(device, fails=True).run(images(1))
        device.captures = False
        with pytest.raises(BackendError, match=r"RuntimeOptions\(cuda_graphs=False\)"):
            execution(device).run(images(1))


def test_times_are_of_each_run_alone(device):
    with device.active():
        # This device's clock counts launches: the one that makes the graph is not among them.
        assert execution(device).time(images(5), 3) == [1.0, 1.0, 1.0]


def engine(shapes=None, types=None):
    own = Engine(None)
    own.names += [name for name in shapes or {} if name not in own.names]
    own.num_io_tensors = len(own.names)
    shape_of, type_of = own.get_tensor_shape, own.get_tensor_dtype
    own.get_tensor_shape = lambda name: (shapes or {}).get(name) or shape_of(name)
    own.get_tensor_dtype = lambda name: (types or {}).get(name) or type_of(name)
    return own


TRT = SimpleNamespace(nptype=lambda own: own)


def test_a_layout_is_read_from_the_engine():
    assert read_layout(TRT, engine(), (1, 4, 8)) == LAYOUT


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": {"more": (1,)}, "types": {"more": np.float32}},
        {"shapes": {INPUT: (4, *PIXELS)}},
        {"shapes": {INPUT: (-1, 3)}},
        {"shapes": {"logits": (-1, 3, 3)}},
        {"types": {INPUT: np.float32}},
        {"types": {"embedding": np.float16}},
    ],
)
def test_an_engine_of_something_else_is_refused(changes):
    with pytest.raises(BackendError, match="expected"):
        read_layout(TRT, engine(**changes), (1, 4, 8))
