"""What the benchmarks read: the project's data folder (../shared/data, or LINGRAFT_DATA)."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

from lingraft.tokenizer.load import BaseTokenizer, load

DATA = Path(os.environ.get("LINGRAFT_DATA") or Path(__file__).resolve().parents[2] / "shared/data")


def sources() -> dict[str, list[str]]:
    """Korean texts by source: health law, disease names, procedures and devices, film reviews."""

    def column(name: str) -> list[str]:
        with open(DATA / "ko-medical" / name, encoding="utf-8-sig", newline="") as file:
            return [row["ko"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["ko"]]

    with gzip.open(DATA / "ko-medical/health_law.jsonl.gz", "rt", encoding="utf-8") as lines:
        law = [json.loads(line)["text"] for line in lines]
    with open(DATA / "ko-medical/edi_device_utf8.csv", encoding="utf-8-sig", newline="") as file:
        devices = [f"{row['제품명_x']} {row['대분류코드명']} {row['중분류명']}" for row in csv.DictReader(file)]
    with gzip.open(DATA / "ko-general/nsmc_reviews.tsv.gz", "rt", encoding="utf-8") as lines:
        reviews = [line.rstrip("\n").split("\t")[1] for line in lines][1:]
    return {
        "law": law,
        "diseases": column("kcd8_en_ko.tsv"),
        "procedures": column("edi_procedures_en_ko.tsv"),
        "devices": devices,
        "reviews": reviews,
    }


def gemma3() -> BaseTokenizer:
    """The real Gemma 3 tokenizer in both of its forms."""
    packed = DATA / "tokenizers/gemma3_262k"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(gzip.decompress((packed / "tokenizer.json.gz").read_bytes()))
        shutil.copy(packed / "tokenizer.model", folder)
        return load(folder)
