"""What an unroll holds in memory, measured as a process's peak."""

import subprocess
import sys

import pytest

PEAK = """
import resource, sys, torch
from torch import nn
from nested_optim import DeepNestedOptimizer

how, k, width, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
torch.set_num_threads(1)
torch.backends.mkldnn.enabled = False


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(512, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 512)

    def forward(self, tokens):
        logits = self.head(self.layers(self.embed(tokens)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


model = Model()
optimizer = DeepNestedOptimizer(
    model, mode="explicit", unroll=how, cms_frequencies=tuple(map(int, sys.argv[5].split(",")))
)
batches = [torch.randint(0, 512, (2, 32)) for _ in range(k)]
model(batches[0]).backward()
optimizer.step()
optimizer.zero_grad()


def peak():
    # In KiB: the highest since it was set back.
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])


open("/proc/self/clear_refs", "w").write("5")
before = peak()
optimizer.meta_update(batches[0], batches)
print(sum(p.numel() for p in model.parameters()), peak() - before)
"""


def peak(how, k, width, layers, frequencies="1"):
    """Parameters of the model, and KiB that a meta update needed beside what was there."""
    arguments = [how, str(k), str(width), str(layers), frequencies]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    parameters, held = map(int, run.stdout.split())
    return parameters, held


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("frequencies", ["1", "1,10,100"])
def test_stepwise_needs_less_memory_and_grows_slower_than_exact(frequencies):
    held = {}
    for how in ("exact", "stepwise"):
        for k in (5, 8):
            parameters, held[how, k] = peak(how, k, 384, 5, frequencies)
    assert 8e6 < parameters < 12e6
    assert held["stepwise", 5] <= 0.65 * held["exact", 5]
    growth = {how: held[how, 8] - held[how, 5] for how in ("exact", "stepwise")}
    assert growth["stepwise"] <= growth["exact"] / 3
