"""Imports point down: launch -> pipeline -> sagan -> torch, and each third party has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"sagan": set(), "pipeline": {"sagan"}, "launch": {"pipeline", "sagan"}}
DOORS = {
    "boto3": {"pipeline/s3.py", "pipeline/s3_store.py"},
    "botocore": {"pipeline/s3.py", "pipeline/s3_store.py", "pipeline/s3_writes.py"},
    "mlflow": {"pipeline/mlflow_sender.py"},
    "torch_fidelity": {"pipeline/features.py"},
    "sklearn": {"pipeline/digits.py"},
    "accelerate": {"pipeline/world.py"},
    "deepspeed": {"pipeline/zero.py"},
    "onnxruntime": {"pipeline/export.py"},
}
FILES = [path.relative_to(ROOT) for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path):
    package = path.parts[0]
    ours = imported_packages(path) & MAY_IMPORT.keys()
    assert ours <= MAY_IMPORT[package] | {package}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_third_party_has_one_door(path: Path):
    for package in imported_packages(path) & DOORS.keys():
        assert path.as_posix() in DOORS[package]


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "sagan"], ids=str)
def test_the_model_library_needs_torch_alone(path: Path):
    may = {"torch", "sagan"} | set(sys.stdlib_module_names)
    if path.name == "portable.py":
        may |= {"safetensors"}  # where `load` is called, and not before
    assert imported_packages(path) <= may


def test_the_model_library_is_imported_without_safetensors():
    code = "import sys; sys.modules['safetensors'] = None; import sagan; sagan.Generator(16, 8, 3, 8, 8)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
