"""The data sets that GPTQ's users know by name, through the package ``datasets``.

The same repositories, files and splits as Optimum takes for them: WikiText-2's raw training text, the first file of
C4's English training part, Penn Treebank's training sentences.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from lowbit.errors import PlanError

NAMES: Final = ("wikitext2", "c4", "c4-new", "ptb", "ptb-new")
_OTHERWISE: Final = "or give a local text file instead (dataset='calibration.txt'), which works as well"


def named_text(name: str) -> str:
    """WikiText-2 or Penn Treebank as one text.

    Raises:
        PlanError: the package is missing or the hub doesn't give the data.
    """
    if name == "wikitext2":
        rows = _load(name, "Salesforce/wikitext", "wikitext-2-raw-v1")["text"]
        return "".join(row or " \n" for row in rows)
    return " ".join(_load(name, "ptb_text_only", "penn_treebank")["sentence"])


def named_rows(name: str) -> Any:
    """C4's documents, a sized ``Dataset`` of records with a ``text``.

    Raises:
        PlanError: the package is missing or the hub doesn't give the data.
    """
    return _load(name, "allenai/c4", data_files={"train": "en/c4-train.00000-of-01024.json.gz"})


def is_rows(name: str) -> bool:
    """Whether a name stands for separate documents and not for one text."""
    return name.startswith("c4")


def _load(name: str, *arguments: str, **options: Any) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise PlanError(
            f"the dataset '{name}' needs the package 'datasets', which is not installed (pip install datasets);"
            f" install it, {_OTHERWISE}"
        ) from error
    try:
        return datasets.load_dataset(*arguments, split="train", **options)
    except Exception as error:  # the network's and the package's own errors have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlanError(
            f"the dataset '{name}' ({arguments[0]} on the hub) can't be loaded: {reason[:300]};"
            f" check the connection, {_OTHERWISE}"
        ) from error
