"""BERTology: what heads, layers and deltas do. One function an analysis, each returns a ``Report``.

From a notebook: ``from bertology_serve.analysis.attention_maps import attention``, then
``report = attention("minilm", "corpus.jsonl", delta="deltas/sentiment")`` and ``report.save("out")``.
"""
