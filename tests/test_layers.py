"""The import direction: a module imports only from its own layer and the layers before it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tq_ao"
TORCH = {"torch"}
TRANSFORMERS = TORCH | {"transformers", "huggingface_hub", "safetensors", "yaml", "numpy", "tqdm"}

# Modules of each layer, and what they may import beside the standard library.
LAYERS: list[tuple[set[str], set[str]]] = [
    ({"", "_import_hook", "errors"}, set()),
    ({"codebook", "packing", "rotation", "config", "devices", "quiet"}, TORCH),
    ({"reference"}, TORCH),
    ({"kernels"}, TORCH | {"triton"}),
    ({"ops"}, TORCH),
    ({"tensor", "tensor_ops"}, TORCH | {"torchao"}),
    ({"cache", "cache_layer", "attention"}, TORCH | {"transformers"}),
    (
        {"quantizer", "hf", "quantize", "embedded", "models", "text", "recall", "hub", "model_card"}
        | {"checkpoint", "transforms_file"},
        TRANSFORMERS | {"torchao", "gguf"},
    ),
    ({"measure"}, TRANSFORMERS),
    ({"calibration", "footprint", "fold"}, TRANSFORMERS),
    ({"evaluation"}, TRANSFORMERS | {"matplotlib"}),
    ({"recipe", "recipe_table"}, {"yaml"}),
    ({"loading", "convert"}, TRANSFORMERS),
    ({"convert_cli", "generate_cli"}, TRANSFORMERS | {"yaml"}),
]


def sources() -> dict[str, Path]:
    """Dotted module name below tq_ao ("" for the package itself) -> file."""
    found = {}
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("[a-z]*/*.py")]:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


SOURCES = sources()


def layer(module: str) -> int:
    first = module.split(".")[0]
    for number, (names, _) in enumerate(LAYERS):
        if first in names:
            return number
    raise AssertionError(f"tq_ao/{module} has no layer: add it to LAYERS")


def imports(tree: ast.AST, at_import_time: bool = False) -> Iterator[str]:
    """Absolute dotted names that are imported, but not those for the type checker only.

    at_import_time: only what runs when the module is imported, not what functions import when called.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from imports(node, at_import_time)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def own(name: str) -> str | None:
    """Module of tq_ao an imported name belongs to; None if it is not ours."""
    if name.split(".")[0] != "tq_ao":
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in SOURCES:
        parts.pop()
    return ".".join(parts)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_direction(module):
    number = layer(module)
    allowed = LAYERS[number][1]
    for name in imports(parse(SOURCES[module])):
        if name.startswith("."):
            assert module.startswith("kernels."), f"tq_ao/{module} imports {name}: write it from tq_ao"
            continue
        target = own(name)
        if target is None:
            top = name.split(".")[0]
            assert top in allowed | sys.stdlib_module_names, f"tq_ao/{module} may not import {top}"
        elif module == "ops" and target.startswith("kernels"):
            pass  # when an op runs: see the test below
        else:
            assert layer(target) <= number, f"tq_ao/{module} (layer {number}) imports {name} (layer {layer(target)})"


def test_kernels_stand_alone():
    for module, path in SOURCES.items():
        if module.startswith("kernels."):
            for name in imports(parse(path)):
                assert own(name) is None, f"{path} imports {name}: kernels take what they need as arguments"


def test_torchao_is_imported_in_two_places():
    tops = {module: {name.split(".")[0] for name in imports(parse(path))} for module, path in SOURCES.items()}
    found = {module for module, names in tops.items() if "torchao" in names}
    assert found == {"tensor", "quantize"}


def test_ops_import_kernels_only_when_they_run():
    eager = [name for name in imports(parse(SOURCES["ops"]), at_import_time=True) if "kernels" in name]
    assert not eager


def test_no_circles():
    graph = {
        module: {own(name) for name in imports(parse(path), at_import_time=True)} - {None, "", module}
        for module, path in SOURCES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


def test_any_module_of_a_subpackage_can_be_imported_first():
    """In one process: all of tq_ao but `ops`, which registers only once, is forgotten before each."""
    names = [
        f"tq_ao.{module}" for module in SOURCES if module.split(".")[0] in ("measure", "calibration", "evaluation")
    ]
    script = (
        "import importlib, sys, torch, transformers, tq_ao, tq_ao.ops; kept = 'tq_ao.ops'\n"
        f"for name in {names}:\n"
        "    for old in [m for m in sys.modules if m.startswith('tq_ao.') and m != kept]:\n"
        "        del sys.modules[old]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_nothing_imports_a_top_level_kernels():
    """The name belongs to a package that transformers imports."""
    for path in [*SOURCES.values(), *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        tops = {name.split(".")[0] for name in imports(parse(path))}
        assert not tops & {"kernels", "recipes"}, path
    for name in ("kernels", "recipes"):
        assert (PACKAGE / name).is_symlink() or not (ROOT / name).exists(), f"tq_ao/{name} must be a symlink"
        assert not (ROOT / name / "__init__.py").exists()


def test_scripts_use_public_names_only():
    for path in (ROOT / "scripts").glob("*.py"):
        private = [n for n in imports(parse(path)) if own(n) is not None and any(p[0] == "_" for p in n.split("."))]
        assert not private, path


@pytest.mark.parametrize("before", ["", "import transformers; "])
def test_import_is_light(before):
    """In a fresh process; importing torchao alone costs more than a second and prints warnings."""
    script = (
        f"{before}import sys; already = set(sys.modules); import tq_ao, torch; new = set(sys.modules) - already; "
        "print(torch.cuda.is_initialized(), *sorted(new & {'triton', 'torchao', 'transformers', 'huggingface_hub'}))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
    assert "tq_ao" not in found.stderr
