"""What holds for the project as a whole: layers, public names, docstrings that run, versions."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import prograde
from prograde import lm

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "prograde"


# modules for models of a framework, which alone may import it
FRAMEWORKS = {
    "nnx": {"flax"},
    "online": {"asdex", "scipy"},
    "torch": {"torch", "torchax", "transformers"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_core_does_not_import_the_lab_or_models_or_what_only_they_need():
    allowed = {"jax", "jaxtyping", "equinox", "numpy", "prograde"} | set(sys.stdlib_module_names)
    for path in SOURCE.rglob("*.py"):
        if not {"lab", "lm"} & set(path.parts):
            framework = FRAMEWORKS.get(path.relative_to(SOURCE).parts[0].removesuffix(".py"), set())
            for name in imports(path):
                assert name.split(".")[0] in allowed | framework, f"{path} imports {name}"
                assert not name.startswith(("prograde.lab", "prograde.lm")), (
                    f"{path} imports {name}"
                )


def test_models_do_not_import_the_lab_nor_the_rest_of_the_core():
    allowed = {
        "jax",
        "jaxtyping",
        "equinox",
        "numpy",
        "safetensors",
        "tokenizers",
        "gguf",
        "platformdirs",
    }
    for path in (SOURCE / "lm").glob("*.py"):
        for name in imports(path):
            known = name.split(".")[0] in allowed | set(sys.stdlib_module_names) or name.startswith(
                "prograde.lm"
            )
            assert known, f"{path} imports {name}"


def test_lab_uses_public_names_only():
    public = {
        "prograde",
        "prograde.testing",
        "prograde.lm",
        "prograde.replay",
        "prograde.torch",
    }
    for path in (SOURCE / "lab").rglob("*.py"):
        for name in imports(path):
            if name.startswith("prograde"):
                assert name in public or name.startswith("prograde.lab"), f"{path} imports {name}"


def test_importing_prograde_does_not_import_the_lab_or_models():
    heavy = (
        "prograde.lab",
        "flax",
        "torch",
        "optax",
        "matplotlib",
        "tyro",
        "prograde.lm",
        "tokenizers",
        "safetensors",
        "gguf",
    )
    code = f"import sys, prograde; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


def test_there_is_no_pickle():
    for path in [*SOURCE.rglob("*.py")]:
        assert not {
            name
            for name in imports(path)
            if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib"}
        }
        assert "allow_pickle=True" not in path.read_text()


def test_api_page_lists_exactly_the_public_names():
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^::: prograde\.(\w+)$", page, re.M)) == {*prograde.__all__, "kit"}
    assert set(re.findall(r"^::: prograde\.torch\.(\w+)$", page, re.M)) == torch_names()
    assert set(re.findall(r"^::: prograde\.testing\.(\w+)$", page, re.M)) == {
        "assert_mean",
        "assert_unbiased",
        "required_samples",
    }
    assert set(re.findall(r"^::: prograde\.lm\.(\w+)$", page, re.M)) == set(lm.__all__)


def torch_names():
    """The public names of prograde.torch, which may not be installed."""
    (listed,) = re.findall(r"__all__ = (\[.*?\])", (SOURCE / "torch/__init__.py").read_text(), re.S)
    return set(ast.literal_eval(listed))


def test_version_stands_once():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {prograde.__version__}" in changelog
    assert f'version = "{prograde.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {prograde.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_constraints_pin_versions_and_nothing_else():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
