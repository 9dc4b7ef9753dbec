"""A small facial-expression encoder for the face branch.

It is the densely connected, depthwise separable network of face-api.js (V. Mühler, MIT licence),
with 0.3 M parameters and seven expressions. Importing this module registers it with ``AutoConfig``
and ``AutoModel``, so a folder saved with ``save_pretrained`` loads like any other encoder.

Shapes: N images, H x W pixels, C channels of the last stage, h x w = H/16 x W/16 its feature map.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

EXPRESSIONS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised")

PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 112, "width": 112},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    # The network subtracts a mean colour and divides by 255.
    "image_mean": [122.782 / 255, 117.001 / 255, 104.298 / 255],
    "image_std": [1.0, 1.0, 1.0],
}
"""The content of ``preprocessor_config.json``, with the network's own normalisation."""


class FaceExpressionConfig(PreTrainedConfig):
    """``hidden_sizes`` are the channels of the stages, each of which halves the resolution."""

    model_type = "face_expression"

    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    image_size: int = 112
    num_channels: int = 3
    initializer_range: float = 0.05

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("id2label", dict(enumerate(EXPRESSIONS)))
        kwargs.setdefault("label2id", {name: index for index, name in enumerate(EXPRESSIONS)})
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """C, the width of the features."""
        return self.hidden_sizes[-1]


@dataclass
class FaceExpressionOutput(ModelOutput):
    """``last_hidden_state`` (N, h w, C) in row-major order, ``pooler_output`` (N, C) its mean,
    ``logits`` (N, expressions), and ``hidden_states`` with one (N, tokens, channels) per stage."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _same(x: Tensor, stride: int) -> Tensor:
    """Zero padding for a 3 x 3 kernel like TensorFlow's SAME, which puts the odd pixel last."""
    pads: list[int] = []
    # F.pad takes the padding of the last dimension first.
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class _Convolution(nn.Module):
    """3 x 3 convolution; depthwise, then pointwise if ``separable``."""

    def __init__(self, inputs: int, outputs: int, stride: int, separable: bool) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = (
            nn.Conv2d(inputs, inputs, 3, stride, groups=inputs, bias=False) if separable else None
        )
        self.mix = (
            nn.Conv2d(inputs, outputs, 1) if separable else nn.Conv2d(inputs, outputs, 3, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = _same(x, self.stride)
        return self.mix(x if self.depthwise is None else self.depthwise(x))


class _Stage(nn.Module):
    """Four convolutions, each of which (except the first) reads the sum of all previous outputs."""

    def __init__(self, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [_Convolution(inputs, outputs, 2, separable=not first)]
            + [_Convolution(outputs, outputs, 1, separable=True) for _ in range(3)]
        )

    def forward(self, x: Tensor) -> Tensor:
        down, second, third, fourth = self.convolutions
        total = down(x).relu()
        total = total + second(total)
        total = total + third(total.relu())
        total = total + fourth(total.relu())
        return total.relu()


class FaceExpressionModel(PreTrainedModel):
    """Maps RGB face crops, normalised by :data:`PREPROCESSOR`, to a map of expression features."""

    config: FaceExpressionConfig
    config_class = FaceExpressionConfig
    base_model_prefix = "face_expression"
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: FaceExpressionConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels, *config.hidden_sizes]
        self.stages = nn.ModuleList(
            _Stage(inputs, outputs, first=index == 0)
            for index, (inputs, outputs) in enumerate(pairwise(sizes))
        )
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label or EXPRESSIONS))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> FaceExpressionOutput | tuple[Tensor, ...]:
        """(N, 3, H, W) -> :class:`FaceExpressionOutput`."""
        x, maps = pixel_values, list[Tensor]()
        for stage in self.stages:
            x = stage(x)
            maps.append(x.flatten(2).transpose(1, 2))
        pooled = maps[-1].mean(1)
        output = FaceExpressionOutput(
            last_hidden_state=maps[-1],
            pooler_output=pooled,
            logits=self.classifier(pooled),
            hidden_states=tuple(maps) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output


AutoConfig.register(FaceExpressionConfig.model_type, FaceExpressionConfig, exist_ok=True)
AutoModel.register(FaceExpressionConfig, FaceExpressionModel, exist_ok=True)
