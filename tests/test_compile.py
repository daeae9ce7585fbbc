"""torch.compile of the step: the same numbers, one graph for every phase of the windows."""

import pytest
import torch
import torch._dynamo.testing

from nested_optim import NestedOptimizer

from .helpers import make_params, random_grads, set_grads, train


@pytest.mark.parametrize("flags", [{}, {"foreach": False}, {"window": "sum", "amsgrad": True}])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_equals_the_eager_one_without_a_graph_per_phase(flags):
    torch._dynamo.reset()
    shapes = ((4, 3), (5,))
    params, compiled_params = make_params(*shapes), make_params(*shapes)

    def build(params):
        return NestedOptimizer(
            [{"params": params[:1], "frequency": 3}, {"params": params[1:]}], lr=0.01, **flags
        )

    optimizer, compiled = build(params), build(compiled_params)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(compiled.step, backend=counter)
    frames = []
    for seed in range(13):
        train(optimizer, params, [seed])
        set_grads(compiled_params, random_grads(compiled_params, seed))
        step()
        frames.append(counter.frame_count)
    assert frames[-1] > 0
    # The state is made on the first step; from then on the graph is one, whatever the phase.
    assert frames[2] == frames[-1]
    for p, q in zip(params, compiled_params):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key in ("step", "window_count"):
            assert optimizer.state[p][key] == compiled.state[q][key]
