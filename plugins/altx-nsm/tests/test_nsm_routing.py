"""Routers in place of the memory's own choice, and the mixers that it stands beside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from altx_nsm.config import NSMConfig
from altx_nsm.memory import NSM

from altx import registry
from altx.capabilities import RouterCapabilities
from altx.compose import build, build_part
from altx.config import ComponentRef, ModelConfig, validate
from altx.context import Context
from altx.errors import CompositionError
from altx.layer import FRESH, StepInfo
from altx.resolve import resolve, resolve_part
from altx.router import Route, Router
from altx.spec import BuildContext
from altx.testing.case import Subject
from altx.testing.runner import PROOFS, run

DIM = 8


class ByContent(Router):
    """Top-2 of the match with the targets' keys."""

    capabilities = RouterCapabilities()

    def route(self, x, targets, ctx=FRESH, state=None):
        assert targets.kind == "states" and targets.keys.shape[:2] == (len(x), targets.n)
        scores = (x @ targets.keys.transpose(1, 2)).masked_fill(~targets.alive, -1e30)
        top = scores.topk(2, -1)
        target = top.indices if ctx.mask is None else top.indices.masked_fill(~ctx.mask[..., None], -1)
        token = torch.arange(x.shape[0] * x.shape[1]).repeat_interleave(2)
        return Route(targets.n, token, target.flatten(), torch.softmax(top.values, -1).flatten())


def test_a_router_is_given_the_states_as_keys():
    torch.manual_seed(0)
    nsm = NSM(NSMConfig(slots=5, chunk=4), DIM, ByContent()).double()
    x, mask = torch.randn(2, 3, DIM).double(), torch.tensor([[True, True, True], [True, False, True]])
    out = nsm.scan(x, nsm.init_state(2), Context(mask=mask))
    top = (x @ nsm.initial.T).topk(2, -1)
    share = torch.zeros(2, 3, 5).double().scatter(-1, top.indices, torch.softmax(top.values, -1)) * mask[..., None]
    torch.testing.assert_close(out.read.value[mask], nsm.out_proj(share @ nsm.initial)[mask])
    writes = (share * torch.sigmoid(nsm.write_gate(x))).mT
    told = torch.cat([writes @ nsm.v_proj(x), writes.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(out.state["total"], told)
    torch.testing.assert_close(out.state["square"], writes.square().sum(-1, keepdim=True))
    assert not out.losses


def component(name: str, n: int, **settings) -> Router:
    ref = ComponentRef.model_validate({"name": name, **settings})
    part = resolve_part(registry.default(), "router", ref, "router", DIM)
    return build_part(part, BuildContext(dim=DIM, num_targets=n), Router)


def test_topk_in_its_place_streams_holds_on_padding_trains_and_is_told_its_load():
    torch.manual_seed(0)
    nsm = NSM(NSMConfig(slots=5, chunk=3, living=4), DIM, component("topk", 5, bias_rate=0.1)).double()
    x = torch.randn(2, 8, DIM).double()
    whole = nsm.scan(x, nsm.init_state(2))
    state, values = nsm.init_state(2), []
    for t in range(8):
        out = nsm.scan(x[:, t : t + 1], state)
        state = out.state
        values.append(out.read.value)
    torch.testing.assert_close(torch.cat(values, 1), whole.read.value)
    padded = torch.cat([torch.full((2, 2, DIM), torch.nan).double(), x], 1)
    out = nsm.scan(padded, nsm.init_state(2), Context(mask=torch.arange(10).expand(2, -1) >= 2))
    torch.testing.assert_close(out.read.value[:, 2:], whole.read.value)
    assert whole.losses.keys() == set(nsm.capabilities.losses) == {"router.balance", "router.z"}
    assert all(torch.allclose(out.losses[name], loss) for name, loss in whole.losses.items())
    assert whole.metrics["load"][4] == 0 and whole.metrics["router.load"].sum() == 2 * 16

    (whole.read.value.square().sum()).backward()
    for name, parameter in nsm.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    nsm.on_step(StepInfo(1, whole.metrics))
    assert nsm.router.bias.abs().max() > 0


def test_a_router_that_looks_at_other_tokens_is_refused():
    router = ByContent()
    router.capabilities = replace(router.capabilities, lookahead="sequence")
    with pytest.raises(CompositionError, match="looks at other tokens"):
        NSM(NSMConfig(), DIM, router)


@pytest.mark.parametrize("attach", ["residual", "gate"])
@pytest.mark.parametrize("mixer", ["attention", "mamba", "gated-deltanet"])
def test_beside_a_mixer_the_laws_hold(mixer, attach):
    memory = {"name": "nsm", "slots": 5, "chunk": 3}
    data = {
        "dim": 16,
        "input": {"kind": "tokens", "vocab": 11},
        "blocks": [{"sublayers": [{"mixer": mixer, "memory": memory, "attach": attach}]}],
    }
    blueprint = resolve(validate(ModelConfig, data), registry.default())
    laws = [*PROOFS, "reset", "packing", "select", "save-restore", "statistics", "declared"]
    results = run(Subject(f"{mixer}+nsm[{attach}]", lambda: build(blueprint), 16, True, blueprint), laws)
    assert [(result.check, result.message) for result in results if result.status != "passed"] == []
