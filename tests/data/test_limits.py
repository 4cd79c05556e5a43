"""What a call costs besides its arrays, and how it ends early: memory, time, signals, exceptions of other code."""

import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from prefkern import _core
from prefkern.data import collate_pairs, discounted_returns, gae, pack, token_batches

RNG = np.random.default_rng(5)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_call_that_finds_no_memory_raises_memory_error():
    script = """
        import resource
        import numpy as np
        from prefkern import _core

        n = 6_000_000
        lengths = np.arange(n) % 4096
        order, offsets = np.empty(n, np.int64), np.empty(n + 1, np.int64)
        cells, out, other = np.zeros((3, n, 1), np.float32)
        batches = {"budget": 4096, "ranks": 1, "seed": 0, "epoch": 0}
        calls = [
            lambda: _core.pack(lengths, 1 << 40, order, offsets),
            lambda: _core.pack(lengths, 4096, order, offsets),
            lambda: _core.balance_lengths(lengths, 8, False, order),
            lambda: _core.token_batches(lengths, order, offsets, padded=True, **batches),
            lambda: _core.token_batches(lengths, order, offsets, padded=False, **batches),
            lambda: _core.group_advantages(cells.ravel(), out.ravel(), method="per_group", ids=lengths),
            lambda: _core.group_advantages(cells.ravel(), out.ravel(), method="per_group", size=1),
            lambda: _core.gae(cells, cells, out, other, gamma=0.9, lam=0.9, masked="skip", moments=True),
        ]
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (8 << 20),) * 2)
        for call in calls:
            try:
                call()
                print("memory enough")
            except MemoryError as error:
                assert str(error) == "there is no memory for what this takes besides its arrays"
        print("done")
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done


class RangError(Exception):
    pass


def ring(*_):
    raise RangError


@pytest.mark.parametrize("capacity", [4096, 1 << 40])
def test_a_signal_ends_a_long_call(capacity):
    n = 8_000_000 if capacity == 4096 else 2_000_000
    lengths = RNG.integers(1, capacity, n)
    order, offsets = np.empty(n, np.int64), np.empty(n + 1, np.int64)

    def call():
        _core.pack(lengths, capacity, order, offsets)
        time.sleep(1)  # it may have ended first

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(20):  # a machine may be so fast, or so busy, that the call ends first
            order[:] = -1
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(RangError):
                call()
            if (order == -1).all():  # it is written last
                return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pytest.fail("the call was never left early")


def test_rows_without_cells_take_no_time():
    rows = np.empty((1 << 40, 0))
    start = time.perf_counter()
    assert gae(rows, rows).advantages.shape == rows.shape
    assert gae(rows, rows, whiten=True).advantages.shape == rows.shape
    assert discounted_returns(rows).shape == rows.shape
    assert time.perf_counter() - start < 1


def test_few_items_cost_little_whatever_the_capacity():
    times = {}
    for capacity in (16, 1 << 22):
        times[capacity] = []
        for _ in range(50):
            start = time.perf_counter()
            pack([1], capacity)
            times[capacity].append(time.perf_counter() - start)
    assert min(times[1 << 22]) < min(times[16]) + 1e-3  # a table of it takes 15 ms


def test_ranks_without_end_are_refused():
    with pytest.raises(ValueError, match=f"4 rows cannot make {2**58} batches"):
        token_batches([0, 0, 0, 0], 2**62, ranks=2**58)


class Watched(list):
    def __len__(self):
        raise AssertionError("Python code ran while an output was borrowed")

    __iter__ = __len__


def test_no_code_of_a_subclass_runs_while_numbers_are_copied():
    values = np.zeros(3, np.int64)
    for rows in ([Watched([1, 2]), [3]], [[1], Watched([2, 3])]):
        values[:] = 0
        _core.flatten("x", "ids", rows, values, True, True)
        assert values.tolist() == [1, 2, 3]
    _core.flatten("x", "ids", Watched([4, 5, 6]), values, True, False)
    assert values.tolist() == [4, 5, 6]


class Index:
    def __init__(self, error):
        self.error = error

    def __index__(self):
        raise self.error


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt()])
def test_exceptions_that_are_no_judgement_of_a_number_pass(error):
    row = {"prompt_ids": [1, Index(error)], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(type(error)) as raised:
        collate_pairs([row], pad_token_id=0)
    assert raised.value is error


def test_exceptions_that_are_one_are_the_cause():
    error = TypeError("not today")
    row = {"prompt_ids": [1, Index(error)], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(TypeError, match=re.escape("prompt_ids[0][1] must be an integer that fits int64")) as raised:
        collate_pairs([row], pad_token_id=0)
    assert raised.value.__cause__ is error
    released = memoryview(np.zeros((1, 2), np.float32))
    released.release()
    out = np.zeros((2, 1, 2), np.float32)
    with pytest.raises(TypeError, match="rewards must be a float32 array, got <class 'memoryview'>") as raised:
        _core.gae(released, out[0], *out, gamma=1.0, lam=1.0, masked="skip")
    assert isinstance(raised.value.__cause__, ValueError)


def test_two_calls_at_once_do_not_write_to_one_array():
    shared = np.zeros((2, 400, 100_000), np.float32)
    options = {"gamma": 0.9, "lam": 0.9, "masked": "skip"}
    small = np.zeros((2, 1, 10), np.float32)
    for write, read in [((shared[0, :1, :10], small[0]), small), (small, (shared[0, :1, :10], shared[1, :1, :10]))]:
        refused = []
        for _ in range(20):  # a busy machine may not let this thread run meanwhile
            other = threading.Thread(target=_core.gae, args=(*shared, *shared), kwargs=options)
            other.start()
            while other.is_alive() and not refused:
                try:
                    _core.gae(*read, *write, **options)
                except ValueError as error:
                    refused.append(str(error))
            other.join()
            if refused:
                break
        assert "overlaps memory that another call writes to" in refused[0]
    _core.gae(*small, *shared[:, :1, :10], **options)  # nothing of the calls is left
