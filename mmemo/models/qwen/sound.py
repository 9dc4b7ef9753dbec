"""What Qwen's models that hear share: their mel spectrogram.

Shapes: M mel bins, S mel frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperFeatureExtractor

from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.clip import DecodedClip
from mmemo.models.backbone import Features
from mmemo.models.composed.audio_encoders import MIN_AUDIO_SECONDS
from mmemo.models.qwen.base import QwenBackbone


class QwenHearing(QwenBackbone):
    """A backbone with an ``audio`` encoder. Features of sound: ``x`` (T, E)."""

    sound_marks = ("<|audio_bos|>", "<|audio_eos|>")
    """Tokens around a block of audio tokens."""

    def hear(self, max_seconds: int) -> None:
        """Set up the mel spectrogram, for sounds of at most ``max_seconds``."""
        self._longest = max_seconds
        self._extractor = WhisperFeatureExtractor(
            feature_size=self._config.audio_config.num_mel_bins,
            sampling_rate=self.sampling.sample_rate,
            chunk_length=max_seconds,
        )

    def _identity(self, modality: Modality) -> dict[str, Any]:
        return {"extractor": self._extractor.to_dict() if modality == "audio" else None}

    def waveform(self, clip: DecodedClip) -> NDArray[np.float32]:
        """The clip's samples, with silence behind a sound that is too short to encode."""
        waveform = clip.waveform
        if waveform is None or len(waveform) == 0:
            raise MediaError(clip.name, "no_audio", "there is no sound to encode")
        rate = self.sampling.sample_rate
        if len(waveform) > self._longest * rate:
            raise MediaError(
                clip.name,
                "too_long",
                f"has {len(waveform) / rate:.0f} s of sound, at most {self._longest} "
                "s fit; set start and end",
            )
        shortest = int(MIN_AUDIO_SECONDS * rate)
        return np.pad(waveform, (0, max(shortest - len(waveform), 0)))

    def mel(self, clip: DecodedClip) -> Tensor:
        """Inputs of the audio encoder: log-mel (M, S), without padding to a full window."""
        waveform, rate = self.waveform(clip), self.sampling.sample_rate
        hop = self._extractor.hop_length
        frames = -(-len(waveform) // hop)
        # Pad with silence, as a full window would, to a whole number of hops.
        total = frames * hop + self._extractor.n_fft
        padded = np.pad(waveform, (0, total - len(waveform)))
        found = self._extractor(
            padded, sampling_rate=rate, padding="do_not_pad", truncation=False, return_tensors="pt"
        )
        return found["input_features"][0, :, :frames]

    def _encode(self, modality: Modality, clip: DecodedClip) -> Features:
        return self._heard(clip) if modality == "audio" else super()._encode(modality, clip)

    def _heard(self, clip: DecodedClip) -> Features:
        """As the audio encoders of the Thinkers, which take the mel frames of any length."""
        encoder = self._encoder("audio")
        mel = self.mel(clip).to(encoder.device, encoder.dtype)
        frames = torch.tensor([mel.shape[1]], device=encoder.device)
        x = encoder(mel, feature_lens=frames).last_hidden_state
        return {"x": x, "mel_frames": frames[0]}
