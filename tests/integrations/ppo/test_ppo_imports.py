"""Imports within PPO run one way: the steps of the algorithm take a run's state, and nothing takes the trainer."""

import ast
import graphlib
from pathlib import Path

import prefkern.integrations.ppo as ppo

FOLDER = Path(ppo.__file__).parent
PACKAGE = "prefkern.integrations.ppo"


def imports() -> dict[str, set[str]]:
    """For each file those that it imports, also for types only and inside functions."""
    files = {path.stem for path in FOLDER.glob("*.py")}
    found: dict[str, set[str]] = {}
    for path in FOLDER.glob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{PACKAGE}."):
                module = node.module.removeprefix(PACKAGE).removeprefix(".")
                modules = {module} if module else {each.name for each in node.names}
                names |= {name if name in files else "__init__" for name in modules}
        found[path.stem] = names
    return found


def test_no_file_imports_itself_through_others() -> None:
    order = list(graphlib.TopologicalSorter(imports()).static_order())  # raises CycleError
    assert order.index("state") < order.index("optimise") < order.index("trainer") < order.index("__init__")


def test_only_the_package_imports_the_trainer() -> None:
    assert {file for file, names in imports().items() if "trainer" in names} == {"__init__"}
