"""``python -m benchmarks training ...``: one command per experiment."""

from __future__ import annotations

import click

from .comparison import compare
from .meta_cli import meta_command
from .one_step_cli import one_step_command


@click.group()
def training() -> None:
    """Small models, trained by every optimizer on equal terms. Each command has its own --help."""


training.add_command(compare)
training.add_command(meta_command)
training.add_command(one_step_command)
