"""The import floors, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("prompt_store", "service", "training")

# A module's floor is that of the longest prefix that fits it.
FLOORS = {
    "prompt_store": 0,
    "service": 3,
    "service.engines": 1,
    "service.experiments": 2,
    "service.routing": 3,
    "service.api": 4,
    "service.app": 5,
    "service.commands": 6,
    "training": 7,
    "softcue": 8,
}
FORBIDDEN = {
    "prompt_store": {"torch", "transformers", "peft", "litestar", "openai", "service", "training", "softcue"},
    "service.engines": {"litestar", "prometheus_client", "uvicorn"},
    "service.experiments": {"torch", "litestar", "sqlalchemy"},
}
# Only these may import torch: everything else is loaded by the HTTP process.
TORCH = {
    "service.engines.local.attention", "service.engines.local.kv_cache", "service.engines.local.model_runner",
    "service.engines.local.sampler", "service.engines.local.engine", "service.engines.local.kernels",
    "service.engines.local.operators", "service.engines.local.packing", "service.engines.local.program",
    "service.engines.local.survey", "service.engines.local.tensors", "service.engines.local.graphs",
    "service.engines.local.sizing", "service.engines.local.varlen", "service.engines.local.weights",
    "service.engines.local.passes",
}  # fmt: skip


def modules() -> dict[str, Path]:
    files = [ROOT / "softcue.py", *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imports(file: Path, *, at_import: bool = False) -> set[str]:
    """Absolute names that a file imports; with `at_import`, only those outside functions and TYPE_CHECKING."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import by absolute name"
            assert node.module is not None
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(tree)
    return found


def own(name: str) -> str | None:
    """The module of ours that an imported name belongs to, or None."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def floor(module: str) -> int:
    return FLOORS[max((name for name in FLOORS if module == name or module.startswith(name + ".")), key=len)]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_its_floor_or_lower_ones(module: str) -> None:
    for name in imports(MODULES[module]):
        target = own(name)
        if target is None:
            continue
        assert floor(target) <= floor(module), f"{module} (floor {floor(module)}) imports {target} ({floor(target)})"
        beside = module.split(".")[0] == "training" and target.split(".")[0] == "service"
        assert not beside or target.startswith("service.engines"), f"{module} imports {target}: only engines are shared"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_no_library_that_its_package_is_kept_free_of(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports(MODULES[module])}
    for package, forbidden in FORBIDDEN.items():
        if module == package or module.startswith(package + "."):
            assert not libraries & forbidden
    if module.startswith("service") and module not in TORCH:
        assert not libraries & {"torch", "transformers"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_our_own_modules_are_imported_at_the_top(module: str) -> None:
    if "commands" in module.split("."):
        return
    hidden = imports(MODULES[module]) - imports(MODULES[module], at_import=True)
    assert not {name for name in hidden if own(name)}


def test_there_is_no_import_cycle() -> None:
    graph = {
        module: {target for name in imports(file, at_import=True) if (target := own(name)) and target != module}
        for module, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_door_of_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "sqlalchemy", "litestar", "uvicorn", "pydantic"}
    code = f"import sys, softcue; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_settings_are_read_by_the_application_alone() -> None:
    readers = {module for module, file in MODULES.items() for name in imports(file) if own(name) == "service.settings"}
    assert readers <= {"service.app", "service.commands.serving"}
