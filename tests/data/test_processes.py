"""Threads, forked workers and what is imported when."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from prefkern import _core


def run(script, *, timeout=120):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_interpreter_is_free_during_the_work():
    """The main thread must run Python while another one is inside the call."""
    rewards, values = np.zeros((2, 100, 100_000), np.float32)
    bounds = {}

    def work():
        bounds["start"] = time.perf_counter()
        _core.gae(rewards, values, rewards, values, gamma=0.9, lam=0.9, masked="skip")
        bounds["end"] = time.perf_counter()

    shares = []
    for _ in range(20):  # a busy machine may starve the main thread; a held lock stops it every time
        bounds.clear()
        worker = threading.Thread(target=work)
        stamps = [time.perf_counter()]
        worker.start()
        while worker.is_alive():
            stamps.append(time.perf_counter())
        worker.join()
        duration = bounds["end"] - bounds["start"]
        shares.append(max(np.diff(stamps)) / duration)
        if shares[-1] < 0.5:
            return
    pytest.fail(f"the main thread stood still for {min(shares):.0%} of the call at best")


def test_concurrent_calls():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 64, 8192))
    options = {"gamma": 0.99, "lam": 0.95, "masked": "skip", "threads": 3}
    outputs = [(np.empty_like(rewards), np.empty_like(rewards)) for _ in range(8)]
    workers = [threading.Thread(target=_core.gae, args=(rewards, values, *out), kwargs=options) for out in outputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for out in outputs[1:]:
        np.testing.assert_array_equal(out, outputs[0])


def test_forked_dataloader_workers_do_not_hang():
    """The parent has used threads before it forks; so do the workers."""
    assert (
        run(
            """
        import numpy as np, torch
        from prefkern.data import collate_pairs, gae

        # Sums are numpy's: torch's own parallel sum hangs in a forked process whose parent has used it.
        torch.set_num_threads(4)
        big = np.random.default_rng(0).normal(size=(64, 32768))
        expected = gae(big, big).advantages.sum()

        def collate(rows):
            torch.set_num_threads(4)  # workers are limited to one by default
            batch = collate_pairs(rows, pad_token_id=0)
            batch["sum"] = gae(big, big).advantages.sum()
            return batch

        rows = [{"prompt_ids": [1] * n, "chosen_ids": [2] * 4000, "rejected_ids": [3] * 5000} for n in range(1, 65)]
        workers = {"num_workers": 2, "multiprocessing_context": "fork"}
        loader = torch.utils.data.DataLoader(rows, 16, collate_fn=collate, **workers)
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == 4 and all(batch["sum"] == expected for batch in batches)
            assert [batch["completion_mask"].numpy().sum() for batch in batches] == [16 * 9000] * 4
        print("done")
        """
        )
        == "done"
    )


def test_a_fork_at_any_moment_of_a_call_leaves_a_child_that_works():
    """While threads start or work: another one calls all the time."""
    assert (
        run(
            """
        import os, signal, threading
        import numpy as np
        from prefkern import _core

        rewards, values = np.random.default_rng(0).normal(size=(2, 64, 32768)).astype(np.float32)
        options = {"gamma": 0.99, "lam": 0.95, "masked": "skip"}

        def gae(threads):
            out = np.empty_like(rewards), np.empty_like(rewards)
            _core.gae(rewards, values, *out, **options, threads=threads)
            return out

        expected = gae(1)
        over = threading.Event()

        def work():
            while not over.is_set():
                gae(3)

        def right():
            return all(np.array_equal(got, wanted) for got, wanted in zip(gae(3), expected))

        worker = threading.Thread(target=work)
        worker.start()
        for _ in range(100):
            child = os.fork()
            if child == 0:
                signal.alarm(30)  # ends a child that hangs
                os._exit(0 if all(right() for _ in range(3)) else 1)
            assert os.waitpid(child, 0)[1] == 0
        over.set()
        worker.join()
        print("done")
        """
        )
        == "done"
    )


def test_no_thread_outlives_a_call():
    if not Path("/proc/self/task").exists():
        pytest.skip("this system does not list threads there")
    assert (
        run(
            """
        import threading, time
        from pathlib import Path
        import numpy as np
        from prefkern import _core

        def threads():
            return len(list(Path("/proc/self/task").iterdir()))

        rewards, values = np.zeros((2, 1000, 10_000), np.float32)
        before = threads()
        most = 0
        for _ in range(5):
            arguments = {"gamma": 0.9, "lam": 0.9, "masked": "skip", "exact": True, "threads": 8}
            caller = threading.Thread(target=_core.gae, args=(rewards, values, rewards, values), kwargs=arguments)
            caller.start()
            while caller.is_alive():
                most = max(most, threads())
            caller.join()
            time.sleep(0.2)
            assert threads() == before
        assert before + 1 < most <= before + 8, most  # the caller and those that help it
        print("done")
        """
        )
        == "done"
    )


def test_eight_forked_workers_for_a_thousand_batches():
    assert (
        run(
            """
        import torch
        from prefkern.data import collate_pairs, flatten

        def collate(rows):
            torch.set_num_threads(4)  # workers are limited to one by default
            batch = collate_pairs(rows, pad_token_id=0)
            flat = flatten(batch["input_ids"], batch["attention_mask"])
            return int(batch["completion_mask"].numpy().sum()), len(flat.input_ids)

        rows = [{"prompt_ids": [1] * 50, "chosen_ids": [2] * 600, "rejected_ids": [3] * 700}] * 4000
        torch.set_num_threads(4)
        expected = collate(rows[:4])
        assert expected == (4 * 1300, 4 * 1400)
        workers = {"num_workers": 8, "multiprocessing_context": "fork"}
        batches = list(torch.utils.data.DataLoader(rows, 4, collate_fn=collate, **workers))
        assert batches == [expected] * 1000
        print("done")
        """
        )
        == "done"
    )


def test_spawned_dataloader_workers_do_not_hang(tmp_path):
    """Spawned workers import the script anew; they use threads, as does the parent."""
    script = tmp_path / "spawned.py"
    script.write_text(
        textwrap.dedent(
            """
        import sys
        import torch
        from prefkern.data import collate_pairs, flatten

        def collate(rows):
            torch.set_num_threads(4)  # workers are limited to one by default
            batch = collate_pairs(rows, pad_token_id=0)
            flat = flatten(batch["input_ids"], batch["attention_mask"])
            return int(batch["completion_mask"].numpy().sum()), len(flat.input_ids)

        if __name__ == "__main__":
            workers, batches, size, scale = map(int, sys.argv[1:])
            row = {"prompt_ids": [1] * scale, "chosen_ids": [2] * 6 * scale, "rejected_ids": [3] * 7 * scale}
            torch.set_num_threads(4)
            expected = collate([row] * size)
            assert expected == (size * 13 * scale, size * 15 * scale)
            options = {"num_workers": workers, "multiprocessing_context": "spawn", "collate_fn": collate}
            found = list(torch.utils.data.DataLoader([row] * size * batches, size, **options))
            assert found == [expected] * batches
            print("done")
        """
        )
    )
    # 0.4 million cells in a batch, 12 MB to write: threads are used
    command = [sys.executable, str(script), "2", "3", "24", "1000"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr


def test_what_is_loaded_when():
    """The compiled module at the first call, pyarrow with the first Arrow object; without the former, what to do."""
    message = run(
        """
        import sys
        import prefkern.data
        from prefkern.check import MissingDependency
        assert "prefkern._core" not in sys.modules

        sys.modules["prefkern._core"] = None
        try:
            prefkern.data.pack([1], 2)
        except MissingDependency as error:
            print(error)

        del sys.modules["prefkern._core"]
        prefkern.data.gae([[1.0]], [[0.5]])
        prefkern.data.pack([1, 2], 3)
        prefkern.data.collate_pairs([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], pad_token_id=0)
        assert "prefkern._core" in sys.modules
        assert "pyarrow" not in sys.modules
        """
    )
    assert message.startswith("prefkern.data needs prefkern: its compiled module is missing; install a wheel with")
    assert "`maturin develop --release`" in message
