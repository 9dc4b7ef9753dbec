"""LongEmotion: emotion in long texts, as six tasks: 200 + 200 classifications, 136 detections, 120
questions, 100 conversations, 150 summaries, and expression in situations of eight emotions.

LongEmotion (arXiv 2509.07403); get it from https://huggingface.co/datasets/LongEmotion/LongEmotion,
whose card says the licence. Layout, in whatever subfolders::

    Emotion_Classification_Emobench.jsonl    id content subject label choices source length
    Emotion_Classification_Finentity.jsonl   the same
    Emotion_Detection.jsonl                  text: [{index, context}, ...], ground_truth: an index
    Emotion_QA.jsonl                         number problem answer source context
    Emotion_Conversations.jsonl              id stages: [{stage, conversations: [{role, context}]}]
    Emotion_Summary.jsonl                    id, three parts of a report, five parts of its summary
    Emotion_Expression_Situations.json       emotions, their factors, their scenarios
    Emotion_Expression_Questionnaires.json   the questions of PANAS

The release's own description of conversations and expression is simpler than the files. Parts of
reports are texts or lists of texts, choices a list or its JSON text.

``rag=true`` shortens what is read to the ``top`` passages of ``size`` words that are most like the
question (BM25, :mod:`mmemo.data.texts.retrieval`), where the paper ranks by bge-m3 and keeps the
whole text as well. Detection needs all of its texts and expression has none, so both stay as they
are.

    mmemo manifest data/texts/longemotion.py --root LongEmotion --output long.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.tables import find_file, read_json, read_table
from mmemo.data.retrieval import retrieved
from mmemo.errors import ConfigError

COLUMNS = ("task", "gold", "choices")
STAGES = 4
POINTS = {"quarter": 1, "half": 2, "three_quarters": 3}
"""Where a conversation is cut, in quarters of the client's turns of a stage."""
PARTS = ("case_description", "consultation_process", "experience_and_reflection")
FIELDS = {
    "causes": "Causes",
    "symptoms": "Symptoms",
    "treatment_process": "Treatment process",
    "characteristics_of_illness": "Characteristics of the illness",
    "treatment_effect": "Treatment effect",
}
PUBLISHED = {
    "task=classification": {"": 400},
    "task=detection": {"": 136},
    "task=qa": {"": 120},
    "task=conversations": {"": 100 * STAGES * len(POINTS)},
    "task=summary": {"": 150},
}
Rows = Iterator[dict[str, Any] | Excluded]
Shorten = Callable[[str, str], str]
CLASSIFY = (
    "{}\n\nWhich emotion does {} finally feel in this text? Choose one of: {}.\nAnswer with JSON: "
    '```json\n{{"Emotion": "..."}}\n```'
)
DETECT = (
    "Below are {} texts. All but one express the same emotion.\n\n{}\n\nWhich one expresses "
    'another emotion? Answer with JSON: ```json\n{{"index": ...}}\n```'
)
ANSWER = "{}\n\nAnswer this question about the text as briefly as you can: {}"
COUNSEL = (
    "You are a counsellor. This is your conversation with a client so far.\n\n{}\n\nWrite your "
    "next reply to the client, and nothing else."
)
SUMMARISE = (
    "This is a report of a psychological consultation.\n\n{}\n\nSummarise it as a JSON object with "
    "the keys {}."
)
EXPRESS = (
    "Imagine that you are in this situation: {}\n\nFirst rate how much you feel each of these, "
    "from 1 (very slightly or not at all) to 5 (extremely), with a short reason: {}.\n\nThen write "
    "about your feelings in five parts: your immediate reaction; how you make sense of the "
    "situation; how your feelings show in your body; how you handle them; what you take from them "
    "for the future."
)


def rows(
    root: Path, *, task: str = "all", rag: str = "false", top: str = "4", size: str = "128"
) -> Rows:
    """The rows of one ``task``, or of all: classification, detection, qa, conversations, summary
    and expression. ``rag``, ``top`` and ``size``: see above."""
    need_option("task", task, ("all", *TASKS))
    need_option("rag", rag, ("false", "true"))
    if not (top.isdecimal() and size.isdecimal() and int(top) and int(size)):
        raise ConfigError(f"top is '{top}' and size '{size}'; give whole numbers above 0")

    def shorten(text: str, query: str) -> str:
        return retrieved(text, query, int(top), int(size)) if rag == "true" else text

    for name, make in TASKS.items():
        if task in ("all", name):
            yield from make(root, shorten)


def _classification(root: Path, shorten: Shorten) -> Rows:
    for source in ("Emobench", "Finentity"):
        for name, one in _read(root, f"Emotion_Classification_{source}.jsonl"):
            if isinstance(one, Excluded):
                yield one
                continue
            text, subject, label = (_text(one.get(key)) for key in ("content", "subject", "label"))
            choices = list(dict.fromkeys(_list(one.get("choices"))))
            gold = next((c for c in choices if c.casefold() == label.casefold()), None)
            if not text or gold is None or len({c.casefold() for c in choices}) < 2:
                reason = "label outside its choices" if text else "no text"
                yield Excluded(name, reason, f"{label} of {', '.join(choices)}")
                continue
            yield {
                "sample_id": name,
                "task": "classification",
                "prompt": CLASSIFY.format(shorten(text, subject), subject, ", ".join(choices)),
                "choices": choices,
                "gold": gold,
                "group": {"source": source},
            }


def _detection(root: Path, shorten: Shorten) -> Rows:
    for name, one in _read(root, "Emotion_Detection.jsonl"):
        if isinstance(one, Excluded):
            yield one
            continue
        texts = {
            _text(part.get("index")): _text(part.get("context")) for part in _parts(one, "text")
        }
        gold = _text(one.get("ground_truth"))
        if gold not in texts or len(texts) < 2:
            yield Excluded(name, "no text of the right index", gold)
            continue
        listed = "\n\n".join(f"{index}: {text}" for index, text in texts.items())
        yield {
            "sample_id": name,
            "task": "detection",
            "prompt": DETECT.format(len(texts), listed),
            "choices": list(texts),
            "gold": gold,
        }


def _qa(root: Path, shorten: Shorten) -> Rows:
    for name, one in _read(root, "Emotion_QA.jsonl"):
        if isinstance(one, Excluded):
            yield one
            continue
        text, question, answer = (_text(one.get(key)) for key in ("context", "problem", "answer"))
        if not question or not answer:
            yield Excluded(name, "no question or no answer", question)
            continue
        yield {
            "sample_id": name,
            "task": "qa",
            "prompt": ANSWER.format(shorten(text, question), question),
            "gold": answer,
            "group": {"speaker": _text(one.get("source")) or name},
        }


def _conversations(root: Path, shorten: Shorten) -> Rows:
    """Cut at 1/4, 1/2 and 3/4 of the client's turns of each stage, with all earlier stages."""
    for name, one in _read(root, "Emotion_Conversations.jsonl"):
        if isinstance(one, Excluded):
            yield one
            continue
        before: list[str] = []
        for number, stage in enumerate(_parts(one, "stages"), start=1):
            turns = _parts(stage, "conversations")
            said = [f"{_text(t.get('role'))}: {_text(t.get('context'))}" for t in turns]
            clients = [p for p, t in enumerate(turns) if _text(t.get("role")) == "Client"]
            if not clients:
                yield Excluded(f"{name}-{number}", "no turn of the client")
            for point, quarters in POINTS.items() if clients else ():
                last = clients[quarters * len(clients) // 4]
                reply = turns[last + 1] if last + 1 < len(turns) else {}
                where = f"{name}-{number}-{point}"
                if _text(reply.get("role")) != "Counselor" or not _text(reply.get("context")):
                    yield Excluded(where, "no reply follows")
                    continue
                earlier = shorten("\n".join([*before, *said[:last]]), _text(turns[last]["context"]))
                yield {
                    "sample_id": where,
                    "task": f"conversation{min(number, STAGES)}",
                    "prompt": COUNSEL.format(f"{earlier}\n{said[last]}".strip()),
                    "gold": _text(reply["context"]),
                    "group": {"speaker": name, "point": point},
                }
            before += said


def _summary(root: Path, shorten: Shorten) -> Rows:
    for name, one in _read(root, "Emotion_Summary.jsonl"):
        if isinstance(one, Excluded):
            yield one
            continue
        read = {key: _text(one.get(key)) for key in (*PARTS, *FIELDS)}
        if not any(read[key] for key in PARTS) or not any(read[key] for key in FIELDS):
            yield Excluded(name, "no report or no summary")
            continue
        report = "\n".join(f"{key.replace('_', ' ').capitalize()}: {read[key]}" for key in PARTS)
        yield {
            "sample_id": name,
            "task": "summary",
            "prompt": SUMMARISE.format(
                shorten(report, " ".join(FIELDS.values())), ", ".join(FIELDS)
            ),
            "gold": "\n".join(f"{title}: {read[key]}" for key, title in FIELDS.items()),
        }


def _expression(root: Path, shorten: Shorten) -> Rows:
    found: Any = read_json(find_file(root, "Emotion_Expression_Situations.json"))
    asked: Any = read_json(find_file(root, "Emotion_Expression_Questionnaires.json"))
    questions = asked[0]["questions"]
    words = list(questions.values()) if isinstance(questions, dict) else questions
    for emotion in found["emotions"]:
        title = _text(emotion.get("name") or emotion.get("emotion_name"))
        for f, factor in enumerate(emotion["factors"], start=1):
            for s, scenario in enumerate(factor["scenarios"], start=1):
                name = f"longemotion-expression-{title}-{f}-{s}"
                if not _text(scenario):
                    yield Excluded(name, "no situation")
                    continue
                yield {
                    "sample_id": name,
                    "task": "expression",
                    "prompt": EXPRESS.format(_text(scenario), ", ".join(map(_text, words))),
                    "gold": title,
                    "group": {"emotion": title},
                }


TASKS: dict[str, Callable[[Path, Shorten], Rows]] = {
    "classification": _classification,
    "detection": _detection,
    "qa": _qa,
    "conversations": _conversations,
    "summary": _summary,
    "expression": _expression,
}


def _read(root: Path, file: str) -> Iterator[tuple[str, dict[str, Any] | Excluded]]:
    """The objects of a file with a name for each."""
    short = file.removeprefix("Emotion_").removesuffix(".jsonl").casefold().replace("_", "-")
    for place, one in enumerate(read_table(find_file(root, file)), start=1):
        yield f"longemotion-{short}-{place}", one


def _parts(one: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [part for part in one.get(key) or () if isinstance(part, dict)]


def _list(value: Any) -> list[str]:
    """A list of texts, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = value.split(",")
    return [_text(one) for one in value or () if _text(one)]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(filter(None, map(_text, value)))
    return "" if value is None else str(value).strip()
