"""What gae takes, what it gives back, and what it refuses."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from prefkern import _core
from prefkern.data import gae

RNG = np.random.default_rng(7)
REWARDS, VALUES = RNG.normal(size=(2, 3, 5)).astype(np.float32)
MASK = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 1]], bool)
EXPECTED = gae(REWARDS, VALUES, mask=MASK)


def same(got, expected=EXPECTED):
    for actual, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), wanted)


@pytest.mark.parametrize("convert", [np.bool_, np.uint8, np.int8, np.int32, np.int64, np.uint64])
def test_mask_dtypes(convert):
    same(gae(REWARDS, VALUES, mask=MASK.astype(convert)))
    same(gae(REWARDS, VALUES, mask=torch.from_numpy(MASK)))
    same(gae(REWARDS, VALUES, mask=MASK.tolist()))


def test_torch_in_torch_out():
    got = gae(torch.from_numpy(REWARDS), torch.from_numpy(VALUES), mask=torch.from_numpy(MASK).long())
    assert all(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in got)
    same(got)


def test_the_kind_is_that_of_the_rewards():
    expected = gae(REWARDS, VALUES)
    tensors, arrays = gae(torch.from_numpy(REWARDS), VALUES), gae(REWARDS, torch.from_numpy(VALUES))
    assert isinstance(tensors.returns, torch.Tensor)
    assert isinstance(arrays.returns, np.ndarray)
    for got in (tensors, arrays):
        np.testing.assert_array_equal(got.returns, expected.returns)
        np.testing.assert_array_equal(got.advantages, expected.advantages)


def test_any_strides():
    for r, v, m in [
        (np.asfortranarray(REWARDS), VALUES, MASK),
        (np.repeat(REWARDS, 2, 1)[:, ::2], np.flip(np.flip(VALUES, 1).copy(), 1), np.asfortranarray(MASK)),
        (REWARDS, torch.from_numpy(VALUES).T.contiguous().T.numpy(), np.repeat(MASK, 3, 0)[::3]),
    ]:
        assert not (r.flags.c_contiguous and v.flags.c_contiguous)
        same(gae(r, v, mask=m))
    unaligned = np.frombuffer(b"x" + REWARDS.tobytes(), np.uint8)[1:].view(np.float32).reshape(3, 5)
    same(gae(unaligned, VALUES, mask=MASK))


def test_read_only_inputs_are_not_written():
    rewards, values = REWARDS.copy(), VALUES.copy()
    rewards.flags.writeable = values.flags.writeable = False
    same(gae(rewards, values, mask=MASK))
    np.testing.assert_array_equal(rewards, REWARDS)


LISTS = ([[1.0, 2.0], [], [3.0]], [[0.5, 1.0], [], [2.0]])


def test_lists_of_unequal_lengths():
    got = gae(*LISTS, gamma=0.5, lam=0.5, bootstrap=[4, 5, 6], mask=[[1, 1], [], [True]])
    # row 0: delta = [1 + .5 - .5, 2 + 2 - 1]; row 2: 3 + .5 * 6 - 2
    assert got.advantages == [[1.75, 3.0], [], [4.0]]
    assert got.returns == [[2.25, 4.0], [], [6.0]]
    assert gae([], []) == ([], [])
    assert gae([[]], [[]]) == ([[]], [[]])


def test_lists_of_arrays():
    got = gae([np.float32([1, 2]), np.float32([3])], [np.float32([0.5, 1]), np.float32([2])], gamma=0.5, lam=0.5)
    assert [x.tolist() for x in got.advantages] == [[1.25, 1.0], [1.0]]
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in got.advantages)
    tensors = gae([torch.tensor([1.0, 2.0]), torch.tensor([])], [torch.tensor([0.5, 1.0]), torch.tensor([])])
    assert all(isinstance(x, torch.Tensor) for x in tensors.returns)
    assert [len(x) for x in tensors.returns] == [2, 0]
    assert tensors.returns[0].tolist() == pytest.approx([1 + 0.99 * 1 + 0.99 * 0.95 * (2 - 1), 2.0], rel=1e-6)


def test_flat_lists_with_offsets():
    got = gae([1.0, 2.0, 3.0], [0.5, 1.0, 2.0], cu_seqlens=[0, 2, 2, 3], gamma=0.5, lam=0.5, bootstrap=[4, 5, 6])
    assert got.advantages == [1.75, 3.0, 4.0]


@pytest.mark.parametrize("make", [pa.list_, pa.large_list])
@pytest.mark.parametrize("dtype", [pa.float32(), pa.float64()])
def test_arrow_lists(make, dtype):
    rewards, values = (pa.array(rows, make(dtype)) for rows in LISTS)
    mask = pa.array([[True, True], [], [True]], pa.list_(pa.bool_()))
    got = gae(rewards, values, gamma=0.5, lam=0.5, bootstrap=[4, 5, 6], mask=mask)
    assert got.advantages.type == rewards.type
    assert got.advantages.to_pylist() == [[1.75, 3.0], [], [4.0]]
    tail = gae(rewards[1:], values.slice(1), gamma=0.5, lam=0.5, bootstrap=[5, 6], mask=mask[1:])
    assert tail.returns.to_pylist() == [[], [6.0]]
    chunks = [pa.chunked_array([x[:1], x[1:]]) for x in (rewards, values)]
    assert gae(*chunks, gamma=0.5, lam=0.5, bootstrap=[4, 5, 6]).returns.to_pylist() == [[2.25, 4.0], [], [6.0]]
    fixed = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(dtype, 2))
    assert gae(fixed[1:], fixed[1:], gamma=0.5, lam=0.5).returns.type == fixed.type
    assert gae(fixed[1:], fixed[1:], gamma=0.5, lam=0.5).advantages.to_pylist() == [[2.0, 0.0]]


def test_empty_shapes():
    for shape in [(0, 0), (0, 5), (4, 0)]:
        got = gae(np.zeros(shape), np.zeros(shape), bootstrap=np.zeros(shape[0]), mask=np.ones(shape, bool))
        assert got.advantages.shape == got.returns.shape == shape
    assert gae(np.zeros(0), np.zeros(0), cu_seqlens=np.array([0])).returns.shape == (0,)
    assert gae(np.zeros(0), np.zeros(0), cu_seqlens=[0, 0, 0]).returns.shape == (0,)


def test_out_is_written_and_returned():
    out = np.full_like(REWARDS, np.nan), np.full_like(REWARDS, np.nan)
    got = gae(REWARDS, VALUES, mask=MASK, out=out)
    assert got.advantages is out[0]
    assert got.returns is out[1]
    same(out)
    tensors = torch.full((3, 5), torch.nan), torch.full((3, 5), torch.nan)
    assert gae(REWARDS, VALUES, mask=MASK, out=tensors).advantages is tensors[0]
    same(tensors)


@pytest.mark.parametrize("masked", ["skip", "zero", "none"])
def test_exact_aliases_work_in_place(masked):
    expected = gae(REWARDS, VALUES, mask=MASK, masked=masked)
    fresh = np.empty_like(REWARDS)
    for pick in [lambda r, v: (r, v), lambda r, v: (v, r), lambda r, v: (r, fresh), lambda r, v: (fresh, r)]:
        r, v = REWARDS.copy(), VALUES.copy()
        same(gae(r, v, mask=MASK, masked=masked, out=pick(r, v)), expected)
    r = torch.from_numpy(REWARDS.copy())
    one = gae(REWARDS, REWARDS, mask=MASK, masked=masked)
    same(gae(r, r, mask=MASK, masked=masked, out=(r, torch.empty_like(r))), one)


def test_partial_aliases_are_refused():
    memory = np.zeros(40, np.float32)
    r, v = memory[:15].reshape(3, 5), VALUES.copy()
    for out, pair in [
        ((memory[1:16].reshape(3, 5), v), "rewards overlaps out[0]"),
        ((np.empty_like(v), memory[14:29].reshape(3, 5)), "rewards overlaps out[1]"),
        ((memory[20:35].reshape(3, 5), memory[21:36].reshape(3, 5)), "out[1] overlaps out[0]"),
        ((r, r), "out[1] overlaps out[0]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(f"prefkern.data.gae: {pair} in memory")):
            gae(r, v, out=out)
    shared = np.zeros((3, 5), np.float32)
    mask = shared.view(np.uint8).reshape(-1)[:15].reshape(3, 5)
    with pytest.raises(ValueError, match="mask overlaps out"):
        _core.gae(r, v, shared, np.empty_like(v), gamma=1, lam=1, masked="skip", mask=mask)
    with pytest.raises(ValueError, match="bootstrap overlaps out"):
        gae(r, v, out=(shared, np.empty_like(v)), bootstrap=shared.reshape(-1)[:3])


def refused(error, message, rewards=REWARDS, values=VALUES, **options):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.gae: {message}")):
        gae(rewards, values, **options)


def test_shapes_and_dtypes_are_refused():
    refused(ValueError, "rewards and values must have the same shape, got (3, 5) and (3, 4)", values=VALUES[:, :4])
    refused(ValueError, "rewards and mask must have the same shape, got (3, 5) and (3, 4)", mask=MASK[:, :4])
    refused(ValueError, "rewards and terminated must have the same shape, got (3, 5) and (5, 3)", terminated=MASK.T)
    refused(
        TypeError, "rewards and values must have the same dtype, got float32 and float64", values=VALUES.astype(float)
    )
    refused(TypeError, "rewards must be float32 or float64, got int64 (3, 5)", REWARDS.astype(int), VALUES.astype(int))
    refused(
        TypeError, "rewards must be float32 or float64, got >f4 (3, 5)", REWARDS.astype(">f4"), VALUES.astype(">f4")
    )
    refused(TypeError, "rewards must be float32 or float64, got float16", REWARDS.astype("f2"), VALUES.astype("f2"))
    refused(ValueError, "rewards must be [B, T], or packed [N] with cu_seqlens, got shape (5,)", REWARDS[0], VALUES[0])
    refused(
        ValueError, "rewards must be [B, T], or packed [N] with cu_seqlens, got shape (3, 5) with", cu_seqlens=[0, 15]
    )
    refused(
        ValueError, "bootstrap must hold one value for each of the 3 rows, got shape (2,)", bootstrap=REWARDS[0, :2]
    )
    refused(TypeError, "rewards and bootstrap must have the same dtype", bootstrap=np.zeros(3))
    refused(TypeError, "rewards must be a numpy array or a torch tensor, got str 'x'", rewards="x")
    masked_array = np.ma.array(REWARDS, mask=MASK)
    refused(TypeError, "rewards must not be a numpy masked array", masked_array)


def test_tensors_are_refused():
    tensor = torch.from_numpy(REWARDS)
    refused(
        ValueError, "values must not require a gradient; pass values.detach()", values=tensor.clone().requires_grad_()
    )
    refused(TypeError, "rewards must not be bfloat16, which numpy lacks; convert it with .float()", tensor.bfloat16())
    refused(
        ValueError, "rewards must be on the CPU, got float32 (3, 5) on meta; move it with .cpu()", tensor.to("meta")
    )
    refused(ValueError, "rewards must be a dense tensor", tensor.to_sparse())


def test_values_are_refused():
    refused(ValueError, "gamma must be a finite number in [0.0, 1.0], got 1.5", gamma=1.5)
    refused(ValueError, "lam must be a finite number in [0.0, 1.0], got nan", lam=float("nan"))
    refused(ValueError, "masked must be one of 'skip', 'zero', 'none', got 'carry'", masked="carry")
    two = MASK.astype(np.int64)
    two[1, 2] = 2
    refused(ValueError, "mask must hold only 0 and 1 (or be bool), got 2 at [1, 2]", mask=two)
    refused(
        ValueError, "terminated must hold only 0 and 1 (or be bool), got -1 at [0, 0]", terminated=-MASK.astype(int)
    )
    refused(TypeError, "mask must be bool or numbers 0 and 1, got complex64 (3, 5)", mask=MASK.astype(np.complex64))
    for value in (0.5, np.nan):
        part = MASK.astype(np.float32)
        part[2, 1] = value
        refused(ValueError, f"mask must hold only 0 and 1 (or be bool), got {value} at [2, 1]", mask=part)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_masks_of_floats_are_masks(dtype) -> None:
    """As the losses take them."""
    expected = gae(REWARDS, VALUES, mask=MASK).advantages
    np.testing.assert_array_equal(gae(REWARDS, VALUES, mask=MASK.astype(dtype)).advantages, expected)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 9, 7, 15], "cu_seqlens must never decrease, got 7 after 9 at row 1"),
        ([1, 15], "cu_seqlens must start at 0, got 1"),
        ([0, 14], "cu_seqlens must end at the number of tokens 15, got 14"),
        ([0, 16], "cu_seqlens must end at the number of tokens 15, got 16"),
        ([-1, 15], "cu_seqlens must not be negative, got -1"),
        ([], "cu_seqlens must hold one offset more than there are rows, got none"),
    ],
)
def test_offsets_are_refused(offsets, message):
    refused(ValueError, message, REWARDS.reshape(-1), VALUES.reshape(-1), cu_seqlens=np.array(offsets, np.int64))


def test_other_offset_types():
    flat = REWARDS.reshape(-1), VALUES.reshape(-1)
    refused(
        TypeError,
        "cu_seqlens must hold integers that fit int64, got float64 (2,)",
        *flat,
        cu_seqlens=np.array([0.0, 15]),
    )
    refused(ValueError, "cu_seqlens must have one dimension, got int64 (1, 2)", *flat, cu_seqlens=np.array([[0, 15]]))


def test_lists_are_refused_by_row():
    rewards, values = LISTS
    refused(ValueError, "rewards[2] and values[2] must have the same length, got 1 and 0", rewards, [[1, 2], [], []])
    refused(
        ValueError, "rewards and mask must have the same number of rows, got 3 and 1", rewards, values, mask=[[1, 1]]
    )
    refused(TypeError, "rewards[2][0] must be a number, got str 'x'", [[1, 2], [], ["x"]], values)
    refused(TypeError, "rewards[1] must be a list or a one-dimensional array, got NoneType None", [[1], None], values)
    refused(TypeError, "rewards[0] must be a list or a one-dimensional array, got float 1.0", [1.0, 2.0], [1.0, 2.0])
    refused(ValueError, "mask[0] and mask[1] must have the same length, got 5 and 4", mask=[[1] * 5, [1] * 4, [1] * 5])
    refused(ValueError, "out needs rewards that are a numpy array", rewards, values, out=(REWARDS, VALUES))
    refused(ValueError, "cu_seqlens is for packed arrays", pa.array(rewards), values, cu_seqlens=[0, 3])


def test_arrow_is_refused_by_row():
    values = pa.array([[0.5], [1.0, 2.0]])
    refused(ValueError, "rewards[1] is null; drop such rows first", pa.array([[0.5], None]), values)
    refused(ValueError, "rewards[1][1] is null", pa.array([[0.5], [1.0, None]]), values)
    refused(ValueError, "rewards[0][1] is null", pa.array([[0.5], [1.0, None]])[1:], values)
    refused(
        TypeError, "rewards must be an Arrow list, large_list or fixed_size_list array, got", pa.array([0.5]), values
    )
    refused(TypeError, "rewards must be float32 or float64, got int64 (3,)", pa.array([[1], [2, 3]]), values)


def test_outputs_are_refused():
    fresh = np.empty_like(REWARDS)
    refused(TypeError, "out must be the pair (advantages, returns), got", out=fresh)
    refused(TypeError, "rewards and out[1] must have the same dtype", out=(fresh, np.empty((3, 5))))
    refused(
        ValueError,
        "rewards and out[0] must have the same shape, got (3, 5) and (3, 4)",
        out=(np.empty((3, 4), "f4"), fresh),
    )
    refused(ValueError, "out[0] must be C-contiguous, got strides", out=(np.asfortranarray(fresh), fresh))
    frozen = fresh.copy()
    frozen.flags.writeable = False
    refused(ValueError, "out[1] must be writable, got a read-only buffer", out=(fresh, frozen))


def test_an_output_of_another_shape_is_no_input():
    """Its memory is the same, but not its rows."""
    both = np.arange(6, dtype=np.float32)
    other, values = np.empty((2, 3), np.float32), VALUES[:2, :3].copy()
    message = "rewards and values must have the same shape, got "
    for out in ((both.reshape(2, 3), other), (other, both.reshape(2, 3))):
        with pytest.raises(ValueError, match=re.escape(message + "(3, 2) and (2, 3)")):
            gae(both.reshape(3, 2), values, out=out)
        with pytest.raises(ValueError, match=re.escape(message + "(2, 3) and (3, 2)")):
            gae(values, both.reshape(3, 2), out=out)
    np.testing.assert_array_equal(both, np.arange(6))


def test_the_core_names_the_argument_that_decides():
    options = {"gamma": 1.0, "lam": 1.0, "masked": "skip"}
    out = np.empty_like(REWARDS), np.empty_like(REWARDS)
    for dtype in (np.int64, np.complex64, np.float16):
        with pytest.raises(TypeError, match="rewards must be a float32 array, got format"):
            _core.gae(REWARDS.astype(dtype), VALUES, *out, **options)
    with pytest.raises(TypeError, match="out\\[0\\] must be a float64 array, got format 'f'"):
        _core.gae(REWARDS.astype(np.float64), VALUES, *out, **options)
    with pytest.raises(TypeError, match="cu_seqlens must be an int64 array, got format"):
        _core.gae(*(x.ravel() for x in (REWARDS, VALUES, *out)), **options, cu_seqlens=np.array([0, 15], np.int32))


def test_the_core_refuses_what_it_cannot_read():
    options = {"gamma": 1.0, "lam": 1.0, "masked": "skip"}
    out = np.empty_like(REWARDS), np.empty_like(REWARDS)
    with pytest.raises(TypeError, match="rewards must be a float32 array, got format '>f'"):
        _core.gae(REWARDS.astype(">f4"), VALUES, *out, **options)
    with pytest.raises(TypeError, match="values must be a float32 array, got <class 'list'>"):
        _core.gae(REWARDS, [1.0], *out, **options)
    with pytest.raises(ValueError, match="values must be C-contiguous"):
        _core.gae(REWARDS, VALUES.T, *out, **options)
    unaligned = np.frombuffer(b"x" + REWARDS.tobytes(), np.uint8)[1:].view(np.float32).reshape(3, 5)
    with pytest.raises(ValueError, match=r"values cannot be read in place: .*aligned"):
        _core.gae(REWARDS, unaligned, *out, **options)
    with pytest.raises(TypeError, match=r"mask must be a uint8 array, got format '\?'"):
        _core.gae(REWARDS, VALUES, *out, mask=MASK, **options)
