"""The op softmax-attention: the reference is the equation, backends are the reference and say what they cannot run."""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from altx_attention.kernels.softmax_attention import OP, attention, flash, flex, native, reference
from altx_attention.kernels.softmax_attention.cases import example, examples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from altx_kernels import KernelError
from altx_kernels.examples import randn
from altx_kernels.verify import relative_error, verify

CPU = [name for name in ("native", "sdpa", "torch") if not OP.backends[name].absent()]


def values(made: Any) -> dict[str, Any]:
    return {name: v.detach() if isinstance(v, Tensor) else v for name, v in made.arguments.items()}


def by_hand(q: Tensor, k: Tensor, v: Tensor, sees: Callable[[int, int, int], bool], **options: Any) -> Tensor:
    """The op's equation, sum by sum; `sees(b, t, s)`."""
    scale, cap, sinks = options.get("scale"), options.get("softcap"), options.get("sinks")
    B, T, H, D = q.shape
    y = torch.zeros(B, T, H, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                group = h // (H // k.shape[2])
                sink = None if sinks is None else float(sinks.expand(B, T, H)[b, t, h])
                total = 0.0 if sink is None else math.exp(sink)
                for s in range(k.shape[1]):
                    if sees(b, t, s):
                        a = float(q[b, t, h] @ k[b, s, group]) * (D**-0.5 if scale is None else scale)
                        weight = math.exp(a if cap is None else cap * math.tanh(a / cap))
                        total += weight
                        y[b, t, h] += weight * v[b, s, group]
                if total:
                    y[b, t, h] /= total
    return y


@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({}, lambda b, t, s: s <= t + 3),
        ({"window": 2, "softcap": 0.7, "scale": 0.4}, lambda b, t, s: t + 1 < s <= t + 3),
        ({"causal": False, "window": 2}, lambda b, t, s: abs(t + 3 - s) < 2),
        ({"offset": torch.tensor([1, 4]), "sinks": randn(4, seed=9, grad=False)}, lambda b, t, s: s <= t + (1, 4)[b]),
    ],
    ids=["causal", "window, cap, scale", "both ways", "offset, sinks"],
)
def test_the_reference_is_the_equation(options: dict[str, Any], sees: Callable[[int, int, int], bool]) -> None:
    q, k, v = randn(2, 4, 4, 3, grad=False), randn(2, 7, 2, 3, grad=False), randn(2, 7, 2, 5, grad=False)
    document, slot_document = torch.tensor([[0, 0, 1, 9]] * 2), torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    y = reference.attention(q, k, v, **options)
    torch.testing.assert_close(y, by_hand(q, k, v, sees, **options), atol=1e-12, rtol=1e-12)
    y = reference.attention(q, k, v, **options, document=document, slot_document=slot_document)
    both = by_hand(q, k, v, lambda b, t, s: sees(b, t, s) and bool(document[b, t] == slot_document[b, s]), **options)
    torch.testing.assert_close(y, both, atol=1e-12, rtol=1e-12)
    assert not y[:, 3].any()  # it belongs to a document that has no slots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", CPU)
def test_backends_equal_the_reference_with_all_gradients(backend: str, dtype: torch.dtype) -> None:
    for finding in verify(OP, [backend], dtypes=[dtype]):
        skipped = backend == "native" and dtype == torch.bfloat16
        assert finding.status == ("skipped" if skipped else "passed"), finding


@pytest.mark.parametrize("scores", [1, 100])
def test_blocks_of_queries_add_up(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altx_attention.kernels.softmax_attention.torch.SCORES", scores)
    for finding in verify(OP, ["torch"], dtypes=[torch.float64], layouts=["contiguous"]):
        assert finding.status == "passed", finding


def test_what_offsets_and_documents_say_is_used_and_changes_nothing() -> None:
    """Values that make a call a simpler one are found on a CPU; so are those that only nearly do."""
    q, k, v = (randn(2, n, 2, 4, seed=n, grad=False) for n in (3, 9, 9))
    same = {"document": torch.zeros(2, 3).long(), "slot_document": torch.zeros(2, 9).int()}
    for offset in ([6, 6], [4, 4], [4, 6], [6, 7], [7, 7], [0, 0], [8, 8]):
        at = torch.tensor(offset)
        for more in ({}, same, {**same, "slot_document": (torch.arange(9) < 3).int().expand(2, 9)}):
            for window in (None, 4):
                wanted = reference.attention(q, k, v, offset=at, window=window, **more)
                assert relative_error(attention(q, k, v, offset=at, window=window, **more), wanted) < 1e-10


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made inside."""

    def __enter__(self) -> Largest:
        self.found = 0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.found = max(self.found, x.numel())
        return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "torch"])
def test_memory_within_a_window_grows_with_the_tokens_and_not_with_their_square(backend: str, causal: bool) -> None:
    def largest(T: int) -> int:
        q, k, v = (torch.randn(1, T, 2, 4) for _ in range(3))
        with Largest() as seen:
            attention(q, k, v, window=16, causal=causal, backend=backend)
        return seen.found

    assert largest(4096) <= 2.1 * largest(2048) < 2048**2 / 4


def test_flex_attention_equals_the_reference() -> None:
    """Uncompiled and without gradients, which is what it has on a CPU."""
    for made in examples():
        arguments = values(made)
        if 0 < arguments["q"].numel() < 1000:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
                y = flex.attention(**arguments, fused=False)
            assert relative_error(y, reference.attention(**arguments)) < 1e-10, made.label


def test_flash_attn_is_told_what_the_call_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's function as documented: aligned at the last query and slot, one width, windows by two reaches."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:  # fmt: skip
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        left, right = window_size
        shift = k.shape[1] - q.shape[1]

        def sees(b: int, t: int, s: int) -> bool:
            near = (left < 0 or s >= t + shift - left) and (right < 0 or s <= t + shift + right)
            return near and (not causal or s <= t + shift)

        return by_hand(q, k, v, sees, scale=softmax_scale, softcap=softcap or None)

    module = types.ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    calls = 0
    for made in examples():
        arguments = values(made)
        bare = all(arguments.get(name) is None for name in ("sinks", "offset", "document"))
        if bare and 0 < arguments["q"].numel() < 3000:
            calls += 1
            assert relative_error(flash.attention(**arguments), reference.attention(**arguments)) < 1e-10, made.label
    assert calls > 8


def on_a_gpu(**options: Any) -> dict[str, Any]:
    """Arguments on no device, that say that they are on a GPU."""

    class Elsewhere(Tensor):
        device = torch.device("cuda", 0)

    made = {"q": (2, 5, 4, 64), "k": (2, 5, 2, 64), "v": (2, 5, 2, 64)} | options
    dtype = made.pop("dtype", torch.bfloat16)
    return {
        name: torch.empty(x, dtype=dtype, device="meta").as_subclass(Elsewhere) if isinstance(x, tuple) else x
        for name, x in made.items()
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"softcap": 3.0, "window": 4}, None),
        ({"dtype": torch.float32}, "q is torch.float32, and it computes in 16 bits"),
        ({"v": (2, 5, 2, 512)}, "heads are 512 wide, and its kernels take 256 at most"),
        ({"offset": (2,)}, "it knows no documents and no queries at different slots"),
        ({"sinks": (4,)}, "it knows no sinks"),
        ({"k": (2, 0, 2, 64)}, "there is nothing to attend to"),
    ],
    ids=str,
)
def test_flash_attn_says_what_it_cannot_run(options: dict[str, Any], reason: str | None) -> None:
    assert flash.unavailable(**on_a_gpu(**options)) == reason


def test_backends_say_why_they_are_not_chosen() -> None:
    choice = OP.choose(**values(example(2, 20, 20, 4, 2, 8, 8, softcap=2.0)))
    assert choice.backend == "torch"
    assert choice.refused["sdpa"] == "torch's fused kernels know no soft cap"
    assert choice.refused["flash-attn"] in ("the package flash-attn is not installed", "there is no CUDA device")
    assert "there is no CUDA device" in choice.refused["flex"]
    assert OP.choose(**values(example(2, 20, 20, 4, 2, 8, 8))).backend == "sdpa"
    if not native.LIBRARY.problem():
        assert OP.choose(**values(example(2, 1, 20, 4, 2, 8, 8, softcap=2.0))).backend == "native"
        shared = OP.choose(**values(example(2, 1, 20, 8, 1, 8, 8)))
        assert "8 heads share a key" in shared.refused["native"]
        with pytest.raises(KernelError, match="it has no gradient"):
            OP(**example(2, 1, 20, 4, 2, 8, 8).arguments, backend="native")
    assert "flash_attn" not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 5, 3, 8), "v": (2, 5, 3, 8)}, "4 heads cannot share 3"),
        ({"v": (2, 6, 2, 8)}, "v has shape"),
        ({"sinks": (3,)}, "sinks has shape"),
        ({"document": (2, 5)}, "document and slot_document go together"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    shapes = {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8)} | change
    with pytest.raises(KernelError) as caught:
        attention(**{name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in shapes.items()})
    assert message in str(caught.value)
