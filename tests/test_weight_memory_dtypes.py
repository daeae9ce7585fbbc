"""Copies of a weight memory that are wider or narrower than the weights, and compensated ones."""

import torch
from torch.nn import Parameter

from nested_optim import NestedOptimizer, WeightMemory, rules

from .helpers import assert_same_tensors, make_params, step_with, train

SHAPES = (7, 5), (11,), ()


def test_copies_of_narrow_weights_are_wide():
    """A slow average moves by less than bfloat16 resolves."""
    p = Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.0)
    memory = WeightMemory(optimizer, (1,), 0.001, 0.0)
    step_with(optimizer, [p], [torch.ones_like(p)])
    p.data.fill_(2.0)
    for _ in range(100):
        step_with(optimizer, [p], [torch.ones_like(p)])
    level = memory.weights(1)[0]
    assert level.dtype == torch.float32
    torch.testing.assert_close(level, torch.full_like(level, 2 - 0.999**100))


def test_narrow_copies_are_an_option():
    params = make_params(*SHAPES)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    memory = WeightMemory(optimizer, (2,), dtype=torch.bfloat16)
    train(optimizer, params, range(8))
    assert {t.dtype for t in memory.weights(1)} == {torch.bfloat16}
    assert optimizer.param_groups[0]["memory_dtype"] == "bfloat16"
    difference = max((a - b).abs().max() for a, b in zip(params, memory.weights(1)))
    assert difference < 0.02  # the pair met in the middle, up to the copy's rounding


def test_compensated_weights_exchange_with_their_compensation():
    """With ``kahan_sum`` the weight is two numbers, and both take part."""
    p = Parameter(torch.full((8,), 256.0, dtype=torch.bfloat16))  # resolves 2
    optimizer = NestedOptimizer([p], lr=0.1, weight_decay=0.0, kahan_sum=True)
    memory = WeightMemory(optimizer, (1,), 0.5, 0.5)
    for _ in range(8):
        step_with(optimizer, [p], [torch.ones_like(p)])
    joined = rules.kahan_join(p.detach(), optimizer.state[p]["kahan_comp"], torch.float32)
    torch.testing.assert_close(joined, memory.weights(1)[0], rtol=1e-4, atol=0)
    assert 255.0 < joined[0] < 256.0  # eight halved steps of 0.1


def test_copies_of_compensated_weights_have_the_compensation():
    p = Parameter(torch.full((8,), 256.0, dtype=torch.bfloat16))
    optimizer = NestedOptimizer([p], lr=0.1, weight_decay=0.0, kahan_sum=True)
    for _ in range(3):
        step_with(optimizer, [p], [torch.ones_like(p)])
    joined = rules.kahan_join(p.detach(), optimizer.state[p]["kahan_comp"], torch.float32)
    assert not torch.equal(joined, p.detach().float())
    memory = WeightMemory(optimizer, (10,))  # late
    step_with(optimizer, [p], [torch.ones_like(p)])
    assert_same_tensors(memory.weights(1), [joined])
