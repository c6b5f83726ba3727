"""Devices by name, and the arithmetic on them."""

import pytest
import torch

from probekit.distributed import autocast, compute_device
from probekit.errors import ProbekitError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def arithmetic(device: torch.device, precision: str) -> torch.dtype:
    with autocast(device, precision):
        return (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype


def test_a_device_by_its_name():
    assert compute_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("available", [True, False])
def test_auto_is_the_gpu_where_there_is_one(available: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert compute_device("auto").type == ("cuda" if available else "cpu")


@pytest.mark.parametrize(
    "name", ["", "nonsense", "cuda:99", "gpu", "cpu:x", "meta", "xla", "hpu", "vulkan", "privateuseone"]
)
def test_what_cannot_compute_here_is_refused_in_one_line(name: str):
    with pytest.raises(ProbekitError) as raised:
        compute_device(name)
    message = str(raised.value)
    assert message.startswith(f"device is {name!r}")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ProbekitError, match=r"^device is 'cuda'"):
        compute_device("cuda")


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_arithmetic_on_a_cpu(precision: str, expected: torch.dtype):
    device = torch.device("cpu")
    assert arithmetic(device, precision) == expected
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_auto_is_bfloat16_on_a_gpu_that_has_it(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    chosen = {}
    monkeypatch.setattr(torch, "autocast", lambda kind, **given: chosen.update(kind=kind, **given))
    autocast(torch.device("cuda"), "auto")
    expected = {"kind": "cuda", "dtype": torch.bfloat16, "enabled": has_bfloat16}
    assert expected.items() <= chosen.items()


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu():
    device = compute_device("auto")
    assert device.type == "cuda"
    assert compute_device("cuda:0").index == 0
    assert arithmetic(device, "float32") == torch.float32
    assert arithmetic(device, "bfloat16") == torch.bfloat16
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    assert arithmetic(device, "auto") == expected
