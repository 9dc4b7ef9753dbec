"""Emotion words of free answers, extracted by a model behind an endpoint.

AffectGPT (arXiv 2501.16566) extracts the words of every description with Qwen2.5-7B, and asks it
for the sentiment of these words; the wording here is ours. The rules of
:mod:`mmemo.answers.open_words` do the same without a model, and are what ``mmemo eval`` uses. This
makes the release's kind of files of a finished run instead, which ``mmemo score`` reads::

    python -m mmemo.evaluation.mer_unibench.extraction RUN_FOLDER endpoint.yaml words.jsonl
    mmemo score words.jsonl --benchmark eval/mer_unibench.py --data DIR

``endpoint.yaml`` has the fields of :class:`~mmemo.rewards.judge.openai_client.EndpointConfig`, such
as ``base_url`` and ``model``. An answer that no request could extract stays in the file, empty, so
that it counts as one without words; how many they are is printed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from mmemo import files
from mmemo.answers.completion import answer_text
from mmemo.answers.label_set import normalise
from mmemo.answers.open_words import SENTIMENTS
from mmemo.config import load_config
from mmemo.console import console, progress
from mmemo.data.merbench import SETS
from mmemo.errors import EvaluationError, MmemoError
from mmemo.evaluation.predictions import Row, key_of, read_predictions
from mmemo.evaluation.results import PREDICTIONS
from mmemo.formats import counted
from mmemo.rewards.judge.openai_client import ChatClient, EndpointConfig

T = TypeVar("T")
_MODULE = "mmemo.evaluation.mer_unibench.extraction"  # __name__ is __main__ where it is shown
WORDS = (
    "You get what somebody wrote about the emotions of a person. List the emotions that the text "
    "says the person has, as single English words or short phrases. Leave out emotions that the "
    "text denies. Answer with one JSON object with the key emotions, a list that may be empty."
)
SENTIMENT = (
    "You get words for the emotions of a person. Which sentiment do they express together: "
    "positive, negative or neutral? No words are neutral. Answer with one JSON object with the key "
    "sentiment."
)
WORDS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"emotions": {"type": "array", "items": {"type": "string"}}},
    "required": ["emotions"],
    "additionalProperties": False,
}
SENTIMENT_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"sentiment": {"type": "string", "enum": list(SENTIMENTS)}},
    "required": ["sentiment"],
    "additionalProperties": False,
}
_BATCH = 256  # answers between two saves
_MOST_WORDS = 64
_LONGEST = 4_000  # characters of a text that are sent


class WordExtractor:
    """Asks an endpoint for the words of texts, and for the sentiment of words.

    ``counts``: ``requests``, and failed ones by kind.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._chat = ChatClient(config, self.counts, "the extractor")

    async def words(self, texts: Sequence[str]) -> list[list[str] | None]:
        """The words of each text; None where no request succeeded. Empty texts have none."""
        return await self._all(WORDS, WORDS_SCHEMA, texts, read_words, [])

    async def sentiments(self, words: Sequence[Sequence[str]]) -> list[str | None]:
        """The sentiment of each list of words; neutral without words, as in the release."""
        texts = [", ".join(one) for one in words]
        return await self._all(SENTIMENT, SENTIMENT_SCHEMA, texts, read_sentiment, "neutral")

    async def _all(
        self,
        prompt: str,
        schema: Mapping[str, Any],
        texts: Sequence[str],
        read: Callable[[str], T | None],
        empty: T,
    ) -> list[T | None]:
        """What is read of the reply to each text; equal texts are sent once."""
        sampling = self.config.request("emotions", schema)
        distinct = [text for text in dict.fromkeys(texts) if text.strip()]

        def messages(text: str) -> list[dict[str, str]]:
            # A JSON string, so that the text cannot pass for instructions around it.
            sent = json.dumps(text[:_LONGEST], ensure_ascii=False)
            return [{"role": "system", "content": prompt}, {"role": "user", "content": sent}]

        async with self._chat.connected():
            replies = await asyncio.gather(
                *(self._chat.ask(lambda t=t: messages(t), sampling, read) for t in distinct)
            )
        known = dict(zip(distinct, replies, strict=True))
        return [known[text] if text.strip() else empty for text in texts]


def read_words(reply: str) -> list[str] | None:
    """The words of a reply; None if it is no such object."""
    value = _object(reply).get("emotions")
    if not isinstance(value, list) or len(cast("list[Any]", value)) > _MOST_WORDS:
        return None
    listed = cast("list[Any]", value)
    if not all(isinstance(one, str) for one in listed):
        return None
    # Quotes, commas and brackets would be read as those of the list.
    words = (normalise("".join(c for c in one if c not in "'\",[]")) for one in listed)
    return list(dict.fromkeys(word for word in words if word))


def read_sentiment(reply: str) -> str | None:
    """The sentiment of a reply; None if it is no such object."""
    value = _object(reply).get("sentiment")
    return value if value in SENTIMENTS else None


def extract_run(folder: Path, output: Path, config: EndpointConfig) -> Counter[str]:
    """Write the words of a finished run's answers, and the sentiment of those to MER-UniBench's
    sets of sentiment, as JSON lines with ``sample_id``, ``task`` and ``raw``.

    A killed extraction continues from what it wrote.

    Returns:
        The number of ``answers``, ``failed`` ones, ``requests``, and failed requests by kind.

    Raises:
        EvaluationError: the run has no answers.
    """
    rows = read_predictions(folder / PREDICTIONS)
    extractor = WordExtractor(config)
    how = [config.model, config.request("emotions", WORDS_SCHEMA), WORDS, SENTIMENT]
    keys = [key_of([how, row["task"], str(row["raw"])]) for row in rows]
    done: dict[str, Row] = {}
    if output.exists():
        done = {line["key"]: line for line in read_predictions(output) if line["extracted"]}
    left = [place for place, key in enumerate(keys) if key not in done]
    with progress("answers", len(left), unit="answers") as bar:
        for start in range(0, len(left), _BATCH):
            batch = left[start : start + _BATCH]
            found = asyncio.run(_extract(extractor, [rows[place] for place in batch]))
            for place, raw in zip(batch, found, strict=True):
                done[keys[place]] = {"raw": raw or "", "extracted": raw is not None}
            whole = [key for key in keys if key in done]
            files.write_rows(
                output,
                (
                    {"sample_id": row["sample_id"], "task": row["task"], "key": key}
                    | {name: done[key][name] for name in ("raw", "extracted")}
                    for row, key in zip(rows, keys, strict=True)
                    if key in done
                ),
                ensure_ascii=False,
            )
            bar.advance(len(batch))
            if not any(done[key]["extracted"] for key in whole):
                raise EvaluationError(
                    f"the endpoint {config.base_url} extracted nothing "
                    f"({dict(extractor.counts)}); check it"
                )
    failed = sum(not done[key]["extracted"] for key in keys)
    return Counter({"answers": len(rows), "failed": failed, **extractor.counts})


async def _extract(extractor: WordExtractor, rows: Sequence[Row]) -> list[str | None]:
    """What stands for each answer in a released file; None where the endpoint failed."""
    words = await extractor.words([answer_text(str(row["raw"])) for row in rows])
    raws = [None if one is None else f"[{', '.join(one)}]" for one in words]
    of_sentiment = [
        place
        for place, row in enumerate(rows)
        if words[place] is not None
        and (one := SETS.get(str(row["task"])))
        and one.metric == "sentiment"
    ]
    if of_sentiment:
        named = await extractor.sentiments([words[place] or [] for place in of_sentiment])
        for place, sentiment in zip(of_sentiment, named, strict=True):
            raws[place] = sentiment
    return raws


def _object(reply: str) -> Mapping[str, Any]:
    """The JSON object of a reply, which may stand in a code block; empty if there is none."""
    text = reply[reply.find("{") : reply.rfind("}") + 1]
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def main(argv: Sequence[str]) -> None:
    """``RUN_FOLDER ENDPOINT.yaml OUTPUT.jsonl``."""
    if len(argv) != 3:
        sys.exit(f"usage: python -m {_MODULE} RUN_FOLDER ENDPOINT.yaml OUT.jsonl")
    try:
        config = load_config(EndpointConfig, Path(argv[1]))
        counts = extract_run(Path(argv[0]), Path(argv[2]), config)
    except MmemoError as error:
        sys.exit(f"error: {error}")
    told = f"{counted(counts['answers'], 'answer')}, {counts['failed']} of them not extracted"
    console.print(f"{told}; {counted(counts['requests'], 'request')}. {argv[2]}", soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
