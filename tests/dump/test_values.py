import numpy as np
import pytest
import torch

from kdcache.dump.signals.values import float_codes, int8_codes, to_host
from kdcache.errors import ModelError
from kdcache.formats.dense import decode_values


def nowhere(index):
    raise AssertionError(f"nothing is wrong at {index}")


def at(index):
    return f"value {tuple(index)}"


def codes_of(values, kind, place):
    return int8_codes(values, place) if kind == "int8" else float_codes(values, kind, "", place)


INT8 = {
    "largest is 127": ([[-1.0, 0.5, 0.25]], [[-127, 64, 32]], [1 / 127]),
    "half to even": ([[127.0, 0.5, 1.5, -2.5]], [[127, 0, 2, -2]], [1.0]),
    "zeros": ([[0.0, 0.0]], [[0, 0]], [0.0]),
    "one scale a vector": ([[254.0, 2.0], [1.27, 0.01]], [[127, 1], [127, 1]], [2.0, 0.01]),
    "alone": ([[-3.0]], [[-127]], [3 / 127]),
    # The smallest scale is 1.4e-45, so these do not fit 127 steps of it.
    "past 127": ([[2.66e-43]], [[127]], [1.4e-45]),
    "below every scale": ([[1.5e-43, -2.8e-45]], [[107, -2]], [1.4e-45]),
}


@pytest.mark.parametrize("case", INT8)
def test_int8_by_hand(case):
    given, codes, scales = INT8[case]
    found, scale = int8_codes(torch.tensor(given), nowhere)
    assert found.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert found.tolist() == codes
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_off_by_half_a_step_at_most(dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** torch.linspace(-4, 3, 200)[:, None, None]
    values = (torch.randn(200, 3, 40, generator=generator) * sizes).to(dtype)
    codes, scale = int8_codes(values, nowhere)
    assert scale.shape == (200, 3)
    error = codes.double() * scale[..., None].double() - values.double()
    largest = values.double().abs().amax(-1, keepdim=True)
    assert (error.abs() <= largest / 254 * 1.00001).all()
    assert codes.abs().amax(-1).eq(127).all()


@pytest.mark.parametrize(("width", "most"), [(64, 0.0065), (768, 0.0085), (4096, 0.0095)])
def test_int8_error_of_normal_vectors(width, most):
    values = torch.randn(500, 1, width, generator=torch.Generator().manual_seed(1))
    codes, scale = int8_codes(values, nowhere)
    found = decode_values(codes[:, 0].numpy(), "int8", scale[:, 0].numpy())
    error = found - values[:, 0].numpy()
    relative = np.sqrt((error**2).mean() / (values.numpy() ** 2).mean())
    assert 0.8 * most < relative < most


def test_bfloat16_is_kept_as_its_bits():
    values = torch.tensor([[1.0, -2.0, 3.1415927, 1e38, 0.0]])
    found = to_host(float_codes(values, "bfloat16", "", nowhere))
    assert found.dtype == np.uint16
    assert found.tolist() == [[0x3F80, 0xC000, 0x4049, 0x7E96, 0x0000]]
    np.testing.assert_allclose(decode_values(found, "bfloat16"), values, rtol=2**-8)


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_floats_are_rounded_to_the_nearest(kind):
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    found = to_host(float_codes(values, kind, "", nowhere))
    np.testing.assert_array_equal(found, values.numpy().astype(kind))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "int8"])
def test_the_lowest_layer_with_no_number_is_named(kind, wrong):
    values = torch.ones(4, 3, 5)
    values[1, 2, 0] = wrong
    values[2, 1, 3] = wrong
    values[3, 1, 1] = wrong
    with pytest.raises(ModelError) as caught:
        codes_of(values, kind, at)
    assert str(caught.value) == (
        f"value (2, 1, 3) is {wrong}, expected a finite number; check the teacher and its dtype"
    )


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.9, True), (65520.0, False)])
def test_the_largest_float16(value, fits):
    values = torch.tensor([[0.0, -value]])
    if fits:
        assert float_codes(values, "float16", "bfloat16", nowhere).tolist() == [[0, -65504]]
        return
    with pytest.raises(ModelError, match=r"^value \(0, 1\) is -65520, .*set values: bfloat16$"):
        float_codes(values, "float16", "bfloat16", at)
