"""The cases of ``python -m prefkern bench data``: a file for each area of `prefkern.data`, with a list ``CASES``."""

import importlib
import pkgutil

from prefkern.commands.benchmark.data.cases.case import DataCase


def areas() -> dict[str, list[DataCase]]:
    """Every public module of this package that has cases, by its name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.__name__.rpartition(".")[2]: module.CASES for module in modules if hasattr(module, "CASES")}
