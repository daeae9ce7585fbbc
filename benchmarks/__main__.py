"""``python -m benchmarks SUITE``: each suite is a click command, imported only when asked for."""

from __future__ import annotations

from importlib import import_module

import click

# name: (module and attribute of its command, what the list of suites says of it)
SUITES = {
    "demo": (
        "benchmarks.demo.cli:demo",
        "AdamW replaced in one line, then three levels, on digits.",
    ),
    "kernels": (
        "benchmarks.kernels.cli:kernels",
        "Time, memory and bandwidth of one step, beside other optimizers.",
    ),
    "matrices": (
        "benchmarks.matrices:matrices",
        "M3's step and its Newton-Schulz, beside torch's Muon.",
    ),
    "memory": (
        "benchmarks.memory:memory",
        "What a weight memory adds to a step.",
    ),
    "precision": (
        "benchmarks.precision:precision",
        "bfloat16 parameters with and without Kahan sums, on digits.",
    ),
    "retention": (
        "benchmarks.retention.cli:retention",
        "What is kept of old tasks, by task-IL and class-IL: memory, controls, EWC.",
    ),
    "rules": (
        "benchmarks.rules.cli:rules",
        "Single update rules on problems small enough to see through.",
    ),
    "training": (
        "benchmarks.training.cli:training",
        "Small models trained by every optimizer, on equal terms.",
    ),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name, so that listing them imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUITES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUITES:
            return None
        module, attribute = SUITES[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Suites"):
            formatter.write_dl([(name, summary) for name, (_, summary) in SUITES.items()])


@click.command(cls=LazyGroup, subcommand_metavar="SUITE [OPTIONS]")
def main() -> None:
    """Measure what the optimizers gain and what they cost. Each suite has its own --help."""


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
