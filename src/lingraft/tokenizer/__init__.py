"""Continued BPE: new pieces on top of a finished tokenizer, without changing how it cuts old text.

    base = load(folder)                                          load.py
    learnt = learn(base, texts, new_tokens=6_000, …)             count.py, learn.py
    grafted = graft(base, place(base, learnt, family=…))         graft.py
    write(grafted, out)
    verify(base, out, old_texts, new_texts)                      check.py

`inspect.py` measures and shows what was gained; `new.py` trains a small base tokenizer from nothing.
"""
