"""Upper bounds for models on a world: classifiers on the true attributes instead of the clips.

They bound the accuracy that a model can reach with one channel, with both, and with the words
alone, and thereby show which difficulty leaves room above the single channels and below a perfect
score.

N clips, A attributes, E emotions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from mmemo.world import emotions as E
from mmemo.world.config import WorldConfig
from mmemo.world.people import ALL_LINES
from mmemo.world.plan import ClipPlan, make_plans
from mmemo.world.rows import attributes

Floats = NDArray[np.float64]


def solve(config: WorldConfig, blur: float = 0.0) -> dict[str, float]:
    """Accuracy on the test clips by observer, and ``{observer}/{subset}`` by conflict subset.

    Observers are ``majority`` (the most common label); ``text`` (the spoken line), ``scene``,
    ``face`` and ``voice``, each a logistic regression on the label; and ``both``, which estimates
    emotion and strength of each channel and takes the stronger one's emotion.

    Args:
        config: the world.
        blur: standard deviation of noise on the attributes, as a model of imperfect perception.
    """
    plans = make_plans(config)
    train, test = plans["train"], plans["test"]
    rng = np.random.default_rng([config.seed, 30])
    inputs = {
        name: (_features(train, name, blur, rng), _features(test, name, blur, rng))
        for name in ("text", "scene", "face", "voice")
    }
    truth = np.array([plan.label for plan in train])
    predictions = {
        name: np.asarray(_classifier().fit(x, truth).predict(y)) for name, (x, y) in inputs.items()
    }
    common = max(E.EMOTIONS, key=lambda emotion: int((truth == emotion).sum()))
    predictions["majority"] = np.full(len(test), common)
    predictions["both"] = _both(train, inputs)
    labels = np.array([plan.label for plan in test])
    subsets = np.array([plan.conflict for plan in test])
    scores: dict[str, float] = {}
    for name, predicted in predictions.items():
        right = predicted == labels
        scores[name] = float(right.mean())
        for subset in ("video_aligned", "audio_aligned", "consistent"):
            scores[f"{name}/{subset}"] = float(right[subsets == subset].mean())
    return scores


def _classifier() -> LogisticRegression:
    quadratic = PolynomialFeatures(2, include_bias=False)
    return make_pipeline(  # pyright: ignore[reportReturnType]
        quadratic, StandardScaler(), LogisticRegression(C=0.03, max_iter=2000)
    )


def _features(
    plans: Sequence[ClipPlan], kind: str, blur: float, rng: np.random.Generator
) -> Floats:
    """(N, A) attributes that an observer sees."""
    if kind == "text":
        return np.array([[float(plan.line == line) for line in ALL_LINES] for plan in plans])
    truth = [attributes(plan) for plan in plans]
    if kind == "scene":
        around = [key for key in truth[0]["video"] if not key.startswith("AU")]
        return np.array(
            [[*(one["video"][key] for key in around), one["audio"]["music"]] for one in truth]
        )
    if kind == "face":
        values = np.array([[one["face"][unit] for unit in E.ACTION_UNITS] for one in truth])
    else:
        values = np.array([[one["audio"][f"{name}_rel"] for name in E.PROSODY] for one in truth])
    return values + blur * rng.normal(size=values.shape)


def _both(train: Sequence[ClipPlan], inputs: dict[str, tuple[Floats, Floats]]) -> NDArray[np.str_]:
    """(N,) emotions: those of each channel, weighted by how likely it is the stronger one."""
    felt = {
        "face": np.array([plan.face_emotion for plan in train]),
        "voice": np.array([plan.voice_emotion for plan in train]),
    }
    strength = {
        "face": np.array([plan.face_strength for plan in train]),
        "voice": np.array([plan.voice_strength for plan in train]),
    }
    names: NDArray[np.str_] = np.array([])
    odds: list[Floats] = []
    strengths: list[tuple[Floats, Floats]] = []
    for name in ("face", "voice"):
        x, y = inputs[name]
        model = _classifier().fit(x, felt[name])
        names = np.asarray(model.classes_)
        odds.append(np.asarray(model.predict_proba(y)))
        p, q = np.asarray(model.predict_proba(x)), odds[-1]
        x, y = np.hstack([x, x**2, p]), np.hstack([y, y**2, q])
        scale = make_pipeline(StandardScaler(), Ridge(3.0)).fit(x, strength[name])
        strengths.append((np.asarray(scale.predict(x)), np.asarray(scale.predict(y))))
    (face_train, face_test), (voice_train, voice_test) = strengths
    # Neutral speakers express nothing, so neither of their channels is the stronger one.
    clear = felt["face"] != "neutral"
    wins = np.array([plan.stronger == "face" for plan in train])
    side = LogisticRegression().fit((face_train - voice_train)[clear, None], wins[clear])
    by_face = np.asarray(side.predict_proba((face_test - voice_test)[:, None]))[:, 1:]
    # Where the channels agree, the agreement is evidence, whichever is stronger.
    score = by_face * odds[0] + (1 - by_face) * odds[1] + 0.5 * odds[0] * odds[1]
    return names[score.argmax(axis=1)]
