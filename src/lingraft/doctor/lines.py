"""The lines of text that checks try: built-in ones, or a user's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lingraft.errors import CorpusError

BUILT_IN = (
    "The patient was admitted with chest pain and shortness of breath; troponin was 0.04 ng/mL.",
    "ERCP showed a stone in the common bile duct of a 58-year-old woman with NIDDM.",
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "안녕하세요. 저는 오늘 병원에 다녀왔습니다.",
    "환자는 당뇨병과 고혈압으로 약물 치료를 받고 있으며 최근 단백뇨가 확인되었다.",
    "급성 심근경색증이 의심되어 심전도와 혈액검사를 시행하였다.",
    "보건복지부장관은 감염병의 예방을 위하여 필요한 조치를 할 수 있다.",
    "특성 세포의 염증은 신장 기능을 저하시킬 수 있고, 간질 발작의 원인이 되기도 한다.",
    "이 영화는 배우들의 연기가 정말 좋았고 결말도 마음에 들었어요 ㅋㅋㅋ",
    "CT 촬영 후 ICU로 옮겨 혈압 120/80 mmHg를 유지하였다.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)  # never empty",
    "for (int i = 0; i < n; ++i) { x[i] += 1; }",
    "👩‍⚕️ 검사 결과 나왔어요 😀 ok 👍🏽",
    "診斷書와 漢字 그리고 かな, 中文",
    "a  b   c\t\td\n\n\ne",
    "Ça coûte 3,50 € — naïve café, Привет, مرحبا",
)


def read_lines(files: Sequence[Path]) -> list[str]:
    """The lines of UTF-8 text files that are not blank.

    Raises:
        CorpusError: a file is missing or in another encoding, or none of them holds text.
    """
    lines: list[str] = []
    for file in files:
        if not file.is_file():
            raise CorpusError(f"{file}: no such text file")
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{file}: not UTF-8 (byte {error.start:,}); convert it first") from None
        lines += [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise CorpusError(f"{', '.join(map(str, files))}: no text; give a file with at least one line")
    return lines
