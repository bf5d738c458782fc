"""What is wrong with a model folder, whoever made it: `examine(folder, base, texts)` names every fault it finds.

`examine.py` holds the ordered list of checks. Each check is one function, Case → problems, in a file by what it
looks at: `files.py`, `configs.py`, `rows.py`, `tokenizers.py`, `added_words.py`, `runtime_ids.py`, `against_base.py`.
They read the folder through `folder.py`, which forgives: a part that is missing or damaged ends only the checks that
need it, with the reason. Weights are streamed in slices; only the comparison of logits loads models.
"""
