"""The exchange's kernel, interpreted on the CPU, and as part of a weight memory."""

import pytest
import torch
from torch.nn import Parameter

from nested_optim import WeightMemory, exchanges, rules
from nested_optim.exchanges import Exchanges

from .helpers import assert_same_tensors, clone_params, make_params, random_grads, train
from .interpreter import interpreted

triton = pytest.importorskip("triton")

SHAPES = (1024,), (3, 700), (5,), (), (0, 4), (2500,)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The kernel's module, interpreted; afterwards as it was."""
    with interpreted() as modules:
        yield modules["exchange"]


@pytest.fixture
def launched(kernel, monkeypatch):
    """How many tensors each launch of the kernel had."""
    sizes = []
    launch = kernel.ExchangeTable.launch

    def counted(self, *args):
        sizes.append(self.n_pairs)
        launch(self, *args)

    monkeypatch.setattr(kernel.ExchangeTable, "launch", counted)
    return sizes


def pairs(u_dtype, v_dtype):
    us, vs = ([torch.randn(s, dtype=d) for s in SHAPES] for d in (u_dtype, v_dtype))
    image = [torch.randn(2, 3, 4, 5, dtype=d) for d in (u_dtype, v_dtype)]
    shifted = [torch.randn(4001, dtype=d)[1:] for d in (u_dtype, v_dtype)]
    for kind in ([t.to(memory_format=torch.channels_last) for t in image], shifted):
        us.append(kind[0])
        vs.append(kind[1])
    return us, vs


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F32, BF16), (F64, F64), (F16, F32)])
@pytest.mark.parametrize("write, pull", [(0.5, 0.5), (0.2, 0.7), (0.01, 0.0), (0.0, 1.0)])
def test_the_kernel_is_the_rule(dtypes, write, pull, launched):
    us, vs = pairs(*dtypes)
    want = [rules.exchange(u, v, write=write, pull=pull) for u, v in zip(us, vs)]
    Exchanges()(us, vs, 3, write, pull)
    assert launched == [len(us)]
    for got, dtype, values in zip((us, vs), dtypes, zip(*want)):
        # A fused multiply-add rounds once less, and a narrow number then falls to its neighbour.
        rtol = {F64: 1e-14, F32: 1e-6, BF16: 1e-2, F16: 2e-3}[dtype]
        torch.testing.assert_close(got, list(values), rtol=rtol, atol=rtol)


def test_equal_levels_stay_equal_to_the_last_bit():
    us, _ = pairs(F32, F32)
    vs = [u.clone(memory_format=torch.preserve_format) for u in us]
    before = [u.clone() for u in us]
    Exchanges()(us, vs, 1, 0.3, 0.4)
    assert_same_tensors(us, before)
    assert_same_tensors(vs, before)


@pytest.mark.parametrize(
    "count, found_inf, due", [(6, 0.0, True), (7, 0.0, False), (6, 1.0, False), (9, None, True)]
)
def test_the_device_decides_by_its_counter(count, found_inf, due):
    us, vs = pairs(F32, F32)
    complex_pair = [torch.randn(3, dtype=torch.complex64) for _ in range(2)]  # torch's operations
    us, vs = [*us, complex_pair[0]], [*vs, complex_pair[1]]
    old = [t.clone() for t in (*us, *vs)]
    found = None if found_inf is None else torch.tensor(found_inf)
    Exchanges()(us, vs, 3, 0.3, 0.4, count=torch.tensor(count), found_inf=found)
    moved = [not torch.equal(a, b) for a, b in zip((*us, *vs), old) if a.numel()]
    assert all(moved) if due else not any(moved)


def test_tensors_in_another_order_of_memory_are_left_to_torch(launched):
    u, v = torch.randn(6, 5).t(), torch.randn(5, 6)
    want = rules.exchange(u, v, write=0.3, pull=0.4)
    Exchanges()([u], [v], 1, 0.3, 0.4)
    assert not launched
    assert_same_tensors([u, v], want)


def test_tables_follow_tensors_that_move():
    run = Exchanges()
    u, v = Parameter(torch.randn(100)), torch.randn(100)
    with torch.no_grad():
        run([u], [v], 1, 0.3, 0.4)
        u.data = torch.randn(100)
        want = rules.exchange(u, v, write=0.3, pull=0.4)
        run([u], [v], 1, 0.3, 0.4)
    torch.testing.assert_close([u.detach(), v], [w.detach() for w in want])
    assert len(run._tables) == 1


def test_tables_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(exchanges, "_MAX_TABLES", 3)
    run = Exchanges()
    for k in range(10):
        run([torch.randn(4)], [torch.randn(4)], 1, k / 20, 0.4)
    assert len(run._tables) <= 3


@pytest.mark.parametrize("on_device", [False, True])
def test_a_memory_on_the_kernel_is_the_memory_on_torchs_operations(
    on_device, launched, monkeypatch
):
    params = make_params((7, 5), (11,), ())
    twins = clone_params(params)
    results = []
    for ps in (params, twins):
        monkeypatch.setenv("TRITON_INTERPRET", "1" if ps is params else "0")
        optimizer = torch.optim.AdamW(ps, lr=0.1)
        memory = WeightMemory(optimizer, (2, 4), 0.3, 0.4)
        if on_device and ps is params:
            # As if the count were where the host must not look.
            monkeypatch.setattr(memory, "_exchange", lambda count, m=memory: counted_on_device(m))
        train(optimizer, ps, range(9))
        results.append([t.detach().clone() for k in range(3) for t in memory.weights(k)])
        assert bool(launched) == (ps is params)
        launched.clear()
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def counted_on_device(memory):
    memory._count -= 1
    memory._exchange_on_device(torch.zeros(1))


def test_gradients_are_not_asked_of_the_kernel():
    """A memory's exchange is no operation of autograd's, whatever mode the step is in."""
    params = make_params((7, 5))
    optimizer = torch.optim.SGD(params, lr=0.1)
    WeightMemory(optimizer, (1,))
    with torch.enable_grad():
        for p, g in zip(params, random_grads(params, 0)):
            p.grad = g
        optimizer.step()
    assert params[0].is_leaf and params[0].grad_fn is None
