"""What is in the wheel, and that it works where there is only torch."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nested_optim

ROOT = Path(__file__).parent.parent

IMPORT_AND_STEP = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import nested_optim, nested_optim.integrations.loop
assert nested_optim.__file__.startswith(sys.argv[1]), nested_optim.__file__
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = nested_optim.NestedOptimizer([parameter], frequency=2)
for _ in range(2):
    parameter.grad = torch.ones(3)
    optimizer.step()
assert (parameter < 1).all()
# The tables and the benchmarks are extras: importing the package asks for none of them.
extras = {"rich", "numpy.testing", "matplotlib", "sklearn", "click", "torchopt", "transformers"}
extras |= {"accelerate", "lightning", "pydantic"}
print(sorted(extras & set(sys.modules)), nested_optim.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # A copy of what is under version control or new: building writes beside pyproject.toml.
    source = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        check=True,
        capture_output=True,
        timeout=240,
    )
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = {
        f"nested_optim/{path.relative_to(ROOT / 'nested_optim')}"
        for path in (ROOT / "nested_optim").rglob("*.py")
    } | {
        f"nested_optim/integrations/{path.relative_to(ROOT / 'integrations')}"
        for path in (ROOT / "integrations").rglob("*.py")
    }
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == ours | {"nested_optim/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    metadata = archive.read(name).decode()
    assert f"Version: {nested_optim.__version__}\n" in metadata
    assert "License-Expression: MIT\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    always = [line.split(": ")[1] for line in required if "extra ==" not in line]
    assert always == ["torch>=2.6", "torchopt<0.8,>=0.7.3"]
    for extra in ("hf", "lightning", "bench", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_wheel_s_package_works_with_torch_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    run = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_AND_STEP, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"[] {nested_optim.__version__}"


def test_the_public_names_are_there():
    for name in nested_optim.__all__:
        assert getattr(nested_optim, name) is not None
