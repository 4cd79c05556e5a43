"""Who may import whom: the arrows of docs/architecture.md, read from the source. Any other edge fails."""

import ast
from pathlib import Path

import pytest

import prefkern

PACKAGE = Path(prefkern.__file__).parent

# part -> what it may import beside types and _check, which everything may
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "_check": set(),
    "plan": {"plan_lines"},  # inside a function
    "plan_lines": {"plan", "stream"},
    "live": set(),
    "products": {"plan"},
    "tiles": {"plan"},
    "reference_math": {"plan"},
    "reference_bwd": {"reference_math", "tiles"},
    "reference": {"products", "reference_bwd", "reference_math", "tiles"},
    "scaling": {"plan", "products", "tiles"},
    "kernels": set(),
    "adapter": {"products"},
    "several": {"reference_math", "tiles"},
    "sliced": {"adapter", "products", "tiles"},
    "head": {"adapter", "plan", "products", "several", "sliced", "tiles"},
    "head_bwd": {"adapter", "head", "plan", "products", "scaling", "several", "tiles"},
    "operators": {"kernels", "products", "reference", "tiles"},
    "ops": {"adapter", "head", "head_bwd", "operators", "plan"},
    "stream": {"plan", "products", "scaling", "tiles"},
    "stream_ops": {"operators", "products", "stream"},
    "_head_inputs": set(),
    "_rows": {"operators"},
    "logprobs": {"_head_inputs", "_rows", "live", "ops", "plan"},
    "logprob_sum": {"_head_inputs", "_rows", "stream_ops"},
    "reference_divergence": {"reference_math"},
    "head_divergence": {"head_bwd", "plan", "products", "scaling", "tiles"},
    "ops_divergence": {"head_divergence", "operators", "products", "reference_divergence"},
    "_divergence_inputs": {"_rows"},
    "divergence": {"_divergence_inputs", "_head_inputs", "live", "ops_divergence", "plan"},
    "objectives": set(),
    "losses": {"_head_inputs", "logprob_sum", "logprobs", "objectives"},
    "data": {"_core"},
    "testing": set(),
    "integrations": {"data", "losses", "logprobs", "objectives", "plan", "products"},
    "doctor": {"integrations"},
    "benchmark": {"data", "kernels", "losses", "logprobs", "products", "reference", "testing", "integrations"},
    "demo": {"integrations", "losses", "logprobs"},
    "plan_command": {"plan", "plan_lines"},
    "cli": {"benchmark", "demo", "doctor", "plan_command"},
    "__main__": {"cli"},
    "__init__": {"data", "divergence", "integrations", "logprobs", "losses", "plan"},
}
FREE = {"types", "_check"}
FORBIDDEN_AT_IMPORT = {"triton", "trl", "transformers", "datasets", "matplotlib", "rich", "pyarrow"}


def parts() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Parts of prefkern that a file imports anywhere in it, also inside functions and by name."""
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
    known = set(ALLOWED) | {"_core"}
    return {part for name in names if name.startswith("prefkern.") and (part := name.split(".")[1]) in known}


def test_every_part_is_known() -> None:
    assert set(parts()) == set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part: str) -> None:
    for path in parts()[part]:
        extra = imported(path) - ALLOWED[part] - FREE - {part}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}: not an edge of docs/architecture.md"


def test_optional_packages_are_imported_inside_functions_only() -> None:
    """Except by the parts that are themselves loaded at first use and cannot be without them."""
    for part, paths in parts().items():
        if part in ("kernels", "integrations", "demo", "benchmark"):
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
