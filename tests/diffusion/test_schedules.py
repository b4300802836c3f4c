"""Schedules: ends, monotony, slope, inverse and precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xdlm_hf.diffusion.schedules import SCHEDULES, CosineSchedule, LinearSchedule, LogLinearSchedule, get_schedule

NAMES = ("linear", "cosine", "loglinear")


def test_every_schedule_is_tested_here():
    assert sorted(SCHEDULES) == sorted(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_ends_are_exact(name, dtype):
    alpha, slope = get_schedule(name)(torch.tensor([0.0, 1.0], dtype=dtype))
    # Exactly 0, not 6e-17: the prior must hold no trace of the text. The log-linear schedule ends at its eps.
    last, rounding = (1e-3, torch.finfo(dtype).eps) if name == "loglinear" else (0.0, 0.0)
    assert alpha[0] == 1 and abs(alpha[1].item() - last) <= rounding
    assert (slope <= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_falls_strictly_and_stays_in_the_unit_interval(name):
    alpha, slope = get_schedule(name)(torch.linspace(0, 1, 4001, dtype=torch.float64))
    assert (alpha.diff() < 0).all() and alpha.min() >= 0 and alpha.max() <= 1
    assert (slope[1:-1] < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative(name):
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    alpha, slope = get_schedule(name)(t)
    (expected,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(slope, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@given(t=st.floats(0, 1))
def test_inverse(name, t):
    schedule = get_schedule(name)
    t = torch.tensor([[t]], dtype=torch.float64)
    alpha, _ = schedule(t)
    back = schedule.inverse(alpha)
    assert back.shape == t.shape and back.dtype == torch.float64
    # acos loses half the digits where cos is flat: an ulp of alpha there moves t by 1e-8
    assert (back - t).abs() < (2e-8 if name == "cosine" else 1e-15)
    torch.testing.assert_close(schedule(back)[0], alpha, rtol=0, atol=1e-15)


def test_values_by_hand():
    t = torch.tensor([0.25, 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(LinearSchedule()(t)[0], 1 - t)
    # cos(pi/8) = sqrt(2 + sqrt 2)/2, cos(pi/3) = 1/2
    expected = torch.tensor([(2 + 2**0.5) ** 0.5 / 2, 0.5], dtype=torch.float64)
    torch.testing.assert_close(CosineSchedule()(t)[0], expected)
    # 1 - 0.999 / 4, 1 - 0.999 * 2 / 3
    expected = torch.tensor([0.75025, 0.334], dtype=torch.float64)
    torch.testing.assert_close(LogLinearSchedule()(t)[0], expected)
    torch.testing.assert_close(LogLinearSchedule(0.5)(t)[0], 1 - t / 2)
    assert LogLinearSchedule(0)(t)[0].equal(1 - t)


@pytest.mark.parametrize("eps", [-1e-3, 1.0])
def test_an_eps_outside_its_range_is_refused(eps):
    with pytest.raises(ValueError, match=rf"eps={eps} must lie in \[0, 1\)"):
        LogLinearSchedule(eps)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_times_are_computed_in_float32(name):
    """In bfloat16 1 - 0.0015 is 1; a rate of 1 makes log(beta) minus infinity."""
    schedule = get_schedule(name)
    t = torch.tensor([0.0015, 0.5], dtype=torch.bfloat16)
    alpha, slope = schedule(t)
    assert alpha.dtype == slope.dtype == schedule.inverse(alpha.bfloat16()).dtype == torch.float32
    assert alpha[0] < 1
    torch.testing.assert_close(alpha.double(), schedule(t.double())[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype_are_kept_and_the_argument_too(name):
    for dtype in (torch.float32, torch.float64):
        for shape in ((), (3,), (2, 1)):
            t = torch.rand(shape, dtype=dtype)
            before = t.clone()
            alpha, slope = get_schedule(name)(t)
            assert alpha.shape == slope.shape == shape and alpha.dtype == slope.dtype == dtype
            assert torch.equal(t, before)


@pytest.mark.parametrize("name", NAMES)
def test_name_finds_the_schedule(name):
    assert get_schedule(name).name == name


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"'quadratic'.*choose one of \['cosine', 'linear', 'loglinear'\]"):
        get_schedule("quadratic")
