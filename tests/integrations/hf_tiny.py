"""What the tests of Hugging Face's Trainer train: a GPT-2 of two layers, on sums in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

VOCABULARY, LENGTH = 16, 8


def make_model(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def samples(size: int = 32, seed: int = 1, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    """Each token is the sum of the two before it; a varying number of them is padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(size):
        tokens = torch.randint(VOCABULARY, (2,), generator=generator).tolist()
        while len(tokens) < length:
            tokens.append((tokens[-1] + tokens[-2]) % VOCABULARY)
        labels = torch.tensor(tokens)
        labels[: int(torch.randint(length // 2, (), generator=generator))] = -100
        found.append({"input_ids": torch.tensor(tokens), "labels": labels})
    return found


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**defaults, **options})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest; NaN counts as infinite."""
    assert left.keys() == right.keys()
    found = [float((left[n].double() - right[n].double()).abs().max()) for n in left]
    return max(d if d == d else float("inf") for d in found)
