"""Find and load content: the files that users edit, which are named by relative paths.

A file in the working directory takes precedence over the copy that is shipped in the wheel, so
editing a reward or a config needs no reinstallation. Functions that are loaded here cannot be
pickled; pass the path string to worker processes instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from mmemo.config import nearest
from mmemo.errors import ConfigError, MmemoError

_SHIPPED = Path(__file__).parent / "_content"
_CHECKOUT = Path(__file__).parent.parent


def find(path: str | Path) -> Path:
    """The file or folder at ``path`` in the working directory, or else its shipped copy.

    Raises:
        ConfigError: ``path`` exists in neither place.
    """
    path = Path(path)
    if path.is_absolute():
        candidates = [path]
    else:
        candidates = [Path.cwd() / path, _SHIPPED / path, _CHECKOUT / path]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ConfigError(f"'{path}' is neither in {Path.cwd()} nor shipped with mmemo; check the path")


def load(spec: str) -> Any:
    """The object that ``folder/file.py:name`` names. Each file is executed once per process.

    Raises:
        ConfigError: there is no such file, it fails when it is run, or it has no such name.
    """
    file, separator, name = spec.rpartition(":")
    if not separator or not file.endswith(".py") or not name:
        raise ConfigError(f"'{spec}' must look like folder/file.py:name")
    module = load_module(file)
    if not hasattr(module, name):
        guess = nearest(name, [key for key in vars(module) if not key.startswith("_")])
        hint = f"did you mean '{guess}'?" if guess else "check the name"
        raise ConfigError(f"{file} has no '{name}'; {hint}")
    return getattr(module, name)


def load_module(file: str) -> Any:
    """The module of a content file, of which ``sys.modules`` holds one per resolved path.

    Raises:
        ConfigError: there is no such file, or it fails when it is run.
    """
    path = find(file).resolve()
    key = "mmemo_content_" + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if key in sys.modules:
        return sys.modules[key]
    found = importlib.util.spec_from_file_location(key, path)
    if found is None or found.loader is None:
        raise ConfigError(f"{path} is not a Python file; name a file that ends in .py")
    module = importlib.util.module_from_spec(found)
    # Registered before it runs: dataclasses and pydantic look their module up in sys.modules.
    sys.modules[key] = module
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        # A half-made module must not be what the next call finds.
        del sys.modules[key]
        if isinstance(error, MmemoError) or not isinstance(error, Exception):
            raise
        raise ConfigError(f"{file} cannot be loaded ({_reason(error, path)})") from error
    return module


def _reason(error: Exception, path: Path) -> str:
    """What an exception says, and the line of the file at ``path`` that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == str(path)]
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" + (f", line {own[-1]}" if own else "")


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex, as stored in run records.

    The digest of a folder is the hash of the names and digests of all files in it.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            # Relative names, so that a folder keeps its digest when it is moved.
            digest.update(f"{file.relative_to(path).as_posix()}\n{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
