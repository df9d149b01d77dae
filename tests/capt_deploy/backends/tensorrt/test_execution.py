import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from capt_deploy.backends.tensorrt.execution import (
    Execution,
    ExecutionPool,
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


def test_a_layout_is_read_from_the_engine():
    assert read_layout(Engine(None), (1, 4, 8)) == LAYOUT


@pytest.fixture
def pool(device):
    return ExecutionPool(device, partial(execution, device))


def ask(pool, seed):
    asked = images(1 + seed % 8, seed)
    with pool.execution() as own:
        return same(own.run(asked), answer(asked))


def test_threads_get_their_own_answers_from_few_executions(pool, device):
    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(partial(ask, pool), range(300)))
    assert device.held["stream", id(device)] <= 4
    pool.close()
    assert device.leaks == []


def test_one_thread_uses_one_execution(pool, device):
    assert all(ask(pool, seed) for seed in range(20))
    assert device.held["stream", id(device)] == 1


def test_a_failed_execution_is_not_used_again(pool, device):
    with pytest.raises(ValueError, match="of the caller"), pool.execution():
        raise ValueError("of the caller")
    assert device.leaks == []
    assert ask(pool, 3)


def test_a_closed_pool_says_so_every_time(pool, device):
    ask(pool, 1)
    pool.close()
    pool.close()
    for _ in range(6):
        with pytest.raises(BackendError, match="closed"), pool.execution():
            pass
    assert device.leaks == []


def test_what_fits_once_is_waited_for_by_other_threads():
    device, refused = HostDevice(memory=1000), threading.Event()  # an execution takes 800

    def make():
        try:
            return execution(device)
        except BackendError:
            refused.set()
            raise

    pool = ExecutionPool(device, make)
    with ThreadPoolExecutor(6) as threads:
        with pool.execution():  # the others come while it is lent
            waiting = [threads.submit(ask, pool, seed) for seed in range(50)]
            assert refused.wait(10)
            assert not any(one.done() for one in waiting)
        assert all(one.result() for one in waiting)
    pool.close()
    assert (device.leaks, device.left) == ([], 1000)


def test_what_does_not_fit_once_is_an_error_each_time():
    device = HostDevice(memory=700)
    pool = ExecutionPool(device, partial(execution, device))
    for _ in range(6):
        with pytest.raises(BackendError, match="out of memory"), pool.execution():
            pass
    device.left = 1000
    assert ask(pool, 1)


def test_after_the_only_one_failed_another_is_made():
    device = HostDevice(memory=1000)
    pool = ExecutionPool(device, partial(execution, device))
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(ValueError, match="of the caller"), pool.execution():
            waiting = threads.submit(ask, pool, 1)
            raise ValueError("of the caller")
        assert waiting.result()


def test_closing_waits_for_what_is_lent_and_ends_those_that_wait():
    device = HostDevice(memory=1000)
    pool = ExecutionPool(device, partial(execution, device))
    with ThreadPoolExecutor(2) as threads:
        with pool.execution() as own:
            waiting = threads.submit(ask, pool, 1)
            closing = threads.submit(pool.close)
            with pytest.raises(BackendError, match="closed"):
                waiting.result(timeout=10)
            assert not closing.done()
            assert len(own.run(images(3, 0)).logits) == 3
        closing.result(timeout=10)
    assert device.leaks == []
