"""The sanitizer catches what is planted, lets a clean kernel pass, and counts bytes."""

import pytest
import torch
import triton
import triton.language as tl
from sanitizer import Violation, sanitized

from mae_fast.ops import dispatch

if not dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1 runs it, in a process of its own", allow_module_level=True)

N, BLOCK = 37, 16


@triton.jit
def _double_kernel(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    """out = 2 x; `shift` moves the place of every store."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i + shift, 2 * x, mask=i < n)


@triton.jit
def _overrun_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = 2 x, and the right answer, though the last load has no mask."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i), mask=i < n)


@triton.jit
def _race_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Programs overlap by one element, and give it the same value."""
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, 2 * x, mask=i < n)


@triton.jit
def _neighbour_kernel(x_ptr, n, BLOCK: tl.constexpr):
    """In place, and the right neighbour's old value is wanted: right in order only."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    right = tl.load(x_ptr + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(x_ptr + i, right, mask=i < n)


@triton.jit
def _twice_kernel(x_ptr, out_ptr, n, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """Stores everything twice in one program, or all lanes to one element."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    if SAME:
        tl.store(out_ptr + i * 0 + tl.program_id(0), x, mask=i < n)
    else:
        tl.store(out_ptr + i, x, mask=i < n)
        tl.store(out_ptr + i, 2 * x, mask=i < n)


@triton.jit
def _back_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Reads back what other threads of its program wrote."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)
    tl.store(x_ptr + i, tl.load(out_ptr + n - 1 - i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _no_other_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.atomic_add(out_ptr + i, 2 * x, mask=i < n)


@triton.jit
def _table_kernel(table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = the tensor whose address lies in the table."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _words_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """A copy of bytes, four in one access."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + i, mask=i < n, other=0)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + i, words, mask=i < n)


SEEN = []


@triton.jit
def _two_masks_kernel(x_ptr, flag_ptr, out_ptr, n, OFF: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2 x by a mask of two; `OFF` moves the loads beyond the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + OFF, mask=(i < n) & (tl.load(flag_ptr) != 0), other=0.0)
    tl.store(out_ptr + i, 2 * x, mask=i < n)


@triton.jit
def _order_kernel(out_ptr):
    SEEN.append(int(tl.program_id(0).handle.data[0]))
    tl.store(out_ptr + tl.program_id(0), 1)


GRID = (triton.cdiv(N, BLOCK),)


@pytest.fixture
def x():
    return torch.arange(1, N + 1).float()


def _double(x, out, n=N, shift=0):
    _double_kernel[GRID](x, out, n, shift, BLOCK=BLOCK)
    return out


def test_a_clean_kernel_passes_and_its_bytes_are_counted(x):
    with sanitized() as record:
        out = _double(x, torch.empty(N))
    assert torch.equal(out, 2 * x)
    (launch,) = record.launches
    assert (launch.kernel, launch.programs) == ("_double_kernel", 3)
    assert launch.loaded == launch.loaded_once == launch.stored == 4 * N
    assert record.moved == record.requested == 8 * N


def test_a_mask_of_two_masks_is_a_mask(x):
    """Of `a & b`, where b is a number of memory, the interpreter makes numbers, not truths."""
    flag, out = torch.ones(1, dtype=torch.int64), torch.empty(N)
    with sanitized() as record:
        _two_masks_kernel[GRID](x, flag, out, N, OFF=0, BLOCK=BLOCK)
    assert torch.equal(out, 2 * x) and record.launches[0].loaded == 4 * N + 3 * 8
    with pytest.raises(Violation, match="outside of every tensor passed"), sanitized():
        _two_masks_kernel[GRID](x, flag, out, N, OFF=1, BLOCK=BLOCK)


def test_programs_run_in_a_shuffled_order():
    for seed in (0, 1):
        with sanitized(seed):
            _order_kernel[(16,)](torch.empty(16))
    first, second = SEEN[:16], SEEN[16:]
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second != list(range(16)) != first


def test_a_value_that_every_program_loads_is_moved_once(x):
    with sanitized() as record:
        out = torch.empty(N)
        _table_kernel[GRID](torch.tensor([x.data_ptr()]), x, 0, BLOCK=BLOCK)
        total = x.sum()
        _double(x, out)
    table, _ = record.launches
    assert (table.loaded, table.loaded_once) == (3 * 8, 8)
    assert record.torch_bytes == 4 * N + total.element_size()


def test_a_race_of_one_element_is_caught(x):
    out = torch.empty(N)
    with pytest.raises(Violation, match="writes what another program writes"), sanitized():
        _race_kernel[(3,)](x, out, N, BLOCK=BLOCK)
    _race_kernel[(3,)](x, out, N, BLOCK=BLOCK)
    assert torch.equal(out, 2 * x)  # which no test of values sees


def test_reading_what_another_program_writes_is_caught(x):
    what = "(reads|writes) what another program (reads|writes)"
    for seed in range(4):
        with pytest.raises(Violation, match=what), sanitized(seed):
            _neighbour_kernel[GRID](x.clone(), N, BLOCK=BLOCK)


def test_reading_back_is_caught(x):
    with pytest.raises(Violation, match="reads back what it wrote"), sanitized():
        _back_kernel[(1,)](x, torch.empty(N), N, BLOCK=64)


def test_an_overrun_that_leaves_the_result_right_is_caught(x):
    with pytest.raises(Violation, match="outside of every tensor passed"), sanitized():
        _overrun_kernel[GRID](x, torch.empty(N), N, BLOCK=BLOCK)


def test_an_overrun_within_a_storage_is_caught(x):
    whole = torch.cat([x, torch.zeros(BLOCK)])
    with pytest.raises(Violation, match=r"what was not passed, at x_ptr\[37\]"), sanitized():
        _overrun_kernel[GRID](whole[:N], torch.empty(N), N, BLOCK=BLOCK)
    with sanitized():
        _overrun_kernel[GRID](whole, torch.empty(N), N, BLOCK=BLOCK)


def test_the_gaps_of_a_strided_tensor_are_not_passed():
    whole = torch.zeros(2 * N)
    with pytest.raises(Violation, match="what was not passed, at x_ptr"), sanitized():
        _double(whole[::2], torch.empty(N))


@pytest.mark.parametrize("same", [True, False], ids=["lanes", "stores"])
def test_a_double_store_is_caught(x, same):
    with pytest.raises(Violation, match="stored twice"), sanitized():
        _twice_kernel[GRID](x, torch.empty(N), N, SAME=same, BLOCK=BLOCK)


def test_a_double_store_by_two_launches_is_caught(x):
    out = torch.empty(N)
    with pytest.raises(Violation, match="stored twice"), sanitized():
        _double(_double(x, out), out)


def test_an_unwritten_element_is_caught(x):
    with pytest.raises(Violation, match="1 elements of an output are never stored, the first at 0"):
        with sanitized():
            _double(x, torch.empty(N), N - 1, shift=1)


def test_outputs_may_be_filled_by_several_launches(x):
    with sanitized():
        out = torch.empty(2, N)
        _double(x, out[1])
        _double(x, out[0])
    assert torch.equal(out, torch.stack([2 * x, 2 * x]))


def test_a_masked_load_without_other_is_caught(x):
    with pytest.raises(Violation, match="without other="), sanitized():
        _no_other_kernel[GRID](x, torch.empty(N), N, BLOCK=BLOCK)


def test_an_atomic_is_caught(x):
    with pytest.raises(Violation, match="an atomic"), sanitized():
        _atomic_kernel[GRID](x, torch.zeros(N), N, BLOCK=BLOCK)


def test_a_table_of_pointers_reaches_extra_tensors_only(x):
    table, out = torch.tensor([x.data_ptr()]), torch.empty(N)
    with sanitized(extra=[x]) as record:
        _table_kernel[GRID](table, out, N, BLOCK=BLOCK)
    assert record.moved == 8 + 8 * N and torch.equal(out, x)
    with pytest.raises(Violation, match="outside of every tensor passed"), sanitized():
        _table_kernel[GRID](table, torch.empty(N), N, BLOCK=BLOCK)


def test_bytes_are_read_as_words():
    x, out = torch.arange(4 * N, dtype=torch.uint8), torch.empty(4 * N, dtype=torch.uint8)
    with sanitized() as record:
        _words_kernel[GRID](x, out, N, BLOCK=BLOCK)
    assert torch.equal(out, x) and record.moved == record.requested == 8 * N
    x, out = x[:-1], torch.empty(4 * N, dtype=torch.uint8)
    with pytest.raises(Violation, match=r"what was not passed, at x_ptr\[147\]"), sanitized():
        _words_kernel[GRID](x, out, N, BLOCK=BLOCK)


def test_nothing_is_watched_afterwards(x):
    with pytest.raises(Violation), sanitized():
        _overrun_kernel[GRID](x, torch.empty(N), N, BLOCK=BLOCK)
    _twice_kernel[GRID](x, torch.empty(N), N, SAME=False, BLOCK=BLOCK)
