"""llama.cpp's own continuation of a text under each ``*.gguf`` of a folder, greedy: ``FOLDER PROMPT COUNT``.

Writes ``texts.json``, by the file's name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def continuation(path: Path, prompt: str, count: int) -> str:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 128, 1, False, 1
    server = xllamacpp.Server(params)
    answer: Any = server.handle_completions({"prompt": prompt, "n_predict": count, "temperature": 0})
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    return str(answer["content"] if "content" in answer else answer["choices"][0]["text"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    texts = {path.stem: continuation(path, sys.argv[2], int(sys.argv[3])) for path in sorted(folder.glob("*.gguf"))}
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
