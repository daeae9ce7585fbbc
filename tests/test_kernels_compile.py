"""The fused kernels, compiled for a GPU that need not be there."""

import importlib.util

import pytest
import torch

triton = pytest.importorskip("triton")

MODULE = "nested_optim.kernels.level_adamw"
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def without_interpreter(name, monkeypatch):
    """A module of kernels as it is without an interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    origin = importlib.util.find_spec(name).origin
    spec = importlib.util.spec_from_file_location(name + "_for_gpus", origin)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def for_gpus(monkeypatch):
    return without_interpreter(MODULE, monkeypatch)


def lines_of_ptx(kernel, kinds, constants, warps):
    try:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(kernel, {**kinds, **dict.fromkeys(constants, "constexpr")}, constants)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except (AttributeError, ImportError, TypeError) as error:
        pytest.skip(f"this Triton compiles otherwise: {error}")
    return compiled.asm["ptx"].splitlines()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "dtypes, flags",
    [
        ((F32, F32, F32, F32), ()),
        ((BF16, BF16, F32, F32), ("WINDOWS", "KAHAN", "SCALED")),
        ((F16, F16, F16, F32), ("AMSGRAD", "WINDOWS", "FLUSH")),
        ((F64, F64, F64, F64), ("WINDOWS",)),
        ((F32, F32, F32, F32), ("EXCHANGE",)),
        ((BF16, BF16, BF16, F32), ("WINDOWS", "EXCHANGE")),
    ],
)
def test_the_update_compiles_to_accesses_of_16_bytes(dtypes, flags, for_gpus):
    names = "AMSGRAD", "KAHAN", "WINDOWS", "SCALED", "FLUSH", "EXCHANGE"
    flags = {name: name in flags for name in names}
    roles = zip(("PARAM", "GRAD", "MOMENT", "COMPUTE"), map(for_gpus._DTYPES.get, dtypes))
    constants = {**dict(roles), **flags, "CHUNK": for_gpus.CHUNK}
    constants["SLOWER"] = for_gpus._DTYPES[F32]
    orders = "*fp64" if F64 in dtypes else "*fp32"
    kinds = {"chunks": "*i32", "rows": "*i64", "orders": orders, "count": "i32"}
    lines = lines_of_ptx(for_gpus.apply, kinds, constants, for_gpus.NUM_WARPS)
    for access in ("ld.global", "st.global"):
        wide = [line for line in lines if access in line and (".v4." in line or ".v2.b64" in line)]
        # Parameter, two moments, and a copy of the parameter.
        assert len(wide) >= 3 + flags["EXCHANGE"]


@pytest.mark.parametrize("scaled, flush", [(False, False), (True, False), (False, True)])
def test_the_counters_compile(scaled, flush, for_gpus):
    constants = {"SCALED": scaled, "FLUSH": flush, "BLOCK": for_gpus.ADVANCE_BLOCK}
    kinds = {"rows": "*i64", "counters": "*i64", "grads": "*i64", "settings": "*fp64"}
    kinds |= {"orders": "*fp32", "n_tensors": "i32"}
    (kinds if scaled else constants).update(
        dict.fromkeys(("grad_scale", "found_inf"), "*fp32" if scaled else None)
    )
    assert any("st.global" in line for line in lines_of_ptx(for_gpus.advance, kinds, constants, 4))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("even", [True, False])
def test_symmetric_products_compile_to_tensor_core_instructions(even, monkeypatch):
    module = without_interpreter("nested_optim.kernels.symmetric", monkeypatch)
    kinds = dict.fromkeys(("a", "b", "plus", "result"), "*fp16")
    kinds |= {"size": "i32", "depth": "i32"}
    kinds |= dict.fromkeys(("a_batch", "a_row", "b_batch", "b_row"), "i64")
    kinds |= dict.fromkeys(("a_column", "b_column"), "i32")
    kinds |= dict.fromkeys(("alpha", "beta", "diagonal"), "fp32")
    constants = {"PLUS": True, "EVEN": even, "WHOLE": even}
    constants |= {"TILE": module.TILE, "DEPTH": module.DEPTH}
    lines = lines_of_ptx(module.product_kernel, kinds, constants, module.NUM_WARPS)
    assert any("wgmma.mma_async" in line for line in lines)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("along", [(True, True), (False, False), (True, False)])
def test_symmetric_products_compile_to_reads_of_the_copy_engine(along, monkeypatch):
    module = without_interpreter("nested_optim.kernels.symmetric", monkeypatch)
    if module.TensorDescriptor is None:
        pytest.skip("needs Triton 3.4")
    tile, step = module.TILE, module.DEPTH
    blocks = [f"1, {tile}, {step}" if by_row else f"1, {step}, {tile}" for by_row in along]
    kinds = {k: f"tensordesc<fp16[{block}]>" for k, block in zip("ab", blocks)}
    kinds |= dict.fromkeys(("plus", "result"), "*fp16") | {"size": "i32", "depth": "i32"}
    kinds |= dict.fromkeys(("alpha", "beta", "diagonal"), "fp32")
    constants = {"PLUS": True, "A_ALONG": along[0], "B_ALONG": along[1], "WHOLE": True}
    constants |= {"TILE": tile, "DEPTH": step}
    lines = lines_of_ptx(module.described_kernel, kinds, constants, module.NUM_WARPS)
    assert any("wgmma.mma_async" in line for line in lines)
    assert any("cp.async.bulk.tensor" in line for line in lines)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (F64, F64, F64)])
@pytest.mark.parametrize("pairs", [None, 1, 3])
def test_the_exchange_compiles_to_accesses_of_16_bytes(dtypes, pairs, monkeypatch):
    module = without_interpreter("nested_optim.kernels.exchange", monkeypatch)
    kinds = {"chunks": "*i32", "rows": "*i64", "rates": "*fp64"}
    constants = dict(zip(("FASTER", "SLOWER", "COMPUTE"), map(module._DTYPES.get, dtypes)))
    constants |= {"CHUNK": module.CHUNK}
    kernel = module.exchange_kernel if pairs is None else module.chain_kernel
    if pairs is not None:
        kinds |= {"count": "*i64", "found_inf": "*fp32", "n_chunks": "i32"}
        constants |= {"DEEP": module._DTYPES[dtypes[1]], "PAIRS": pairs}
    lines = lines_of_ptx(kernel, kinds, constants, module.NUM_WARPS)
    for access in ("ld.global", "st.global"):
        wide = [x for x in lines if access in x and (".v4." in x or ".v2.b64" in x)]
        assert len(wide) >= (pairs or 1) + 1  # every level, if it is of at least 4 bytes


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("param, row", [(F32, F32), (F32, BF16), (BF16, BF16)])
def test_dgds_launches_compile_to_accesses_of_16_bytes(param, row, monkeypatch):
    module = without_interpreter("nested_optim.kernels.descend", monkeypatch)
    shared = {"PARAM": module.DTYPES[param], "ALIGNED": True, "EVEN": True, "CHUNK": module.CHUNK}
    kinds = {"addresses": "*i64", "terms": "*bf16", "sizes": "*fp32", "numel": "i32"}
    kinds |= {"weight_decay": "fp32", "sign": "fp32"}
    constants = {**shared, "GRAD": module.DTYPES[param]}
    descend = lines_of_ptx(module.descend_kernel, kinds, constants, module.NUM_WARPS)
    kinds = {"addresses": "*i64", "weights": "*bf16", "rows": "*bf16", "sums": "*fp32"}
    kinds |= dict.fromkeys(("weight_numel", "row_numel", "weight_spans"), "i32")
    constants = {**shared, "ROW": module.DTYPES[row], "SEEN": module.DTYPES[BF16]}
    constants |= {"COPY_ROWS": True, "CHUNKS": module.CHUNKS}
    prepare = lines_of_ptx(module.prepare_kernel, kinds, constants, module.NUM_WARPS)
    # What is stacked: by what a launch knows.
    for lines, least in ((descend, (2, 1)), (prepare, (2, 0))):
        for access, number in zip(("ld.global", "st.global"), least):
            wide = [x for x in lines if access in x and (".v4." in x or ".v2.b64" in x)]
            assert len(wide) >= number
    kinds = dict.fromkeys(("sums", "sizes", "counts", "scales"), "*fp32") | {"per_weight": "i32"}
    kinds |= dict.fromkeys(("lr", "decay", "count", "scale"), "fp32")
    for on_device in (False, True):
        constants = {"COUNTED": on_device, "SCALED": on_device, "SUMS": module.SUMS}
        assert lines_of_ptx(module.size_kernel, kinds, constants, module.NUM_WARPS)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (F16, BF16, F32)])
@pytest.mark.parametrize("on_device", [False, True])
def test_delta_momentums_passes_compile_to_accesses_of_16_bytes(dtypes, on_device, monkeypatch):
    module = without_interpreter("nested_optim.kernels.delta", monkeypatch)
    tables = {"chunks": "*i32", "rows": "*i64", "grads": "*i64", "space": "*bf16", "first": "i32"}
    roles = dict(zip(("PARAM", "BUFFER", "GRAD"), map(module.DTYPES.get, dtypes)))
    penalty = {"PENALTY": not on_device}
    shared = {"PRODUCT": module.DTYPES[BF16], "SIZE": 2, "CHUNK": module.CHUNK, **penalty}
    both = dict.fromkeys(("sign", "penalty"), "fp32")
    numbers = dict.fromkeys(("lr", "keep", "weight_decay", "momentum"), "fp32")
    kinds = {**tables, "factors": "*fp32", **numbers, **both}
    constants = {**roles, **shared, "LR_ON_DEVICE": on_device}
    (kinds if on_device else constants)["lr_at"] = "*fp64" if on_device else None
    update = lines_of_ptx(module.update_kernel, kinds, constants, module.NUM_WARPS)
    kinds = {**tables, "norms": "*fp32", **both}
    prepare = lines_of_ptx(module.prepare_kernel, kinds, {**roles, **shared}, module.NUM_WARPS)
    kinds = {"spans": "*i32", "rows": "*i64", "grads": "*i64", "sums": "*fp64", **both}
    del roles["BUFFER"]
    constants = {**roles, **penalty, "CHUNK": module.CHUNK, "SPAN": module.SPAN}
    squares = lines_of_ptx(module.squares_kernel, kinds, constants, module.NUM_WARPS)
    in_a_row = module.SPAN // module.CHUNK
    for lines, least in ((update, (2, 2)), (prepare, (2, 2)), (squares, (in_a_row, 0))):
        for access, number in zip(("ld.global", "st.global"), least):
            wide = [x for x in lines if access in x and (".v4." in x or ".v2.b64" in x)]
            assert len(wide) >= number
    kinds = {"rows": "*i64", "sums": "*fp64", "norms": "*fp32", "factors": "*fp32"}
    kinds |= {"momentum": "i64", "rate": "i64"}
    for normalized in (False, True):
        constants = {"NORMALIZED": normalized, "SPAN": module.SPAN, "SUMS": module.SUMS}
        assert lines_of_ptx(module.numbers_kernel, kinds, constants, module.NUM_WARPS)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtypes", [(F32, F32, F32, BF16), (BF16, BF16, BF16, BF16)])
@pytest.mark.parametrize("slow, on_device", [(False, False), (True, False), (True, True)])
def test_m3s_passes_compile_to_accesses_of_16_bytes(dtypes, slow, on_device, monkeypatch):
    module = without_interpreter("nested_optim.kernels.momenta", monkeypatch)
    param, grad, momentum, update = map(module.DTYPES.get, dtypes)
    numbers = dict.fromkeys(("weight", "beta1", "beta3", "scale", "share"), "fp32")
    kinds = {"chunks": "*i32", "rows": "*i64", "grads": "*i64", "stack": "*fp32"}
    kinds |= {"sums": "*fp32", **numbers}
    constants = {"GRAD": grad, "MOMENTUM": momentum, "SLOW": slow, "COUNTED": on_device}
    constants |= {"NESTEROV": True, "MAXIMIZE": False, "CHUNK": module.CHUNK}
    programs = [lines_of_ptx(module.momenta_kernel, kinds, constants, module.NUM_WARPS)]

    numbers = dict.fromkeys(("alpha", "weight2", "eps", "size", "decay"), "fp32")
    kinds = {"rows": "*i64", "x": "*fp16", "sums": "*fp32", "sizes": "*fp32"}
    kinds |= {"per_matrix": "i32", **numbers}
    constants = {"PARAM": param, "UPDATE": update, "SLOW": slow, "MOMENT": slow, "RATIO": slow}
    constants |= {"SIZED": on_device, "ALIGNED": True, "CHUNK": module.CHUNK}
    for measure in (False, True) if slow else (False,):
        constants["MEASURE"] = measure
        programs.append(lines_of_ptx(module.move_kernel, kinds, constants, module.NUM_WARPS))
    # Both momenta and the buffer; parameter, stack, slow update and second moment.
    for lines, loads, stores in zip(programs, (2 + slow, 2 + 2 * slow, 3), (2 + slow, 1, 1)):
        for access, least in (("ld.global", loads), ("st.global", stores)):
            wide = [x for x in lines if access in x and (".v4." in x or ".v2.b64" in x)]
            assert len(wide) >= least


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "dtypes, slow, measure, update, way",
    [
        ((F32, F32, F32, BF16, F32), 0, True, True, False),
        ((F32, F32, F32, BF16, F32), 0, True, True, True),
        ((BF16, BF16, F32, BF16, F32), 2, True, True, True),
        ((F32, F32, F32, BF16, F32), 1, True, False, True),
        ((F64, F64, F64, F64, F64), 2, False, True, False),
    ],
)
def test_the_learned_pass_compiles_to_accesses_of_16_bytes(
    dtypes, slow, measure, update, way, monkeypatch
):
    module = without_interpreter("nested_optim.kernels.learned_adamw", monkeypatch)
    wide = F64 if F64 in dtypes else F32
    kinds = {"spans": "*i32", "rows": "*i64", "addresses": "*i64"}
    kinds |= dict.fromkeys(("orders", "multipliers", "sums"), "*fp64")
    roles = zip(("PARAM", "GRAD", "MOMENT", "LAST", "SLOWKIND", "WIDE"), (*dtypes, wide))
    constants = {role: module.KINDS[dtype] for role, dtype in roles}
    constants |= {"N_SLOW": slow, "NORMALIZE": True, "AMSGRAD": False}
    constants |= {"MEASURE": measure, "UPDATE": update, "WAY": way}
    constants |= {"CHUNK": module.CHUNK, "SPAN": module.SPAN}
    lines = lines_of_ptx(module.pass_kernel, kinds, constants, module.NUM_WARPS)
    # Both moments and slow ones; parameter and gradient, and the last gradient, read or written, of
    # which a thread has 8 bytes where they are narrow.
    own, last = dtypes[0] != BF16, dtypes[3] != BF16
    loads, stores = 2 + slow + (measure + way) * last + 2 * own, 2 + slow + last + own
    for access, least in (("ld.global", loads), ("st.global", stores * update)):
        found = [x for x in lines if access in x and (".v4." in x or ".v2.b64" in x)]
        assert len(found) >= least


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kept", ["fp32", "fp64"])
def test_what_looks_back_compiles(kept, monkeypatch):
    module = without_interpreter("nested_optim.kernels.look_back", monkeypatch)
    kinds = {"sums": "*fp64", "bounds": "*i64", "ways": "*fp64"}
    lines = lines_of_ptx(module.way_kernel, kinds, {"PART": module.PART}, 4)
    assert sum("st.global" in line for line in lines) == 3
    kinds = {"rows": "*i64", "settings": "*fp64", "controller": "*fp32"}
    kinds |= {"controller_start": "*fp32", "ways": "*fp64", "parts": "*i64"}
    kinds |= {"looked": "*i64", "kept": "*fp32", "found": "*fp64", "n_looked": "i32"}
    kind = {"fp32": triton.language.float32, "fp64": triton.language.float64}[kept]
    constants = {"FADES": 0.98, "KEPT": kind, "WIDE": kind, "CONTROLLER": 32}
    constants |= {"CONTROLLER_WIDTH": 32, "BLOCK": module.BLOCK}
    lines = lines_of_ptx(module.look_kernel, kinds, constants, 4)
    assert any("st.global" in line for line in lines)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("slow, learns", [(2, True), (0, False)])
@pytest.mark.parametrize("kept", [F32, F64], ids=str)
def test_the_learned_networks_compile(kept, slow, learns, monkeypatch):
    module = without_interpreter("nested_optim.kernels.learned_networks", monkeypatch)
    kind = {F32: "fp32", F64: "fp64"}[kept]
    flats = ("controller", "controller_start", "momentum", "momentum_start", "mixing")
    kinds = {"rows": "*i64", "steps": "*i64", "settings": "*fp64", **dict.fromkeys(flats, "*fp32")}
    kinds |= {"multipliers": "*fp64", "seen": f"*{kind}", "said": "*fp64", "orders": "*fp64"}
    constants = {"KEPT": {"fp32": triton.language.float32, "fp64": triton.language.float64}[kind]}
    constants["WIDE"] = constants["KEPT"]
    constants |= {"LEARN_LR": True, "LEARN_MOMENTUM": True, "LEARN_MIXING": slow > 0}
    constants |= {"CONTROLLER": 32, "CONTROLLER_WIDTH": 32, "MOMENTUM": 50, "MOMENTUM_WIDTH": 64}
    constants |= {"F1": 10, "F2": 100, "N_SLOW": slow, "BLOCK": module.BLOCK}
    lines = lines_of_ptx(
        module.inputs_kernel, {**kinds, "n_groups": "i32"}, constants, module.NUM_WARPS
    )
    assert any("st.global" in line for line in lines)
    for name in ("multipliers", "said", "orders"):
        del kinds[name]
    kinds |= dict.fromkeys(("sums", "lengths", "found"), "*fp64")
    kinds |= dict.fromkeys(("n_tensors", "n_groups", "total"), "i32")
    constants |= {"LEARN": learns, "KEEP": True}
    lines = lines_of_ptx(module.learn_kernel, kinds, constants, module.NUM_WARPS)
    assert any("st.global" in line for line in lines)
    kinds = {"found": "*fp64", "lengths": "*fp64", "modules": "*i64", "n_tensors": "i32"}
    constants = {"COSINE": learns, "BLOCK": 1024}
    lines = lines_of_ptx(module.collect_kernel, kinds, constants, module.NUM_WARPS)
    assert any("st.global" in line for line in lines)
