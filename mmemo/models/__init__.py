"""The composed multimodal LLM. Importing this registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from mmemo.models.composed.configuration import MmemoConfig
from mmemo.models.composed.face_expression import FaceExpressionConfig, FaceExpressionModel
from mmemo.models.composed.modeling import MmemoForConditionalGeneration, MmemoModel
from mmemo.models.composed.processing import MmemoProcessor

AutoConfig.register("mmemo", MmemoConfig)
AutoModel.register(MmemoConfig, MmemoModel)
AutoModelForMultimodalLM.register(MmemoConfig, MmemoForConditionalGeneration)
AutoModelForImageTextToText.register(MmemoConfig, MmemoForConditionalGeneration)
AutoModelForCausalLM.register(MmemoConfig, MmemoForConditionalGeneration)
AutoProcessor.register(MmemoConfig, MmemoProcessor)

__all__ = [
    "FaceExpressionConfig",
    "FaceExpressionModel",
    "MmemoConfig",
    "MmemoForConditionalGeneration",
    "MmemoModel",
    "MmemoProcessor",
]
