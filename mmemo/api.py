"""What a script needs: load a model, process a clip, answer, score, train and evaluate.

    import mmemo

    model = mmemo.load_model("runs/quickstart/dpo/final")
    print(mmemo.answer(model, "clip.mp4", "What does she feel?"))

These functions are importable from :mod:`mmemo` itself; nothing heavy is imported until one of them
is used. The command line does the same work on whole data sets, with resumable runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmemo import content, stages
from mmemo.answers.parsing import LabelSet, label_set, parse
from mmemo.config import apply_overrides, load_config, read_yaml
from mmemo.config import parse as parse_config
from mmemo.data.sample import CONFLICTS, MODALITIES, MediaRef, Modality, Sample, Turn
from mmemo.errors import ConfigError, DataError, EvaluationError, MediaError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.config import AnswerGenerationConfig
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.results import read_results
from mmemo.evaluation.scoring import score_task
from mmemo.experiments.run_stage import run_stage
from mmemo.features.source import FeatureSource
from mmemo.media.config import DecodeConfig
from mmemo.media.probe import probe
from mmemo.models.adapters.lora import unwrap
from mmemo.models.backbone import Features
from mmemo.models.build import Loaded, ModelConfig
from mmemo.models.build import load_model as build_model
from mmemo.statistics import BootstrapConfig

Clip = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
"""A media file, or the file of each modality: ``{"video": "a.mp4", "audio": "a.wav"}``."""


def load_model(path: str | os.PathLike[str], **options: Any) -> Loaded:
    """Load a saved model, a run's adapter, or a native model by folder or hub id.

    Args:
        path: the ``final`` folder of a run, a merged export, an adapter, or a Qwen2.5-Omni or
            Qwen2.5-VL.
        options: further keys of a config's ``model`` section, such as ``dtype="bfloat16"``,
            ``quantization="nf4"`` or ``adapter="merge"``; ``mmemo schema eval`` lists them.

    Returns:
        The model in eval mode (``.model``, a ``torch.nn.Module`` that may be moved to a GPU) and
        its processor (``.processor``).

    Raises:
        ConfigError: the folder holds no model that can be loaded with these options.
        CheckpointError: weights are damaged or missing.
    """
    return build_model(parse_config(ModelConfig, {"path": os.fspath(path), **options}))


def process_clip(loaded: Loaded, clip: Clip) -> dict[Modality, Features]:
    """Decode a clip and encode it with the model's frozen encoders.

    Args:
        loaded: from :func:`load_model`.
        clip: one media file, of which every stream that the model has an encoder for is used, or a
            file for each modality.

    Returns:
        For each modality of the clip its features by name, on the CPU: ``x`` is (T, D), T steps of
        width D. They are what training and evaluation keep in the feature store.

    Raises:
        MediaError: the file cannot be read, or lacks a stream that ``clip`` asks for by name.
        DataError: the model has no encoder for a modality that ``clip`` asks for by name, or finds
            faces by boxes that only a manifest can give.
    """
    sample, root = _sample(loaded, clip, "")
    backbone: Any = unwrap(loaded.model)
    with FeatureSource([sample], backbone, None, root, DecodeConfig()) as source:
        return source.get(sample)


def answer(loaded: Loaded, clip: Clip, question: str, *, seed: int = 0, **generation: Any) -> str:
    """Ask the model one question about one clip.

    Args:
        loaded: from :func:`load_model`.
        clip: as in :func:`process_clip`.
        question: the user's turn as plain text; the clip's placeholders are put before it.
        seed: fixes the random numbers where ``do_sample=True`` is given.
        generation: keys of an evaluation's ``generation`` section, such as ``max_new_tokens=256``,
            ``do_sample=True``, ``temperature=0.7`` or ``reallocation={...}``. Decoding is greedy by
            default.

    Returns:
        The answer's text, with its tags.

    Raises:
        ConfigError: a generation setting is unknown or does not fit the model.
        MediaError, DataError: as :func:`process_clip`.
    """
    settings = parse_config(AnswerGenerationConfig, generation, where="generation")
    sample, root = _sample(loaded, clip, question)
    generator = AnswerGenerator(
        loaded,
        [sample],
        None,
        root,
        DecodeConfig(),
        generation=settings,
        seed=seed,
        max_length=None,
    )
    asked = Question(sample, sample.turns, "question", None, "")
    with generator:
        return generator.answer([asked], "answer")[0][0]


def score(
    answers: Sequence[str],
    truths: Sequence[str],
    labels: Sequence[str],
    *,
    speakers: Sequence[str] | None = None,
    conflicts: Sequence[str | None] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Read answers and score them against the truth, with intervals clustered by speaker.

    Args:
        answers: n generated texts, which are read as in an evaluation: the verdict in ``<answer>``
            or behind the reasoning counts, synonyms of emotion labels are known, and an answer that
            cannot be read is wrong and counted apart.
        truths: n right labels.
        labels: the K labels that an answer may name.
        speakers: n names. Answers about one speaker are alike, and count as one cluster; without
            names every answer is taken for independent, which makes intervals too narrow if it is
            not.
        conflicts: n of ``video_aligned``, ``audio_aligned``, ``consistent`` or None, for numbers
            by conflict subset.
        confidence: confidence level of the intervals.
        resamples: has no effect any more, since these intervals need no random draws.

    Returns:
        ``metrics`` (``war``, ``uar``, ``macro_f1`` and ``weighted_f1``, each with ``value``,
        ``low``, ``high`` and ``n``), ``classes``, ``confusion``, ``subsets``, ``statuses`` and
        ``by_reading`` (the statuses under the verdict and the strict reading), as in a run's
        ``results.json``.

    Raises:
        EvaluationError: lengths differ, there is no answer, a truth is none of the labels, or a
            conflict is none of the subsets.
        ConfigError: ``confidence`` or ``resamples`` is out of bounds.
    """
    settings = {"confidence": confidence, "resamples": resamples}
    bootstrap = parse_config(BootstrapConfig, settings, where="score")
    given = {"truths": truths, "speakers": speakers, "conflicts": conflicts}
    for name, column in given.items():
        if column is not None and len(column) != len(answers):
            raise EvaluationError(
                f"score: {len(answers)} answers and {len(column)} {name}; give one for each answer"
            )
    if not answers:
        raise EvaluationError("score: there is no answer; give at least one")
    for index, conflict in enumerate(conflicts or ()):
        if conflict is not None and conflict not in CONFLICTS:
            raise EvaluationError(
                f"score: conflicts[{index}] is '{conflict}'; use None or one of "
                f"{', '.join(CONFLICTS)}"
            )
    known = label_set(labels)
    rows = [_scored_row(index, text, truths[index], known) for index, text in enumerate(answers)]
    for index, row in enumerate(rows):
        row["conflict"] = None if conflicts is None else conflicts[index]
        row["group"] = {} if speakers is None else {"speaker": speakers[index]}
    return score_task(rows, bootstrap)


def _scored_row(index: int, text: str, truth: str, known: LabelSet) -> dict[str, Any]:
    if truth not in known.labels:
        raise EvaluationError(
            f"score: truths[{index}] is '{truth}', which is none of the labels "
            f"({', '.join(known.labels)})"
        )
    read, strict = parse(text, known), parse(text, known, "strict")
    return {
        "sample_id": str(index),
        "task": "emotion",
        "labels": list(known.labels),
        "truth": truth,
        "answer": read.label,
        "status": read.status,
        "score": float(read.label == truth),
        "strict_status": strict.status,
        "strict_answer": strict.label,
    }


def train_model(config: str | os.PathLike[str], *overrides: str, run: str | None = None) -> Path:
    """Run a training stage from its YAML file, as ``mmemo sft``, ``grpo`` or ``dpo`` would.

    Where ``run.processes`` asks for several ranks, they are started.

    Args:
        config: the YAML file, looked up in the working directory and then as shipped.
        overrides: values to set, as on the command line without the dashes:
            ``"train.learning_rate=1e-4"``.
        run: what ``${run}`` stands for in the file.

    Returns:
        The folder of the trained model, for :func:`load_model`. A run that was stopped before goes
        on from its newest checkpoint.

    Raises:
        ConfigError: the file is for no training stage, or does not validate.
        MmemoError: whatever the stage itself raises.
    """
    path = content.find(Path(config))
    values = apply_overrides(read_yaml(path, _variables(run)), list(overrides))
    stage = stages.STAGES.get(stages.guess(values))
    if stage is None or not stage.trains:
        known = ", ".join(name for name, one in stages.STAGES.items() if one.trains)
        raise ConfigError(
            f"{os.fspath(config)} is no config of a stage that trains; give one of {known}"
        )
    parsed: Any = parse_config(stage.config_class, values, where=str(path))
    made = run_stage(stage, parsed)
    return Path(parsed.output_dir) / "final" if made is None else Path(made)


def evaluate(
    config: str | os.PathLike[str], *overrides: str, run: str | None = None
) -> dict[str, Any]:
    """Answer a benchmark and score it from its YAML file, as ``mmemo eval`` would.

    Args:
        config, overrides, run: as in :func:`train_model`.

    Returns:
        What the run wrote to ``results.json``.

    Raises:
        ConfigError: the file is not for an evaluation, or does not validate.
        EvaluationError: the evaluation could not be done.
    """
    stage = stages.stage("eval")
    loaded: Any = load_config(
        stage.config_class, content.find(Path(config)), list(overrides), _variables(run)
    )
    run_stage(stage, loaded)
    return dict(read_results(Path(loaded.output_dir)).values)


def _variables(run: str | None) -> dict[str, str]:
    return {"seed": "0"} if run is None else {"run": run, "seed": "0"}


def _sample(loaded: Loaded, clip: Clip, question: str) -> tuple[Sample, Path]:
    """The clip as one row, and the folder that its paths are relative to."""
    backbone: Any = unwrap(loaded.model)
    files = _files(clip, backbone.modalities)
    if "face" in files and backbone.sampling.face.detector == "boxes":
        raise DataError(
            "the model finds faces by boxes from a manifest, which a file does not have; name the "
            "files of the other modalities: {'video': ..., 'audio': ...}"
        )
    root = Path(os.path.commonpath([file.parent for file in files.values()]))
    media: dict[Modality, MediaRef] = {
        name: MediaRef(str(file.relative_to(root))) for name, file in files.items()
    }
    marks = "".join(f"<{name}>" for name in media)
    sample = Sample("clip", (Turn("user", marks + question),), media, source=("clip", 1))
    return sample, root


def _files(clip: Clip, modalities: Sequence[Modality]) -> dict[Modality, Path]:
    if isinstance(clip, Mapping):
        unknown = sorted(set(clip) - set(MODALITIES))
        if unknown or not clip:
            raise DataError(
                f"a clip names files of {', '.join(MODALITIES)}, not of "
                f"'{unknown[0] if unknown else 'nothing'}'"
            )
        without = sorted(set(clip) - set(modalities))
        if without:
            raise DataError(f"the model has no encoder for {without[0]}; leave it out of the clip")
        return {cast(Modality, name): Path(file).resolve() for name, file in clip.items()}
    file = Path(clip).resolve()
    info = probe(file, os.fspath(clip))
    streams = {"video": info.video, "face": info.video, "audio": info.audio}
    found: dict[Modality, Path] = {name: file for name in modalities if streams[name] is not None}
    if not found:
        wanted = " or ".join(modalities) or "media"
        kind = "no_audio" if tuple(modalities) == ("audio",) else "no_video"
        raise MediaError(os.fspath(clip), kind, f"holds no {wanted}, which is what the model reads")
    return found
