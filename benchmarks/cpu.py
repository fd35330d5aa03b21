"""What long sequences, training, decoding and the first call cost on a CPU, in one run; for one layer see layers.py.

    python benchmarks/cpu.py [scaling] [position] [memory] [decode] [ntm] [first-use] [--rounds 7] [--json out.json]

The peer of decoding is transformers, where it is installed. The floor of decoding is every weight in one matrix-vector
product. Medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from layers import Call, forward, medians, training
from peers import layer as mixer
from torch import nn

from altx import registry
from altx.compose import compose
from altx.context import Context
from altx.layer import Layer
from altx.state import State

DIM, LENGTH = 768, 1024


def scaling(rounds: int) -> dict[str, Any]:
    """Microseconds per token of the forward pass."""
    report: dict[str, Any] = {}
    for name in ("mamba", "mamba2", "mamba3"):
        layer, per_token = mixer(name, DIM), {}
        for length in (256, 1024, 4096, 16384, 65536):
            x = torch.randn(1, length, DIM)
            times = medians(
                {"altx": forward(lambda layer=layer, x=x: layer(x).y)}, max(2, min(rounds, 65536 // length))
            )
            per_token[length] = times["altx"] * 1e3 / length
        report[name] = {
            "us per token": per_token,
            "largest over smallest": max(per_token.values()) / min(per_token.values()),
        }
    return report


def stepping(layer: Layer, state: State) -> Call:
    x = torch.randn(1, 1, DIM)
    return forward(lambda: layer(x, state=state).y)


def position(rounds: int) -> dict[str, Any]:
    """Milliseconds of one token at two positions, of every mixer whose state does not grow."""
    report: dict[str, Any] = {}
    for component in registry.default().components("mixer"):
        capabilities = component.load("capabilities")(component.load("config")())
        if capabilities.growth not in ("constant", "window") or not capabilities.causal:
            continue
        layer = mixer(component.qualified, DIM)
        calls: dict[str, Call] = {}
        for tokens in (10, 100_000):
            with torch.no_grad():
                state = layer(torch.randn(1, tokens, DIM), state=layer.init_state(1)).state
            calls[f"{tokens:,}"] = stepping(layer, state)
        times = medians(calls, 20 * rounds)
        report[component.name] = {"ms at position": times, "later over earlier": times["100,000"] / times["10"]}
    return report


def peak() -> float:
    """MiB that this process had at its peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def grown(name: str, length: int) -> None:
    """Print by how many MiB a training step makes this process grow at its peak."""
    layer = mixer(name, DIM)
    for tokens in (64, length):
        x = torch.randn(1, tokens, DIM, requires_grad=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = peak()
        layer(x).y.sum().backward()
    print(peak() - before)


def memory(rounds: int) -> dict[str, Any]:
    """Peak growth in training, each in a process of its own."""
    report: dict[str, Any] = {}
    for name in ("mamba", "mamba2", "mamba3"):
        mib = {}
        for length in (1024, 2048, 4096, 8192, 16384):
            code = f"import cpu; cpu.grown({name!r}, {length})"
            run = subprocess.run(
                [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            )
            mib[length] = float(run.stdout)
        report[name] = {"MiB": mib, "KiB per token": {t: m * 1024 / t for t, m in mib.items()}}
    return report


def decode(rounds: int) -> dict[str, Any]:
    """One token of a model of 24 layers, batch 1: milliseconds."""
    return {name: decoding(name, rounds) for name in ("mamba", "mamba2", "mamba3")}


def decoding(name: str, rounds: int) -> dict[str, Any]:
    vocab, depth, many = 50280, 24, 16
    tokens = {"kind": "tokens", "vocab": vocab}
    model = compose(
        {"dim": DIM, "layers": depth, "mixer": name, "feed_forward": "none", "input": tokens}, seed=0
    ).eval()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    if model.head is None:
        weights.append(model.tied_weight)
    inputs = [torch.randn(1, w.shape[1]) for w in weights]
    prompt = torch.randint(vocab, (1, many))
    state = model(prompt, Context(), model.init_state(1)).state

    def steps() -> None:
        nonlocal state
        for _ in range(many - 1):
            state = model(prompt[:, :1], Context(donate_state=True), state).state

    def stream() -> None:
        for _ in range(many - 1):
            for x, w in zip(inputs, weights, strict=True):
                nn.functional.linear(x, w)

    calls: dict[str, Call] = {"altx": steps, "weights streamed once": stream}
    theirs = their_model(name, vocab, depth)
    if theirs is not None:

        def generate(n: int) -> None:
            theirs.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

        calls["many"], calls["one"] = lambda: generate(many), lambda: generate(1)
    with torch.inference_mode():
        times = medians(calls, rounds)
    if theirs is not None:
        # What the other tokens cost: the prompt and the set-up drop out.
        times["transformers generate"] = times.pop("many") - times.pop("one")
    times = {key: ms / (many - 1) for key, ms in times.items()}
    report = {"ms": times, "x weights streamed once": times["altx"] / times["weights streamed once"]}
    if theirs is not None:
        report["x faster than transformers"] = times["transformers generate"] / times["altx"]
    return report


def their_model(name: str, vocab: int, depth: int) -> Any:
    """A model of the same sizes in transformers, or None."""
    try:
        import transformers
    except ImportError:
        return None
    shared = {"vocab_size": vocab, "hidden_size": DIM, "num_hidden_layers": depth}
    if name == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**shared)).eval()
    if name == "mamba2":
        config = transformers.Mamba2Config(**shared, num_heads=2 * DIM // 64, head_dim=64, n_groups=1, state_size=128)
        return transformers.Mamba2ForCausalLM(config).eval()
    return None


def ntm(rounds: int) -> dict[str, Any]:
    """Forward + backward of the time loops of NTM and DNC, per token; the reference is a plain loop in torch."""
    from altx_ntm.kernels import dnc, ntm

    report: dict[str, Any] = {}
    for op in (ntm.SCAN, dnc.SCAN):
        for workload in op.workloads():
            arguments = workload.arguments(torch.device("cpu"), torch.float32)
            length = arguments["reads"].key.shape[1]
            names = [name for name, backend in op.backends.items() if backend.reason(**arguments) is None]
            calls = {n: training(lambda n=n, op=op, arguments=arguments: op(**arguments, backend=n)[0]) for n in names}
            per_token = {name: ms / length for name, ms in medians(calls, rounds).items()}
            report[f"{op.name} {workload.label}"] = {
                "ms per token": per_token,
                **{f"x faster than {n}": per_token[n] / per_token["native"] for n in names if n != "native"},
            }
    return report


def first_use(rounds: int) -> dict[str, Any]:
    """Seconds until a native op first returns: compiled, and found in the cache."""
    code = (
        "import time, torch\nfrom altx_mamba.kernels.{op} import native\nstart = time.perf_counter()\n"
        "problem = native.LIBRARY.problem()\nassert problem is None, problem\nprint(time.perf_counter() - start)"
    )
    report: dict[str, Any] = {}
    for op in ("selective_scan", "mamba_step"):
        with tempfile.TemporaryDirectory() as cache:
            os.chmod(cache, 0o700)
            env = {**os.environ, "ALTX_CACHE": cache}
            run = [sys.executable, "-c", code.format(op=op)]
            seconds = [
                float(subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout) for _ in range(3)
            ]
        report[op] = {"compiled, s": seconds[0], "from the cache, s": statistics.median(seconds[1:])}
    return report


SECTIONS = {
    "scaling": scaling, "position": position, "memory": memory, "decode": decode, "ntm": ntm, "first-use": first_use
}  # fmt: skip


def show(value: Any, indent: int = 2) -> None:
    """Print a report for people."""
    for key, item in value.items():
        if isinstance(item, dict) and any(isinstance(inner, dict) for inner in item.values()):
            print(" " * indent + str(key))
            show(item, indent + 2)
        elif isinstance(item, dict):
            print(" " * indent + f"{key}: " + ", ".join(f"{k} {v:.3g}" for k, v in item.items()))
        else:
            print(" " * indent + f"{key}: {item:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"there is no section {unknown.pop()!r}; there are {', '.join(SECTIONS)}")
    where = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(), "dim": DIM, "length": LENGTH, "dtype": "float32",
    }  # fmt: skip
    print(f"width {DIM}, {LENGTH} tokens, batch 1, float32, {where['threads']} threads, torch {where['torch']}")
    report: dict[str, Any] = {"where": where}
    for name in args.sections or SECTIONS:
        torch.manual_seed(0)
        print(name)
        report[name] = SECTIONS[name](args.rounds)
        show(report[name])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
