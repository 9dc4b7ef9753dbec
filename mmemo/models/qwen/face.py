"""A face branch on a native model: a frozen encoder of face crops, and a trained connector.

The encoder and the connector are those of a model that is built from parts
(:mod:`mmemo.models.composed`). The face's tokens stand in the prompt as a short text before video
and sound, so that positions and everything else remain the model's own. Their embeddings are those
of a token that no text uses, plus what the connector says. The connector's last layer begins at
zero: an untrained branch answers exactly as the released model does on that text.

A face encoder beside a video MLLM is the form of Omni-Emotion (arXiv 2501.09502), whose details are
not public; the place of the tokens and the zero start are ours.

Shapes: N clips in the batch, B rows, L tokens of a row, K tokens of the branch, E the LM's width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmemo.config import dump, parse
from mmemo.errors import CheckpointError, ConfigError, DataError
from mmemo.media.clip import DecodedClip
from mmemo.models.backbone import FACE, FeatureBatch, Features
from mmemo.models.composed import encoders
from mmemo.models.composed.configuration import BranchBaseConfig, SavedBranchConfig
from mmemo.models.composed.connectors import Connector, streams
from mmemo.models.config import BranchConfig

FOLDER = "mmemo_face"
"""Folder beside a model's or an adapter's own files, which hold nothing of the branch."""
TOWER = "face_tower"
CONNECTORS = "connectors"
SPARE = ("<|vision_pad|>", "<|quad_start|>", "<|object_ref_start|>", "<|box_start|>")
"""Tokens of Qwen's tokenizers that mmemo's prompts never contain."""


class FaceConnectors(nn.Module):
    """The trained part of the branch, by the name under which PEFT saves a model's connectors."""

    def __init__(self, spec: SavedBranchConfig, width: int) -> None:
        super().__init__()
        self.face = Connector(spec, width)
        last: Any = self.face.proj[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: FeatureBatch) -> Tensor:
        """(N, K, E)."""
        return self.face(*streams(features, "face"))


@dataclass(frozen=True, slots=True)
class FaceBranch:
    """What a native model's backbone needs to know of its face branch. The modules themselves are
    attributes of the model, :data:`TOWER` and :data:`CONNECTORS`."""

    model: Any
    spec: SavedBranchConfig
    token: str
    """Stands for one token of the branch in the text."""
    token_id: int
    source: Mapping[str, str | None]
    """Where the encoder came from: :func:`~mmemo.models.saved.part_source`."""

    def fingerprint(self) -> str:
        """See :meth:`~mmemo.models.backbone.Backbone.feature_fingerprint`."""
        return encoders.fingerprint(getattr(self.model, TOWER), self.spec, "face")

    def encode(self, clips: Sequence[DecodedClip]) -> list[Features]:
        """See :func:`mmemo.models.composed.encoders.encode`."""
        tower = getattr(self.model, TOWER)
        return [encoders.encode(tower, self.spec, "face", clip) for clip in clips]

    def spell(self) -> str:
        """The text of ``<face>``."""
        return self.token * self.spec.tokens

    def connect(self, features: FeatureBatch) -> Tensor:
        """(N, K, E); of one clip without a face if the batch has none, because every rank must run
        every connector under ZeRO-3 and DDP."""
        connectors = getattr(self.model, CONNECTORS)
        if "face_features" not in features:
            weight = next(connectors.parameters())
            layers = (self.spec.feature_layers,) if self.spec.feature_layers else ()
            empty = weight.new_zeros((1, *layers, 1, self.spec.feature_size))
            mask = torch.zeros((1, 1), dtype=torch.bool, device=weight.device)
            features = {"face_features": empty, "face_features_mask": mask}
        return connectors(features)

    def add(self, embeds: Tensor, modality_ids: Tensor, features: FeatureBatch) -> Tensor:
        """Embeddings (B, L, E) with the branch's output added at its tokens.

        Raises:
            DataError: a row has another number of face tokens than the branch, or its clip has no
                face.
        """
        where = modality_ids == FACE
        counts = where.sum(1)
        rows = counts > 0
        clips = features["clip_index"]
        connected = self.connect(features)
        mask = features.get("face_features_mask")
        seen = rows & False if mask is None else mask.any(1)[clips.clamp(min=0)] & (clips >= 0)
        wrong = rows & ((counts != self.spec.tokens) | ~seen)
        # One read for all rows, because each waits until a GPU has caught up.
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            if not bool(seen[row]):
                raise DataError(
                    f"row {row} has face tokens but no clip with a face; check the batch"
                )
            raise DataError(
                f"row {row} has {int(counts[row])} face tokens but the branch makes "
                f"{self.spec.tokens}; render the text with this model's processor and never cut it"
            )
        values = connected[clips.clamp(min=0) if mask is not None else clips * 0][rows]
        # An empty sum keeps the connector in the graph of a batch without a face.
        values = values.flatten(0, 1).to(embeds)
        added = torch.zeros_like(embeds).masked_scatter(where[..., None], values)
        return embeds + added + (0.0 * connected.sum()).to(embeds)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write the encoder and the branch's settings to ``folder/mmemo_face``.

        Args:
            weights: of the model, by name, of which the connector's are written too; None for an
                adapter, which holds them itself.
        """
        target = folder / FOLDER
        getattr(self.model, TOWER).save_pretrained(target / TOWER)
        record = {"spec": dump(self.spec), "token": self.token, "source": dict(self.source)}
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (target / "face.json").write_text(text, encoding="utf-8")
        if weights is not None:
            prefix = f"{CONNECTORS}."
            own = {
                name.removeprefix(prefix): value.contiguous()
                for name, value in weights.items()
                if name.startswith(prefix)
            }
            save_file(own, target / f"{CONNECTORS}.safetensors")


def own_weight(name: str) -> bool:
    """Whether a weight of a native model belongs to its face branch, and not to its own files."""
    return name.split(".")[0] in (TOWER, CONNECTORS)


def new_branch(
    model: Any, branch: BranchConfig, dtype: torch.dtype, source: Mapping[str, str | None]
) -> None:
    """Give a native model a face branch with a new connector.

    Raises:
        ConfigError: the encoder does not fit, or the tokenizer has no token to spare.
    """
    if model.backbone.face is not None:
        raise ConfigError("the model of model.path has a face branch already; leave model.face out")
    loaded = encoders.load_encoder("face", branch, model.sampling, dtype)
    _attach(model, loaded, _spare_token(model.backbone.tokenizer), source)


def load_branch(model: Any, folder: Path, dtype: torch.dtype, *, connectors: bool) -> None:
    """Give a native model the face branch that was saved in ``folder/mmemo_face``.

    Args:
        connectors: whether the folder holds the connector's weights; an adapter has them itself.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    place = folder / FOLDER
    try:
        record = json.loads((place / "face.json").read_text(encoding="utf-8"))
        spec = parse(SavedBranchConfig, record["spec"], where=str(place))
        token, source = str(record["token"]), dict(record["source"])
        settings = {key: getattr(spec, key) for key in BranchBaseConfig.model_fields}
        own = {"encoder": str(place / TOWER), "preprocessor": spec.preprocessor}
        branch = parse(BranchConfig, {**settings, **own}, where=str(place))
        _attach(model, encoders.load_encoder("face", branch, model.sampling, dtype), token, source)
        if connectors:
            weights = load_file(place / f"{CONNECTORS}.safetensors")
            getattr(model, CONNECTORS).load_state_dict(weights)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{place}: the face branch cannot be loaded ({reason}); save or fetch it again"
        ) from error


def has_branch(folder: Path | str) -> bool:
    """Whether a model or adapter was saved with a face branch."""
    return (Path(folder) / FOLDER / "face.json").is_file()


def _attach(
    model: Any, loaded: encoders.LoadedEncoder, token: str, source: Mapping[str, str | None]
) -> None:
    width = model.get_input_embeddings().weight.shape[1]
    setattr(model, TOWER, loaded.model)
    setattr(model, CONNECTORS, FaceConnectors(loaded.spec, width))
    convert: Any = model.backbone.tokenizer.convert_tokens_to_ids
    model.add_face(FaceBranch(model, loaded.spec, token, convert(token), source))


def _spare_token(tokenizer: Any) -> str:
    known = tokenizer.get_vocab()
    found = next((token for token in SPARE if token in known), None)
    if found is None:
        raise ConfigError(
            f"face: the tokenizer has none of {', '.join(SPARE)} for the face's place in the text; "
            "use another model"
        )
    return found
