"""A weight memory whose exchanges the fused kernels do on the way, interpreted on the CPU."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nested_optim import NestedOptimizer, WeightMemory
from nested_optim.exchanges import Exchanges
from nested_optim.kernels.tables import CHUNK

from .helpers import assert_same_tensors, clone_params, make_params, random_grads, set_grads
from .interpreter import interpreted

pytest.importorskip("triton")

SHAPES = ((CHUNK + 3,), (7, 5), (), (0, 3))


@pytest.fixture(autouse=True)
def on_the_host():
    with interpreted():
        yield


def pair(params, fused=True, frequencies=(2, 4), write=0.3, pull=0.2, dtype=None, **options):
    """A memory of an optimizer on the kernels, and the weights that its hook exchanged itself."""
    optimizer = NestedOptimizer(params, lr=0.1, fused=fused, foreach=None, **options)
    memory = WeightMemory(optimizer, frequencies, write, pull, dtype=dtype)
    given = []

    class Watching(Exchanges):
        def __call__(self, faster, *args, **kwargs):
            given.append(list(faster))
            super().__call__(faster, *args, **kwargs)

    memory._run = Watching()
    return memory, given


def train(memories, columns, seeds, without=()):
    for seed in seeds:
        for memory, params in zip(memories, columns):
            set_grads(params, random_grads(params, seed))
            for i in without:
                params[i].grad = None
            memory.optimizer.step()


VARIANTS = {
    "plain": {},
    "one level, all the way": {"frequencies": (3,), "write": 1.0, "pull": 0.0},
    "every step": {"frequencies": (1, 1), "write": 0.6, "pull": 0.4},
    "weight decay, amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "windows": {"frequency": 3},
    "coupled, maximize": {"decoupled": False, "weight_decay": 0.1, "maximize": True},
    "bfloat16 copies": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_kernels_exchange_as_the_hook_does(options):
    params = make_params(*SHAPES)
    twins = clone_params(params)
    joined, given = pair(params, **options)
    hooked, _ = pair(twins, fused=None, **options)
    train((joined, hooked), (params, twins), range(2))  # which make the copies
    given.clear()
    train((joined, hooked), (params, twins), range(2, 7))
    assert not any(t is p for call in given for t in call for p in params)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if "dtype" in options else {"rtol": 1e-5, "atol": 1e-6}
    for level in range(len(joined.optimizer.param_groups[0]["memory_frequencies"]) + 1):
        torch.testing.assert_close(joined.weights(level), hooked.weights(level), **tolerance)
    assert joined.optimizer.state[params[0]]["memory_count"] == 7


@pytest.mark.parametrize("frequency", [1, 3])
def test_what_has_no_gradient_is_exchanged_too(frequency):
    params = make_params((CHUNK + 3,), (7, 5))
    twins = clone_params(params)
    joined, given = pair(params, frequency=frequency)
    hooked, _ = pair(twins, fused=None, frequency=frequency)
    train((joined, hooked), (params, twins), range(2))
    for column in (params, twins):  # so that an exchange has something to do
        with torch.no_grad():
            for p in column:
                p.add_(1.0)
    before = [p.detach().clone() for p in params]
    given.clear()
    train((joined, hooked), (params, twins), range(2, 4), without=(0,))
    assert not torch.equal(params[0], before[0])
    assert not any(t is p for call in given for t in call for p in params)
    for level in range(3):
        torch.testing.assert_close(joined.weights(level), hooked.weights(level))


def test_bfloat16_weights_exchange_what_is_stored():
    params = make_params(*SHAPES, dtype=torch.bfloat16)
    twins = clone_params(params)
    joined, _ = pair(params)
    hooked, _ = pair(twins)

    def forget(optimizer, *_):
        if optimizer._fused is not None:
            optimizer._fused.exchange = None

    hooked.optimizer.register_step_pre_hook(forget)
    train((joined, hooked), (params, twins), range(6))
    assert joined.optimizer.state[params[0]]["memory_1"].dtype == torch.float32
    for level in range(3):
        torch.testing.assert_close(joined.weights(level), hooked.weights(level))


def test_narrow_copies_draw_nothing_that_stands_still():
    params = make_params(*SHAPES)
    before = clone_params(params)
    joined, given = pair(params, frequencies=(1, 2), dtype=torch.bfloat16)
    joined.optimizer.param_groups[0]["lr"] = 0.0
    train((joined,), (params,), range(5))
    assert not any(t is p for call in given[2:] for t in call for p in params)
    assert_same_tensors(params, before)


def test_groups_keep_their_own_exchanges():
    params = make_params((40,), (30,), (20,))
    twins = clone_params(params)
    memories = []
    for ps, fused in ((params, True), (twins, None)):
        groups = [
            {"params": [ps[0]], "memory_frequencies": (3,), "memory_write": 0.1},
            {"params": [ps[1]], "memory_frequencies": ()},
            {"params": [ps[2]], "memory_pull": 0.5, "lr": 0.03},
        ]
        memories.append(WeightMemory(NestedOptimizer(groups, lr=0.1, fused=fused), (2,), 0.3, 0.2))
    train(memories, (params, twins), range(7))
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)
    assert "memory_1" not in memories[0].optimizer.state[params[1]]
    for at in (0, 2):
        copies = [m.optimizer.state[ps[at]]["memory_1"] for m, ps in zip(memories, (params, twins))]
        torch.testing.assert_close(*copies, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("why", ["kahan", "strided", "a copy laid out otherwise"])
def test_what_the_kernels_cannot_exchange_is_left_to_the_hook(why):
    dtype = torch.bfloat16 if why == "kahan" else torch.float32
    params = make_params((12, 10), dtype=dtype)
    if why == "strided":
        params = [Parameter(torch.randn(12, 20)[:, ::2])]
    twins = [Parameter(p.detach().clone()) for p in params]
    kahan = {"kahan_sum": True} if why == "kahan" else {}
    joined, given = pair(params, **kahan)
    hooked, _ = pair(twins, fused=None, **kahan)
    train((joined, hooked), (params, twins), range(3))
    if why.startswith("a copy"):
        state = joined.optimizer.state[params[0]]
        state["memory_1"] = state["memory_1"].t().contiguous().t()
    given.clear()
    train((joined, hooked), (params, twins), range(3, 8))
    assert any(t is p for call in given for t in call for p in params)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if why == "kahan" else {"rtol": 1e-5, "atol": 1e-6}
    for level in range(3):
        torch.testing.assert_close(joined.weights(level), hooked.weights(level), **tolerance)


def test_a_run_that_resumes_goes_on_joined():
    params = make_params(*SHAPES)
    joined, _ = pair(params)
    train((joined,), (params,), range(5))
    twins = clone_params(params)
    resumed, given = pair(twins)
    resumed.optimizer.load_state_dict(copy.deepcopy(joined.optimizer.state_dict()))
    train((joined, resumed), (params, twins), range(5, 10))
    assert len(given) < 5
    for level in range(3):
        torch.testing.assert_close(joined.weights(level), resumed.weights(level), rtol=0, atol=0)
