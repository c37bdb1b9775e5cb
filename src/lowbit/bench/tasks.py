"""Benchmarks of the package ``lm-eval`` (EleutherAI's harness) on models that are loaded already."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import PlanError

Scores = dict[str, dict[str, float]]


def check_lm_eval() -> None:
    """Refuse tasks where the package is missing.

    Raises:
        PlanError: says how to install it.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise PlanError(
            f"tasks need the package lm-eval, which can't be imported ({error}): pip install lm-eval"
        ) from error


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> Any:
    """The harness' manager of tasks, once it knows all of them.

    Args:
        tasks: names of tasks and groups.
        include: a folder with further tasks in YAML files.

    Raises:
        PlanError: the package is missing, or it has no such task.
    """
    check_lm_eval()
    if not tasks:
        raise PlanError("no task is named; give names such as arc_easy,hellaswag")
    if include is not None and not include.is_dir():
        raise PlanError(f"there is no folder '{include}' with tasks")
    manager_of = importlib.import_module("lm_eval.tasks").TaskManager
    if include is not None:
        # The harness reads thousands of files to know its own tasks, which takes long.
        manager = manager_of(include_path=str(include), include_defaults=False)
        if not _unknown(tasks, manager):
            return manager
    manager = manager_of(include_path=None if include is None else str(include))
    unknown = _unknown(tasks, manager)
    if unknown:
        raise PlanError(f"lm-eval has no task {', '.join(map(repr, unknown))}; 'lm_eval ls tasks' lists them")
    return manager


def _unknown(tasks: Sequence[str], manager: Any) -> list[str]:
    known = set(manager.all_tasks)
    return [name for name in tasks if name not in known]


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    manager: Any = None,
    include: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
) -> Scores:
    """Run tasks.

    Args:
        model: a causal language model of Transformers, on its device; dense or quantized.
        tokenizer: its tokenizer.
        tasks: names of tasks and groups.
        manager: what :func:`check_tasks` gave, where it was called before.
        include: a folder with further tasks in YAML files.
        limit: examples of each task; None takes all.
        shots: solved examples before each question; None takes what each task says.
        batch_size: examples per forward pass.

    Returns:
        Of each task and group, its metrics with their standard errors, as the harness calls them (``acc``,
        ``acc_stderr``).

    Raises:
        PlanError: the package is missing, it has no such task, or a task's data can't be had.
    """
    manager = manager or check_tasks(tasks, include)
    harness = importlib.import_module("lm_eval.models.huggingface")
    # Given an object, the harness leaves its device and dtype alone.
    wrapped = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = importlib.import_module("lm_eval").simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise PlanError(f"the data of {', '.join(tasks)} can't be loaded: {error}") from error
    return {name: _scores(values) for name, values in found["results"].items()}


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers under plain names: the harness writes ``acc,none`` for a metric without a filter."""
    scores = {}
    for name, value in values.items():
        metric, _, by = name.partition(",")
        if by and isinstance(value, int | float):
            scores[metric if by == "none" else f"{metric} ({by})"] = float(value)
    return scores
