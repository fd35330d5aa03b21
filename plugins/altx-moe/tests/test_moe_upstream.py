"""The routers beside transformers' Mixtral, DeepSeek-V3, Granite and Switch, st-moe-pytorch and soft-moe-pytorch."""

from __future__ import annotations

import warnings

import pytest
import torch
from altx_moe.config import SoftConfig, SwitchConfig, TopKConfig
from altx_moe.soft import Soft
from altx_moe.switch import Switch
from altx_moe.topk import TopK

from altx.context import Context
from altx.feed_forward import SwiGLU, SwiGLUBank
from altx.feed_forward_config import SwiGLUConfig, capabilities
from altx.routed import Routed
from altx.router import Targets

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import DeepseekV3Config, GraniteMoeConfig, MixtralConfig, SwitchTransformersConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.switch_transformers import modeling_switch_transformers as switch_transformers

BATCH, LENGTH, HEADS = 3, 17, {"num_attention_heads": 1, "num_key_value_heads": 1}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bank(n: int, gate_up: torch.Tensor, down: torch.Tensor) -> SwiGLUBank:
    """transformers' experts: gate_up (n, 2F, D), down (n, D, F)."""
    mine = SwiGLUBank(n, gate_up.shape[2], down.shape[2]).to(gate_up.dtype)
    mine.capabilities = capabilities(SwiGLUConfig())
    gate, up = gate_up.chunk(2, 1)
    with torch.no_grad():
        for parameter, weight in ((mine.gate, gate), (mine.up, up), (mine.down, down)):
            parameter.copy_(weight.transpose(1, 2))
    return mine


@pytest.mark.parametrize(("dim", "n", "k"), [(16, 4, 2), (24, 8, 3), (8, 8, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_mixtral(dim, n, k, dtype, tolerance):
    config = MixtralConfig(hidden_size=dim, intermediate_size=12, num_local_experts=n, num_experts_per_tok=k, **HEADS)
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    for index, parameter in enumerate(theirs.parameters()):
        parameter.data = 0.5 * noise(*parameter.shape, seed=index)
    theirs = theirs.to(dtype)
    # MixtralTopKRouter's softmax is in float32, whatever the dtype.
    router = TopK(TopKConfig(k=k), dim, n).to(dtype)
    router.gate.weight.data = theirs.gate.weight.data
    ours = Routed(router, bank(n, theirs.experts.gate_up_proj.data, theirs.experts.down_proj.data))
    x = noise(BATCH, LENGTH, dim).to(dtype)
    logits, weight, index = theirs.gate(x)
    route = router.route(x, Targets(n))
    assert torch.equal(route.target.view(-1, k), index)
    torch.testing.assert_close(route.weight.view(-1, k).float(), weight.float(), rtol=1e-5, atol=1e-6)
    if dtype == torch.float64:
        exact = torch.softmax(logits, -1).topk(k, -1).values
        weight = exact / exact.sum(-1, keepdim=True)
        torch.testing.assert_close(route.weight.view(-1, k), weight, rtol=tolerance, atol=tolerance)
        y = theirs.experts(x.flatten(0, 1), index, weight).view_as(x)
    else:
        y = theirs(x)
    torch.testing.assert_close(ours(x).y, y, rtol=tolerance, atol=tolerance)


def deepseek(**settings):
    config = DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        n_shared_experts=1, routed_scaling_factor=2.5, **HEADS, **settings,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    for index, parameter in enumerate(theirs.parameters()):
        parameter.data = 0.5 * noise(*parameter.shape, seed=index)
    theirs.gate.e_score_correction_bias.data = 0.3 * noise(8, seed=99)
    return theirs.float()


@pytest.mark.parametrize("renormalise", [True, False])
def test_deepseek_v3_with_groups_bias_and_a_shared_expert(renormalise):
    theirs = deepseek(norm_topk_prob=renormalise)
    settings = {"k": 3, "groups": 4, "groups_used": 2, "shared": 1, "scale": 2.5, "bias_rate": 0.001}
    router = TopK(TopKConfig(score="sigmoid", renormalise=renormalise, **settings), 16, 9)
    router.gate.weight.data, router.bias = theirs.gate.weight.data, theirs.gate.e_score_correction_bias.data
    shared, experts = theirs.shared_experts, theirs.experts
    first = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])[None]
    gate_up = torch.cat([first, experts.gate_up_proj]).detach()
    down = torch.cat([shared.down_proj.weight[None], experts.down_proj]).detach()
    x = noise(BATCH, LENGTH, 16).float()
    torch.testing.assert_close(Routed(router, bank(9, gate_up, down))(x).y, theirs(x), rtol=1e-5, atol=1e-5)

    # In float64 beside the same equations: everything but the picks is theirs.
    _, weight, index = theirs.gate(x)
    route = router.double().route(x.double(), Targets(9))
    target = route.target.view(-1, 4)
    assert not target[:, 0].any() and torch.equal((target[:, 1:] - 1).sort(-1).values, index.sort(-1).values)
    scores = torch.sigmoid(x.double() @ router.gate.weight.T).flatten(0, 1).gather(-1, target[:, 1:] - 1)
    wanted = 2.5 * (scores / scores.sum(-1, keepdim=True) if renormalise else scores)
    torch.testing.assert_close(route.weight.view(-1, 4)[:, 1:], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wanted.sort(-1).values.float(), weight.sort(-1).values, rtol=1e-5, atol=1e-6)


def test_a_softmax_after_the_top_k_is_softmax_renormalised():
    theirs = GraniteMoeTopKRouter(GraniteMoeConfig(hidden_size=8, num_local_experts=6, num_experts_per_tok=3))
    router = TopK(TopKConfig(k=3), 8, 6)
    router.gate.weight.data = theirs.weight.data = noise(6, 8, seed=1).float()
    x = noise(BATCH, LENGTH, 8).float()
    _, weight, index = theirs(x.flatten(0, 1))
    route = router.route(x, Targets(6))
    assert torch.equal(route.target.view(-1, 3), index)
    torch.testing.assert_close(route.weight.view(-1, 3), weight, rtol=1e-5, atol=1e-6)
    exact = torch.softmax((x.double().flatten(0, 1) @ router.gate.weight.double().T).gather(-1, index), -1)
    weight = router.double().route(x.double(), Targets(6)).weight.view(-1, 3)
    torch.testing.assert_close(weight, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [6, 16, 29])
def test_switch_transformers(length):
    n, capacity = 4, -(-length * 5 // 16)  # ceil(1.25 length / 4)
    config = SwitchTransformersConfig(hidden_size=8, num_experts=n, expert_capacity=capacity, router_jitter_noise=0.0)
    theirs = switch_transformers.SwitchTransformersTop1Router(config)
    theirs.dtype = torch.float64
    router = Switch(SwitchConfig(z_weight=0.1), 8, n).double().train()
    router.gate.weight.data = theirs.classifier.weight.data = noise(n, 8, seed=1)
    x = noise(BATCH, length, 8)
    index, probs, logits = theirs(x)
    route = router.route(x, Targets(n))
    taken = index.any(-1)
    assert int((~taken).sum()) > 0 and torch.equal(route.target.view(BATCH, length) >= 0, taken)
    wanted = torch.where(taken, index.argmax(-1), -1)
    assert torch.equal(route.target.view(BATCH, length), wanted)
    weight = (probs[..., 0] * taken).flatten()
    torch.testing.assert_close(route.weight, weight, rtol=1e-12, atol=1e-12)
    assert float(route.metrics["drop_rate"]) == pytest.approx(float((~taken).double().mean()))
    assert int(route.metrics["no_target"]) == int((~taken).sum())

    # One row, because theirs is the mean of the rows' losses.
    row = router.route(x[:1], Targets(n))
    best = torch.softmax(logits[:1], -1)
    aux = switch_transformers.load_balancing_loss_func(best, best.argmax(-1))
    torch.testing.assert_close(row.losses["balance"].double(), aux, rtol=1e-6, atol=1e-6)
    z = switch_transformers.router_z_loss_func(logits)
    torch.testing.assert_close(route.losses["z"], z, rtol=1e-12, atol=1e-12)


def test_st_moe_pytorch():
    st_moe = pytest.importorskip("st_moe_pytorch.st_moe_pytorch")
    # No second expert is left out by chance, and none is full.
    theirs = st_moe.TopNGating(8, 4, threshold_train=0.0, capacity_factor_train=8.0).double()
    router = TopK(TopKConfig(k=2), 8, 4).double()
    router.gate.weight.data = theirs.to_gates.weight.data = noise(4, 8, seed=1)
    x = noise(1, LENGTH, 8)
    _, combine, _, z = theirs(x)
    route = router.route(x, Targets(4))
    weights = route.dense(1, LENGTH).permute(1, 2, 0)
    torch.testing.assert_close(weights, combine.sum(-1).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(route.losses["z"], z.double(), rtol=1e-9, atol=1e-9)


def test_soft_moe_pytorch():
    soft_moe = pytest.importorskip("soft_moe_pytorch")
    theirs = soft_moe.SoftMoE(8, num_slots=3, num_experts=4).double()
    router = Soft(SoftConfig(slots=3, normalise=False), 8, 4).double()
    experts = [SwiGLU(8, 5).double() for _ in range(4)]
    for expert in experts:
        expert.capabilities = capabilities(SwiGLUConfig())
    theirs.experts = torch.nn.Module()
    theirs.experts.forward = lambda slots: torch.stack([e(slots[:, i]).y for i, e in enumerate(experts)], 1)
    # Theirs norms inside, ours has a norm in front.
    router.phi.data = theirs.slot_norm(theirs.slot_embeds).flatten(0, 1).detach()
    x, mask = noise(BATCH, LENGTH, 8), torch.rand(BATCH, LENGTH) > 0.3
    ours = Routed(router, experts)(theirs.norm(x), Context(causal=False, mask=mask)).y
    torch.testing.assert_close(ours[mask], theirs(x, mask=mask)[mask], rtol=1e-12, atol=1e-12)
