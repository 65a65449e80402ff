"""Names of datasets -> where they lie and which of their columns are which: SWIFT's names, and files of a user's own names.

A table of facts and a reader of `--dataset_info` files; nothing is fetched or opened here but that file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftlite.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One dataset: its id on ModelScope and on Hugging Face (or a local `path`), subsets, and columns (theirs -> ours).

    `prefer` narrows a hub folder to the data files whose names hold it, if there are such.
    """

    ms: str = ""
    hf: str = ""
    subsets: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    prefer: str = ""
    path: str = ""


_QA = {"question": "query", "answer": "response"}
_TASK = {"instruction": "query", "output": "response"}
_PROMPT = {"prompt": "query", "answer": "response"}

# SWIFT 2.x's names of text datasets for fine-tuning (3.x and 4.x name the ids themselves).
CATALOG: dict[str, Entry] = {
    # general
    "alpaca-zh": Entry("AI-ModelScope/alpaca-gpt4-data-zh", "llm-wizard/alpaca-gpt4-data-zh"),
    "alpaca-en": Entry("AI-ModelScope/alpaca-gpt4-data-en", "vicgalle/alpaca-gpt4"),
    "alpaca-cleaned": Entry("AI-ModelScope/alpaca-cleaned", "yahma/alpaca-cleaned"),
    "multi-alpaca": Entry("damo/nlp_polylm_multialpaca_sft"),
    "sharegpt-gpt4-mini": Entry("AI-ModelScope/sharegpt_gpt4", "shibing624/sharegpt_gpt4", prefer="sharegpt_gpt4"),
    "sharegpt-gpt4": Entry("AI-ModelScope/sharegpt_gpt4", "shibing624/sharegpt_gpt4"),
    "ms-bench": Entry("iic/ms_bench"),
    "instinwild": Entry("wyj123456/instinwild"),
    "instinwild-zh": Entry("wyj123456/instinwild", subsets=("default",)),
    "instinwild-en": Entry("wyj123456/instinwild", subsets=("subset",)),
    "cot-en": Entry("YorickHe/CoT"),
    "cot-zh": Entry("YorickHe/CoT_zh"),
    "instruct-en": Entry("wyj123456/instruct", columns={"prompt": "query", "completion": "response"}),
    "firefly-zh": Entry(
        "AI-ModelScope/firefly-train-1.1M", "YeungNLP/firefly-train-1.1M", columns={"input": "query", "target": "response"}
    ),
    "gpt4all-en": Entry("wyj123456/GPT4all"),
    "tulu-v2-sft-mixture": Entry("AI-ModelScope/tulu-v2-sft-mixture", "allenai/tulu-v2-sft-mixture"),
    "open-orca": Entry("AI-ModelScope/OpenOrca", "Open-Orca/OpenOrca", columns={"question": "query"}),
    "slim-orca": Entry("swift/SlimOrca", "Open-Orca/SlimOrca"),
    "open-hermes": Entry("swift/OpenHermes-2.5", "teknium/OpenHermes-2.5"),
    "no-robots": Entry("swift/no_robots", "HuggingFaceH4/no_robots"),
    "ultrachat-200k": Entry("swift/ultrachat_200k", "HuggingFaceH4/ultrachat_200k", prefer="train_sft"),
    "deepctrl-sft": Entry("AI-ModelScope/deepctrl-sft-data"),
    "coig-cqia": Entry("AI-ModelScope/COIG-CQIA", "m-a-p/COIG-CQIA"),
    "long-alpaca-12k": Entry("AI-ModelScope/LongAlpaca-12k", "Yukang/LongAlpaca-12k"),
    "dolly-15k": Entry(
        "AI-ModelScope/databricks-dolly-15k", "databricks/databricks-dolly-15k", columns={"context": "input", "response": "output"}
    ),
    # agents
    "ms-agent": Entry("iic/ms_agent"),
    "ms-agent-for-agentfabric": Entry("AI-ModelScope/ms_agent_for_agentfabric"),
    # code
    "code-alpaca-en": Entry("wyj123456/code_alpaca_en", "sahil2801/CodeAlpaca-20k"),
    "codefuse-python-en": Entry("codefuse-ai/CodeExercise-Python-27k", columns={"chat_rounds": "messages"}),
    "codefuse-evol-instruction-zh": Entry("codefuse-ai/Evol-instruction-66k", columns=_TASK),
    # medicine, law
    "medical-en": Entry("huangjintao/medical_zh", subsets=("en",), columns={"input": "query", "output": "response"}),
    "medical-zh": Entry("huangjintao/medical_zh", subsets=("zh",), columns=_TASK),
    "disc-med-sft-zh": Entry("AI-ModelScope/DISC-Med-SFT", "Flmc/DISC-Med-SFT"),
    "lawyer-llama-zh": Entry("AI-ModelScope/lawyer_llama_data", "Skepsun/lawyer_llama_data", columns={**_TASK, "history": "-"}),
    "disc-law-sft-zh": Entry("AI-ModelScope/DISC-Law-SFT", "ShengbinYue/DISC-Law-SFT", columns={"input": "query", "output": "response"}),
    # mathematics, SQL
    "school-math-zh": Entry("AI-ModelScope/school_math_0.25M", "BelleGroup/school_math_0.25M"),
    "open-platypus-en": Entry("AI-ModelScope/Open-Platypus", "garage-bAInd/Open-Platypus"),
    "math-instruct": Entry("AI-ModelScope/MathInstruct", "TIGER-Lab/MathInstruct", columns=_TASK),
    "text2sql-en": Entry("AI-ModelScope/texttosqlv2_25000_v2", "Clinton/texttosqlv2_25000_v2"),
    "sql-create-context-en": Entry(
        "AI-ModelScope/sql-create-context",
        "b-mc2/sql-create-context",
        columns={"question": "instruction", "context": "input", "answer": "output"},
    ),
    # text and classes
    "advertise-gen-zh": Entry("lvjianjin/AdvertiseGen", "shibing624/AdvertiseGen", columns={"content": "query", "summary": "response"}),
    "cls-fudan-news-zh": Entry("damo/zh_cls_fudan-news", columns=_PROMPT),
    "ner-jave-zh": Entry("damo/zh_ner-JAVE", columns=_PROMPT),
    "finance-en": Entry("wyj123456/finance_en", "ssbuild/alpaca_finance_en"),
    "webnovel-zh": Entry("AI-ModelScope/webnovel_cn", "zxbsmk/webnovel_cn"),
    "generated-chat-zh": Entry("AI-ModelScope/generated_chat_0.4M", "BelleGroup/generated_chat_0.4M"),
    "poetry-zh": Entry("modelscope/chinese-poetry-collection", columns={"text1": "response"}),
    # plain text
    "wikipedia-zh": Entry(
        "AI-ModelScope/wikipedia-cn-20230720-filtered", "pleisto/wikipedia-cn-20230720-filtered", columns={"completion": "response"}
    ),
    "pileval": Entry("huangjintao/pile-val-backup", "mit-han-lab/pile-val-backup", columns={"text": "response"}),
}

_SWIFT_KEYS = ("ms_dataset_id", "dataset_id", "hf_dataset_id", "dataset_path")
_FACTORY_KEYS = ("file_name", "hf_hub_url", "ms_hub_url")
# LLaMA-Factory's columns are written the other way round, ours -> theirs, under its names of the roles.
_FACTORY_ROLES = {"prompt": "instruction", "query": "input", "response": "output"}


def find(name: str, known: Mapping[str, Entry]) -> Entry | None:
    """The entry of a name; of a hub id that an entry holds, its columns (the id stays what the user wrote)."""
    if name in known:
        return known[name]
    same = [entry for entry in known.values() if name in (entry.ms, entry.hf)] if "/" in name else []
    return Entry(name, name, columns=same[0].columns) if same and all(e.columns == same[0].columns for e in same) else None


def read_info(path: str) -> dict[str, Entry]:
    """A `--dataset_info` file: SWIFT's list (3.x, 4.x) or map (2.x), or LLaMA-Factory's map. Raises DataError."""
    file = Path(path).expanduser()
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read --dataset_info {path}", error.strerror or str(error), "check the path") from None
    except ValueError as error:
        raise DataError(f"--dataset_info {path} is not valid JSON", str(error)) from None
    items: list[tuple[str, Any]] = list(content.items()) if isinstance(content, dict) else []
    if isinstance(content, list):
        items = [("", item) for item in content]
    elif not isinstance(content, dict):
        raise DataError(f"--dataset_info {path} holds {type(content).__name__}, not datasets", fix="a map of names, or a list of objects")
    found: dict[str, Entry] = {}
    for number, (name, item) in enumerate(items, 1):
        where = f"--dataset_info {path}, dataset {name or number}"
        if not isinstance(item, dict) or not any(item.get(key) for key in (*_SWIFT_KEYS, *_FACTORY_KEYS)):
            raise DataError(f"{where}: it says no place", fix="give it ms_dataset_id, hf_dataset_id or dataset_path")
        entry = _entry(item, file.parent, where)
        name = name or str(item.get("dataset_name") or entry.ms or entry.hf or entry.path)
        found[name] = entry
    return found


def _entry(item: dict[str, Any], folder: Path, where: str) -> Entry:
    columns = item.get("columns") or {}
    if not isinstance(columns, dict) or not all(isinstance(value, str) for value in columns.values()):
        raise DataError(f"{where}: columns must map names to names")
    factory = not any(item.get(key) for key in _SWIFT_KEYS)
    if factory:
        columns = {theirs: _FACTORY_ROLES.get(ours, ours) for ours, theirs in columns.items()}
        local, ms, hf = item.get("file_name"), item.get("ms_hub_url"), item.get("hf_hub_url")
        subsets = [item["subset"]] if item.get("subset") else []
    else:
        local, ms, hf = item.get("dataset_path"), item.get("ms_dataset_id") or item.get("dataset_id"), item.get("hf_dataset_id")
        subsets = item.get("subsets") or []
        key = (item.get("conversations") or {}).get("conversations_key")  # 2.x
        columns = {**columns, **({key: "messages"} if key else {})}
    local = local[0] if isinstance(local, list) and len(local) == 1 else local
    if local is not None and not isinstance(local, str):
        raise DataError(f"{where}: dataset_path must be one path", fix="name each file as a dataset of its own, or their folder")
    names = tuple(subset if isinstance(subset, str) else str(subset.get("subset", "default")) for subset in subsets)
    for subset in subsets:
        if isinstance(subset, dict):
            columns = {**columns, **(subset.get("columns") or {})}
    path = str(folder / Path(local).expanduser()) if local else ""
    ms, hf = str(ms or hf or ""), str(hf or ms or "")
    return Entry(ms, hf, tuple(name for name in names if name not in ("default", "all", "")), columns, path=path)
