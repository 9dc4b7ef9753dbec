"""Train small encoders from scratch on known attributes, as frozen encoders without a download.

The encoder of each modality is an ordinary Hugging Face model that is built from a config in the
YAML file. It learns to regress the attributes that the manifest gives for its modality (action
units, pitch and others, but never the emotion). It is saved as an ordinary Hugging Face folder,
which a branch can name as its ``encoder``.

Shapes: N clips, F frames, T audio steps, M mel bins, D the encoder's width, Y attributes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmemo.config import Config, dump, save_resolved
from mmemo.console import Bar, console, progress
from mmemo.content import find, sha256
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Modality, Sample
from mmemo.errors import ConfigError, DataError, MediaError, TrainingError
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.media.paths import resolve
from mmemo.models.composed.audio_encoders import whisper_states
from mmemo.models.composed.encoders import build_encoder
from mmemo.models.composed.preprocessors import (
    load_feature_extractor,
    load_image_processor,
    preprocess_frames,
)
from mmemo.run_log import RunRecord

_MADE_OF = "training.json"
"""The file in an encoder's folder that records the data and the config of its training."""


class EncoderTrainConfig(Config):
    """The architecture of one encoder, and how to train it."""

    architecture: dict[str, Any]
    """A Hugging Face config: ``model_type`` and the fields of that type."""
    preprocessor: dict[str, Any]
    """The content of ``preprocessor_config.json``."""
    max_steps: int = Field(default=600, ge=1)
    """Number of optimizer steps."""
    per_device_train_batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    frames_per_step: int = Field(default=4, ge=1)
    """Frames per clip that are sampled in each training step. Validation uses all frames."""
    noise: float = Field(default=0.05, ge=0)
    """Standard deviation of the noise that is added to the normalised inputs in training."""


class EncodersConfig(Config):
    """The encoders to train, and the manifests whose attributes they are trained on."""

    output_dir: str
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    decode: DecodeConfig = DecodeConfig()
    encoders: dict[Modality, EncoderTrainConfig] = Field(min_length=1)
    val_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the speakers that are held out to report how well the attributes are learned."""
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _no_towers(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "towers" in values:
            raise ValueError("towers: has been renamed; write encoders: instead")
        return values  # pyright: ignore[reportUnknownVariableType]


class AttributeModel(nn.Module):
    """An encoder with a linear head on the mean and the maximum over its steps."""

    def __init__(self, config: EncoderTrainConfig, outputs: int) -> None:
        super().__init__()
        fields = dict(config.architecture)
        kind = str(fields.pop("model_type", ""))
        try:
            hf_config = AutoConfig.for_model(kind, **fields)
        except ValueError as error:
            raise ConfigError(
                f"architecture.model_type '{kind}' is unknown to transformers; check its spelling"
            ) from error
        self.encoder: PreTrainedModel = build_encoder(hf_config)
        sizes: Any = getattr(hf_config, "hidden_sizes", None)
        width = int(sizes[-1] if sizes else hf_config.hidden_size)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, F, 3, H, W) or log-mel (N, M, T) -> attribute logits (N, Y)."""
        if x.ndim == 5:
            steps = self._images(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        elif isinstance(self.encoder, WhisperEncoder):
            steps = whisper_states(self.encoder, x).last_hidden_state
        else:
            steps = self.encoder(x).last_hidden_state
        steps = self.norm(steps)
        return self.head(torch.cat([steps.mean(1), steps.amax(1)], dim=-1))

    def _images(self, x: Tensor) -> Tensor:
        """(N F, 3, H, W) -> (N F, D), averaged over the encoder's spatial grid."""
        # Convolutional encoders give (N F, D, h, w), transformers (N F, steps, D).
        state: Tensor = self.encoder(x).last_hidden_state
        return state.mean((2, 3)) if state.ndim == 4 else state.mean(1)


def run_encoders(config: EncodersConfig) -> Path:
    """Train each encoder that does not exist yet, and return the output folder.

    Raises:
        DataError: the manifest gives no attributes for a modality, or lacks its stream.
        TrainingError: too many clips cannot be decoded.
    """
    folder = Path(config.output_dir)
    record = RunRecord(folder)
    record.event("encoders", config=dump(config))
    save_resolved(config, folder / "config.yaml")
    clips = _distinct(load_samples(config.data))
    made_of = {modality: _made_of(config, modality) for modality in config.encoders}
    todo: dict[Modality, EncoderTrainConfig] = {
        modality: encoder
        for modality, encoder in config.encoders.items()
        if not _is_made(folder / modality, made_of[modality])
    }
    for modality in config.encoders.keys() - todo.keys():
        console.print(f"{modality} encoder: already trained")
    learned = {modality: _targets(clips, modality) for modality in todo}
    inputs = _decode(clips, todo, config, record) if todo else {}
    for modality, encoder in todo.items():
        names, targets = learned[modality]
        kept = sorted(inputs[modality])
        # Popped, so that the decoded inputs are freed once they are stacked.
        arrays = _stack([inputs[modality].pop(index) for index in kept])
        held_out = _held_out([clips[index] for index in kept], config)
        # Seeded for each encoder: its weights do not depend on which others were trained before it.
        torch.manual_seed(config.seed)
        model = AttributeModel(encoder, len(names))
        _fit(model, encoder, arrays, targets[kept], held_out, config.seed, modality)
        scores = _r_squared(model, arrays[held_out], targets[kept][held_out])
        record.event("encoder", modality=modality, r2=dict(zip(names, scores, strict=True)))
        console.print(
            f"{modality} encoder: mean R² {np.nanmean(scores):.2f} on held-out speakers "
            f"({len(names)} attributes, {len(kept)} clips)"
        )
        _save(model.encoder, encoder, folder / modality, made_of[modality])
    return folder


def _made_of(config: EncodersConfig, modality: Modality) -> str:
    """Everything that determines the weights of an encoder, as JSON."""
    values = dump(config)
    parts = {key: values[key] for key in ("data", "sampling", "val_share", "seed")}
    # Older versions wrote this key; keeping it avoids training their encoders again.
    parts["tower"] = values["encoders"][modality]
    parts["manifests"] = {name: sha256(find(name)) for name in config.data.manifests}
    return json.dumps(parts, indent=1, sort_keys=True)


def _is_made(folder: Path, made_of: str) -> bool:
    try:
        return (folder / _MADE_OF).read_text(encoding="utf-8") == made_of
    except FileNotFoundError:
        return False


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per clip, in order."""
    found: dict[tuple[str, ...], Sample] = {}
    for sample in samples:
        found.setdefault(tuple(sorted(ref.path for ref in sample.media.values())), sample)
    return list(found.values())


def _targets(clips: Sequence[Sample], modality: Modality) -> tuple[list[str], Tensor]:
    """Attribute names and their values (N, Y) in 0..1, with NaN where a clip does not give one."""
    names = sorted({name for clip in clips for name in clip.truth.attributes.get(modality, {})})
    if not names:
        raise DataError(
            f"no row has attributes for '{modality}'; add 'attributes', or remove this encoder"
        )
    rows = [
        [clip.truth.attributes.get(modality, {}).get(name, float("nan")) for name in names]
        for clip in clips
    ]
    return names, torch.tensor(rows)


def _note(record: RunRecord, path: str, kind: str, detail: str) -> None:
    record.event("bad_clip", path=path, reason=kind, detail=detail)


def _decode(
    clips: Sequence[Sample],
    encoders: Mapping[Modality, EncoderTrainConfig],
    config: EncodersConfig,
    record: RunRecord,
) -> dict[Modality, dict[int, Tensor]]:
    """The inputs of each encoder by clip index, for clips that decode. Files are decoded once."""
    plans: list[tuple[int, list[Modality], DecodeJob]] = []
    bad: set[int] = set()
    for index, clip in enumerate(clips):
        try:
            plans += [(index, kinds, job) for kinds, job in _jobs(clip, encoders, config)]
        except MediaError as error:
            _note(record, error.path, error.kind, error.detail)
            bad.add(index)
    found: dict[Modality, dict[int, Tensor]] = {modality: {} for modality in encoders}
    with DecodePool(config.decode) as pool, progress("decode", len(plans), unit="clips") as bar:
        results = pool.map([job for _, _, job in plans])
        for (index, kinds, _), result in zip(plans, results, strict=True):
            if isinstance(result, BadClip):
                _note(record, result.path, result.kind, result.detail)
                bad.add(index)
            else:
                for modality in kinds:
                    found[modality][index] = _prepare(result, modality, encoders[modality])
            bar.advance()
    if len(bad) > config.decode.max_bad_share * len(clips):
        raise TrainingError(
            f"{len(bad)} of {len(clips)} clips cannot be decoded, more than "
            f"decode.max_bad_share; correct or remove those that {record.path} lists"
        )
    if bad:
        console.print(f"{len(bad)} of {len(clips)} clips were left out; see {record.path}")
    return found


def _jobs(
    clip: Sample, encoders: Mapping[Modality, EncoderTrainConfig], config: EncodersConfig
) -> list[tuple[list[Modality], DecodeJob]]:
    """One job for each file and span of a clip, with the streams to decode from it."""
    spans: dict[tuple[str, float | None, float | None], list[Modality]] = {}
    for modality in encoders:
        if modality not in clip.media:
            raise DataError(
                f"sample '{clip.sample_id}' has no {modality} stream to train the encoder on; add "
                "it, or remove this encoder"
            )
        ref = clip.media[modality]
        spans.setdefault((ref.path, ref.start, ref.end), []).append(modality)
    boxes = clip.media["face"].face_boxes if "face" in clip.media else ()
    return [
        (
            kinds,
            DecodeJob(
                path=resolve(Path(config.data.media_root), path),
                name=path,
                want=frozenset(kinds),
                sampling=config.sampling,
                limits=config.decode,
                start=start,
                end=end,
                face_boxes=boxes,
            ),
        )
        for (path, start, end), kinds in spans.items()
    ]


def _stack(arrays: list[Tensor]) -> Tensor:
    """Stack to one tensor. Log-mel inputs are padded to the longest with their own minimum."""
    if arrays[0].ndim == 2:
        longest = max(array.shape[1] for array in arrays)
        arrays = [F.pad(a, (0, longest - a.shape[1]), value=float(a.min())) for a in arrays]
    return torch.stack(arrays)


def _prepare(clip: DecodedClip, modality: Modality, encoder: EncoderTrainConfig) -> Tensor:
    """(F, 3, H, W) float16 pixels, or (M, T) float32 log-mel."""
    if modality == "audio":
        extractor: Any = load_feature_extractor(encoder.preprocessor)
        longest = int(getattr(extractor, "n_samples", 0))
        if longest and clip.waveform is not None and len(clip.waveform) > longest:
            # The attributes are those of the whole clip, and the extractor would cut it.
            raise DataError(
                f"{clip.name}: has {len(clip.waveform) / clip.sample_rate:.0f} s of sound and the "
                f"encoder takes {longest / clip.sample_rate:.0f} s; give start and end"
            )
        values = extractor(
            clip.waveform,
            sampling_rate=clip.sample_rate,
            padding="do_not_pad",
            return_tensors="np",
        )
        return torch.from_numpy(np.asarray(values[extractor.model_input_names[0]][0], np.float32))
    frames = clip.faces.crops if modality == "face" and clip.faces else clip.frames
    if frames is None:
        raise DataError(f"{clip.name}: has no {modality} frames; remove the clip")
    processor = load_image_processor(encoder.preprocessor)
    return preprocess_frames(processor, frames)["pixel_values"].half()


def _held_out(clips: Sequence[Sample], config: EncodersConfig) -> Tensor:
    """Mask (N,) of the clips whose speakers are held out for validation."""
    speakers = [clip.group.get("speaker", clip.sample_id) for clip in clips]
    order = sorted(set(speakers))
    chosen = np.random.default_rng(config.seed).permutation(len(order))
    held = {order[index] for index in chosen[: max(1, round(config.val_share * len(order)))]}
    return torch.tensor([speaker in held for speaker in speakers])


def _fit(
    model: AttributeModel,
    config: EncoderTrainConfig,
    arrays: Tensor,
    targets: Tensor,
    held_out: Tensor,
    seed: int,
    title: str,
) -> None:
    """Train with binary cross-entropy against the attribute values, which lie in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nonzero(~held_out).flatten()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.max_steps, pct_start=0.15
    )
    model.train()
    with progress(f"train {title} encoder", config.max_steps) as bar:
        for step in range(config.max_steps):
            chosen = torch.randint(
                len(rows), (config.per_device_train_batch_size,), generator=generator
            )
            x = _augment(arrays[rows[chosen]], config, generator)
            y = targets[rows[chosen]]
            # A clip need not give every attribute; the loss is over those that it gives.
            known = ~torch.isnan(y)
            loss = F.binary_cross_entropy_with_logits(model(x)[known], y[known])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            _show(bar, step, loss.item())
    model.eval()


def _augment(x: Tensor, config: EncoderTrainConfig, generator: torch.Generator) -> Tensor:
    """Sample a few frames of each clip, and add a little noise."""
    if x.ndim == 5 and config.frames_per_step < x.shape[1]:
        # Ranks of random numbers draw frames without replacement, for all clips at once.
        frames = torch.rand(x.shape[:2], generator=generator).argsort(1)[
            :, : config.frames_per_step
        ]
        # (N, F, 3, H, W) -> (N, frames_per_step, 3, H, W)
        x = torch.gather(x, 1, frames[:, :, None, None, None].expand(-1, -1, *x.shape[2:]))
    x = x.float()
    return x + config.noise * torch.randn(x.shape, generator=generator)


def _show(bar: Bar, step: int, loss: float) -> None:
    bar.advance()
    if step % 20 == 0:
        bar.note(f"loss {loss:.3f}")


@torch.inference_mode()
def _r_squared(model: AttributeModel, arrays: Tensor, targets: Tensor) -> list[float]:
    """R² of each attribute (Y,): the explained share of its variance. NaN if it does not vary."""
    parts = [torch.sigmoid(model(part.float())) for part in arrays.split(16)]
    error = (torch.cat(parts) - targets).square().nanmean(0)
    spread = (targets - targets.nanmean(0)).square().nanmean(0)
    # A variance of rounding errors would make R² a large negative number.
    return torch.where(spread > 1e-6, 1 - error / spread, torch.nan).tolist()


def _save(encoder: PreTrainedModel, config: EncoderTrainConfig, folder: Path, made_of: str) -> None:
    """Write an ordinary Hugging Face folder that exists completely or not at all."""
    staged = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staged, ignore_errors=True)
    copy.deepcopy(encoder).save_pretrained(staged)
    text = json.dumps(config.preprocessor, indent=2)
    (staged / "preprocessor_config.json").write_text(text, encoding="utf-8")
    (staged / _MADE_OF).write_text(made_of, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    # The record of the training is in the folder by now, so a kill before this line only costs
    # training again.
    staged.replace(folder)
