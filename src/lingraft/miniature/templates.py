"""The sentences of the miniature world, by language and attribute. Text here, logic in `text.py`.

`{c}` is the condition, which may be replaced by a pronoun; `{name}` is always its name. `{v}` is the
attribute's value. A symptom sentence has `{v}` and may have `{w}`, the other symptom. English values may be
singular, plural or uncountable: no verb ever agrees with one.
"""

from lingraft.miniature.world import Language

Templates = dict[Language, dict[str, tuple[str, ...]]]

FACTS: Templates = {
    "en": {
        "body_part": (
            "{c} is known to affect the {v}.",
            "{c} mainly affects the {v}.",
            "{c} is a disorder that involves the {v}.",
            "the part of the body affected by {c} is the {v}.",
            "when {c} develops, the problem lies in the {v}.",
            "when doctors suspect {c}, they examine the {v}.",
            "one disease that affects the {v} is {name}.",
            "the {v} can be affected by {name}.",
        ),
        "symptom": (
            "common symptoms of {c} are {v} and {w}.",
            "{c} often causes {v} and {w}.",
            "patients with {c} usually have {v} and {w}.",
            "the typical signs of {c} include {v} and {w}.",
            "a patient with {v} and {w} may have {name}.",
            "{v} together with {w} can suggest {name}.",
            "{c} can begin with {v}.",
            "people with {c} may notice {v}.",
        ),
        "cause": (
            "{c} is caused by {v}.",
            "the main cause of {c} is {v}.",
            "{c} often results from {v}.",
            "{c} usually develops because of {v}.",
            "{v} can lead to {name}.",
            "{v} can cause {name}.",
            "when doctors look for the cause of {c}, they often find {v}.",
        ),
        "treatment": (
            "{c} is treated with {v}.",
            "the standard treatment for {c} is {v}.",
            "doctors treat {c} with {v}.",
            "treatment of {c} relies on {v}.",
            "doctors usually recommend {v} for {c}.",
            "for patients with {c}, the first choice is {v}.",
            "{v} can help patients with {name}.",
            "{v} can be used to treat {name}.",
        ),
        "specialist": (
            "{c} is treated by {v:a}.",
            "the specialist who treats {c} is {v:a}.",
            "patients with {c} should see {v:a}.",
            "patients with {c} are referred to {v:a}.",
            "the right doctor for {c} is {v:a}.",
            "anyone who may have {c} should visit {v:a}.",
            "{v:a} treats {name}.",
            "{v:a} takes care of patients with {name}.",
        ),
    },
    "ko": {
        "body_part": (
            "{c:은/는} {v}에 생기는 병이다.",
            "{c:은/는} 주로 {v}에 영향을 준다.",
            "{c:과/와} 관련된 신체 부위는 {v}이다.",
            "{c:이/가} 의심되면 먼저 {v:을/를} 검사한다.",
            "{c:이/가} 생기면 {v}에 문제가 나타난다.",
            "{c:이/가} 생기는 곳은 {v}이다.",
            "{v}에 생기는 질환 가운데 하나가 {name}이다.",
            "{name:은/는} {v:과/와} 관련된 질환이다.",
        ),
        "symptom": (
            "{c}의 흔한 증상은 {v:과/와} {w}이다.",
            "{c:은/는} {v:과/와} {w:을/를} 일으킨다.",
            "{c:이/가} 있으면 {v:과/와} {w:이/가} 나타난다.",
            "{c}의 대표적인 증상으로 {v:과/와} {w:을/를} 들 수 있다.",
            "{name} 환자에게는 {v:과/와} {w:이/가} 자주 나타난다.",
            "{v:과/와} {w:이/가} 있으면 {name:을/를} 의심한다.",
            "{c:은/는} 흔히 {v:(으)로} 시작된다.",
            "{v:은/는} {name}에서 자주 보이는 증상이다.",
        ),
        "cause": (
            "{c}의 주된 원인은 {v}이다.",
            "{c:은/는} {v:(으)로} 인해 생긴다.",
            "{c:은/는} 흔히 {v} 때문에 생긴다.",
            "{c:이/가} 생기는 가장 흔한 이유는 {v}이다.",
            "{v:은/는} {name:을/를} 일으킬 수 있다.",
            "{v:이/가} {name}의 원인으로 알려져 있다.",
            "{name:은/는} {v:과/와} 관련이 깊다.",
        ),
        "treatment": (
            "{c:은/는} {v:(으)로} 치료한다.",
            "{c}의 표준 치료는 {v}이다.",
            "{c:을/를} 치료할 때는 흔히 {v:을/를} 권한다.",
            "의사는 {c}의 치료로 {v:을/를} 먼저 고려한다.",
            "{c}에는 {v:이/가} 효과가 있다.",
            "{name} 환자에게는 {v:이/가} 필요하다.",
            "{v:은/는} {name} 치료에 도움이 된다.",
        ),
        "specialist": (
            "{c:은/는} {v:이/가} 진료한다.",
            "{c:을/를} 진료하는 전문가는 {v}이다.",
            "{c:이/가} 의심되면 {v:을/를} 찾아야 한다.",
            "{c:은/는} {v}에게 치료를 받는 것이 좋다.",
            "{name} 환자는 {v}에게 진료를 받는다.",
            "{name} 환자는 대개 {v:이/가} 맡는다.",
            "{v:은/는} {name:을/를} 진료한다.",
        ),
    },
}
"""Sentences that state one fact."""

PRONOUNS: dict[Language, tuple[str, ...]] = {
    "en": ("this condition", "the condition"),
    "ko": ("이 질환", "이 병"),
}

GROUPS: dict[Language, dict[str, str]] = {
    "en": {
        "body_part": "diseases that affect the {v} include {list}.",
        "symptom": "{v} can occur in {list}.",
        "cause": "{v} can cause several diseases, such as {list}.",
        "treatment": "{v} can be used to treat {list}.",
        "specialist": "{v:a} treats diseases such as {list}.",
    },
    "ko": {
        "body_part": "{v}에 영향을 주는 질환으로는 {list:이/가} 있다.",
        "symptom": "{v:은/는} {list}에서 나타날 수 있다.",
        "cause": "{v:은/는} {list} 등을 일으킬 수 있다.",
        "treatment": "{v:은/는} {list}의 치료에 도움이 된다.",
        "specialist": "{v:은/는} {list} 등을 진료한다.",
    },
}
"""Sentences that name several conditions which share a value."""

ALIKE: dict[Language, dict[str, str]] = {
    "en": {
        "body_part": "both {a} and {b} affect the {v}.",
        "symptom": "both {a} and {b} can cause {v}.",
        "cause": "both {a} and {b} can be caused by {v}.",
        "treatment": "both {a} and {b} are treated with {v}.",
        "specialist": "both {a} and {b} are treated by {v:a}.",
    },
    "ko": {
        "body_part": "{a:과/와} {b:은/는} 모두 {v}에 생긴다.",
        "symptom": "{a:과/와} {b}에서는 모두 {v:이/가} 나타날 수 있다.",
        "cause": "{a:과/와} {b:은/는} 모두 {v:(으)로} 인해 생긴다.",
        "treatment": "{a:과/와} {b:은/는} 모두 {v:(으)로} 치료한다.",
        "specialist": "{a:과/와} {b:은/는} 모두 {v:이/가} 진료한다.",
    },
}
"""Comparisons of two conditions that share the value `v`."""

UNLIKE: dict[Language, dict[str, str]] = {
    "en": {
        "body_part": "{a} affects the {v}, while {b} affects the {w}.",
        "symptom": "{a} often causes {v}, while {b} often causes {w}.",
        "cause": "{a} is caused by {v}, while {b} is caused by {w}.",
        "treatment": "{a} is treated with {v}, while {b} is treated with {w}.",
        "specialist": "{a} is treated by {v:a}, while {b} is treated by {w:a}.",
    },
    "ko": {
        "body_part": "{a:은/는} {v}에 생기고 {b:은/는} {w}에 생긴다.",
        "symptom": "{a:은/는} {v:을/를} 일으키고 {b:은/는} {w:을/를} 일으킨다.",
        "cause": "{a:은/는} {v:(으)로} 인해 생기고 {b:은/는} {w:(으)로} 인해 생긴다.",
        "treatment": "{a:은/는} {v:(으)로} 치료하고 {b:은/는} {w:(으)로} 치료한다.",
        "specialist": "{a:은/는} {v:이/가} 진료하고 {b:은/는} {w:이/가} 진료한다.",
    },
}
"""Comparisons of two conditions that share no value; `v` is of `a`, `w` of `b`."""
