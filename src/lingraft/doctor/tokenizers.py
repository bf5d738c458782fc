"""Checks of the tokenizer's files: against each other, against the configs, and by what they do to text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lingraft.doctor.configs import as_ids
from lingraft.doctor.cuts import cut, joined
from lingraft.doctor.findings import Case, Problem, first
from lingraft.doctor.folder import CannotCheck, ModelFolder
from lingraft.doctor.rows import RESERVED
from lingraft.tokenizer.pieces import is_byte_piece

# Released tokenizers have a few (Gemma 3: 4 of 255,814); more than this share is a fault of the merges.
UNREACHABLE_SHARE = 0.001
ROLES = ("bos", "eos", "pad", "unk")
# What stands between such brackets in a chat template is meant to be one token.
TURN_MARKS = re.compile(
    r"<\|[^<>|\s]+\|>|<｜[^<>\s]+｜>|<(?:unused\d+|bos|eos|pad|(?:start|end)_of_\w+|\w*image\w*|\w*audio\w*)>"
)
BYTES = re.compile(r"(<0x[0-9A-F]{2}>)+")
BRACKETED = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z_/]{2,40}\]")


def tokenizer_file(case: Case) -> list[Problem]:
    """tokenizer.json is damaged, or missing beside weights."""
    path = case.model.path / "tokenizer.json"
    try:
        case.model.tokenizer  # noqa: B018
    except CannotCheck as reason:
        return [
            Problem(
                severity="fault" if path.is_file() else "warning",
                what="the tokenizer cannot be read" if path.is_file() else "no tokenizer.json",
                where=f"{path.name}: {reason}",
                why="without it, most tools cannot turn text into the ids that the model knows",
                cure="fetch tokenizer.json again, or save it with AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        ]
    return []


def sentencepiece_model(case: Case) -> list[Problem]:
    """tokenizer.model is missing, damaged, or says other pieces than tokenizer.json."""
    tokenizer = case.model.bpe
    if not tokenizer.json["model"].get("byte_fallback"):
        return []
    present = (case.model.path / "tokenizer.model").is_file()
    if tokenizer.proto is None or not tokenizer.proto.pieces:
        return [
            Problem(
                severity="fault" if present else "warning",
                what="tokenizer.model " + ("is damaged" if present else "is missing"),
                where=str(case.model.path / "tokenizer.model"),
                why="llama.cpp's converter takes pieces, scores and types from it: it stops, or loses token types",
                cure="write both files from one tokenizer (transformers 5 saves tokenizer.json alone)",
            )
        ]
    problems = []
    if differing := stale_ids(case.model):
        index, theirs, ours = differing[0]
        problems.append(
            Problem(
                severity="fault",
                what=f"tokenizer.model is stale: {len(differing):,} ids mean something else in tokenizer.json",
                where=f"id {index} is {theirs!r} in tokenizer.model, {ours!r} in tokenizer.json",
                why="SentencePiece and llama.cpp give other ids than Hugging Face: the model reads other words",
                cure="write both files from one tokenizer (lingraft tokenizer graft does)",
            )
        )
    listed = _listed(case.model)
    hidden = [
        token["content"]
        for token in case.model.added.values()
        if token["id"] >= len(tokenizer.proto.pieces) and token["content"] not in listed
    ]
    if hidden:
        problems.append(
            Problem(
                severity="warning",
                what=f"{len(hidden):,} added tokens that llama.cpp's converter does not see",
                where=f"past the end of tokenizer.model and in no other list: {first(hidden)}",
                why="the converter pads their ids: in llama.cpp their text is cut into other tokens",
                cure="list them in added_tokens_decoder of tokenizer_config.json (transformers 5 no longer does)",
            )
        )
    return problems


def stale_ids(model: ModelFolder) -> list[tuple[int, str | None, str | None]]:
    """(id, piece in tokenizer.model, piece in tokenizer.json) where they differ; ids past the end may be added."""
    tokenizer = model.tokenizer
    if tokenizer.proto is None:
        return []
    added = {token["id"] for token in model.added.values()}
    theirs = {index: piece.piece for index, piece in enumerate(tokenizer.proto.pieces)}
    ids = sorted(theirs.keys() | (tokenizer.piece_of.keys() - added))
    pairs = ((index, theirs.get(index), tokenizer.piece_of.get(index)) for index in ids)
    return [(index, one, other) for index, one, other in pairs if one != other]


def _listed(model: ModelFolder) -> set[str]:
    """Added tokens in the two files that llama.cpp's converter reads them from."""
    decoder = model.json("tokenizer_config.json").get("added_tokens_decoder")
    contents = [token.get("content") for token in decoder.values()] if isinstance(decoder, dict) else []
    return {*model.json("added_tokens.json"), *contents}


def special_ids(case: Case) -> list[Problem]:
    """Special tokens whose id is not what the configs, or the base, say."""
    return [*_roles_against_configs(case), *_specials_against_base(case)]


def _roles_against_configs(case: Case) -> Iterable[Problem]:
    model = case.model
    vocab = model.tokenizer.vocab
    config = model.json("config.json")
    nested = config.get("text_config")
    places = {
        "config.json": config,
        "config.json's text_config": nested if isinstance(nested, dict) else {},
        "generation_config.json": model.json("generation_config.json"),
    }
    for role in ROLES:
        token = _named(model).get(f"{role}_token")
        for file, values in places.items():
            said = as_ids(values.get(f"{role}_token_id"))
            if token in vocab and said and vocab[token] not in said:
                shown = ", ".join(model.name_token(index) for index in sorted(said))
                yield _moved(
                    f"{role} is {token!r} = {vocab[token]} in the tokenizer, {shown} in {file}",
                    f"write {vocab[token]} as {role}_token_id in {file}, or name the right {role}_token",
                )


def _specials_against_base(case: Case) -> Iterable[Problem]:
    if case.base is None:
        return
    try:
        old = case.base.added
    except CannotCheck:
        return
    vocab = case.model.tokenizer.vocab
    moved = [
        f"{content!r}: {token['id']} → {vocab.get(content, 'lost')}"
        for content, token in old.items()
        if vocab.get(content) != token["id"] and not RESERVED.search(content)
    ]
    if moved:
        yield _moved(f"{len(moved):,} tokens of the base: {first(moved)}", "build the tokenizer from the base's again")
    before, after = case.base.json("config.json"), case.model.json("config.json")
    for key in sorted(before.keys() & after.keys()):
        if key.endswith(("_token_id", "_token_index")) and key.removesuffix("_token_id") not in ROLES:
            one, other = as_ids(before[key]), as_ids(after[key])
            if one != other:
                yield _moved(f"config.json: {key} was {before[key]}, is {after[key]}", "restore the base's value")


def _moved(where: str, cure: str) -> Problem:
    return Problem(
        severity="fault",
        what="a special token's id moved",
        where=where,
        why="answers do not stop, begin wrongly, or images and turns are not seen",
        cure=cure,
    )


def _named(model: ModelFolder) -> dict[str, str]:
    """Setting → special token, from the two files that name them: {"bos_token": "<bos>", …}."""
    settings = model.json("special_tokens_map.json") | model.json("tokenizer_config.json")
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    named = {key: value for key, value in contents.items() if key.endswith("_token") and isinstance(value, str)}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(key)
        listed = list(values.values()) if isinstance(values, dict) else values if isinstance(values, list) else []
        for value in listed:
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                named[f"{key}: {content}"] = content
    return named


def tokenizer_config(case: Case) -> list[Problem]:
    """Settings and lists of added tokens that name tokens which the tokenizer has not, or has elsewhere."""
    model = case.model
    vocab, piece_of = model.tokenizer.vocab, model.tokenizer.piece_of
    lost = [f"{key.split(':')[0]} {token!r}" for key, token in _named(model).items() if token and token not in vocab]
    decoder = model.json("tokenizer_config.json").get("added_tokens_decoder")
    listed = {index: token.get("content") for index, token in decoder.items()} if isinstance(decoder, dict) else {}
    listed |= {str(index): content for content, index in model.json("added_tokens.json").items()}
    wrong = [
        f"id {index} {content!r}, which the tokenizer has as {piece_of.get(int(index))!r}"
        for index, content in listed.items()
        if str(index).isdigit() and piece_of.get(int(index)) != content
    ]
    return [
        Problem(
            severity="fault",
            what=f"the tokenizer's settings name {len(names):,} tokens that {state}",
            where=f"tokenizer_config.json, special_tokens_map.json or added_tokens.json: {first(names)}",
            why="loaders add them again under new ids past the model's rows, or give old ids another meaning",
            cure="take the names of lost tokens out of these files, or restore the tokens",
        )
        for names, state in ((lost, "are lost"), (wrong, "have another place"))
        if names
    ]


def chat_template(case: Case) -> list[Problem]:
    """Marks of the chat template that are no tokens (any more)."""
    model = case.model
    vocab = model.tokenizer.vocab
    known = base_vocab(case)
    problems = []
    for name, template in _templates(model).items():
        marks = {match[0] for match in TURN_MARKS.finditer(template)}
        marks |= {match[0] for match in BRACKETED.finditer(template) if match[0] in known}
        if lost := sorted(mark for mark in marks if mark not in vocab):
            problems.append(
                Problem(
                    severity="fault",
                    what="the chat template uses marks that are no tokens",
                    where=f"{name}: {first(lost)}",
                    why="a turn's mark is cut into letters, so the model does not see where turns begin and end",
                    cure="restore these tokens under their old ids (never reuse a slot that the template names)",
                )
            )
    return problems


def base_vocab(case: Case) -> dict[str, int]:
    try:
        return case.base.tokenizer.vocab if case.base else {}
    except CannotCheck:
        return {}


def _templates(model: ModelFolder) -> dict[str, str]:
    """The chat templates by where they stand."""
    found = {}
    for path in [model.path / "chat_template.jinja", *sorted(model.path.glob("additional_chat_templates/*.jinja"))]:
        if path.is_file():
            found[path.name] = path.read_text("utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = model.json(name).get("chat_template")
        templates = [entry.get("template") for entry in value] if isinstance(value, list) else [value]
        text = "\n".join(template for template in templates if isinstance(template, str))
        if text:
            found[name] = text
    return found


def unreachable_pieces(case: Case) -> list[Problem]:
    """Pieces that their own spelling does not lead to, so that no text can contain them."""
    model = case.model
    tokenizer = model.bpe
    new = new_pieces(case)
    candidates = {
        piece: index
        for piece, index in tokenizer.vocab.items()
        if piece not in model.added
        and not BYTES.fullmatch(piece)
        and not RESERVED.search(piece)
        and (new is None or piece in new)
    }
    segmented = tokenizer.segment(list(candidates))
    dead = [piece for (piece, index), ids in zip(candidates.items(), segmented, strict=True) if ids != [index]]
    special = {value for value in tokenizer.json["model"].values() if isinstance(value, str)}
    dead = [piece for piece in dead if piece not in special]
    if not dead:
        return []
    few = new is None and len(dead) <= UNREACHABLE_SHARE * len(candidates)
    example = f"{dead[0]!r} comes out as {joined(cut(tokenizer, tokenizer.segment([dead[0]])[0]))}"
    return [
        Problem(
            severity="note" if few else "fault",
            what=f"{len(dead):,} of {len(candidates):,} {'' if new is None else 'new '}pieces can never come out",
            where=example,
            why="their rows are never used" + ("; released tokenizers have a few of these" if few else ""),
            cure="nothing to do" if few else "add the merges that lead to them, in the order learnt",
        )
    ]


def new_pieces(case: Case) -> set[str] | None:
    """Pieces that are not the base's, or that graft.json lists; None where neither is there to tell."""
    if known := base_vocab(case):
        return set(case.model.tokenizer.vocab) - set(known)
    listed = case.model.json("graft.json").get("pieces")
    if not isinstance(listed, list):
        return None
    return {entry["piece"] for entry in listed if isinstance(entry, dict) and "piece" in entry}


def byte_merges(case: Case) -> list[Problem]:
    """Merges that join byte-fallback pieces."""
    tokenizer = case.model.bpe
    if not tokenizer.json["model"].get("byte_fallback"):
        return []
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer.json["model"]["merges"]]
    found = [merge for merge in merges if any(part.startswith("<0x") and is_byte_piece(part) for part in merge)]
    if not found:
        return []
    return [
        Problem(
            severity="fault",
            what=f"{len(found):,} merges join byte-fallback pieces",
            where=f"tokenizer.json: {' + '.join(found[0])}",
            why="Hugging Face can merge bytes, SentencePiece and llama.cpp cannot: they give different ids",
            cure="give the characters pieces of their own (lingraft tokenizer graft does), and drop these merges",
        )
    ]
