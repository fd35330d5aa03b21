"""States that live, die and split: shapes, checkpoints, optimizer and graphs never notice."""

from __future__ import annotations

import torch
from altx_nsm.config import NSMConfig
from altx_nsm.memory import NSM
from altx_nsm.population import Population

from altx.compose import compose
from altx.layer import StepInfo
from altx.optim import optimizer_groups

DIM = 8


def population(**settings) -> Population:
    return Population(NSMConfig(**{"slots": 6, "decay": 0.5, **settings}))


def steps(states: Population, *loads: list[float], times: int = 20) -> torch.Tensor:
    initial = torch.randn(len(loads[0]), 4, generator=torch.Generator().manual_seed(0))
    for step in range(times):
        for load in loads:
            states.update(torch.tensor(load), initial, step)
    return initial


def test_states_that_few_tokens_choose_die_but_never_below_k():
    states = population(prune=0.5, split=1.0, k=3)
    steps(states, [10, 10, 10, 10, 0, 0.1])
    assert states.alive.tolist() == [True] * 4 + [False] * 2
    steps(states, [10.0, 0, 0, 0, 0, 0])
    assert int(states.alive.sum()) == 3 and states.alive[0]
    assert (states.usage[~states.alive] == 0).all()


def test_a_state_that_many_choose_is_split_into_a_dead_one():
    states = population(living=3, prune=0.0, split=0.5)
    initial = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    before = initial.clone()
    for step in range(10):
        states.update(torch.tensor([1.0, 8, 1, 0, 0, 0]), initial, step)
        if states.born.any():
            break
    assert states.alive.tolist() == [True] * 4 + [False] * 2 and states.born.tolist() == [0, 0, 0, 1, 0, 0]
    assert torch.equal(initial[[0, 1, 2, 4, 5]], before[[0, 1, 2, 4, 5]])
    distance = (initial[3] - initial[1]).norm() / initial[1].norm()
    assert 0 < distance < 0.5
    assert states.usage[1] == states.usage[3] > states.usage[0]


def test_a_models_metrics_reach_each_of_its_memories():
    model = compose({"dim": DIM, "mixer": "mamba", "layers": 2, "memory": "nsm", "attach": "gate"}, seed=0)
    memories = [module for module in model.modules() if isinstance(module, NSM)]
    before = [memory.population.usage.clone() for memory in memories]
    model.on_step(StepInfo(1, model(torch.randint(256, (2, 20))).metrics))
    assert len(memories) == 2
    for memory, usage in zip(memories, before, strict=True):
        assert not torch.equal(memory.population.usage, usage)


def test_no_tokens_change_nothing():
    states = population(living=4)
    before = {name: value.clone() for name, value in states.state_dict().items()}
    initial = steps(states, [0.0] * 6)
    assert all(torch.equal(value, before[name]) for name, value in states.state_dict().items())
    assert torch.equal(initial, steps(states, [0.0] * 6, times=0))


def test_the_same_step_is_the_same_on_every_rank():
    one, other = population(living=3), population(living=3)
    torch.manual_seed(1)
    first = steps(one, [1.0, 9, 1, 0, 0, 0])
    torch.manual_seed(2)
    second = steps(other, [1.0, 9, 1, 0, 0, 0])
    assert torch.equal(first, second) and one.born.any()


def test_a_dead_state_gets_no_token_and_is_heard_by_none_however_few_live():
    torch.manual_seed(0)
    nsm, x = NSM(NSMConfig(slots=6, chunk=2), DIM).double(), torch.randn(2, 8, DIM, dtype=torch.float64)
    nsm.population.alive.copy_(torch.tensor([False, True, False, False, True, False]))
    out = nsm.scan(x, nsm.init_state(2))
    with torch.no_grad():
        nsm.initial[~nsm.population.alive] = 1e3
    again = nsm.scan(x, nsm.init_state(2))
    assert torch.equal(out.read.value, again.read.value)
    assert (out.metrics["load"] > 0).tolist() == nsm.population.alive.tolist()
    # Fewer than k, or none, as a foreign checkpoint might have it.
    for i in (1, 4):
        nsm.population.alive[i] = False
        assert (nsm.scan(x, nsm.init_state(2)).metrics["load"] > 0).tolist() == nsm.population.alive.tolist()
    state = nsm.init_state(2)
    assert not nsm.scan(x, state).read.value.any() and not nsm.read(x, state)[0].value.any()


def test_what_a_sequence_kept_of_a_dead_state_is_not_taken_for_a_new_one():
    torch.manual_seed(0)
    nsm, x = NSM(NSMConfig(slots=4, chunk=2, heads=2), DIM).double(), torch.randn(1, 5, DIM, dtype=torch.float64)
    state = nsm.scan(x, nsm.init_state(1)).state
    initial = nsm.initial[2].chunk(2)
    assert not torch.equal(state["keys"][0, 2], initial[0]) and not torch.equal(state["values"][0, 2], initial[1])
    nsm.population.born[2] += 1
    held = nsm.scan(x[:, :0], state).state
    assert torch.equal(held["keys"][0, 2], initial[0]) and torch.equal(held["values"][0, 2], initial[1])
    assert (held["total"][0, 2] == 0).all() and (held["square"][0, 2] == 0).all()
    for name in ("keys", "values", "total", "square"):
        assert torch.equal(held[name][0, [0, 1, 3]], state[name][0, [0, 1, 3]]), name


def lively(steps: int, forward) -> NSM:
    """A memory that is trained while load is made to wander, so that states die and are born."""
    torch.manual_seed(0)
    nsm = NSM(NSMConfig(slots=6, chunk=4, heads=2, decay=0.8, prune=0.5, split=0.3), DIM)
    call = forward(nsm)
    optimizer = torch.optim.AdamW(optimizer_groups(nsm, lr=1e-3, weight_decay=0.1))
    shapes = {name: (t.shape, t.dtype) for name, t in nsm.state_dict().items()}
    living, moments = set(), None
    for step in range(steps):
        if step % (steps // 20) == 0:
            out = call(torch.randn(2, 9, DIM))
            optimizer.zero_grad()
            out.read.value.square().sum().backward()
            optimizer.step()
            found = [[t.shape for t in each.values()] for each in optimizer.state.values()]
            assert moments in (None, found)
            moments = found
        load = torch.rand(6) ** 8 * nsm.population.alive
        nsm.on_step(StepInfo(step, {"load": load}))
        count = int(nsm.population.alive.sum())
        assert count >= nsm.config.k
        living.add(count)
        assert {name: (t.shape, t.dtype) for name, t in nsm.state_dict().items()} == shapes
        assert nsm.population.usage.isfinite().all() and nsm.initial.isfinite().all()
    assert len(living) > 2 and nsm.population.born.sum() > 10
    return nsm


def test_2000_steps_leave_every_shape_the_optimizer_and_checkpoints_as_they_are():
    nsm = lively(2000, lambda nsm: lambda x: nsm.scan(x, nsm.init_state(len(x))))
    fresh = NSM(nsm.config, DIM)
    fresh.load_state_dict(nsm.state_dict())
    x = torch.randn(2, 9, DIM)
    one, other = (each.scan(x, each.init_state(2)) for each in (nsm, fresh))
    assert torch.equal(one.read.value, other.read.value)


def test_a_compiled_graph_serves_whatever_lives():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def forward(nsm):
        compiled = torch.compile(lambda x: nsm.scan(x, nsm.init_state(2)), backend=count, fullgraph=True)

        def both(x):
            out, plain = compiled(x), nsm.scan(x, nsm.init_state(2))
            torch.testing.assert_close(out.read.value, plain.read.value)
            return out

        return both

    torch._dynamo.reset()
    lively(200, forward)
    assert len(graphs) == 1
    torch._dynamo.reset()
