"""Whether the features of a request are what vLLM's processor makes of the same tensors.

Run by vLLM's own Python: ``python read_by_vllm.py REQUEST TENSORS KIND``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from vllm.entrypoints.scale_out.token_in_token_out.mm_features import mm_kwargs_from_features
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    create_qwen2_5_omni_thinker_field_factory,
)
from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems


def main(request: str, tensors: str, kind: str) -> None:
    parsed = GenerateRequest(**json.loads(Path(request).read_text()))
    assert parsed.features is not None
    found = mm_kwargs_from_features(parsed.features)
    given: Any = load_file(tensors)
    if kind == "omni":
        fields = dict(create_qwen2_5_omni_thinker_field_factory(2)(given))
    else:
        seconds = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        fields = {**_create_qwen2vl_field_factory(2)(given), "second_per_grid_ts": seconds}
    wanted = MultiModalKwargsItems.from_hf_inputs(given, fields)
    for modality, items in wanted.items():
        own = found[modality]
        assert len(own) == len(items), (modality, len(own))
        for one, other in zip(own, items, strict=True):
            # Of no use where sound and picture are blocks of their own.
            names = set(other) - {"use_audio_in_video"}
            assert one is not None
            assert set(one) == names, (modality, set(one), names)
            for name in names:
                assert one[name] == other[name], (modality, name)
                assert one[name].data.dtype == other[name].data.dtype, (modality, name)
                assert one[name].field.keep_on_cpu is other[name].field.keep_on_cpu, name
    print("the same")


if __name__ == "__main__":
    main(*sys.argv[1:])
