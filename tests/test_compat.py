"""What libraries do not promise to keep, by name: a release that changes it fails here."""

from __future__ import annotations

import importlib
import inspect
import re
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftType
from torch import nn

from mmemo.models import transformers_compat
from mmemo.models.adapters import peft_compat
from mmemo.train.zero import compat as deepspeed_compat

COMPAT: tuple[ModuleType, ...] = (peft_compat, transformers_compat, deepspeed_compat)
NAMES = {name: wanted for module in COMPAT for name, wanted in module.RELIED_ON.items()}
ROOT = Path(__file__).parent.parent / "mmemo"


def resolve(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for place, part in enumerate(parts[end:], end + 1):
            if not hasattr(found, part):
                raise AssertionError(f"{'.'.join(parts[:place])} is gone, which {name} names")
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module of {name} can be imported")


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_what_mmemo_relies_on(name: str) -> None:
    found, wanted = resolve(name), NAMES[name]
    if wanted:
        parameters = inspect.signature(found.__init__ if inspect.isclass(found) else found)
        assert tuple(parameters.parameters) == wanted, f"{name} takes other parameters now"


@pytest.mark.parametrize("name", deepspeed_compat.ATTRIBUTES)
def test_deepspeed_still_sets_an_attribute(name: str) -> None:
    source = inspect.getsource(resolve(name))
    for attribute in deepspeed_compat.ATTRIBUTES[name]:
        assert re.search(rf"\.{attribute} =", source), f"{name} no longer sets {attribute}"


@pytest.mark.parametrize("name", transformers_compat.MODULE_ATTRIBUTES)
def test_a_module_has_what_mmemo_relies_on(name: str) -> None:
    assert name in vars(nn.Linear(1, 1)), f"torch.nn.Module.{name} is gone"


def test_a_name_that_is_gone_is_said() -> None:
    with pytest.raises(AssertionError, match=r"peft\.PeftType\._gone_ is gone"):
        resolve("peft.PeftType._gone_")


def test_the_enumeration_of_peft_takes_a_name_and_keeps_it() -> None:
    added = peft_compat.add_peft_type("MMEMO_EXPERTS")
    assert PeftType("MMEMO_EXPERTS") is added
    assert peft_compat.add_peft_type("MMEMO_EXPERTS") is added
    assert list(PeftType).count(added) == 1


def test_persistent_buffers_are_those_of_the_state_dict() -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    found = transformers_compat.persistent_buffers(module)
    assert set(found) == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_pre_hook_is_found_in_a_copy_and_removed() -> None:
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)

    module = nn.Linear(1, 1)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    other = deepcopy(module)
    assert len(transformers_compat.pre_hooks(other, hook)) == 1
    transformers_compat.remove_pre_hooks(other, hook)
    other(torch.zeros(1, 1))
    assert not calls
    module(torch.zeros(1, 1))
    assert calls == [1]


PRIVATE = re.compile(
    r"(\.|\")(_attn_implementation|_supports_attention_backend|_member_map_|_forward_(?:pre_)?hooks\w*"
    r"|_non_persistent_buffers_set|__compatible_ops__|parameter_offload|_register_deepspeed_module"
    r"|ds_shape|ds_numel|ds_active_sub_modules|ds_id)\b"
)


def test_only_the_compat_modules_use_private_names() -> None:
    allowed = {Path(str(module.__file__)) for module in COMPAT}
    used = [
        f"{path.relative_to(ROOT)}: {found.group(2)}"
        for path in sorted(ROOT.rglob("*.py"))
        if path not in allowed
        for found in PRIVATE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not used
