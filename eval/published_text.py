"""Published text results of arXiv 2602.01362, Tables 7 to 11 and 18.

Rows are "MDLM", "GIDD", "XDLM k=0.1" (and the other k) and "UDLM". Tables 10, 11 and 18 are judged by gpt2-large, on
5,000 samples per cell, from one model per row; no errors are given. According to the released code, samples were drawn
with float32 noise (UDLM: float64), which lowers perplexity and entropy with many steps; the GIDD rows have a uniform
share of 0; and no network had time conditioning.
"""


def grid(text: str) -> dict[str, dict[str, float]]:
    """{row: {column: value}} of a table as text."""
    head, *lines = (line.split() for line in text.strip().splitlines())
    rows = {line[0].replace("XDLM-", "XDLM k="): map(float, line[1:]) for line in lines}
    return {row: dict(zip(head[1:], values, strict=True)) for row, values in rows.items()}


# Validation perplexity on OpenWebText after 1,000,000 steps.
VALIDATION: dict[str, float] = {
    "MDLM": 23.321,
    "GIDD": 23.136,
    "XDLM k=0.001": 23.495,
    "XDLM k=0.1": 24.097,
    "XDLM k=0.5": 24.818,
    "XDLM k=0.9": 25.731,
    "UDLM": 25.937,
}

# Table 8: zero-shot perplexity by corpus (names of `xdlm_hf.data.corpora`).
ZERO_SHOT = grid("""
row        ag_news lambada   lm1b    ptb  arxiv pubmed wikitext average
MDLM        61.374  47.967 65.629 89.049 37.457 41.981   32.093  53.650
GIDD        60.607  47.811 65.898 86.911 39.019 42.634   30.809  53.384
XDLM-0.001  62.247  45.982 65.944 89.575 38.294 42.206   31.809  53.722
XDLM-0.1    62.768  45.608 68.229 90.796 37.232 41.391   32.748  54.110
XDLM-0.5    67.352  47.966 71.252 91.683 38.460 43.373   33.570  56.236
XDLM-0.9    71.791  49.094 74.116 97.266 39.658 44.701   35.175  58.829
UDLM        69.402  51.272 75.572 95.986 42.671 47.181   34.933  59.574
""")

# Table 9: the average of Table 8 by training step.
ZERO_SHOT_BY_STEP = grid("""
row          100k   200k   300k   400k   500k   600k   700k   800k   900k     1M
MDLM       64.209 59.315 57.411 56.129 55.434 54.943 54.466 54.201 53.839 53.650
GIDD       61.097 57.900 56.326 55.389 54.848 54.294 53.960 53.807 53.258 53.384
XDLM-0.001 63.748 59.097 57.319 56.374 55.576 54.937 54.577 54.336 53.977 53.722
XDLM-0.1   64.847 60.187 58.253 57.201 56.288 55.797 55.271 54.872 54.500 54.110
XDLM-0.5   68.074 62.524 60.489 59.353 58.396 57.881 57.437 56.976 56.530 56.236
XDLM-0.9   70.264 65.384 63.147 61.758 60.977 60.263 59.723 59.438 58.915 58.829
UDLM       71.220 65.789 63.692 62.320 61.258 60.937 60.577 60.192 59.711 59.574
""")

# Table 10: OpenWebText models, 1024 tokens: generative perplexity and entropy by sampling steps.
OPENWEBTEXT_PERPLEXITY = grid("""
row              8      16      32      64    128    256    512    1024
MDLM       711.382 288.157 156.576 106.098 80.198 64.376 51.756  41.545
GIDD       654.841 273.829 151.331 102.558 77.548 62.077 49.822  39.981
XDLM-0.001 613.647 253.897 146.567 104.090 80.301 65.245 52.650  42.797
XDLM-0.1   301.640 161.724 114.795  94.837 83.205 73.824 63.888  52.609
XDLM-0.5   218.572 127.335  98.817  86.956 81.051 77.155 73.503  66.136
XDLM-0.9   189.750 117.234  93.239  84.068 80.614 79.456 78.707  78.238
UDLM       183.991 111.237  88.632  79.509 76.611 74.019 73.345 106.666
""")
OPENWEBTEXT_ENTROPY = grid("""
row            8    16    32    64   128   256   512  1024
MDLM       5.872 5.767 5.687 5.614 5.543 5.472 5.387 5.287
GIDD       5.832 5.748 5.675 5.605 5.534 5.462 5.370 5.269
XDLM-0.001 5.837 5.746 5.673 5.613 5.546 5.475 5.393 5.298
XDLM-0.1   5.662 5.630 5.600 5.573 5.548 5.516 5.467 5.390
XDLM-0.5   5.574 5.565 5.555 5.547 5.538 5.525 5.514 5.476
XDLM-0.9   5.546 5.547 5.548 5.548 5.548 5.547 5.544 5.542
UDLM       5.536 5.539 5.543 5.535 5.536 5.531 5.524 5.769
""")

# Table 11: LM1B models, 128 tokens: generative perplexity and entropy by sampling steps.
LM1B_PERPLEXITY = grid("""
row              4       8      16      32      64     128
MDLM       377.177 215.579 152.939 124.731 112.049 102.142
GIDD       392.002 215.873 151.824 124.014 110.247 101.211
XDLM-0.001 343.246 199.457 146.612 124.444 111.960 103.544
XDLM-0.1   246.134 155.487 123.129 113.006 105.509 101.983
XDLM-0.5   232.702 141.121 116.063 106.182 103.419 100.754
UDLM       232.403 136.914 110.575 102.072  98.571  96.385
""")
LM1B_ENTROPY = grid("""
row            4     8    16    32    64   128
MDLM       4.405 4.379 4.366 4.357 4.353 4.347
GIDD       4.401 4.373 4.361 4.359 4.354 4.348
XDLM-0.001 4.382 4.363 4.357 4.358 4.354 4.351
XDLM-0.1   4.326 4.329 4.334 4.342 4.345 4.346
XDLM-0.5   4.309 4.315 4.325 4.335 4.340 4.342
UDLM       4.303 4.305 4.320 4.327 4.334 4.336
""")

# Table 18: LM1B models at 128 sampling steps: generative perplexity and entropy by training step.
LM1B_BY_STEP_PERPLEXITY = grid("""
row           100k    200k    300k    400k    500k    600k    700k    800k    900k      1M
MDLM       113.218 107.864 106.735 105.839 104.594 104.106 103.559 103.174 102.769 102.142
GIDD       107.366 103.473 103.386 101.854 102.367 101.745 101.904 101.957 101.490 101.211
XDLM-0.001 112.628 108.381 106.406 104.913 105.156 103.817 103.624 102.731 103.638 103.544
XDLM-0.1   119.632 110.803 109.017 106.265 105.428 104.572 103.645 103.348 102.223 101.983
XDLM-0.5   117.846 111.024 108.130 105.955 104.953 103.048 102.464 101.040 102.015 100.754
UDLM       116.021 107.800 104.508 102.466 101.480  99.958  99.660  98.147  97.503  96.385
""")
LM1B_BY_STEP_ENTROPY = grid("""
row         100k  200k  300k  400k  500k  600k  700k  800k  900k    1M
MDLM       4.350 4.348 4.350 4.347 4.349 4.349 4.348 4.349 4.349 4.347
GIDD       4.352 4.350 4.351 4.349 4.351 4.349 4.350 4.350 4.351 4.348
XDLM-0.001 4.351 4.347 4.349 4.347 4.350 4.347 4.347 4.349 4.351 4.351
XDLM-0.1   4.353 4.347 4.347 4.344 4.344 4.344 4.346 4.344 4.344 4.346
XDLM-0.5   4.350 4.346 4.345 4.344 4.342 4.343 4.342 4.343 4.344 4.342
UDLM       4.349 4.343 4.341 4.340 4.338 4.336 4.338 4.336 4.335 4.336
""")

_BY_CORPUS = {
    "openwebtext": (10, 1024, OPENWEBTEXT_PERPLEXITY, OPENWEBTEXT_ENTROPY),
    "lm1b": (11, 128, LM1B_PERPLEXITY, LM1B_ENTROPY),
}


def published_samples(corpus: str | None, row: str, steps: int) -> dict[str, float | str | int] | None:
    """Published generative perplexity and entropy, to compare with measured ones.

    Args:
        corpus: Training corpus; "openwebtext" and "lm1b" have a table.
        row: Name of the model in the tables.
        steps: Sampling steps.

    Returns:
        `perplexity`, `entropy`, `source` and `length` in tokens, or None if nothing was published.
    """
    table, length, perplexity, entropy = _BY_CORPUS.get(corpus, (0, 0, {}, {}))
    if str(steps) not in perplexity.get(row, {}):
        return None
    found = {"perplexity": perplexity[row][str(steps)], "entropy": entropy[row][str(steps)]}
    return {**found, "source": f"Table {table}, {row}", "length": length}
