"""What mmemo uses of PEFT that PEFT does not promise to keep.

PEFT's registry takes new methods (``register_peft_method``), but its enumeration of their names is
closed, and a tuner is a subclass that overrides methods with a leading underscore. Both stand here;
``tests/test_compat.py`` fails by name when a release changes one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftType

RELIED_ON: Mapping[str, tuple[str, ...]] = {
    "peft.tuners.tuners_utils.BaseTuner._create_and_replace": (
        *("self", "peft_config", "adapter_name", "target"),
        *("target_name", "parent", "current_key", "parameter_name"),
    ),
    "peft.tuners.tuners_utils.BaseTuner._replace_module": (
        *("self", "parent", "child_name", "new_module", "child"),
    ),
    "peft.tuners.tuners_utils.BaseTuner._unload_and_optionally_merge": (
        *("self", "merge", "progressbar", "safe_merge", "adapter_names"),
    ),
    "peft.utils.register_peft_method": (
        "name",
        "config_cls",
        "model_cls",
        "prefix",
        "is_mixed_compatible",
    ),
    "peft.PeftType._member_map_": (),
    "peft.PeftType._member_names_": (),
    "peft.PeftType._value2member_map_": (),
}
"""Dotted name -> its parameters, for the methods that mmemo's tuner overrides and what it calls;
() for what is no function."""


def add_peft_type(name: str) -> PeftType:
    """The member ``name`` of PEFT's enumeration of methods, added to it if it is not there yet."""
    kind: Any = PeftType
    if name not in kind._member_map_:
        member = str.__new__(kind, name)
        member._name_ = member._value_ = name
        type.__setattr__(kind, name, member)
        # Access by name, by value and in order each read a table of their own.
        kind._member_map_[name] = kind._value2member_map_[name] = member
        kind._member_names_.append(name)
    return kind[name]
