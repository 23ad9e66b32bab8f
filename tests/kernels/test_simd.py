"""The CPU kernels at every vector width, also at widths that this processor has no registers for."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# A C interface to the tables of function pointers.
DRIVER = """
#include "tile.cpp"
#include "product.cpp"
#include "info_nce.cpp"
#include "sigmoid_loss.cpp"
using namespace vlmfast::cpu;
using F = float*;
using I = int64_t;
extern "C" {{
void exp_sums(F t, I st, I r, I c, float s, float u, double* rs, double* cs, F o, I os)
{{ {isa}::info_nce.exp_sums(t, st, r, c, s, u, rs, cs, o, os); }}
void online_sums(F t, I st, I r, I c, float s, F rm, double* rs, F cm, double* cs)
{{ {isa}::info_nce.online_sums(t, st, r, c, s, rm, rs, cm, cs); }}
void gradient_from_exp(F t, I st, I r, I c, F rf, F cf, F o, I os)
{{ {isa}::info_nce.gradient_from_exp(t, st, r, c, {{0, rf, 0}}, {{0, cf, 0}}, o, os); }}
void gradient_from_dot(F t, I st, I r, I c, float s, float u, F rf, F cf)
{{ {isa}::info_nce.gradient_from_dot(t, st, r, c, s, u, {{0, rf, 0}}, {{0, cf, 0}}); }}
void gradient_two_shifts(F t, I st, I r, I c, float s, F rm, F rf, F cm, F cf, F o, I os)
{{ {isa}::info_nce.gradient_two_shifts(t, st, r, c, s, {{rm, rf, 0}}, {{cm, cf, 0}}, o, os); }}
void subtract_matches(F t, I st, I r, I c, int32_t* ri, int32_t* ci, F rt, F ct)
{{ {isa}::info_nce.subtract_matches(t, st, r, c, ri, ci, {{0, 0, rt}}, {{0, 0, ct}}); }}
void sigmoid_sweep(F t, I st, I r, I c, float s, float b, int32_t* ri, int32_t* ci, double* sums)
{{ SigmoidSums all; {isa}::sigmoid_loss.sweep(t, st, r, c, s, b, ri, ci, all);
   sums[0] = all.loss, sums[1] = all.scale, sums[2] = all.bias; }}
void sum_matches(F t, I st, I r, I c, int32_t* ri, int32_t* ci, F rs, F cs)
{{ {isa}::tile.sum_matches(t, st, r, c, ri, ci, rs, cs); }}
void round_to_bf16(F t, I st, I r, I c, uint16_t* o, I os) {{ {isa}::tile.narrow(t, st, true, r, c, o, os); }}
void pair_rows(F t, I st, I r, I c, F o, I os) {{ {isa}::tile.pair_rows(t, st, r, c, o, os); }}
void transpose(F t, I st, I r, I c, F o, I os) {{ {isa}::tile.transpose(t, st, r, c, o, os); }}
void multiply(I m, I n, I k, F a, I ar, I ac, F b, I br, F c, I cr, I add)
{{ {isa}::product.multiply(m, n, k, a, ar, ac, b, br, c, cr, add); }}
void multiply_pairs(I m, I n, I k, F a, I ar, I ac, F b, I br, F c, I cr, I add)
{{ {isa}::product.multiply_pairs(m, n, k, a, ar, ac, b, br, c, cr, add); }}
void multiply_shorts(I m, I n, I k, F a, I ar, I ac, F b, I br, F c, I cr, I add, F rs, F cs)
{{ {isa}::product.multiply_shorts(m, n, k, a, ar, ac, b, br, c, cr, add, rs, cs); }}
void fixed_point(uint16_t* f, I fs, I b, I r, I c, int16_t* o, I os, F s)
{{ {isa}::tile.fixed_point(f, fs, b, r, c, o, os, s); }}
void quantise_rows(F t, I st, I r, I c, F f, float l, int16_t* o, I os, F s)
{{ {isa}::tile.quantise_rows(t, st, r, c, f, l, o, os, s); }}
void quantise_columns(F t, I st, I r, I c, F f, float l, F o, I os, F s)
{{ {isa}::tile.quantise_columns(t, st, r, c, f, l, o, os, s); }}
void scale(F a, I n, float f, F o) {{ {isa}::tile.scale(a, n, f, o); }}
double dot(F a, F b, I n) {{ return {isa}::tile.dot(a, b, n); }}
}}
"""


@pytest.fixture(scope="module", params=[("baseline", 4), ("avx2", 8), ("avx512", 16)], ids=lambda p: f"width{p[1]}")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """No -m flag: the compiler makes a wide vector of what registers there are, with the same lanes and code."""
    isa, width = request.param
    folder = tmp_path_factory.mktemp(isa)
    (folder / "driver.cpp").write_text(DRIVER.format(isa=isa))
    library = folder / "driver.so"
    subprocess.run(
        [COMPILER, "-O2", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{SOURCES}", f"-DVLMFAST_ISA={isa}",
         f"-DVLMFAST_SIMD_WIDTH={width}", str(folder / "driver.cpp"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.dot.restype = ctypes.c_double
    loaded.width = width
    return loaded


def call(function, *arguments):
    converted = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            converted.append(argument.ctypes.data_as(ctypes.c_void_p))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(ctypes.c_int64(argument))
    return function(*converted)


SHAPES = [(1, 1), (3, 7), (2, 16), (5, 17), (128, 128), (9, 255)]
STRIDE = 256


def tile(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, STRIDE)).astype(np.float32)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_exp_sums(kernels, rows: int, cols: int) -> None:
    x, scale, shift = tile(rows, cols), 144.25, 43.0
    e = x.copy()
    row, col = np.ones(rows), np.ones(cols)
    call(kernels.exp_sums, x, STRIDE, rows, cols, scale, shift, row, col, e, STRIDE)
    exact = np.exp2(x[:, :cols].astype(np.float64) * scale - shift)
    # Two roundings of |x * scale| <= 145 where the compiler has no fused multiply-add.
    np.testing.assert_allclose(e[:, :cols], np.where(exact < 2.0**-125, 0, exact), rtol=2e-5, atol=2.0**-125)
    np.testing.assert_allclose(row, 1 + exact.sum(1), rtol=2e-5)
    np.testing.assert_allclose(col, 1 + exact.sum(0), rtol=2e-5)
    assert np.array_equal(e[:, cols:], x[:, cols:])  # nothing past the end is touched


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_online_sums_over_two_tiles(kernels, rows: int, cols: int) -> None:
    tiles, scale = [tile(rows, cols, 1), tile(rows, cols, 2)], 2000.0
    row_max, row = np.full(rows, -np.inf, np.float32), np.zeros(rows)
    col_max, col = np.full(cols, -np.inf, np.float32), np.zeros(cols)
    for x in tiles:  # two tiles of the same rows and columns
        call(kernels.online_sums, x, STRIDE, rows, cols, scale, row_max, row, col_max, col)
    logits = np.stack([x[:, :cols].astype(np.float64) * scale for x in tiles])
    for axis, maximum, total in (((0, 2), row_max, row), ((0, 1), col_max, col)):
        top = logits.max(axis, keepdims=True)
        exact = np.log2(np.exp2(logits - top).sum(axis)) + top.squeeze(axis)
        np.testing.assert_allclose(np.log2(total) + maximum, exact, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_gradients(kernels, rows: int, cols: int) -> None:
    x, scale, shift = tile(rows, cols), 30.0, 5.0
    rng = np.random.default_rng(3)
    row_factor, col_factor = rng.random(rows, np.float32), rng.random(cols, np.float32)
    row_shift, col_shift = np.full(rows, 7, np.float32), np.full(cols, 9, np.float32)
    col_shift[::3], col_factor[::3] = np.inf, 0  # columns without a softmax of their own
    logits = x[:, :cols].astype(np.float64) * scale

    kept, streamed, two = np.abs(x), x.copy(), x.copy()
    call(kernels.gradient_from_exp, kept, STRIDE, rows, cols, row_factor, col_factor, kept, STRIDE)
    np.testing.assert_allclose(kept[:, :cols], np.abs(x[:, :cols]) * (row_factor[:, None] + col_factor), rtol=1e-6)
    call(kernels.gradient_from_dot, streamed, STRIDE, rows, cols, scale, shift, row_factor, col_factor)
    expected = np.exp2(logits - shift) * (row_factor[:, None] + col_factor)
    np.testing.assert_allclose(streamed[:, :cols], expected, rtol=1e-5)
    call(kernels.gradient_two_shifts, two, STRIDE, rows, cols, scale, row_shift, row_factor, col_shift, col_factor,
         two, STRIDE)  # fmt: skip
    expected = np.exp2(logits - 7) * row_factor[:, None] + np.exp2(logits - col_shift) * col_factor
    np.testing.assert_allclose(two[:, :cols], expected, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_values_out_of_range(kernels, value: float) -> None:
    x = np.full((1, STRIDE), value, np.float32)
    row, col = np.zeros(1), np.zeros(19)
    call(kernels.exp_sums, x, STRIDE, 1, 19, 10.0, 3.0, row, col, x, STRIDE)
    expected = np.nan if np.isnan(value) else np.inf if value > 0 else 0.0
    np.testing.assert_array_equal(x[0, :19], np.full(19, expected))
    np.testing.assert_array_equal(row, [expected])


@pytest.mark.parametrize("count", [1, 15, 1024, 5000])
def test_dot(kernels, count: int) -> None:
    a, b = (np.random.default_rng(k).standard_normal(count).astype(np.float32) for k in (0, 1))
    exact = np.dot(a.astype(np.float64), b)
    assert abs(call(kernels.dot, a, b, count) - exact) < 1e-6 * np.abs(a * b).sum()


@pytest.mark.parametrize("count", [1, 15, 16, 33])
def test_scale(kernels, count: int) -> None:
    a, out = np.random.default_rng(0).standard_normal(count + 1).astype(np.float32), np.zeros(count + 1, np.float32)
    call(kernels.scale, a, count, 0.3, out)
    np.testing.assert_array_equal(out[:count], a[:count] * np.float32(0.3))
    assert out[count] == 0
    call(kernels.scale, a, count, 0.3, a)
    np.testing.assert_array_equal(a[:count], out[:count])


@pytest.mark.parametrize("k", [1, 2, 191, 193, 257, 577, 1200])
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (2, 15), (3, 64), (4, 33), (5, 129), (6, 16), (7, 80), (13, 71), (24, 83), (31, 40)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_multiply(kernels, m: int, n: int, k: int, transposed: bool) -> None:
    rng = np.random.default_rng(m * n * k)
    a, b, before = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k + 3), (k, n + 2), (m, n + 5)))
    stored = np.ascontiguousarray(a.T) if transposed else a
    a_row, a_col = (1, m) if transposed else (k + 3, 1)
    exact = a[:, :k].astype(np.float64) @ b[:, :n].astype(np.float64)
    size = np.abs(a[:, :k]).astype(np.float64) @ np.abs(b[:, :n])
    for add in (False, True):
        c = before.copy()
        call(kernels.multiply, m, n, k, stored, a_row, a_col, b, n + 2, c, n + 5, int(add))
        expected = exact + before[:, :n] if add else exact
        # Roundings of a chain of at most 256 products, most of which cancel, and of the sum of chains.
        assert np.all(np.abs(c[:, :n] - expected) <= 2.0**-24 * (min(k, 192) ** 0.5 + 8) * (size + np.abs(expected)))
        assert np.array_equal(c[:, n:], before[:, n:])  # nothing past the end is touched


@pytest.mark.parametrize("k", [1, 96, 300, 600])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 65), (6, 16), (13, 71), (24, 83)])
@pytest.mark.parametrize("transposed", [False, True])
def test_multiply_pairs(kernels, m: int, n: int, k: int, transposed: bool) -> None:
    rng = np.random.default_rng(m * n * k)
    # Numbers of 8 bits, as bfloat16 the upper halves of float32.
    a, b = (rng.integers(-255, 256, (*shape, 2)).astype(np.float32) / 64 for shape in ((m, k), (k, n)))
    a_pairs, b_pairs = (
        np.ascontiguousarray(x.view(np.uint32) >> 16).astype(np.uint16).view(np.float32)[..., 0] for x in (a, b)
    )
    stored = np.ascontiguousarray(a_pairs.T if transposed else a_pairs)
    a_row, a_col = (1, m) if transposed else (k, 1)
    before = rng.standard_normal((m, n + 5)).astype(np.float32)
    exact = np.einsum("mkp,knp->mn", a.astype(np.float64), b)
    size = np.einsum("mkp,knp->mn", np.abs(a).astype(np.float64), np.abs(b))
    for add in (False, True):
        c = before.copy()
        call(
            kernels.multiply_pairs, m, n, k, stored, a_row, a_col, np.ascontiguousarray(b_pairs), n, c, n + 5, int(add)
        )
        expected = exact + before[:, :n] if add else exact
        assert np.all(
            np.abs(c[:, :n] - expected) <= 2.0**-24 * (min(2 * k, 512) ** 0.5 + 8) * (size + np.abs(expected))
        )
        assert np.array_equal(c[:, n:], before[:, n:])


@pytest.mark.parametrize("k", [1, 96, 300, 600])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 65), (6, 16), (13, 71), (24, 83)])
@pytest.mark.parametrize("transposed", [False, True])
def test_multiply_shorts(kernels, m: int, n: int, k: int, transposed: bool) -> None:
    """Sums up to 2^30 are exact: what is rounded is the one float that is stored."""
    rng = np.random.default_rng(m * n * k)
    top = int((2.0**30 / (2 * k)) ** 0.5)
    a, b = (rng.integers(-top, top + 1, (*shape, 2)).astype(np.int16) for shape in ((m, k), (k, n)))
    a[0], b[:, 0] = top, -top  # all of one sign
    a_pairs, b_pairs = (np.ascontiguousarray(x).view(np.float32)[..., 0] for x in (a, b))
    stored = np.ascontiguousarray(a_pairs.T if transposed else a_pairs)
    a_row, a_col = (1, m) if transposed else (k, 1)
    before = rng.standard_normal((m, n + 5)).astype(np.float32)
    row_steps, col_steps = (rng.uniform(1e-5, 1e-4, count).astype(np.float32) for count in (m, n))
    for columns in (col_steps, None):
        steps = row_steps[:, None].astype(np.float64) * (1 if columns is None else columns)
        exact = np.einsum("mkp,knp->mn", a.astype(np.float64), b) * steps
        for add in (False, True):
            c = before.copy()
            call(
                kernels.multiply_shorts, m, n, k, stored, a_row, a_col, b_pairs, n, c, n + 5, int(add), row_steps,
                0 if columns is None else columns,
            )  # fmt: skip
            expected = exact + before[:, :n] if add else exact
            # Chains of 256 pairs are rounded one by one, to a float, times the step and with what was there.
            size = np.einsum("mkp,knp->mn", np.abs(a).astype(np.float64), np.abs(b)) * steps + np.abs(expected)
            assert np.all(np.abs(c[:, :n] - expected) <= 2.0**-22 * size)
            assert np.array_equal(c[:, n:], before[:, n:])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [*SHAPES, (5, 1200)])
def test_fixed_point(kernels, rows: int, cols: int, bf16: bool) -> None:
    import torch

    stride = cols + 3
    dtype = torch.bfloat16 if bf16 else torch.float16
    x = (
        torch.randn(rows, stride, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, rows)[:, None]
    ).to(dtype)
    x[0, 0] = 1000  # one entry makes up the row
    x[-1, : cols // 2] = 0
    exact = x[:, :cols].double().numpy()
    out, steps = np.zeros((rows, stride), np.int16), np.full(rows, 7, np.float32)
    call(kernels.fixed_point, x.view(torch.int16).numpy(), stride, int(bf16), rows, cols, out, stride, steps)
    assert not out[:, cols:].any()
    counts = out[:, :cols].astype(np.float64)
    expected = np.maximum(np.linalg.norm(exact, axis=1) / 46000, np.abs(exact).max(1) / 32700)
    np.testing.assert_allclose(steps, expected, rtol=1e-5)
    assert np.all(np.abs(counts * steps[:, None] - exact) <= 0.502 * steps[:, None])
    x[0] = 0
    x[-1, 0] = float("nan") if rows > 1 else 0
    call(kernels.fixed_point, x.view(torch.int16).numpy(), stride, int(bf16), rows, cols, out, stride, steps)
    assert steps[0] == 0
    assert not out[0].any()
    assert rows == 1 or np.isnan(steps[-1])


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_quantise(kernels, rows: int, cols: int) -> None:
    x = tile(rows, cols) * np.logspace(-12, 3, rows, dtype=np.float32)[:, None]
    limit = 30000.0
    for function, factors, axis in (
        (kernels.quantise_rows, np.logspace(-2, 1, cols, dtype=np.float32), 1),
        (kernels.quantise_columns, np.logspace(-2, 1, rows, dtype=np.float32), 0),
    ):
        values = x[:, :cols].astype(np.float64) * (factors if axis else factors[:, None])
        for zero in (False, True):
            data, exact = x.copy(), values.copy()
            if zero:
                data[0] = exact[0] = 0
            steps = np.full(rows if axis else cols, 7, np.float32)
            out = np.zeros((rows, STRIDE) if axis else ((rows + 1) // 2, STRIDE, 2), np.int16)
            call(function, data, STRIDE, rows, cols, factors, limit, out, STRIDE, steps)
            assert not out[:, cols:].any()  # nothing past the end is touched
            counts = (out if axis else out.transpose(0, 2, 1).reshape(-1, STRIDE)).astype(np.float64)
            assert not counts[rows:].any()
            counts = counts[:rows, :cols]
            np.testing.assert_allclose(steps, np.linalg.norm(exact, axis=axis) / limit, rtol=1e-5)
            assert np.all(np.linalg.norm(counts, axis=axis) <= limit + counts.shape[axis] ** 0.5)
            step = np.expand_dims(steps.astype(np.float64), axis)
            assert np.all(np.abs(counts * step - exact) <= 1.002 * step)
            # What is rounded away is not lost: not from sums over as many as share it, one lane of a row or a column.
            lanes = kernels.width if axis else 1
            for lane in range(lanes):
                part = (slice(None), slice(lane, None, lanes)) if axis else slice(None)
                error = np.abs((counts[part] * step - exact[part]).sum(axis, keepdims=True))
                assert np.all(error <= 0.51 * step)
            if zero:
                assert not counts[0].any()
        broken = x.copy()
        broken[0, 0] = np.nan
        call(function, broken, STRIDE, rows, cols, factors, limit, out, STRIDE, steps)
        assert np.isnan(steps[0])
        assert np.isfinite(steps[1:]).all()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_transpose(kernels, rows: int, cols: int) -> None:
    x, out = tile(rows, cols), np.zeros((STRIDE, STRIDE), np.float32)
    call(kernels.transpose, x, STRIDE, rows, cols, out, STRIDE)
    assert np.array_equal(out[:cols, :rows], x[:, :cols].T)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_online_sums_leave_out_minus_infinity(kernels, rows: int, cols: int) -> None:
    x = tile(rows, cols)
    x[0, :cols] = x[:rows, 0] = -np.inf
    row_max, row = np.full(rows, -np.inf, np.float32), np.zeros(rows)
    col_max, col = np.full(cols, -np.inf, np.float32), np.zeros(cols)
    call(kernels.online_sums, x, STRIDE, rows, cols, 50.0, row_max, row, col_max, col)
    assert (row_max[0], row[0], col_max[0], col[0]) == (-np.inf, 0, -np.inf, 0)
    exact = np.exp2(x[1:rows, 1:cols].astype(np.float64) * 50)
    if exact.size:
        np.testing.assert_allclose(row[1:] * np.exp2(row_max[1:].astype(np.float64)), exact.sum(1), rtol=1e-5)
        np.testing.assert_allclose(col[1:] * np.exp2(col_max[1:].astype(np.float64)), exact.sum(0), rtol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matches(kernels, rows: int, cols: int) -> None:
    x, rng = tile(rows, cols), np.random.default_rng(1)
    row_ids, col_ids = (rng.integers(0, 3, count).astype(np.int32) for count in (rows, cols))
    match = row_ids[:, None] == col_ids
    row, col = np.ones(rows, np.float32), np.ones(cols, np.float32)
    call(kernels.sum_matches, x, STRIDE, rows, cols, row_ids, col_ids, row, col)
    np.testing.assert_allclose(row, 1 + (x[:, :cols] * match).sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(col, 1 + (x[:, :cols] * match).sum(0), rtol=1e-4, atol=1e-5)
    row, col = (rng.random(count).astype(np.float32) for count in (rows, cols))
    expected = x[:, :cols] - match * (row[:, None] + col)
    call(kernels.subtract_matches, x, STRIDE, rows, cols, row_ids, col_ids, row, col)
    np.testing.assert_allclose(x[:, :cols], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 5.0])
@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_sigmoid_sweep(kernels, rows: int, cols: int, scale: float, bias: float) -> None:
    x, rng = tile(rows, cols), np.random.default_rng(2)
    row_ids, col_ids = (rng.integers(0, 3, count).astype(np.int32) for count in (rows, cols))
    z = np.where(row_ids[:, None] == col_ids, -1.0, 1.0)
    dots, sums, g = x[:, :cols].astype(np.float64), np.zeros(3), x.copy()
    call(kernels.sigmoid_sweep, g, STRIDE, rows, cols, scale, bias, row_ids, col_ids, sums)
    t = z * (scale * dots + bias)
    sigmoid = np.exp(-np.logaddexp(0, -t))
    # A logit of 1000 is off by 6e-5 when it is rounded, and with it the small values.
    close = {"rtol": 3e-6 + scale * 2e-7, "atol": 1e-30}
    np.testing.assert_allclose(g[:, :cols], z * sigmoid, **close)
    np.testing.assert_allclose(sums[0], np.logaddexp(0, t).sum(), rtol=close["rtol"])
    np.testing.assert_allclose(sums[1], (z * sigmoid * dots).sum(), atol=close["rtol"] * np.abs(sigmoid * dots).sum())
    np.testing.assert_allclose(sums[2], (z * sigmoid).sum(), atol=close["rtol"] * sigmoid.sum())
    assert np.array_equal(g[:, cols:], x[:, cols:])


def as_bf16(stored: np.ndarray):
    import torch

    return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_bf16(kernels, rows: int, cols: int) -> None:
    import torch

    x = tile(rows, cols) * np.float32(3.7)
    x[0, 0] = np.nan if rows > 1 else 1 + 2.0**-8  # a tie, which goes to the even neighbour
    expected = torch.from_numpy(x[:, :cols].copy()).bfloat16()
    rounded, paired = np.zeros((rows, STRIDE), np.uint16), np.zeros(((rows + 1) // 2, STRIDE, 2), np.uint16)
    call(kernels.round_to_bf16, x, STRIDE, rows, cols, rounded, STRIDE)
    call(kernels.pair_rows, x, STRIDE, rows, cols, paired, STRIDE)
    torch.testing.assert_close(as_bf16(rounded)[:, :cols], expected, rtol=0, atol=0, equal_nan=True)
    assert not rounded[:, cols:].any()
    assert not paired[:, cols:].any()
    pairs = as_bf16(paired)[:, :cols].transpose(1, 2).reshape(-1, cols)
    torch.testing.assert_close(pairs[:rows], expected, rtol=0, atol=0, equal_nan=True)
    assert not pairs[rows:].any()
