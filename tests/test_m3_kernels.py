"""M3's kernels around the orthogonalisation, interpreted on the CPU, against the rule in a loop."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nested_optim import m3_fused

from .helpers import clone_params, make_params, random_grads, set_grads, slow_m3, snapshot
from .interpreter import interpreted

triton = pytest.importorskip("triton")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Sizes below, at and above a chunk of the kernels, of two orientations; two of one shape.
SHAPES = ((6, 5), (40, 33), (32, 64), (6, 5), (1, 7))


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The kernels' module, interpreted; afterwards as it was."""
    with interpreted() as modules:
        yield modules["momenta"]


def left_to_torch(optimizer):
    """How many parameters of each plan the kernels leave alone."""
    return [len(plan.left) for plan in optimizer._matrices._plans.values()]


def pair(params, group=None, **options):
    """An optimizer on the kernels, and its twin, which applies the rule one by one."""
    options = {"lr": 0.05, "slow_frequency": 2, "ns_dtype": "float32", **options}
    twins = clone_params(params)
    fused = slow_m3([{"params": params, **(group or {})}], fused=True, **options)
    loop = slow_m3([{"params": twins, **(group or {})}], foreach=False, **options)
    return fused, loop, twins


def assert_alike(fused, loop, rtol, atol=None):
    atol = rtol if atol is None else atol
    for group, other in zip(fused.param_groups, loop.param_groups):
        for p, q in zip(group["params"], other["params"]):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=atol)
            mine, its = fused.state[p], loop.state[q]
            assert mine.keys() == its.keys()
            for key in mine:
                assert mine[key].shape == its[key].shape and mine[key].dtype == its[key].dtype
                torch.testing.assert_close(mine[key], its[key], rtol=rtol, atol=atol, msg=key)


def check(params, group=None, steps=5, rounding=1e-5, **options):
    fused, loop, twins = pair(params, group, **options)
    for seed in range(steps):
        grads = random_grads(params, seed)
        set_grads(params, grads)  # each time in other memory
        set_grads(twins, grads)
        fused.step()
        loop.step()
        assert_alike(fused, loop, rounding)
    assert left_to_torch(fused) == [0]
    return fused


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # beyond a tensor's end
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.0},
        {"alpha": 0.0, "nesterov": False, "weight_decay": 0.0},
        {"nesterov": False, "maximize": True, "weight_decay": 0.3},
        {"betas": (0.3, 0.5, 0.4), "adjust_lr": "original", "alpha": 2.0},
        {"betas": (0.0, 0.0, 0.0), "adjust_lr": "spectral", "eps": 1e-3},
        {"second_moment": "row", "adjust_lr": None},
        {"second_moment": "row", "alpha": 0.0, "out_dim": 1, "adjust_lr": "original"},
        {"second_moment": "element", "eps": 0.0},
        {"second_moment": "element", "alpha": 0.0, "eps": 0.1},
        {"capturable": True},
        {"frequency": 2, "slow_frequency": 1},
        {"capturable": True, "frequency": 2, "slow_frequency": 1},
        {"slow_frequency": 3},
        {"max_batch_bytes": 1},
        {"lr": torch.tensor(0.05)},
        {"state_dtype": "float32"},
    ],
    ids=str,
)
def test_the_kernels_are_the_rule(options):
    check(make_params(*SHAPES), **options)


@pytest.mark.parametrize("second_moment", [None, "row", "element"])
@pytest.mark.parametrize(
    "shape, group",
    [
        ((48, 30), {"split_sizes": (16, 16, 16)}),
        ((50, 30), {"split_sizes": (40, 10)}),
        ((30, 54), {"split_sizes": (18, 36), "out_dim": 1}),
        ((16, 1040), {"split_sizes": (1030, 10), "out_dim": 1}),
        ((48, 30), {"split_sizes": (32, 16), "num_heads": (2, 1)}),
        ((30, 48), {"num_heads": 3, "out_dim": 1}),
        ((3, 20, 24), {"flatten": False}),
        ((3, 20, 24), {"flatten": False, "split_sizes": (8, 16), "out_dim": 1}),
        ((8, 5, 3, 3), {}),
        ((8, 6, 3, 3), {"split_sizes": (3, 5)}),
    ],
    ids=str,
)
def test_matrices_within_parameters_are_found(shape, group, second_moment):
    check(make_params(shape, shape), group, second_moment=second_moment)


@pytest.mark.parametrize(
    "dtype, options",
    [
        (BF16, {}),
        (BF16, {"state_dtype": "float32", "ns_dtype": "bfloat16"}),
        (BF16, {"second_moment": "element", "ns_dtype": "float16"}),
        (F16, {"second_moment": "element", "num_heads": 2}),
        (F16, {"state_dtype": "float32", "alpha": 0.0, "ns_dtype": "bfloat16"}),
        (F16, {"ns_dtype": "float16", "frequency": 2}),
    ],
    ids=str,
)
def test_narrow_tensors_are_read_and_rounded_as_what_they_are(dtype, options):
    params = [Parameter(p.detach() / 20) for p in make_params((40, 33), (16, 64), dtype=dtype)]
    start = [p.detach().float() for p in params]
    fused, loop, twins = pair(params, weight_decay=0.0, **options)
    for seed in range(6):
        grads = random_grads(params, seed)
        set_grads(params, grads)
        set_grads(twins, grads)
        fused.step()
        loop.step()
    assert left_to_torch(fused) == [0]
    for p, q, s in zip(params, twins, start):
        # The interpreter cuts bfloat16 off where a device rounds it.
        bound = 0.15 if dtype == BF16 else 0.05
        assert (p.detach().float() - q).norm() <= bound * (q.detach() - s).norm()
        for key, value in fused.state[p].items():
            assert value.dtype == loop.state[q][key].dtype
            expected = loop.state[q][key].float()
            assert (value.float() - expected).norm() <= 0.05 * expected.norm()


def test_misaligned_tensors_and_strided_gradients_are_served():
    def shifted(numel, shape):
        return torch.randn(numel + 1)[1:].view(shape)

    torch.manual_seed(0)
    params = [Parameter(shifted(2560, (64, 40))), Parameter(torch.randn(40, 64))]
    fused, loop, twins = pair(params)
    for seed in range(5):
        grads = [shifted(2560, (64, 40)), torch.randn(64, 40).t()]
        if seed == 3:
            grads[0] = torch.randn(40).expand(64, 40)
        for p, q, grad in zip(params, twins, grads):
            p.grad, q.grad = grad, grad.clone()
        fused.step()
        loop.step()
        assert_alike(fused, loop, 1e-5)
        if seed == 1:  # state, too
            state = fused.state[params[1]]
            state["momentum_buffer"] = shifted(2560, (40, 64)).copy_(state["momentum_buffer"])
            state["slow_update"] = shifted(2560, (40, 64)).copy_(state["slow_update"])
    assert left_to_torch(fused) == [0]


def test_a_strong_reader_of_old_updates_sees_them_until_the_chunk_is_over():
    """With a large alpha, an update that came a step early or late would stand out."""
    check(make_params((40, 33), (33, 40)), alpha=50.0, slow_frequency=1, steps=4)


@pytest.mark.parametrize("capturable", [False, True])
def test_chunks_that_are_out_of_step_stay_so(capturable):
    params = make_params((6, 5), (6, 5), (9, 4))
    fused, loop, twins = pair(params, capturable=capturable, alpha=3.0, betas=(0.5, 0.5, 0.5))
    for seed in range(10):
        grads = [
            None if seed in (1, 4) and i else g for i, g in enumerate(random_grads(params, seed))
        ]
        set_grads(params, grads)
        set_grads(twins, grads)
        fused.step()
        loop.step()
        assert_alike(fused, loop, 1e-5)


def test_plans_are_kept_and_follow_what_changes(monkeypatch):
    made = []
    make = m3_fused.FusedMatrices.make
    monkeypatch.setattr(
        m3_fused.FusedMatrices, "make", lambda self, *args: made.append(1) or make(self, *args)
    )
    params = make_params((6, 5), (9, 4))
    fused, loop, twins = pair(params)

    def train(seeds):
        made.clear()
        for seed in seeds:
            grads = random_grads(params, seed)
            set_grads(params, grads)
            set_grads(twins, grads)
            fused.step()
            loop.step()
            assert_alike(fused, loop, 1e-5)
        return len(made)

    assert train(range(4)) == 1
    for optimizer in (fused, loop):
        optimizer.param_groups[0].update(lr=0.01, weight_decay=0.3, alpha=0.7, slow_frequency=2)
    assert train(range(4, 7)) == 0
    for heads in (3, None):
        for optimizer in (fused, loop):
            optimizer.param_groups[0]["num_heads"] = heads
        assert train(range(3)) == 1
    params[0].data = params[0].detach().clone()
    assert train(range(7, 9)) == 1
    fused.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert train(range(9, 11)) == 1
    for optimizer in (fused, loop):
        optimizer.param_groups[0]["second_moment"] = "element"
    assert train(range(11, 14)) == 1
    for key in ("momentum_buffer", "slow_momentum_buffer", "slow_update", "second_moment"):
        fused.state[params[1]][key] = fused.state[params[1]][key].clone()
        assert train(range(14, 16)) == 1
    for q in (params, twins):
        q[0].data = q[0].detach().reshape(5, 6).t().contiguous()
        q[0].data = q[0].data.reshape(5, 6).t()  # the same memory in another order
    before = snapshot(fused)
    assert before["state"]
    train(range(16, 18))
    assert left_to_torch(fused) == [1]


def test_what_the_kernels_do_not_know_goes_through_torch():
    wide, narrow = make_params((6, 5), dtype=F64), make_params((6, 5), (4, 4), dtype=BF16)
    across = [Parameter(make_params((5, 6))[0].detach().t())]
    empty = [Parameter(torch.zeros(0, 3))]
    for params, options, left in (
        (wide, {}, 1),
        (narrow, {"kahan_sum": True}, 2),
        (across, {}, 1),
        (empty, {}, 1),
        (make_params((6, 5)), {"ns_dtype": "float64"}, 1),
        (make_params((6, 5)), {"state_dtype": "float64"}, 1),
        ([*make_params((6, 5)), *across], {}, 1),
    ):
        options = {"ns_dtype": None, **options}
        fused, loop, twins = pair(params, **options)
        if params[-1] is across[0]:
            twins[-1].data = params[-1].detach().clone(memory_format=torch.preserve_format)
        for seed in range(4):
            grads = random_grads(params, seed)
            set_grads(params, grads)
            set_grads(twins, grads)
            fused.step()
            loop.step()
        assert left_to_torch(fused) == [left]
        assert_alike(fused, loop, 1e-5 if params[0].dtype != BF16 else 0.02)


def test_gradients_of_another_dtype_are_read_as_they_are():
    """A window of half-precision gradients comes to a mean in float32."""
    params = make_params((40, 33), dtype=F16)
    fused, loop, twins = pair(params, frequency=2, state_dtype="float32")
    for seed in range(8):
        for its in (params, twins):
            set_grads(its, random_grads(params, seed))
        fused.step()
        loop.step()
    assert left_to_torch(fused) == [0]
    assert_alike(fused, loop, 5e-3)


def test_one_launch_goes_before_however_many_matrices_there_are(kernel, monkeypatch):
    before, after = [], []
    launch, run = kernel.MomentumTable.launch, kernel.MoveTable._run

    def counted(self, *args, **options):
        before.append(self.chunks)
        launch(self, *args, **options)

    def counted_too(self, *args):
        after.append(self._count)
        run(self, *args)

    monkeypatch.setattr(kernel.MomentumTable, "launch", counted)
    monkeypatch.setattr(kernel.MoveTable, "_run", counted_too)
    for alpha, launches in ((0.0, 1), (0.25, 2)):
        params = make_params(*[(6, 5), (8, 4)] * 10)
        optimizer = slow_m3(params, fused=True, alpha=alpha)
        for seed in range(2):
            before.clear()
            after.clear()
            set_grads(params, random_grads(params, seed))
            optimizer.step()
            assert len(before) == 1 and after == [10] * (2 * launches)


def test_a_scaler_is_not_told_that_matrices_skip_on_the_device():
    optimizer = slow_m3(make_params((6, 5)), fused=True)
    assert not optimizer._step_supports_amp_scaling


def test_vectors_and_matrices_are_both_served_by_their_kernels():
    params = make_params((6, 5), (7,))
    twins = clone_params(params)

    def groups(its):
        return [{"params": its[:1]}, {"params": its[1:], "algorithm": "adamw"}]

    fused = slow_m3(groups(params), lr=0.05, slow_frequency=2, fused=True)
    loop = slow_m3(groups(twins), lr=0.05, slow_frequency=2, foreach=False)
    for seed in range(5):
        grads = random_grads(params, seed)
        set_grads(params, grads)
        set_grads(twins, grads)
        fused.step()
        loop.step()
    assert left_to_torch(fused) == [0] and fused._fused.served == {params[1]}
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-5)


def test_a_captured_step_needs_the_tables_of_an_earlier_one(monkeypatch):
    monkeypatch.setattr(m3_fused, "capturing", lambda: True)
    params = make_params((6, 5))
    optimizer = slow_m3(params, fused=True, capturable=True)
    set_grads(params, random_grads(params, 0))
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="needs the tables of an earlier step"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor([0.05]), "capturable": True},
        {"lr": 0.05, "weight_decay": torch.tensor(0.3)},
        {"lr": torch.tensor(0.05), "second_moment": "row"},
    ],
    ids=str,
)
def test_options_that_only_the_device_knows_are_read_there(options, monkeypatch):
    monkeypatch.setattr(m3_fused, "_number", lambda value: torch.as_tensor(value).reshape(()))
    check(make_params((40, 33), (6, 5)), **options)


@pytest.mark.parametrize(
    "options, by_kernels",
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
        ({"mode": "paper"}, False),
    ],
    ids=str,
)
def test_matrices_go_by_the_kernels_unless_another_path_is_asked_for(options, by_kernels):
    params = make_params(*SHAPES)
    optimizer = slow_m3(params, **options)
    for seed in range(2):
        set_grads(params, random_grads(params, seed))
        optimizer.step()
    assert (optimizer._matrices is not None) == by_kernels
    if by_kernels:
        assert left_to_torch(optimizer) == [0]


def test_norms_of_what_is_orthogonalised_are_those_of_the_matrices(monkeypatch):
    params = make_params(*SHAPES)
    optimizer = slow_m3(params, lr=0.05, slow_frequency=2)
    found = []
    batches = m3_fused.orthogonal_batches

    def checked(matrices, *args, norms, **options):
        for matrix, norm in zip(matrices, norms, strict=True):
            if norm is not None:  # of the slow momenta they are not known
                exact = torch.linalg.vector_norm(matrix.double(), dim=(1, 2), keepdim=True)
                torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
            found.append(norm is None)
        return batches(matrices, *args, norms=norms, **options)

    monkeypatch.setattr(m3_fused, "orthogonal_batches", checked)
    for seed in range(4):
        set_grads(params, random_grads(params, seed))
        optimizer.step()
    assert any(found) and not all(found)
