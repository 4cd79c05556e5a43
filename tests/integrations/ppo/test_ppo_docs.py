"""docs/ppo.md: the lines it shows are lines of the source, and it knows every option."""

import dataclasses
import re
from pathlib import Path

import prefkern.integrations.ppo as ppo

PAGE = (Path(__file__).parents[3] / "docs" / "ppo.md").read_text()
SOURCE = {line.strip() for path in Path(ppo.__file__).parent.glob("*.py") for line in path.read_text().splitlines()}


def test_lines_of_the_algorithm_are_lines_of_the_source() -> None:
    algorithm = PAGE[PAGE.index("## The algorithm") : PAGE.index("## Options")]
    shown = [line for block in re.findall(r"```python\n(.*?)```", algorithm, re.DOTALL) for line in block.splitlines()]
    assert len(shown) > 10
    assert [line for line in shown if line not in SOURCE] == []


def test_every_option_is_explained() -> None:
    table = PAGE[PAGE.index("## Options") : PAGE.index("Arguments of `PPOTrainer`")]
    assert [field.name for field in dataclasses.fields(ppo.PPOConfig) if f"`{field.name}" not in table] == []
