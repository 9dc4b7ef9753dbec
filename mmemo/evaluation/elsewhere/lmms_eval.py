"""Sample logs of lmms-eval, ``*_samples_TASK.jsonl``, as ``--log_samples`` writes them.

A line has ``doc_id`` (the place of the document, which identifies nothing), ``doc``, ``target``,
``resps`` (one list of texts a request) and ``filtered_resps``. The first text of ``resps`` is read,
or of ``filtered_resps`` where the log has no other; what a filter cut out is not what was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.errors import DataError
from mmemo.evaluation.elsewhere import jsonl
from mmemo.evaluation.elsewhere.prediction import Columns, Prediction, predictions_of


def read(path: Path, columns: Columns) -> list[Prediction]:
    """The predictions of a sample log. An id is a field of ``doc``.

    Raises:
        DataError: a line is damaged or has no response.
    """
    # A document may identify itself by nothing that is known here; then only --by-position helps.
    return predictions_of(
        _rows(path), columns, file=str(path), texts=("lmms_eval_text",), need_id=False
    )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, row in jsonl.rows(path):
        text = _first(row.get("resps"))
        text = _first(row.get("filtered_resps")) if text is None else text
        if text is None:
            raise DataError(f"{where}: has neither 'resps' nor 'filtered_resps'", file=str(path))
        doc = row.get("doc")
        own: Mapping[str, Any] = doc if isinstance(doc, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]
        # The truth is the target; the document's own "answer" may be a letter of other choices.
        hidden = ("truth", "gold", "label", "gt", "ground_truth", "answer")
        plain = {key: value for key, value in own.items() if str(key).lower() not in hidden}
        yield where, {**plain, "target": row.get("target"), "lmms_eval_text": text}


def _first(value: Any) -> str | None:
    """The first text in nested lists."""
    while isinstance(value, list | tuple):
        listed: Sequence[Any] = value  # pyright: ignore[reportUnknownVariableType]
        if not listed:
            return ""
        value = listed[0]
    if isinstance(value, Mapping):  # some versions log a response with its token counts
        fields: Mapping[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
        value = fields.get("text")
    return value if isinstance(value, str) else None
