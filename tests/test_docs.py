"""The documentation names what exists, and its examples run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import mmemo
from mmemo import content
from mmemo.cli import app
from mmemo.config import parse
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.stages import COMPOSITES, STAGES, config_class

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
STUDIES = sorted((ROOT / "train_configs").rglob("README.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *STUDIES]
FOLDERS = "mmemo|reward|losses|eval|data|benchmarks|tests|launch|train_configs|ds_configs|docs"

# A block of code that stands at the left margin: its language, its title, its text.
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]+)(?::\w+)?(?: [^`]*)?`")
CONFIG_PATH = re.compile(r"\b((?:train_configs|ds_configs)/[\w./-]+\.(?:yaml|json))\b")


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, str]]:
    return [(kind, title, text) for kind, title, text in BLOCK.findall(page.read_text())]


def generated() -> set[Path]:
    """Pages that the site's hooks make."""
    names = [f"reference/config/{name}.md" for name in (*STAGES, *COMPOSITES)]
    names += [*HOOKS.COPIED.values(), *HOOKS.study_pages().values()]
    return {DOCS / name for name in names}


def headings(page: Path) -> set[str]:
    """The anchors of a page: its headings in lower case, words joined by hyphens, and ids."""
    text = page.read_text()
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    names = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", one).strip().lower()) for one in found}
    return names | set(re.findall(r'<a id="([^"]+)">', text))


# What the pages name.


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() or there in generated(), target
        if anchor and there.exists():
            assert anchor in headings(there), target


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_files_that_are_named_exist(page: Path) -> None:
    here = {title for _, title, _ in blocks(page)}
    named = {*CODE_PATH.findall(page.read_text()), *CONFIG_PATH.findall(page.read_text())}
    placeholder = re.compile(r"[A-Z]{4,}|_content")  # NAME, FAMILY; README.md is a real name
    missing = [
        name
        for name in sorted(named)
        if name not in here
        and not placeholder.search(name.replace("README", ""))
        and not (ROOT / name).exists()
    ]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert not [page for page in pages if page not in text]


def test_the_layers_of_the_design_are_those_of_the_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = [
        one for one in project["tool"]["importlinter"]["contracts"] if one["type"] == "layers"
    ]
    held = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
    rows = re.findall(r"^\| (`[^|\\]+(?:\\\| `[^|\\]+)*)\|", (DOCS / "design.md").read_text(), re.M)
    shown = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert [name for name in shown if name in held] == held


def test_every_stage_is_explained() -> None:
    overview = (DOCS / "concepts" / "index.md").read_text()
    assert not [name for name in STAGES if f"`mmemo {name}`" not in overview]


def test_every_loss_and_reward_is_in_the_index_of_papers() -> None:
    index = (DOCS / "papers.md").read_text()
    folders = ("mmemo/losses", "losses", "mmemo/rewards", "reward")
    files = [by_name(path) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    plumbing = {  # they talk to an endpoint, read inputs, or check a config
        "mmemo/rewards/judge/clip_features.py",
        "mmemo/rewards/judge/endpoint.py",
        "mmemo/rewards/judge/media.py",
        "mmemo/rewards/judge/open.py",
        "mmemo/rewards/judge/openai_client.py",
        "mmemo/rewards/judge/reader.py",
        "mmemo/losses/validate.py",
        "mmemo/rewards/opened.py",
    }
    listed = {name for name in files if f"`{name}`" in index}
    assert not [name for name in files if name not in listed | plumbing and "__init__" not in name]


def test_every_paper_that_the_code_names_is_in_the_index() -> None:
    index = (DOCS / "papers.md").read_text()
    folders = ("mmemo", "losses", "reward", "eval")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = {one for path in files for one in re.findall(r"\b2\d{3}\.\d{5}\b", path.read_text())}
    assert len(named) > 30
    assert not [one for one in sorted(named) if one not in index]


# Generated pages.


@pytest.mark.parametrize("name", [*STAGES, *COMPOSITES])
def test_a_config_page_lists_every_key(name: str) -> None:
    page = HOOKS.config_page(name)
    schema = config_class(name).model_json_schema()
    for section in (schema, *schema.get("$defs", {}).values()):
        for key, value in section.get("properties", {}).items():
            assert f"| `{key}` |" in page
            words = str(value.get("description", "")).split()[:3]
            assert " ".join(words).replace("``", "`").partition(":`")[0] in page


def test_the_page_of_label_sets_has_every_set_and_its_example_is_right() -> None:
    from mmemo.answers.label_sets import set_names

    tables = HOOKS.label_set_tables()
    assert all(f"\n## `{name}`\n" in tables for name in set_names())
    assert "| fearful | 06 | 恐惧 | fear, afraid, scared, fearfully | -0.44 | 0.90 | 116°" in tables
    page = (ROOT / "docs/reference/label-sets.md").read_text()
    assert page.count("<!-- label sets -->") == 1
    names: dict[str, Any] = {}
    imports, lines = [], page.partition("```python\n")[2].partition("```")[0].splitlines()
    for line in filter(None, lines):
        code, _, says = line.partition("#")
        if not says:
            imports.append(code)
            continue
        exec("\n".join(imports), names)
        value = eval(code, names)
        shown = f"{value:.2f}" if isinstance(value, float) else repr(value).replace("'", '"')
        assert "same" in says or says.strip().startswith(shown[:10].rstrip(")")), line


def test_a_config_page_gives_type_default_limits_and_description() -> None:
    row = next(line for line in HOOKS.config_page("sft").splitlines() if line.startswith("| `r` |"))
    assert row.split(" | ")[1:4] == ["integer", "`16`", "≥ 1"]
    rate = next(
        line
        for line in HOOKS.config_page("sft").splitlines()
        if line.startswith("| `learning_rate` |")
    )
    assert rate.split(" | ")[1:4] == ["number", "`0.0002`", "> 0"]
    assert "learning rate of AdamW" in rate


# Metadata.


def test_versions_agree() -> None:
    changes = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changes[0] == mmemo.__version__
    assert changes == sorted(changes, reverse=True)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{mmemo.__version__}"\n' in project
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mmemo.__version__


def test_the_citation_has_what_the_format_requires() -> None:
    values = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert values["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= values.keys()
    assert all("name" in one or "family-names" in one for one in values["authors"])


def test_the_changelog_keeps_to_its_format() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(?!Unreleased\])[^\]]+\](.*)$", text, re.MULTILINE)
    assert released
    assert all(re.fullmatch(r" - \d{4}-\d{2}-\d{2}", one) for one in released)
    kinds = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))  # "How ..." has several words
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# Examples.


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with two rows; modules loaded from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "messages": [{"role": "user", "content": "<video>What does she feel?"}],
            "videos": [f"{label}.mp4"],
            "label": label,
            "group": {"speaker": label},
        }
        for label in ("sad", "happy")
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("mmemo_content_"):
            del sys.modules[name]


def write_examples(page: str, work: Path) -> dict[str, str]:
    """Write a page's titled blocks into ``work``; the text by title."""
    found = {title: text for _, title, text in blocks(DOCS / page) if title}
    assert found
    for title, text in found.items():
        path = work / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return found


def yaml_blocks(page: str) -> list[Any]:
    return [yaml.safe_load(text) for kind, _, text in blocks(DOCS / page) if kind == "yaml"]


def test_the_rows_of_your_clips_are_read(work: Path) -> None:
    text = (DOCS / "your-clips.md").read_text()
    shown = re.findall(r"^    ```json\n(.*?)^    ```", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == 4
    manifest = work / "rows.jsonl"
    manifest.write_text("".join(json.dumps(json.loads(one)) + "\n" for one in shown))
    samples = load_samples(DataConfig(manifests=[str(manifest)]))
    assert [one.truth.label for one in samples] == ["sad", "sad", "sad", None]
    assert set(samples[0].media) == {"video", "audio", "face"}
    assert (samples[3].chosen, samples[3].rejected) == ("sad", "happy")


def test_the_example_of_a_reward_is_proved(work: Path) -> None:
    from mmemo.rewards.rewards import RewardConfig
    from mmemo.rewards.validate import proof_rows, prove

    write_examples("extend/reward.md", work)
    (values,) = yaml_blocks("extend/reward.md")
    config = parse(RewardConfig, values["rewards"][1])
    samples = load_samples(DataConfig(manifests=["train.jsonl"]))
    proof = prove(config, proof_rows(samples))
    assert proof.proved
    assert proof.rows == 2


def test_the_example_of_a_loss_is_the_hinge(work: Path) -> None:
    from mmemo.losses.base import PreferenceLogps
    from mmemo.losses.objective import ObjectiveConfig, build_terms

    write_examples("extend/loss.md", work)
    (values,) = yaml_blocks("extend/loss.md")
    built = build_terms(parse(ObjectiveConfig, values["objective"]).terms)
    assert [one.name for one in built] == ["hinge", "sft"]
    policy = {a: torch.tensor([[-x]], requires_grad=True) for a, x in PAIR.items()}
    there = torch.ones(1, 1, dtype=torch.bool)
    logps = PreferenceLogps(
        policy={("input", a): x for a, x in policy.items()},
        reference={("input", a): torch.zeros(1, 1) for a in PAIR},
        mask=dict.fromkeys(PAIR, there),
        changed=dict.fromkeys(PAIR, there),
        present={("input", a): torch.tensor([a != "hallucinated"]) for a in PAIR},
    )
    loss = built[0].term(logps)
    assert loss.rows.tolist() == pytest.approx([1 - 0.1 * (4.0 - 1.0)])
    loss.rows.sum().backward()
    assert policy["chosen"].grad is not None
    assert policy["chosen"].grad.item() < 0 < policy["spurious"].grad.item()  # type: ignore[union-attr]


PAIR: dict[Any, float] = {"chosen": 1.0, "spurious": 4.0, "hallucinated": 9.0}


def test_the_example_of_a_benchmark_is_valid(work: Path) -> None:
    from mmemo.data.adapter import write_manifest
    from mmemo.evaluation.benchmark import load_benchmark, validate
    from mmemo.evaluation.config import EvalConfig

    write_examples("extend/benchmark.md", work)
    (values,) = yaml_blocks("extend/benchmark.md")
    root = work / "ACTORS"
    (root / "clips").mkdir(parents=True)
    table = "file,actor,emotion,arousal\na.mp4,1,sad,2\nb.mp4,1,bored,1\nc.mp4,2,angry,6.5\n"
    (root / "labels.csv").write_text("\ufeff" + table, encoding="utf-8")
    for name in ("a", "b"):
        (root / f"clips/{name}.mp4").touch()
    made = write_manifest("eval/actors.py", root, work / "actors.jsonl")
    assert (made.missing, [one.row for one in made.excluded]) == (("clips/c.mp4",), ["b.mp4"])
    data = {"manifests": ["actors.jsonl"]}
    whole = {**values, "output_dir": "out", "model": {"path": "model"}, "data": data}
    config = parse(EvalConfig, whole)
    benchmark = load_benchmark(config.benchmark.path)
    questions = benchmark.questions(config.data)
    validate(benchmark, questions)
    assert [(one.task, one.truth) for one in questions] == [("emotion", "sad"), ("arousal", 2.0)]
    assert questions[0].turns[0].text.startswith("<video><audio>Which emotion does")
    assert questions[1].kind is not None
    assert questions[1].kind.read("<answer>6.5</answer>").answer == 6.5


def test_the_example_of_a_stage_runs_in_a_pipeline(work: Path) -> None:
    write_examples("extend/stage.md", work)
    done = CliRunner().invoke(app, ["pipeline", "counting.yaml"])
    assert done.exit_code == 0, done.exception
    counts = json.loads((work / "runs" / "counting" / "counts" / "counts.json").read_text())
    assert counts == {"happy": 1, "sad": 1}
    schema = CliRunner().invoke(app, ["schema", "label_counts.py:STAGE"])
    assert set(json.loads(schema.stdout)["properties"]) == {"output_dir", "data"}


def test_the_example_of_a_backbone_is_the_untouched_model(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmemo.models import backbones
    from mmemo.models.build import ModelConfig, load_model
    from tests.models.native_files import FED
    from tests.models.qwen.test_omni import clip

    examples = write_examples("extend/backbone.md", work)
    (title,) = examples
    assert examples[title] == (ROOT / title).read_text()
    kind = content.load(f"{title}:NativeQwen2VL")
    monkeypatch.setitem(backbones.BACKBONES, "qwen2_vl", kind)  # type: ignore[arg-type]

    folder = save_qwen2_vl(work / "model")
    values = {"path": str(folder), "native": FED, "sampling": {"frames": 4}}
    model: Any = load_model(parse(ModelConfig, values)).model.double()
    one = clip(1, frames=4)
    (features,) = model.encode("video", [one])
    ids, kinds = model.backbone.expand("<video>What does she feel?", {"video": features})
    tokens = torch.tensor([ids])
    mask = torch.ones_like(tokens)
    batch = {
        "input_ids": tokens,
        "attention_mask": mask,
        "modality_ids": torch.tensor([kinds]),
        "clip_index": torch.tensor([0]),
        "video_features": features["x"][None],
        "video_features_mask": torch.ones(1, len(features["x"]), dtype=torch.bool),
        "video_grid": features["grid"][None],
        "video_seconds_per_grid": features["seconds_per_grid"][None],
    }
    patches, grid, _ = model.backbone.pixels(one)
    plain = kind.released_class()
    with torch.no_grad():
        ours = model.logits(batch)
        theirs = plain.forward(
            model,
            input_ids=tokens,
            attention_mask=mask,
            mm_token_type_ids=2 * (tokens == model.config.video_token_id).int(),
            pixel_values_videos=patches.double(),
            video_grid_thw=grid[None],
        ).logits
    torch.testing.assert_close(ours, theirs)


def save_qwen2_vl(folder: Path) -> Path:
    """A tiny Qwen2-VL with random weights, as its makers release it."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from tests.models.native_files import TEMPLATE
    from tests.models.qwen.test_vl import train_tokenizer

    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids: Any = {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,  # so that a wrong position or feature moves the logits
        },
        initializer_range=0.2,
        **ids,
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_example_of_an_encoder_makes_features(work: Path) -> None:
    from mmemo.models.build import ModelConfig, load_model
    from tests.models.qwen.test_omni import clip

    examples = write_examples("extend/encoder.md", work)
    content.load_module("mmemo/models/composed/patch_means.py")  # registers the encoder
    values = yaml.safe_load(examples["patch_means.yaml"])
    model: Any = load_model(parse(ModelConfig, values["model"]), ["a text", "another"]).model
    one = clip(1, frames=4)
    (features,) = model.encode("video", [one])
    assert features["x"].shape == (4 * 2 * 2, 32)
    # Frames are resized to 64 x 64 and normalised; a feature is linear in the mean of its quarter.
    (darker,) = model.encode("video", [replace(one, frames=one.frames // 2)])
    assert not torch.equal(features["x"], darker["x"])
    assert parse(config_class("sft"), values).output_dir == "runs/patch_means"  # type: ignore[attr-defined]


def test_the_example_of_a_data_set_writes_a_manifest(work: Path) -> None:
    from mmemo.data.adapter import write_manifest

    write_examples("extend/dataset.md", work)
    names = ("Actor_01/01-01-03-02-01-01-01", "Actor_22/01-01-04-01-01-01-22")
    silent = "Actor_01/02-01-03-01-01-01-01"  # picture without sound
    for name in (*names, silent):
        path = work / "RAVDESS" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    made = write_manifest("data/ravdess.py", work / "RAVDESS", work / "all.jsonl")
    assert [one.truth.label for one in made.samples] == ["happy", "sad"]
    assert made.unused == (f"{silent}.mp4",)
    part = write_manifest("data/ravdess.py", work / "RAVDESS", work / "t.jsonl", {"split": "train"})
    (one,) = load_samples(DataConfig(manifests=["t.jsonl"]))
    assert one == replace(part.samples[0], source=one.source)
    assert one.group == {"speaker": "01", "gender": "male", "intensity": "strong"}
    assert set(one.media) == {"video", "audio", "face"}
