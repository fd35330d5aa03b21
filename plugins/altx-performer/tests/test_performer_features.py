"""Positive features: every backend equals the reference."""

from __future__ import annotations

import pytest
import torch
from altx_performer.kernels.positive_features import OP, positive_features
from altx_performer.kernels.positive_features.cases import call, examples

from altx_kernels import KernelError
from altx_kernels.verify import verify

BACKENDS = [name for name, backend in OP.backends.items() if name != "reference" and not backend.absent()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_equals_the_reference(backend: str) -> None:
    for finding in verify(OP, [backend], devices=["cpu"]):
        assert finding.status == "passed", finding


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_split_equals_the_whole(backend: str) -> None:
    values = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in call(2, 20, 3, 13, "state").items()}
    whole = positive_features(**values, backend=backend)
    M, parts = values.pop("M"), []
    for start, stop in ((0, 1), (1, 8), (8, 20)):
        *part, M = positive_features(*(v[:, start:stop] for v in list(values.values())[:3]), M=M, backend=backend)
        parts.append(part)
    for index in range(3):
        assert torch.equal(torch.cat([part[index] for part in parts], 1), whole[index])
    assert torch.equal(M, whole[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_is_one_node_with_the_same_gradients(backend: str) -> None:
    values = call(2, 9, 2, 5, "state", "reset")
    tensors = [values[name] for name in ("a", "b", "half")]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        a, b, half = tensors
        q, k, decay, M = positive_features(a, b, half, M=values["M"], reset=values["reset"], backend=backend)
        return (q * k * decay.exp()).sum() + M.sum()

    expected = torch.autograd.grad(run(*tensors), tensors)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one, other in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_many_threads_share_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    if "native" not in BACKENDS:
        pytest.skip("no native code here")
    monkeypatch.setattr("altx_performer.kernels.positive_features.native.SERIAL", 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for example in examples():
            found, expected = (OP(**example.arguments, backend=b) for b in ("native", "reference"))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("b", torch.zeros(2, 4, 3, 5), "b has shape"),
        ("half", torch.zeros(2, 4, 3, 1), "half has shape"),
        ("M", torch.zeros(2, 3, 4), "M has shape"),
        ("reset", torch.zeros(2, 4), "reset has dtype"),
        ("a", torch.zeros(2, 4, 3, 5, dtype=torch.int64), "a has dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, value: torch.Tensor, message: str) -> None:
    values = {"a": torch.zeros(2, 4, 3, 6), "b": torch.zeros(2, 4, 3, 6), "half": torch.zeros(2, 4, 3)} | {name: value}
    if name == "a":
        values["b"] = torch.zeros(2, 4, 3, 5)
    with pytest.raises(KernelError, match=message):
        positive_features(**values)
