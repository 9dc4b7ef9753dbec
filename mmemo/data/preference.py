"""Preference rows: one prompt about one clip, a chosen answer, and one or two rejected answers.

The schema is AVEm-DPO's (arXiv 2602.07054). ``rejected_spurious`` cites a cue that is present but
irrelevant to the emotion, ``rejected_hallucinated`` a cue that is typical of the emotion but
absent. A ``negative`` replaces the streams that the question is about, and an ``irrelevant``
negative the other streams (MoD-DPO, arXiv 2603.03192). TRL's and ms-swift's field names are read
too, and those in :mod:`mmemo.data.pair_names`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Field, TypeAdapter

from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.pair_names import Query, query_named, rename
from mmemo.data.row_models import (
    PLACEHOLDERS,
    Expect,
    Row,
    check,
    did_you_mean,
    read_clip,
    read_text,
)
from mmemo.data.sample import MODALITIES, MediaRef, Modality, Sample
from mmemo.errors import DataError

Answer = Literal["chosen", "spurious", "hallucinated"]
Side = Literal["negative", "irrelevant"]
"""The streams that are replaced: those that the question is about (``negative``) or the others."""

FEATURE_KINDS = (
    *("shuffled_frames", "frozen_frame", "muted", "reversed", "noise", "blank_face"),
    "uniform_noise",
)
"""Kinds of negative that are made from the clip's own features."""
MEDIA_KINDS = ("different_label", "other_speaker", "swapped", "given")
"""Kinds of negative that are streams of other clips; ``given`` if the row gives no kind."""
WRITTEN_KINDS = ("blurred", "cropped")
"""Kinds of negative that are made of the clip's own pictures and exist as files only. A kind of
``FEATURE_KINDS`` is a file too where the row says ``feature_level: false`` and names it."""
KINDS = (*FEATURE_KINDS, *MEDIA_KINDS, *WRITTEN_KINDS)

KIND_STREAMS: Mapping[str, tuple[Modality, ...]] = {
    **dict.fromkeys(KINDS, MODALITIES),
    "frozen_frame": ("video", "face"),
    "blank_face": ("video", "face"),
    "muted": ("audio",),
    **dict.fromkeys(WRITTEN_KINDS, ("video", "face")),
}
"""The streams that each kind can be made of."""

REJECTED: tuple[Answer, Answer] = ("spurious", "hallucinated")
QUERIES: tuple[Query, ...] = get_args(Query)
_SIDES: tuple[Side, ...] = get_args(Side)
_REJECTED: Mapping[str, Answer] = {
    "rejected_spurious": "spurious",
    "rejected_hallucinated": "hallucinated",
}
_KEYS = (
    *_REJECTED,
    *("query_modality", "rejected_kind", "feature_level", "snr_db", "judge_agreement"),
    *(f"{side}_{name}" for side in _SIDES for name in ("kind", "seed")),
    *(f"{modality}_{side}" for side in _SIDES for modality in MODALITIES),
)
_Decibels = Annotated[
    float | None,
    Field(strict=True, ge=-60, le=60),
    Expect("must be a number of decibels between -60 and 60, not {value}"),
]
_SNR: TypeAdapter[float | None] = TypeAdapter(_Decibels)
_Agreement = Annotated[
    float | None,
    Field(strict=True, gt=0.5, le=1),
    Expect("must be the share of the judges that prefer the chosen answer, above 0.5, not {value}"),
]
_AGREEMENT: TypeAdapter[float | None] = TypeAdapter(_Agreement)


@dataclass(frozen=True, slots=True)
class Negative:
    """How a worse input is made."""

    kind: str
    """One of ``KINDS``."""
    feature_level: bool
    """Whether it is made from the clip's own stored features."""
    media: Mapping[Modality, MediaRef]
    """The streams of other clips, or of files written from this one; empty if it is made from
    features."""
    modalities: tuple[Modality, ...]
    """The streams that are replaced."""
    seed: int
    snr_db: float = 0.0
    """Signal-to-noise power ratio of the kind ``noise``, in dB."""
    noised: tuple[Modality, ...] = ()
    """The streams of the clip's own that uniform noise replaces, beside those of other clips
    (:func:`with_noise`)."""

    @property
    def of_features(self) -> Negative | None:
        """The part that is made from the clip's own stored features; None if there is none."""
        if self.feature_level:
            return self
        noise = Negative("uniform_noise", True, {}, self.noised, self.seed)
        return noise if self.noised else None

    @property
    def corruptions(self) -> tuple[Negative, ...]:
        """The parts that are made from stored features, one after the other. There are two where
        streams of one kind of corruption stand beside noised ones."""
        first = self.of_features
        if first is None or not (self.feature_level and self.noised):
            return () if first is None else (first,)
        noise = Negative("uniform_noise", True, {}, self.noised, self.seed)
        return replace(self, noised=()), noise


@dataclass(frozen=True, slots=True)
class Preference:
    """One pair."""

    sample: Sample
    """The prompt without an answer, and the clip."""
    query: Query
    """The modality that the question is about."""
    answers: Mapping[Answer, str]
    """``chosen``, and one or both of ``spurious`` and ``hallucinated``."""
    negative: Negative | None
    irrelevant: Negative | None
    plain: bool = False
    """The rejected answer came without a kind and is stored as ``spurious``."""
    judge_agreement: float | None = None
    """Share of the judges that prefer the chosen answer, above 0.5; None: the row does not say."""
    names: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)
    """The row's keys with other names than here -> the names that they were read as
    (:func:`mmemo.data.pair_names.reading`)."""


@dataclass(slots=True)
class _Extra:
    """The parts of a row that belong to the pair and not to its sample."""

    query: Query | None = None
    answers: dict[Answer, str] = field(default_factory=dict[Answer, str])
    kind: Answer | None = None
    negatives: dict[Side, Negative] = field(default_factory=dict[Side, Negative])
    judge_agreement: float | None = None
    names: dict[str, str] = field(default_factory=dict[str, str])


def queried(query: Query, media: Collection[Modality]) -> tuple[Modality, ...]:
    """The streams of the clip that a question is about."""
    streams = {"audio": ("audio",), "video": ("video", "face"), "joint": MODALITIES}[query]
    return tuple(name for name in MODALITIES if name in streams and name in media)


def unqueried(query: Query, media: Collection[Modality]) -> tuple[Modality, ...]:
    """The clip's other streams; none if the question is joint."""
    asked = queried(query, media)
    return tuple(name for name in MODALITIES if name in media and name not in asked)


def replaced(pair: Preference, side: Side) -> tuple[Modality, ...]:
    """The streams that the pair's negative of this side replaces."""
    negative = pair.negative if side == "negative" else pair.irrelevant
    return () if negative is None else (*negative.modalities, *negative.noised)


def not_replaced(pair: Preference, side: Side) -> tuple[Modality, ...]:
    """The streams that a negative of this side should replace and does not: all of them if the pair
    has no such negative."""
    asked = (queried if side == "negative" else unqueried)(pair.query, pair.sample.media)
    done = replaced(pair, side)
    return tuple(name for name in asked if name not in done)


def with_noise(pair: Preference, side: Side) -> Preference:
    """The pair with uniform noise for each stream that its negative should replace and does not.

    The authors' loader does so where a record has no ``video_l`` or no ``audio_l`` (AVEm-DPO,
    arXiv 2602.07054), in the pixels and samples; here the encoder's features become noise.
    """
    missing = not_replaced(pair, side)
    if not missing:
        return pair
    negative = pair.negative if side == "negative" else pair.irrelevant
    if negative is None:
        seed = seed_of(pair.sample.sample_id, side)
        filled = Negative("uniform_noise", True, {}, missing, seed)
    else:
        filled = replace(negative, noised=missing)
    if side == "negative":
        return replace(pair, negative=filled)
    return replace(pair, irrelevant=filled)


def with_noised_audio(pair: Preference) -> Preference:
    """The pair with uniform noise for the sound of its negative, whatever the question is about.

    The authors' released loader does so with every record (AVEm-DPO, arXiv 2602.07054), whereas the
    paper leaves the stream alone that the question is not about.
    """
    negative = pair.negative
    if negative is None or "audio" not in pair.sample.media or "audio" in negative.noised:
        return pair
    left = tuple(name for name in negative.modalities if name != "audio")
    media = {name: ref for name, ref in negative.media.items() if name != "audio"}
    if not left and not negative.noised:
        noise = Negative("uniform_noise", True, {}, ("audio",), negative.seed)
        return replace(pair, negative=noise)
    noised = (*negative.noised, "audio")
    changed = replace(negative, media=media, modalities=left, noised=noised)
    return replace(pair, negative=changed)


def load_preferences(config: DataConfig) -> list[Preference]:
    """Load the pairs of the manifests that the config keeps, in file order.

    Raises:
        DataError: a row is wrong; names file, line, field and the nearest known name.
    """
    extras: dict[tuple[str, int], _Extra] = {}

    def prepare(row: Row) -> Row:
        extra = extras[row.file, row.line] = _Extra()
        return _prepare(row, extra, config.columns)

    samples = load_samples(config, prepare)
    whole = config.modalities is None
    found: list[Preference] = []
    for sample in samples:
        extra = extras[sample.source]
        try:
            found.append(_preference(sample, extra, whole=whole))
        except DataError as error:
            written = next((k for k, name in extra.names.items() if name == error.field), None)
            if written is None:
                raise
            _, _, message = str(error).partition(f"field '{error.field}': ")
            file, line = sample.source
            raise DataError(message, file=file, line=line, field=written) from None
    return found


def _prepare(row: Row, extra: _Extra, columns: list[str]) -> Row:
    """Move the pair's fields of a row to ``extra``; the rest is a row to read a sample from."""
    if row.problems:
        return row
    row, extra.names = rename(row, _KEYS, columns)
    if row.problems:
        return row
    _read_query(row, extra)
    _read_rejected(row, extra)
    snr_db = _read_snr(row)
    value = row.get("judge_agreement")
    extra.judge_agreement = check(row, _AGREEMENT, value, "judge_agreement")
    for side in _SIDES:
        _read_negative(row, side, extra, snr_db)
    _check_streams(row, extra)
    kept = {key: value for key, value in row.values.items() if key not in _KEYS or key in columns}
    if extra.answers:
        # The reader takes a row for a pair only if it has 'rejected'; _preference puts all back.
        kept["rejected"] = next(iter(extra.answers.values()))
    # The list of problems is shared, so that those found later are in it too.
    return Row(kept, row.file, row.line, row.problems, row.written)


def _read_query(row: Row, extra: _Extra) -> None:
    value = row.get("query_modality")
    extra.query = query_named(value)
    if value is not None and extra.query is None:
        row.bad("query_modality", f"is {value!r}; {did_you_mean(str(value), QUERIES)}")


def _read_rejected(row: Row, extra: _Extra) -> None:
    plain = [key for key in ("rejected", "rejected_response") if row.has(key)]
    for key, name in _REJECTED.items():
        if not row.has(key):
            continue
        if plain:
            row.bad(key, f"cannot be combined with '{plain[0]}'; keep one of them")
            continue
        text = _read_answer(row, key)
        if text is not None:
            extra.answers[name] = text
    kind = row.get("rejected_kind")
    if kind is not None and not plain:
        row.bad("rejected_kind", "needs 'rejected', which the row does not have")
    elif kind is not None and kind not in _REJECTED.values():
        row.bad("rejected_kind", f"is {kind!r}; {did_you_mean(str(kind), (*_REJECTED.values(),))}")
    else:
        extra.kind = kind
    if not plain and not any(row.has(key) for key in _REJECTED):
        row.bad(
            "rejected_spurious",
            "is missing, as is 'rejected_hallucinated'; a pair needs one of them",
        )
    chosen = _text_of(row.get("chosen"))
    for name, text in extra.answers.items():
        key = f"rejected_{name}"
        if text == chosen:
            row.bad(key, "equals the chosen answer; a pair needs two different answers")
        elif any(mark in text for mark in PLACEHOLDERS.values()):
            row.bad(key, "has a media placeholder in an answer; move it to the user's turn")
    if len(set(extra.answers.values())) < len(extra.answers):
        other = row.written.get("rejected_spurious", "rejected_spurious")
        row.bad("rejected_hallucinated", f"equals '{other}'; leave one of them out")


def _text_of(value: object) -> str | None:
    """The answer in ``value``: a string, or turns of which the last one is the answer."""
    if isinstance(value, list) and value:
        last: Any = cast("list[object]", value)[-1]
        value = cast("dict[str, object]", last).get("content") if isinstance(last, dict) else None
    return value if isinstance(value, str) and value.strip() else None


def _read_answer(row: Row, key: str) -> str | None:
    text = _text_of(row.get(key))
    if text is None:
        row.bad(key, "must be a text, or turns that end with the assistant's")
    return text


def _read_negative(row: Row, side: Side, extra: _Extra, snr_db: float) -> None:
    kind = read_text(row, f"{side}_kind")
    if kind is not None and kind not in KINDS:
        row.bad(f"{side}_kind", f"is {kind!r}; {did_you_mean(kind, KINDS)}")
        return
    media: dict[Modality, MediaRef] = {}
    for modality in MODALITIES:
        key = f"{modality}_{side}"
        if row.has(key):
            if kind in FEATURE_KINDS and row.get("feature_level") is not False:
                row.bad(
                    key,
                    f"cannot be combined with '{kind}', which is made of the clip itself; if the "
                    "file is already that, say so by feature_level: false",
                )
            ref = read_clip(row, key)
            if ref is not None:
                media[modality] = ref
    if kind is None and not media:
        return
    kind = kind or "given"
    if kind not in FEATURE_KINDS and not media:
        row.bad(f"{side}_kind", f"is '{kind}', which needs video_{side} or audio_{side}")
    flag = row.get("feature_level") if side == "negative" else None
    made = kind in FEATURE_KINDS and not media
    if flag is not None and flag != made:
        row.bad("feature_level", f"is {flag!r} but '{kind}' makes it {made}")
    extra.negatives[side] = Negative(
        kind=kind,
        feature_level=made,
        media=media,
        modalities=(),
        seed=_read_seed(row, side),
        snr_db=snr_db,
    )


def _read_seed(row: Row, side: Side) -> int:
    """The row's seed; if it has none, one derived from its id, which never changes."""
    value = row.get(f"{side}_seed")
    if value is None:
        # Not by line: inserting a row must not change the negatives of the others.
        return seed_of(str(row.get("sample_id") or row.get("id")), side)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        row.bad(f"{side}_seed", "must be a whole number of at least 0")
        return 0
    return value


def _read_snr(row: Row) -> float:
    return check(row, _SNR, row.get("snr_db"), "snr_db") or 0.0


def _check_streams(row: Row, extra: _Extra) -> None:
    """Check that each file of a negative is for a stream that its side replaces."""
    if extra.query is None:
        return
    asked = queried(extra.query, MODALITIES)
    for side, negative in extra.negatives.items():
        allowed = asked if side == "negative" else [m for m in MODALITIES if m not in asked]
        for modality in negative.media:
            if modality not in allowed:
                about = {"joint": "both"}.get(extra.query, extra.query)
                streams = ", ".join(allowed) or "nothing"
                message = f"the question is about {about}, so this side replaces {streams}"
                row.bad(f"{modality}_{side}", f"{message}; remove it")
        if side == "irrelevant" and not allowed:
            row.bad("irrelevant_kind", "has no stream to replace in a joint question; remove it")


def _preference(sample: Sample, extra: _Extra, *, whole: bool) -> Preference:
    """The pair with the streams that ``data.modalities`` keeps; ``whole`` if it keeps all."""
    assert sample.chosen is not None
    assert sample.rejected is not None
    query = extra.query or _query_of(sample.media)
    asked = queried(query, sample.media)
    file, line = sample.source
    if whole and sample.media and not asked:
        message = f"is '{query}', but the row names no such stream; add it, or change the query"
        raise DataError(message, file=file, line=line, field="query_modality")
    if whole:
        _check_shown(sample, extra)
    negatives, key = dict(extra.negatives), "{}_negative"
    if sample.rejected_media and "negative" not in negatives:
        key = "rejected_{}s"
        seed = seed_of(sample.sample_id, "negative")
        negatives["negative"] = Negative("given", False, sample.rejected_media, (), seed)
    given, other = negatives.get("negative"), negatives.get("irrelevant")
    return Preference(
        sample=replace(sample, chosen=None, rejected=None, rejected_media={}),
        query=query,
        answers={
            "chosen": sample.chosen,
            **(extra.answers or {extra.kind or "spurious": sample.rejected}),
        },
        negative=given and _finished(given, sample, asked, key),
        irrelevant=other
        and _finished(other, sample, unqueried(query, sample.media), "{}_irrelevant"),
        plain=not extra.answers and extra.kind is None,
        judge_agreement=extra.judge_agreement,
        names=extra.names,
    )


def _check_shown(sample: Sample, extra: _Extra) -> None:
    """Check that each file of a negative replaces a stream that the row shows."""
    file, line = sample.source
    for side, negative in extra.negatives.items():
        for modality in negative.media:
            if modality not in sample.media:
                shown = ", ".join(sample.media) or "no media"
                message = f"replaces a {modality}, but the row shows {shown}; rename or remove it"
                raise DataError(message, file=file, line=line, field=f"{modality}_{side}")


def _query_of(media: Mapping[Modality, MediaRef]) -> Query:
    """The query of a row without ``query_modality``: all streams that it shows."""
    if not media or ("audio" in media and len(media) > 1):
        return "joint"
    return "audio" if "audio" in media else "video"


def _finished(
    negative: Negative, sample: Sample, asked: tuple[Modality, ...], key: str
) -> Negative | None:
    """The negative with the streams that it replaces; None if none of them is left.

    Args:
        asked: the streams that its side replaces.
        key: the row's key for a stream, ``{}`` standing for its name.
    """
    file, line = sample.source
    if negative.feature_level:
        streams = tuple(name for name in asked if name in KIND_STREAMS[negative.kind])
        if asked and streams != asked:
            missing = next(name for name in asked if name not in streams)
            message = f"'{negative.kind}' cannot be made of {missing}, which it has to replace"
            field_name = f"{key.rpartition('_')[2]}_kind"
            raise DataError(message, file=file, line=line, field=field_name)
        return replace(negative, modalities=streams) if streams else None
    media, own = _whole_picture(negative.media, sample, asked, key), sample.media
    media: dict[Modality, MediaRef] = {name: media[name] for name in asked if name in media}
    for name, ref in media.items():
        if (ref.path, ref.start, ref.end) == (own[name].path, own[name].start, own[name].end):
            # A rejected input that equals the chosen one has no preference to learn.
            message = "is the row's own clip; name another one"
            raise DataError(message, file=file, line=line, field=key.format(name))
    return replace(negative, media=media, modalities=tuple(media)) if media else None


def _whole_picture(
    media: Mapping[Modality, MediaRef], sample: Sample, asked: tuple[Modality, ...], key: str
) -> dict[Modality, MediaRef]:
    """The negative's streams, in which picture and face are replaced together: either of them alone
    would still show the emotion that the negative is to hide."""
    own = sample.media
    pictured: list[Modality] = [name for name in asked if name != "audio"]
    given: list[Modality] = [name for name in pictured if name in media]
    lacking: list[Modality] = [name for name in pictured if name not in media]
    if not given or not lacking:
        return dict(media)
    have, lack = given[0], lacking[0]
    if own["video"].path == own["face"].path:
        # Given boxes are of the row's own file.
        return {**media, lack: replace(media[have], face_boxes=())}
    file, line = sample.source
    words = {"video": "picture", "face": "face"}
    message = (
        f"replaces the {words[have]} but not the {words[lack]}, which is a file of its own here "
        f"and would stay; add {key.format(lack)}"
    )
    raise DataError(message, file=file, line=line, field=key.format(have))


def seed_of(sample_id: str, purpose: str) -> int:
    """A seed that depends only on the row's id and the purpose."""
    return int.from_bytes(hashlib.sha256(f"{sample_id}/{purpose}".encode()).digest()[:4])
