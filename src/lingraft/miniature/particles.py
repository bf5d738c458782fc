"""Korean particles, whose form depends on whether the word before ends in a consonant (받침).

`attach("폐렴", "은/는")` gives 폐렴은; with "(으)로", 천식 gives 천식으로 and 물 gives 물로.
Latin letters and digits count as they are read aloud in Korean: 19 ends like 구, MRI like 아이.
"""

FORMS = {
    "은/는": ("은", "는"),
    "이/가": ("이", "가"),
    "을/를": ("을", "를"),
    "과/와": ("과", "와"),
    "(으)로": ("으로", "로"),
}
"""Each particle's form after a final consonant and after a vowel."""

_FIRST_SYLLABLE, _LAST_SYLLABLE = "가", "힣"
_FINALS = 28  # a syllable's code is (initial × 21 + medial) × 28 + final; final 0 is none
_RIEUL = 8

_SPOKEN_LAST_SYLLABLE = {
    **dict(zip("0123456789", "영일이삼사오육칠팔구", strict=True)),
    "L": "엘",
    "M": "엠",
    "N": "엔",
    "R": "알",
    # Lower case is a word and not spelled out: 이메일, 칼슘, 인슐린; a final r is silent in Korean.
    "l": "일",
    "m": "슘",
    "n": "린",
}


def _final_consonant(word: str) -> int:
    """Return the index of the final consonant that `word` is read with, 0 for none."""
    # Closing brackets and quotes are not read.
    last = word.rstrip(" )]}\"'”’.,")[-1:]
    last = _SPOKEN_LAST_SYLLABLE.get(last, last)
    if not _FIRST_SYLLABLE <= last <= _LAST_SYLLABLE:
        return 0
    return (ord(last) - ord(_FIRST_SYLLABLE)) % _FINALS


def attach(word: str, particle: str) -> str:
    """Return `word` with `particle` (a key of `FORMS`) in the form that fits its last sound."""
    final = _final_consonant(word)
    after_consonant, after_vowel = FORMS[particle]
    takes_vowel_form = final == 0 or (particle == "(으)로" and final == _RIEUL)
    return word + (after_vowel if takes_vowel_form else after_consonant)
