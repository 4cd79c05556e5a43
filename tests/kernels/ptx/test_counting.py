"""What the machine counts: sectors, bytes, bank conflicts, instructions, barriers."""

import numpy as np
import pytest

from ptx import report, snippets
from ptx.counting import Launch, bank_conflicts
from ptx.snippets import TID, words


def copy(step: int, vector: int = 1, threads: int = 64) -> Launch:
    """Loads and stores one vector a lane, the lanes ``step`` words apart."""
    data, out = words(threads * step + 8), words(threads * step + 8)
    names = ", ".join(f"%r{20 + i}" for i in range(vector))
    form = f"v{vector}.b32" if vector > 1 else "b32"
    value = f"{{{names}}}" if vector > 1 else names
    body = TID.format(size=4 * step) + "ld.param.b64 %rd4, [p1];\nadd.s64 %rd5, %rd4, %rd2;\n"
    body += f"ld.global.{form} {value}, [%rd3];\nst.global.{form} [%rd5], {value};"
    return snippets.run(body, data, out, threads=threads)


@pytest.mark.parametrize(
    ("step", "vector", "sectors", "efficiency"),
    [(1, 1, 8, 1.0), (4, 4, 32, 1.0), (2, 1, 16, 0.5), (8, 1, 64, 0.125), (8, 4, 64, 0.5), (0, 1, 2, 0.125)],
)
def test_sectors(step: int, vector: int, sectors: int, efficiency: float) -> None:
    if step == 0:  # all lanes read one word
        data, out = words(8), words(64)
        body = TID.format(size=4) + "ld.param.b64 %rd4, [p1];\nadd.s64 %rd5, %rd4, %rd2;\n"
        launch = snippets.run(body + "ld.global.b32 %r2, [%rd1];\nst.global.b32 [%rd5], %r2;", data, out)
        load, store = launch.accesses.values()
        assert (load.requests, load.requested, load.needed, load.moved) == (2, 2, 8, 32)
        assert store.moved == 256
        return
    launch = copy(step, vector)
    load, store = launch.accesses.values()
    assert load.requested == store.requested == sectors
    assert load.needed == 64 * 4 * vector
    assert load.moved == 32 * sectors
    assert launch.efficiency == efficiency


def test_moved_bytes_count_a_block_once_and_a_second_pass_again() -> None:
    data = words(64)
    once = TID.format(size=4) + "ld.global.b32 %r2, [%rd3];\nld.global.b32 %r3, [%rd3];\n"
    assert snippets.run(once, data).bytes_read == 256
    twice = TID.format(size=4) + "ld.global.b32 %r2, [%rd3];\nbra $next;\n$next:\nld.global.b32 %r3, [%rd3];\n"
    assert snippets.run(twice, data).bytes_read == 512
    unordered = TID.format(size=4) + "xor.b32 %r4, %r1, 31;\nmul.wide.u32 %rd4, %r4, 4;\nadd.s64 %rd5, %rd1, %rd4;\n"
    launch = snippets.run(unordered + "ld.global.b32 %r2, [%rd5];", data)
    assert launch.efficiency == 1.0


def test_bank_conflicts() -> None:
    lane = np.arange(32)
    warp = np.zeros(32, np.int64)
    assert bank_conflicts(lane * 4, 4, warp) == 0
    assert bank_conflicts(lane * 8, 4, warp) == 1
    assert bank_conflicts(lane * 128, 4, warp) == 31
    assert bank_conflicts(lane * 0, 4, warp) == 0  # one word for all
    assert bank_conflicts(lane * 132, 4, warp) == 0  # rows padded by a word
    assert bank_conflicts(lane * 2, 2, warp) == 0
    assert bank_conflicts(lane * 16, 16, warp) == 0  # a quarter warp at a time
    assert bank_conflicts(lane * 32, 16, warp) == 4  # two of eight lanes meet, in each quarter
    both = np.concatenate([lane * 8, lane * 4])
    assert bank_conflicts(both, 4, np.repeat([0, 1], 32)) == 1


def test_the_report_is_a_table() -> None:
    line = ("fold", "15.1", "1.000", "-", "0.996", "3.0", "0")
    assert report.table([line]).splitlines()[1:] == [
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| fold | 15.1 | 1.000 | - | 0.996 | 3.0 | 0 |",
    ]


def test_instructions_and_barriers_are_counted_per_warp_and_per_program() -> None:
    data = words(64)
    launch = snippets.run(TID.format(size=4) + "bar.sync 0;\nbar.sync 0;\nld.global.b32 %r2, [%rd3];", data, grid=3)
    assert launch.barriers == 6
    assert launch.instructions["bar.sync"] == 12
    assert launch.instructions["ld.global.b32"] == 6
    assert launch.accesses[6].requests == 6
    assert launch.programs == 3
