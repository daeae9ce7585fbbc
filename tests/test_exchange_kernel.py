"""The exchange's kernel, interpreted on the CPU, and as part of a weight memory."""

import pytest
import torch
from torch.nn import Parameter

from nested_optim import WeightMemory, exchanges, rules
from nested_optim.exchanges import Exchanges, Settings

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
    """How many tensors each launch of a kernel had."""
    sizes = []

    def counting(real):
        def launch(self, *args):
            sizes.append(self.n_tensors)
            real(self, *args)

        return launch

    for name in ("launch", "launch_due"):
        monkeypatch.setattr(
            kernel.ExchangeTable, name, counting(getattr(kernel.ExchangeTable, name))
        )
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


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F32, F16), (F64, F32), (F16, BF16)])
def test_equal_levels_stay_equal_to_the_last_bit(dtypes, on_device):
    """Also those that are equal but for the copy's rounding."""
    us, _ = pairs(dtypes[0], dtypes[0])
    vs = [u.to(dtypes[1], copy=True, memory_format=torch.preserve_format) for u in us]
    before = [[t.clone() for t in tensors] for tensors in (us, vs)]
    if on_device:
        settings = Settings((1,), (0.3,), (0.4,))
        Exchanges().on_device(lambda: [(settings, (us, vs), ())], torch.tensor(4))
    else:
        Exchanges()(us, vs, 1, 0.3, 0.4)
    assert_same_tensors(us, before[0])
    assert_same_tensors(vs, before[1])


def by_the_rule(levels, settings, count):
    """What the exchanges that are due at ``count`` make of each tensor's levels."""
    levels = [list(tensors) for tensors in levels]
    for k, (frequency, write, pull) in enumerate(zip(*settings)):
        if count % frequency == 0:
            for i, (u, v) in enumerate(zip(levels[k], levels[k + 1])):
                levels[k][i], levels[k + 1][i] = rules.exchange(u, v, write=write, pull=pull)
    return levels


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F32, BF16), (F64, F64), (F64, F32)])
@pytest.mark.parametrize("frequencies", [(3,), (2, 4), (2, 3, 9)])
@pytest.mark.parametrize("count, found_inf", [(6, 0.0), (7, 0.0), (6, 1.0), (9, None), (4, None)])
def test_the_device_decides_by_its_counter(dtypes, frequencies, count, found_inf, launched):
    us, vs = pairs(*dtypes)
    deeper = [pairs(dtypes[1], dtypes[1])[0] for _ in frequencies[1:]]
    levels = [us, vs, *deeper]
    n = len(frequencies)
    settings = Settings(frequencies, (0.3, 0.1, 0.6)[:n], (0.4, 0.05, 0.4)[:n])
    old = [[t.clone() for t in tensors] for tensors in levels]
    want = old if found_inf else by_the_rule(old, settings, count)
    found = None if found_inf is None else torch.tensor(found_inf)
    run = Exchanges()
    run.on_device(lambda: [(settings, levels, ())], torch.tensor(count), found)
    assert launched == [len(us)]  # all pairs at once
    for k, (got, values) in enumerate(zip(levels, want)):
        rtol = {F64: 1e-14, F32: 1e-6, BF16: 4e-2}[dtypes[min(k, 1)]]
        for at, value in zip(got, values):
            torch.testing.assert_close(at, value, rtol=rtol, atol=rtol)
    if found_inf or not any(count % f == 0 for f in frequencies):
        for got, values in zip(levels, old):
            assert_same_tensors(got, values)

    def asked_again():
        raise AssertionError

    run.on_device(asked_again, torch.tensor(count), found)
    assert launched == [len(us)] * 2


def test_what_the_kernel_does_not_serve_takes_its_turn(launched):
    """Complex numbers, and the live pair of compensated weights."""
    plain, other = (torch.randn(300) for _ in range(2)), torch.complex64
    levels = [[t, torch.randn(5, dtype=other)] for t in plain]
    narrow = torch.randn(40).bfloat16()
    levels[0].append(narrow)
    levels[1].append(narrow.float() + 0.5)
    levels.append([torch.randn(300), torch.randn(5, dtype=other), torch.randn(40)])
    comp = torch.full((40,), 1e-3, dtype=BF16)
    settings = Settings((2, 3), (0.3, 0.1), (0.4, 0.2))
    old = [[t.clone() for t in tensors] for tensors in levels]
    old[0][2] = rules.kahan_join(old[0][2], comp, F32)
    want = by_the_rule(old, settings, 6)
    run = Exchanges()
    for count in (5, 6):
        comps = [None, None, comp]
        run.on_device(lambda c=comps: [(settings, levels, c)], torch.tensor(count))
    got = [list(tensors) for tensors in levels]
    got[0][2] = rules.kahan_join(got[0][2], comp, F32)
    for at, values in zip(got, want):
        torch.testing.assert_close(at, values, rtol=1e-5, atol=1e-5)
    assert launched == [1, 1] * 2


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
            # As if the host must not look at the count.
            monkeypatch.setattr(memory, "_exchange", lambda count, m=memory: counted_on_device(m))
        train(optimizer, ps, range(9))
        results.append([t.detach().clone() for k in range(3) for t in memory.weights(k)])
        assert bool(launched) == (ps is params)
        if on_device and ps is params:
            assert launched == [3] * 9
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
