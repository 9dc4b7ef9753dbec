"""Sound to features, with any audio encoder of transformers.

Some encoders take sound of any length (wav2vec2, HuBERT, WavLM, data2vec-audio, SEW, MMS,
Wav2Vec2-BERT); others a fixed stretch, which :func:`sound_window` knows. A longer sound is then
heard in windows whose features follow each other without a gap. Of a shorter sound, only the steps
that lie within it are kept, although an encoder of fixed size attends to its padding.

Shapes: S samples, T feature steps, M mel bins, D the encoder's width, f x t the grid of an encoder
that sees a spectrogram as an image.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import ASTFeatureExtractor, ClapFeatureExtractor, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmemo.errors import ConfigError
from mmemo.models.composed.configuration import SavedBranchConfig
from mmemo.models.composed.hidden_states import select_states, stack_states
from mmemo.models.composed.preprocessors import load_feature_extractor

MIN_AUDIO_SECONDS = 0.1
"""Shorter waveforms are padded with silence to this: encoders need a window to look through."""


@dataclass(frozen=True, slots=True)
class SoundWindow:
    """How an encoder that takes a fixed stretch of sound hears a longer one.

    Attributes:
        size: samples that it takes at once.
        hop: samples from the start of one window to that of the next. Where it is less than
            ``size``, windows overlap by what their last step looks ahead.
        least: samples that a further window must have to be worth a step.
        padded: whether shorter sounds are padded to ``size`` and the padding's steps cut off.
    """

    size: int
    hop: int
    least: int
    padded: bool

    def starts(self, samples: int) -> list[int]:
        """First sample of each window of a sound."""
        last = max(samples - self.least, 0)
        return [0, *range(self.hop, last + 1, self.hop)] if samples > self.size else [0]


def sound_window(extractor: Any, encoder: PreTrainedModel) -> SoundWindow | None:
    """The window of an encoder and its feature extractor; None where any length will do.

    - Whisper: 30 s of log-mel frames; shorter sounds are not padded (:func:`whisper_states`). Other
      encoders with Whisper's extractor insist on the full 30 s.
    - AST: as many frames of 10 ms as it has positions for, 1024. Its patches are 16 frames long and
      10 apart, so a window has 101 of them and the next one starts 1010 frames later, where the
      102nd would: the patches of all windows are those of one long spectrogram.
    - CLAP: 10 s. Its extractor would draw a random crop from more.
    """
    rate = int(extractor.sampling_rate)
    shortest = int(MIN_AUDIO_SECONDS * rate)
    if isinstance(extractor, ASTFeatureExtractor):
        config: Any = encoder.config
        hop, frame = rate // 100, rate // 40  # Kaldi's frames: 25 ms long, 10 ms apart
        _, steps = _spectrogram_grid(encoder)
        size = (extractor.max_length - 1) * hop + frame
        least = (config.patch_size - 1) * hop + frame
        return SoundWindow(size, steps * config.time_stride * hop, least, True)
    if isinstance(extractor, ClapFeatureExtractor):
        size = int(extractor.nb_max_samples)
        return SoundWindow(size, size, shortest, True)
    size = int(getattr(extractor, "n_samples", 0))
    if size:
        return SoundWindow(size, size, shortest, not isinstance(encoder, WhisperEncoder))
    return None


def encode_sound(
    encoder: PreTrainedModel,
    spec: SavedBranchConfig,
    waveform: NDArray[np.float32],
    sample_rate: int,
) -> Tensor:
    """(S,) samples at ``sample_rate`` Hz -> ([layers,] T, D).

    Raises:
        ConfigError: the encoder wants another rate, or its output does not fit ``spec``.
    """
    if hasattr(encoder.config, "spec_size") and spec.layer != -1:
        # CLAP folds a spectrogram to a square, several stretches of time on top of each other.
        raise ConfigError(
            f"layer {spec.layer}: only the output of '{encoder.config.model_type}' is in order of "
            "time; use layer -1"
        )
    extractor = load_feature_extractor(spec.preprocessor, encoder.config.model_type)
    rate = int(getattr(extractor, "sampling_rate", sample_rate))
    if rate != sample_rate:
        raise ConfigError(
            f"the audio encoder wants {rate} Hz but clips are decoded at {sample_rate} Hz; "
            f"set sampling.sample_rate to {rate}"
        )
    waveform = np.asarray(waveform, dtype=np.float32)
    shortest = int(MIN_AUDIO_SECONDS * rate)
    if len(waveform) < shortest:
        waveform = np.pad(waveform, (0, shortest - len(waveform)))
    window = sound_window(extractor, encoder)
    starts = [0] if window is None else window.starts(len(waveform))
    size = len(waveform) if window is None else window.size
    states = [
        _window_states(encoder, spec, extractor, waveform[start : start + size], window)
        for start in starts
    ]
    joined = [torch.cat(parts, 1) for parts in zip(*states, strict=True)]
    return stack_states([_average_steps(state, spec.stride) for state in joined], spec)


def _window_states(
    encoder: PreTrainedModel,
    spec: SavedBranchConfig,
    extractor: Any,
    waveform: NDArray[np.float32],
    window: SoundWindow | None,
) -> list[Tensor]:
    """Chosen hidden states (1, T, D) of a stretch of sound that the encoder can take."""
    values = _extract(extractor, waveform, padded=window is not None and window.padded)
    name = extractor.model_input_names[0]
    inputs = torch.from_numpy(np.asarray(values.pop(name), dtype=np.float32))
    inputs = inputs.to(encoder.device, encoder.dtype)
    if isinstance(encoder, WhisperEncoder):
        return select_states(whisper_states(encoder, inputs), spec)
    known = inspect.signature(encoder.forward).parameters
    given = {name if name in known else encoder.main_input_name: inputs}
    mask = values.pop("attention_mask", None)
    if mask is not None and "attention_mask" in known and not bool(np.all(mask)):
        # A mask that hides nothing would only choose another, differently rounding kernel.
        given["attention_mask"] = torch.from_numpy(np.asarray(mask)).to(encoder.device)
    for key, value in values.items():
        if key in known:
            given[key] = torch.from_numpy(np.asarray(value)).to(encoder.device)
    outputs = encoder(**given, output_hidden_states=spec.layer != -1, return_dict=True)
    states = [_time_steps(state, encoder) for state in select_states(outputs, spec)]
    if window is not None and window.padded:
        return [x[:, : _steps_within(x.shape[1], len(waveform), window, encoder)] for x in states]
    return states


def _extract(extractor: Any, waveform: NDArray[np.float32], *, padded: bool) -> dict[str, Any]:
    """What the extractor makes of one sound, with its own padding only where that is needed."""
    padding: Any = "max_length" if padded else "do_not_pad"
    if isinstance(extractor, ClapFeatureExtractor):
        padding = None  # its own: the sound is repeated
    asked: dict[str, Any] = {"padding": padding, "return_tensors": "np"}
    # Some cut by default what is longer than they expect; a window never is.
    if "truncation" in inspect.signature(extractor.__call__).parameters and not padded:
        asked["truncation"] = False
    return dict(extractor(waveform, sampling_rate=extractor.sampling_rate, **asked))


def _spectrogram_grid(encoder: PreTrainedModel) -> tuple[int, int]:
    """(f, t) of the patches of an encoder that sees a spectrogram of ``max_length`` frames."""
    config: Any = encoder.config
    sizes = (config.num_mel_bins, config.frequency_stride), (config.max_length, config.time_stride)
    rows, steps = ((size - config.patch_size) // stride + 1 for size, stride in sizes)
    return rows, steps


def _time_steps(state: Tensor, encoder: PreTrainedModel) -> Tensor:
    """An encoder's output as steps in time (1, T, D); the frequencies of a grid are averaged."""
    if state.ndim == 4:  # a map (1, D, f, t)
        return state.float().mean(2).transpose(1, 2).to(state.dtype)
    if not hasattr(encoder.config, "frequency_stride"):
        return state
    rows, steps = _spectrogram_grid(encoder)
    # Class and distillation tokens come first; patches run over time, frequency by frequency.
    patches = state[:, state.shape[1] - rows * steps :].unflatten(1, (rows, steps))
    return patches.float().mean(1).to(state.dtype)


def _steps_within(steps: int, samples: int, window: SoundWindow, encoder: PreTrainedModel) -> int:
    """Of a padded window's steps, those that look at its sound; at least one."""
    if hasattr(encoder.config, "frequency_stride"):
        # Steps start every `hop / steps` samples and look ahead by `least`.
        beyond = max(samples - window.least, 0)
        return min(1 + -(-beyond * steps // window.hop), steps)
    return min(max(-(-steps * samples // window.size), 1), steps)


class _States:
    """What :func:`select_states` reads of an output of transformers."""

    def __init__(self, hidden_states: list[Tensor]) -> None:
        self.hidden_states = hidden_states
        self.last_hidden_state = hidden_states[-1]


def whisper_states(encoder: WhisperEncoder, mel: Tensor) -> _States:
    """Hidden states of a Whisper encoder for mel frames of any length up to its maximum.

    ``mel`` (1, M, frames). HF's forward insists on 3000 frames, 30 s, and a 5 s clip then costs
    nine times what it must. Whisper has absolute positions and no mask, so this takes the first
    positions and equals HF at 3000 frames. Fewer frames are not HF's prefix of the padded
    result: there, the padding is attended to.
    """
    x = F.gelu(encoder.conv1(mel))
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    states = [x]
    for layer in encoder.layers:
        out = layer(x, None)
        x = out[0] if isinstance(out, tuple) else out
        states.append(x)
    # As in transformers, only the last hidden state has passed the final norm.
    states[-1] = encoder.layer_norm(x)
    return _States(states)


def _average_steps(state: Tensor, stride: int) -> Tensor:
    """(1, T, D) -> (1, ceil(T / stride), D); the last average may be over fewer steps."""
    if stride == 1:
        return state
    pooled = F.avg_pool1d(
        state.float().transpose(1, 2), stride, ceil_mode=True, count_include_pad=False
    )
    return pooled.transpose(1, 2).to(state.dtype)
