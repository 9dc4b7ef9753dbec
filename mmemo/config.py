"""Parse strict YAML into typed configs: an unknown key is an error that names the nearest one.

Each config class derives from :class:`Config` and is defined beside the code that uses it. Fields
are named as in transformers' ``TrainingArguments`` and TRL's configs if these have a field for the
same setting.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmemo.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base class of all configs: unknown keys and numbers that are not finite are refused, and
    instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads ``1e-4`` as a number and a date as text.

    It refuses repeated keys, and what YAML 1.1 reads otherwise than people do.
    """


class _Dumper(yaml.SafeDumper):
    """A safe YAML dumper that quotes strings which ``_Loader`` would read as numbers."""


# PyYAML follows YAML 1.1, in which a float needs a dot and 1e-4 is a string.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


# A date is no setting: it is the name of a folder, and JSON has no dates.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}

_OCTAL = re.compile(r"[-+]?0[0-9_]+")


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """A number. YAML 1.1 reads ``010`` as 8 and ``1:30`` as 90."""
    text = str(node.value)
    line = node.start_mark.line + 1
    # Below 8 both readings are the same, as in 00 or 07.
    if _OCTAL.fullmatch(text) and loader.construct_yaml_int(node) != int(text):
        sign = "-" if text.startswith("-") else ""
        plain = sign + (text.lstrip("+-").replace("_", "").lstrip("0") or "0")
        raise ConfigError(
            f"line {line}: '{text}' begins with 0, which YAML reads as an octal number; write "
            f"{plain}, or '{text}' in quotes if it is text"
        )
    if ":" in text:
        raise ConfigError(
            f"line {line}: '{text}' would be read as a number to the base 60; write the number "
            "out, or put it in quotes if it is text"
        )
    if node.tag.endswith(":int"):
        return loader.construct_yaml_int(node)
    return loader.construct_yaml_float(node)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key: Any = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float) or isinstance(key, bool):
            raise ConfigError(
                f"line {line}: the key '{key_node.value if key_node.id == 'scalar' else key}' is "
                "read as no text; put it in quotes"
            )
        if key in pairs:
            raise ConfigError(f"line {line}: key '{key}' is given twice; keep one")
        pairs[key] = loader.construct_object(value_node, deep=True)
    return pairs


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)
for _tag in ("binary", "set", "omap", "pairs", "timestamp"):  # JSON has none of them
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_undefined)


def _load_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ConfigError: it is valid YAML, but not what a config may hold.
        yaml.YAMLError: it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506, TID251 - a SafeLoader
    except RecursionError as error:
        raise ConfigError("is nested too deeply; use at most a few levels") from error
    except ValueError as error:  # thousands of digits, a character that is no character
        raise ConfigError(f"holds a value that cannot be read ({error}); correct it") from error


def read_yaml(
    path: Path, variables: Mapping[str, str] | None = None, *, later: Sequence[str] = ()
) -> dict[str, Any]:
    """Read one YAML mapping, and replace each ``${name}`` by its value in ``variables``.

    Args:
        later: names that may remain in the text, because the caller replaces them.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping, or has a ``${name}``
            without a value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    text = fill(text, variables or {})
    # A name in a comment needs no value.
    left = set(re.findall(r"^[^#\n]*?\$\{(\w+)\}", text, re.MULTILINE)) - set(later)
    if left:
        raise ConfigError(
            f"{path}: '${{{min(left)}}}' has no value here; pass --run DIR, use "
            "`mmemo pipeline`, or write the value into the file"
        )
    try:
        value = _load_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must contain 'key: value' lines")
    return value  # pyright: ignore[reportUnknownVariableType]


def fill(text: str, variables: Mapping[str, str]) -> str:
    """Replace each ``${name}`` that has a value.

    A name with a slash, such as ``run/world``, stands for ``${run}/world``. It is replaced first,
    because that folder is in another place than the rest of ``${run}``.
    """
    for name, value in sorted(variables.items(), key=lambda item: "/" not in item[0]):
        head, slash, rest = name.partition("/")
        whole = "${" + head + "}"
        if slash:
            # The value is passed by a function, or re.sub would read its backslashes as escapes.
            text = re.sub(re.escape(f"{whole}/{rest}") + r"(?![\w.-])", lambda _, v=value: v, text)
        else:
            text = text.replace(whole, value)
    return text


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``--a.b=c`` overrides in order. Values are parsed as YAML.

    Raises:
        ConfigError: an override has no value, or its key descends into a plain value.
    """
    # Unlike deepcopy, JSON undoes YAML aliases: setting one section must not change its twins.
    try:
        merged: dict[str, Any] = json.loads(json.dumps(values))
    except (RecursionError, ValueError) as error:  # an alias that names what holds it
        raise ConfigError("a value of the config contains itself; remove the alias") from error
    for text in overrides:
        key, separator, raw = text.lstrip("-").partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{text}' must look like --section.key=value")
        target: Any = merged
        *parents, last = key.split(".")
        for parent in parents:
            target = _step(target, parent, text, create=True)
        value = _override_value(raw, text)
        if isinstance(target, list):
            target[_index(target, last, text)] = value
        elif isinstance(target, dict):
            target[last] = value
        else:
            raise ConfigError(f"override '{text}': '{last}' cannot be set inside a plain value")
    return merged


def _override_value(raw: str, text: str) -> Any:
    try:
        return _load_yaml(raw)
    except ConfigError as error:
        told = str(error).removeprefix("line 1: ")
        raise ConfigError(f"override '{text}': {told}") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override '{text}': the value is not valid YAML; quote it: --key='\"text\"'"
        ) from error


def _step(target: Any, key: str, text: str, *, create: bool) -> Any:
    if isinstance(target, list):
        return target[_index(target, key, text)]  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(target, dict):
        raise ConfigError(f"override '{text}': '{key}' is inside a plain value, not a section")
    if create and target.get(key) is None:
        target[key] = {}
    return target[key]


def _index(target: list[Any], key: str, text: str) -> int:
    if not key.isdigit() or int(key) >= len(target):
        raise ConfigError(f"override '{text}': '{key}' must be an index below {len(target)}")
    return int(key)


def parse(cls: type[C], values: Mapping[str, Any], *, where: str = "") -> C:
    """Validate plain values as an instance of ``cls``. A path that begins with ``~/`` is expanded.

    Raises:
        ConfigError: the message lists every wrong field with its path, and the nearest known key.
    """
    try:
        return cls.model_validate(_at_home(values, []))
    except ValidationError as error:
        found: list[Any] = error.errors()
        # Else a pipeline of twenty stages that all say the same wrong thing is told twenty times.
        same = Counter(problem["msg"] for problem in found if problem["type"] == "value_error")
        problems = [
            _explain(cls, problem, same.pop(problem["msg"], 1))
            for problem in found
            if problem["type"] != "value_error" or problem["msg"] in same
        ]
        prefix = f"{where}: " if where else ""
        raise ConfigError(prefix + "; ".join(dict.fromkeys(problems))) from None


def load_config(
    cls: type[C],
    path: Path,
    overrides: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> C:
    """Read ``path``, apply overrides, and validate the result as ``cls``.

    Raises:
        ConfigError: the file, an override or a value is wrong.
    """
    values = apply_overrides(read_yaml(path, variables), overrides)
    return parse(cls, values, where=str(path))


def dump(config: Config) -> dict[str, Any]:
    """A config as plain JSON values, including all defaults."""
    return config.model_dump(mode="json")


def without_new(value: Any, before: Any, chosen: Any) -> Any:
    """Plain config values without keys that an earlier version did not know.

    A setting that a later version brings has a default that keeps the numbers, so it counts only
    where it has another value.

    Args:
        before: the values that the earlier version wrote.
        chosen: those of ``value`` that are not defaults.
    """
    if isinstance(value, dict) and isinstance(before, dict):
        rows: dict[str, Any] = value
        then: dict[str, Any] = before
        given: dict[str, Any] = chosen if isinstance(chosen, dict) else {}
        return {
            key: without_new(one, then.get(key), given.get(key))
            for key, one in rows.items()
            if key in then or key in given
        }
    if isinstance(value, list) and isinstance(before, list):
        items: list[Any] = value
        olds: list[Any] = before
        news: list[Any] = chosen if isinstance(chosen, list) else [None] * len(items)
        if len(olds) == len(items) == len(news):
            return [without_new(*three) for three in zip(items, olds, news, strict=True)]
    return value


def save_resolved(config: Config, path: Path) -> None:
    """Write a config, including all defaults, as YAML beside the outputs of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(dump(config), Dumper=_Dumper, sort_keys=False)
    path.write_text(text, encoding="utf-8")


_SHELL = re.compile(r"\$[A-Z_][A-Z0-9_]*(?:/|$)")


def _at_home(value: Any, place: list[str]) -> Any:
    """Plain values with ``~/`` at the beginning of a text expanded, as a shell would.

    Raises:
        ConfigError: a text begins with a variable of the shell, which nothing replaces.
    """
    if isinstance(value, Mapping):
        pairs: Mapping[Any, Any] = value
        return {key: _at_home(one, [*place, str(key)]) for key, one in pairs.items()}
    if isinstance(value, list):
        items: list[Any] = value
        return [_at_home(one, [*place, str(index)]) for index, one in enumerate(items)]
    if not isinstance(value, str):
        return value
    if _SHELL.match(value):
        raise ConfigError(
            f"'{'.'.join(place)}': '{value}' begins with a variable of the shell, which is not "
            "replaced here; write the path out, or begin it with ~/"
        )
    return os.path.expanduser(value) if value.startswith("~/") else value


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that is closest to a mistyped one, or None if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else None


def _explain(cls: type[Config], problem: Any, places: int = 1) -> str:
    """One problem in a sentence. ``places``: how many fields have the same one."""
    location = [str(part) for part in problem["loc"]]
    place = ".".join(location)
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
        given = problem.get("input")
        simple = isinstance(given, str | int | float | bool) and problem["type"] != "value_error"
        more = f" and {places - 1} more" if places > 1 else ""
        where = f"'{place}'{more}: " if place else ""
        # YAML reads no, on and 01 as something else than text.
        quote = "; put it in quotes" if problem["type"] == "string_type" and simple else ""
        return f"{where}{message}" + (f", not {json.dumps(given)}" if simple else "") + quote
    known = _known_keys(cls, location[:-1])
    guess = nearest(location[-1], known)
    hint = f"did you mean '{guess}'?" if guess else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key '{place}': {hint}"


def _known_keys(cls: type[Config], path: Sequence[str]) -> list[str]:
    """The keys of the class at ``path``. List indices and union tags are skipped."""
    current: list[type[BaseModel]] = [cls]
    for part in path:
        following = [
            found
            for model in current
            if part in model.model_fields
            for found in _models_in(model.model_fields[part].annotation)
        ]
        current = following or current
    return [key for model in current for key in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
