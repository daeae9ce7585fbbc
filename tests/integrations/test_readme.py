"""The README's snippets run as they stand: those below a comment ``<!-- runs -->``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
NEEDS = {
    "Hugging Face": ("transformers", "accelerate"),
    "Configurations": ("pydantic",),
    "Lightning": ("lightning",),
    "Accelerate": ("accelerate",),
    "Plain loop": ("tqdm",),
}


def sections() -> dict[str, list[str]]:
    """The snippets below each heading; a later one goes on where the one before it ended."""
    found = {}
    for section in re.split(r"^## ", README, flags=re.MULTILINE)[1:]:
        snippets = re.findall(r"<!-- runs -->\n```python\n(.*?)```", section, flags=re.DOTALL)
        if snippets:
            found[section.splitlines()[0]] = snippets
    return found


def test_there_are_snippets_to_run():
    assert {"Hugging Face", "Configurations"} <= sections().keys()


@pytest.mark.parametrize("heading", sections())
def test_the_snippets_of_a_section_run(heading, tmp_path, monkeypatch, capsys):
    for module in NEEDS.get(heading, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in sections()[heading]:
        exec(compile(snippet, f"README.md, {heading}", "exec"), names)


def test_the_configuration_in_yaml_is_valid():
    pytest.importorskip("pydantic")
    yaml = pytest.importorskip("yaml")
    from nested_optim.integrations.config import check_config

    (snippet,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    checked = check_config(yaml.safe_load(snippet))
    assert checked.nested_optimizer is not None and checked.nested_optimizer.weight_decay == 0.01
