import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from capt_deploy.backends.tensorrt.execution import Execution
from capt_deploy.backends.tensorrt.pool import Pool
from capt_deploy.core.errors import BackendError
from tests.capt_deploy.backends.tensorrt.host_device import (
    LAYOUT,
    PIXELS,
    Context,
    HostDevice,
    answer,
)


@pytest.fixture
def device():
    return HostDevice()


def execution(device):
    return Execution(device, LAYOUT, lambda scratch: Context(device), 64, capture=True)


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, *PIXELS), dtype=np.uint8)


def same(outputs, wanted):
    return all(np.array_equal(own, other) for own, other in zip(outputs, wanted, strict=True))


@pytest.fixture
def pool(device):
    return Pool(device, partial(execution, device))


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

    pool = Pool(device, make)
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
    pool = Pool(device, partial(execution, device))
    for _ in range(6):
        with pytest.raises(BackendError, match="out of memory"), pool.execution():
            pass
    device.left = 1000
    assert ask(pool, 1)


def test_after_the_only_one_failed_another_is_made():
    device = HostDevice(memory=1000)
    pool = Pool(device, partial(execution, device))
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(ValueError, match="of the caller"), pool.execution():
            waiting = threads.submit(ask, pool, 1)
            raise ValueError("of the caller")
        assert waiting.result()


def test_closing_waits_for_what_is_lent_and_ends_those_that_wait():
    device = HostDevice(memory=1000)
    pool = Pool(device, partial(execution, device))
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
