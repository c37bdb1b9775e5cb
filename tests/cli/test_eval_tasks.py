"""Tasks of lm-eval on loaded models: with the package, where it is installed; and what is said without it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lowbit.bench.tasks import run_tasks
from lowbit.errors import PlanError
from outcome import Lowbit

TASK = """
task: lowbit_rivers
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
QUESTIONS = [
    {"question": "The town lies on the", "choices": ["river", "is of"], "answer": 0},
    {"question": "He was born in", "choices": ["the of a", "the city"], "answer": 1},
    {"question": "It was the first of", "choices": ["river was", "the"], "answer": 0},
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of two questions that are answered right and one that isn't."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rivers.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    (folder / "rivers.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the package lm-eval")
@pytest.mark.filterwarnings("default")
def test_a_task_of_the_package(
    lowbit: Lowbit, small: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert lowbit("quantize", small, tmp_path / "model", "--method", "nf4").status == 0
    words = ("eval", tmp_path / "model", "--tasks", "lowbit_rivers", "--task-path", tasks)
    report = lowbit(*words, "--json").json
    assert set(report) == {"bits_per_weight", "memory_bytes", "tasks"}
    scores = report["tasks"]["lowbit_rivers"]
    assert scores["acc"] == pytest.approx(2 / 3)
    assert scores["acc_stderr"] == pytest.approx(1 / 3)
    assert "there is no folder" in lowbit("eval", small, "--tasks", "x", "--task-path", tmp_path / "none").mistake
    assert "no task is named" in lowbit("eval", small, "--tasks", ",").mistake


def test_without_the_package(lowbit: Lowbit, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # type: ignore[arg-type]
    assert "pip install lm-eval" in lowbit("eval", small, "--tasks", "arc_easy").mistake


class Harness:
    """Stands for the package: what it is asked, and what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        self.asked: dict[str, Any] = {}
        self.answer = answer
        modules = {
            "lm_eval": SimpleNamespace(simple_evaluate=self.evaluate),
            "lm_eval.tasks": SimpleNamespace(TaskManager=self.manager),
            "lm_eval.models.huggingface": SimpleNamespace(HFLM=self.wrap),
        }
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update(vars(contents))
            monkeypatch.setitem(sys.modules, name, module)

    def manager(self, include_path: str | None, include_defaults: bool = True) -> Any:
        self.asked["include_path"] = include_path
        own = [] if include_path is None else ["mine"]
        return SimpleNamespace(all_tasks=[*own, "arc_easy", "hellaswag"] if include_defaults else own)

    def wrap(self, **options: Any) -> Any:
        self.asked["wrapped"] = options
        return "wrapped"

    def evaluate(self, **options: Any) -> Any:
        self.asked["evaluated"] = options
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"results": self.answer}


def test_what_the_package_is_asked_and_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01, "sample_len": 4},
        "hellaswag": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
    }
    harness = Harness(monkeypatch, answer)
    scores = run_tasks(
        "model", "tokenizer", ["arc_easy", "hellaswag"], include=tmp_path, limit=4, shots=2, batch_size=8
    )
    assert scores == {"arc_easy": {"acc": 0.5, "acc_stderr": 0.01}, "hellaswag": {"exact_match (strict)": 0.25}}
    assert harness.asked["include_path"] == str(tmp_path)
    assert harness.asked["wrapped"] == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 8}
    evaluated = harness.asked["evaluated"]
    assert evaluated["task_manager"].all_tasks == ["mine", "arc_easy", "hellaswag"]
    assert (evaluated["model"], evaluated["tasks"]) == ("wrapped", ["arc_easy", "hellaswag"])
    assert (evaluated["limit"], evaluated["num_fewshot"]) == (4, 2)


def test_refuses_unknown_tasks_and_data_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Harness(monkeypatch, ConnectionError("Couldn't reach the hub"))
    with pytest.raises(PlanError, match="no task 'winogrande', 'x'; 'lm_eval ls tasks' lists them"):
        run_tasks("model", "tokenizer", ["winogrande", "arc_easy", "x"])
    with pytest.raises(PlanError, match="no task is named"):
        run_tasks("model", "tokenizer", [])
    with pytest.raises(PlanError, match="there is no folder"):
        run_tasks("model", "tokenizer", ["arc_easy"], include=tmp_path / "none")
    with pytest.raises(PlanError, match="the data of arc_easy can't be loaded: Couldn't reach the hub"):
        run_tasks("model", "tokenizer", ["arc_easy"])


def test_the_command_prints_scores_beside_the_perplexity(
    lowbit: Lowbit, small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    harness = Harness(monkeypatch, {"mine": {"acc,none": 0.5, "acc_stderr,none": 0.01, "f1,strict": 0.25}})
    words = ("eval", small, "--tasks", " mine", "--task-path", tmp_path, "--limit", 3, "--shots", 0, "--batch-size", 2)
    shown = lowbit(*words, "--text", text, "--seq-len", 64, "--max-windows", 1).out
    assert "mine              acc 0.5000 ± 0.0100, f1 (strict) 0.2500\n" in shown
    assert "perplexity        " in shown
    evaluated = harness.asked["evaluated"]
    assert evaluated["task_manager"].all_tasks == ["mine"]
    assert (evaluated["limit"], evaluated["num_fewshot"]) == (3, 0)
    assert harness.asked["wrapped"]["batch_size"] == 2
    assert type(harness.asked["wrapped"]["pretrained"]).__name__ == "LlamaForCausalLM"
