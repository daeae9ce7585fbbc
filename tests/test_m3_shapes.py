"""M3 on what is no plain matrix: projections, heads, experts, convolutions."""

import copy
import math

import pytest
import torch
from torch.nn import Parameter

from nested_optim import rules

from .helpers import (
    make_params,
    random_grads,
    slow_m3,
    step_with,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
QUINTIC = rules.ns_schedule("quintic", 5)


@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize("foreach", [False, True])
class TestShapes:
    def pair(self, shape, group, parts, foreach, second_moment, read, rounding=1e-5):
        """One parameter that is read as several, against these as parameters of their own."""
        options = {"lr": 0.05, "slow_frequency": 2, "alpha": 0.5, "foreach": foreach}
        options["second_moment"] = second_moment
        [p] = make_params(shape)
        apart = [Parameter(part.detach().clone()) for part in read(p)]
        assert [tuple(q.shape) for q in apart] == parts
        whole = slow_m3([{"params": [p], **group}], **options)
        single = slow_m3(apart, **options)
        for seed in range(6):
            [grad] = random_grads([p], seed)
            step_with(whole, [p], [grad])
            step_with(single, apart, list(read(grad)))
            for part, q in zip(read(p.detach()), apart, strict=True):
                torch.testing.assert_close(part, q.detach(), rtol=rounding, atol=rounding)
        return whole, p

    def test_projections_are_matrices_of_their_own(self, foreach, second_moment):
        parts = [(4, 9), (2, 9), (2, 9)]
        self.pair(
            (8, 9),
            {"split_sizes": (4, 2, 2)},
            parts,
            foreach,
            second_moment,
            lambda t: t.split([4, 2, 2]),
        )

    def test_heads_are_matrices_of_their_own(self, foreach, second_moment):
        self.pair(
            (8, 9),
            {"split_sizes": (4, 4), "num_heads": (2, 1)},
            [(2, 9), (2, 9), (4, 9)],
            foreach,
            second_moment,
            lambda t: t.split([2, 2, 4]),
        )

    def test_transposed_weights_are_read_by_columns(self, foreach, second_moment):
        # A transposed weight moves as the weight itself does.
        options = {"lr": 0.05, "slow_frequency": 2, "foreach": foreach, "adjust_lr": "spectral"}
        options["second_moment"] = second_moment
        [weight] = make_params((8, 9))
        turned = Parameter(weight.detach().T.contiguous())
        plain = slow_m3([weight], split_sizes=(4, 4), num_heads=2, **options)
        conv1d = slow_m3([turned], split_sizes=(4, 4), num_heads=2, out_dim=1, **options)
        for seed in range(6):
            [grad] = random_grads([weight], seed)
            step_with(plain, [weight], [grad])
            step_with(conv1d, [turned], [grad.T.contiguous()])
        torch.testing.assert_close(turned.detach().T, weight.detach(), rtol=1e-5, atol=1e-5)

    def test_experts_are_a_batch(self, foreach, second_moment):
        self.pair(
            (3, 6, 9),
            {"flatten": False},
            [(6, 9)] * 3,
            foreach,
            second_moment,
            lambda t: t.unbind(),
        )

    @pytest.mark.parametrize("shape, flatten", [((6, 2, 3, 3), None), ((6, 4, 3), True)])
    def test_convolutions_are_flattened(self, shape, flatten, foreach, second_moment):
        columns = math.prod(shape[1:])
        self.pair(
            shape,
            {"flatten": flatten},
            [(6, columns)],
            foreach,
            second_moment,
            lambda t: [t.reshape(6, columns)],
        )

    def test_a_convolution_in_channels_last_moves_as_any_other(self, foreach, second_moment):
        options = {"lr": 0.05, "slow_frequency": 2, "foreach": foreach}
        options["second_moment"] = second_moment
        [plain] = make_params((6, 2, 3, 3))
        last = Parameter(plain.detach().clone(memory_format=torch.channels_last))
        optimizers = slow_m3([plain], **options), slow_m3([last], **options)
        for seed in range(5):
            grads = random_grads([plain], seed)
            step_with(optimizers[0], [plain], grads)
            grads[0] = grads[0].to(memory_format=torch.channels_last)
            step_with(optimizers[1], [last], grads)
        torch.testing.assert_close(plain.detach(), last.detach(), rtol=1e-5, atol=1e-5)
        assert last.is_contiguous(memory_format=torch.channels_last)


def test_state_of_another_memory_format_goes_on_as_it_was():
    options = {"lr": 0.05, "slow_frequency": 2, "second_moment": "element", "foreach": True}
    [plain] = make_params((6, 2, 3, 3))
    last = Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizer = slow_m3([last], **options)
    grads = [random_grads([plain], seed) for seed in range(8)]
    for seed in range(3):
        step_with(optimizer, [last], grads[seed])
    with torch.no_grad():
        plain.copy_(last)
    resumed = slow_m3([plain], **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not resumed.state[plain]["slow_update"].is_contiguous()
    for seed in range(3, 8):
        step_with(optimizer, [last], grads[seed])
        step_with(resumed, [plain], grads[seed])
    torch.testing.assert_close(plain.detach(), last.detach(), rtol=1e-5, atol=1e-5)
