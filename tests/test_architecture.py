"""Who may import whom: the arrows of docs/architecture.md, read from the source. Any other edge fails."""

import ast
from pathlib import Path

import pytest

import prefkern

PACKAGE = Path(prefkern.__file__).parent

# part -> what it may import, beside the ground that everything may
ALLOWED: dict[str, set[str]] = {
    "commands": {"integrations", "losses", "head", "testing", "kernels", "data"},
    "integrations": {"losses", "head", "data"},
    "losses": {"head", "kernels", "operators"},
    "head": {"kernels", "operators"},
    "testing": {"kernels"},
    "kernels": set(),
    "operators": set(),
    "data": {"_core", "kernels"},
    "__init__": {"integrations", "losses", "head", "data"},
}
GROUND = {"types", "check", "options"}
FORBIDDEN_AT_IMPORT = {"triton", "trl", "transformers", "datasets", "matplotlib", "rich", "pyarrow"}


def parts() -> dict[str, list[Path]]:
    """The files of each folder or file at the package's root."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Modules of prefkern that a file imports anywhere in it, also inside functions and by name, without `prefkern.`"""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("require", "import_module", "find_spec"):
                names.add(str(node.args[0].value))
    return {name.removeprefix("prefkern.") for name in names if name.startswith("prefkern.")}


def imported_parts(path: Path) -> set[str]:
    known = {*ALLOWED, *GROUND, "_core"}
    return {name.split(".")[0] for name in imported(path)} & known


def test_every_part_is_known() -> None:
    assert set(parts()) == {*ALLOWED, *GROUND, "__main__"}


@pytest.mark.parametrize("part", sorted({*ALLOWED, *GROUND}))
def test_imports_go_one_way(part: str) -> None:
    for path in parts()[part]:
        extra = imported_parts(path) - ALLOWED.get(part, set()) - GROUND - {part}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}: not an edge of docs/architecture.md"


def test_the_engine_knows_no_implementation_of_the_tile_functions() -> None:
    """It runs on whatever the operators bind: `kernels.reference` or `kernels.triton`."""
    for path in (PACKAGE / "head" / "engine").glob("*.py"):
        assert {name for name in imported(path) if name.startswith("kernels.")} <= {
            name for name in imported(path) if name.startswith("kernels.interface")
        }, path.name


def test_optional_packages_are_imported_inside_functions_only() -> None:
    """Except by the parts that are themselves loaded at first use and cannot be without them."""
    for part, paths in parts().items():
        if part in ("kernels", "integrations", "commands"):
            continue
        for path in paths:
            tree = ast.parse(path.read_text())
            for node in tree.body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not FORBIDDEN_AT_IMPORT & {name.split(".")[0] for name in names}, path


def test_files_stay_readable() -> None:
    for paths in parts().values():
        for path in paths:
            lines = len(path.read_text().splitlines())
            assert lines <= 340, f"{path.relative_to(PACKAGE)} has {lines} lines: split it by concept"
