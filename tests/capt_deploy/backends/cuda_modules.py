"""Imitations of the modules of cuda-python and pycuda: one GPU, whose memory is the host's.

They are as strict as the real ones: the calls that `capt_deploy.backends.device` makes, with their
arguments and results, only with a context in the thread, and every address and object once.
test_device.py compares their signatures with the real modules where these are installed.
"""

import ctypes
import threading
from itertools import count
from types import SimpleNamespace

import numpy as np

LARGEST = 2**40  # bytes
NAME, CAPABILITY, CUDA = "an imitation", (8, 9), 13000


class Host:
    """What both imitations count."""

    def __init__(self):
        self.held = {}  # by address or number
        self.contexts = threading.local()
        self._numbers = count(1)
        self.time = 0.0

    def reserve(self, size):
        memory = np.full(size, 0xAB, np.uint8)
        self.held[memory.ctypes.data] = memory
        return memory.ctypes.data

    def keep(self, value=None):
        """Return the number of what is no memory."""
        self.held[number := next(self._numbers)] = [value]
        return number

    def tick(self):
        self.time += 1.0
        return self.time


class Runtime:
    """`cuda.bindings.runtime`: functions return their error first."""

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self):
        self.host, self._device, self._captured = Host(), 0, None

    def cudaGetErrorString(self, error):
        return (0, {2: b"out of memory"}.get(error, b"invalid value"))

    def cudaGetDeviceCount(self):
        return (0, 1)

    def cudaGetDeviceProperties(self, device):
        major, minor = CAPABILITY
        return (0, SimpleNamespace(name=NAME.encode() + bytes(9), major=major, minor=minor))

    def cudaDriverGetVersion(self):
        return (0, CUDA)

    def cudaGetDevice(self):
        return (0, self._device)

    def cudaSetDevice(self, device):
        self._device = device
        return (0,)

    def cudaMalloc(self, size):
        return (2, None) if size > LARGEST else (0, self.host.reserve(size))

    def cudaMallocHost(self, size):
        return (0, self.host.reserve(size))

    def _free(self, address):
        return (0,) if self.host.held.pop(address, None) is not None else (1,)

    def cudaFree(self, devPtr):
        return self._free(devPtr)

    def cudaFreeHost(self, ptr):
        return self._free(ptr)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1
        return (0, self.host.keep())

    def cudaStreamDestroy(self, stream):
        return self._free(stream)

    def cudaStreamSynchronize(self, stream):
        return (0,) if stream in self.host.held else (1,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        assert kind in (1, 2) and stream in self.host.held
        if self._captured is None:
            ctypes.memmove(dst, src, count)
        else:
            self._captured.append((dst, src, count))
        return (0,)

    def cudaEventCreate(self):
        return (0, self.host.keep())

    def cudaEventRecord(self, event, stream):
        self.host.held[event] = [self.host.tick()]
        return (0,)

    def cudaEventElapsedTime(self, start, end):
        return (0, self.host.held[end][0] - self.host.held[start][0])

    def cudaEventDestroy(self, event):
        return self._free(event)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self._captured is None
        self._captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        calls, self._captured = self._captured, None
        return (0, self.host.keep(calls))

    def cudaGraphInstantiateWithFlags(self, graph, flags):
        return (0, self.host.keep(*self.host.held[graph]))

    def cudaGraphDestroy(self, graph):
        return self._free(graph)

    def cudaGraphLaunch(self, graphExec, stream):
        for call in self.host.held[graphExec][0]:
            ctypes.memmove(*call)
        return (0,)

    def cudaGraphExecDestroy(self, graphExec):
        return self._free(graphExec)


class Driver:
    """`pycuda.driver`: functions raise errors, and objects are freed with the last reference."""

    def __init__(self):
        self.host = host = Host()

        class Error(Exception):
            pass

        class OutOfMemoryError(Error, MemoryError):
            pass

        def stack():
            host.contexts.__dict__.setdefault("stack", [])
            return host.contexts.stack

        def reserve(size):
            if not stack():
                raise Error("invalid device context")
            if size > LARGEST:
                raise OutOfMemoryError("cuMemAlloc failed: out of memory")
            return host.reserve(size)

        class Held:
            def __init__(self, size):
                self._address = reserve(size)

            def __int__(self):
                return self._address

            def free(self):
                host.held.pop(self._address)

        class Ended(Held):
            def __del__(self):
                self.free()

        class Stream(Ended):
            def __init__(self, flags=0):
                assert flags == 1
                super().__init__(1)
                self.handle = self._address

            def synchronize(self):
                assert self.handle in host.held

        class Event(Ended):
            def __init__(self, flags=0):
                super().__init__(1)

            def record(self, stream=None):
                assert isinstance(stream, Stream)
                self._time = host.tick()

            def time_since(self, event):
                return self._time - event._time

        class Pinned(Held):
            def __init__(self, size):
                super().__init__(size)
                self.__array_interface__ = host.held[self._address].__array_interface__

        class Context:
            def push(self):
                stack().append(self)

            @staticmethod
            def pop():
                stack().pop()

        class Device:
            def __init__(self, number):
                assert number == 0

            @staticmethod
            def count():
                return 1

            def name(self):
                return NAME

            def compute_capability(self):
                return CAPABILITY

            def retain_primary_context(self):
                return Context()

        def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
            assert dtype is np.uint8
            return np.asarray(Pinned(shape))

        def memcpy_htod_async(dest, src, stream=None):
            assert isinstance(stream, Stream)
            ctypes.memmove(dest, src.ctypes.data, src.nbytes)

        def memcpy_dtoh_async(dest, src, stream=None):
            assert isinstance(stream, Stream) and dest.flags.writeable
            ctypes.memmove(dest.ctypes.data, src, dest.nbytes)

        self.Error, self.Device, self.Stream, self.Event = Error, Device, Stream, Event
        self.mem_alloc, self.pagelocked_empty = Held, pagelocked_empty
        self.memcpy_htod_async, self.memcpy_dtoh_async = memcpy_htod_async, memcpy_dtoh_async
        self.init, self.get_driver_version = lambda: None, lambda: CUDA
