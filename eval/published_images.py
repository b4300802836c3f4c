"""Published image results of arXiv 2602.01362, Tables 3, 4, 12 to 15 and 19: FID and IS by sampling steps.

Rows are "MDLM", "GIDD", "XDLM k=0.1" (and the other k) and "UDLM". All are of 50,000 samples, as many of each class,
from one model per row; no errors are given. What to know before comparing (from the released code):

- ImageNet is compared with the 50,000 validation images, CIFAR-10 with the 50,000 training images. Most papers use
  statistics of ImageNet's training images; FID against another reference is another number.
- The guided tables say "scale 2.0", and no script sets it: it is gamma = 2 (guidance_scale 3), the literal reading of
  the code's option, or 1 + gamma = 2 (guidance_scale 2).
- Codes of ImageNet were decoded from codebook rows that were not normalised, as LlamaGen's are.
- Samples were drawn in float32 (UDLM: float64), in bfloat16 logits on ImageNet, with no final denoising step.

Tables 3 and 4 are the rows MDLM, GIDD, UDLM and XDLM k=0.1 of Tables 12 and 13.
"""

from typing import Any

from xdlm_hf.evaluation.published_text import grid

SAMPLES = 50_000
REFERENCES = {"imagenet": "validation images, 256 x 256", "cifar10": "training images"}

# Table 12: ImageNet without guidance.
IMAGENET_FID = grid("""
row             4      8     16     32
MDLM       80.752 47.732 28.785 18.928
GIDD       86.842 54.933 35.403 24.588
XDLM-0.001 81.992 52.590 35.046 25.637
XDLM-0.1   54.085 34.109 25.774 22.187
XDLM-0.5   45.808 29.362 23.417 21.486
UDLM       49.861 30.144 26.242 25.661
""")
IMAGENET_IS = grid("""
row             4      8     16     32
MDLM       16.287 29.178 44.656 57.803
GIDD       14.559 24.297 35.698 46.376
XDLM-0.001 15.597 24.813 35.097 44.032
XDLM-0.1   24.829 36.964 43.903 48.118
XDLM-0.5   29.310 40.482 46.620 48.911
UDLM       27.049 38.832 41.801 41.850
""")

# Table 13: ImageNet, "CFG scale 2.0".
IMAGENET_GUIDED_FID = grid("""
row             4      8    16    32
MDLM       33.468 11.144 6.725 7.485
GIDD       41.000 15.151 7.076 6.314
XDLM-0.001 32.876 12.872 7.612 7.588
XDLM-0.1   13.550  8.956 8.625 8.914
XDLM-0.5   11.945  9.038 8.790 8.939
UDLM       14.055  9.718 8.980 8.650
""")
IMAGENET_GUIDED_IS = grid("""
row              4       8      16      32
MDLM        54.740 119.150 172.664 203.722
GIDD        44.084  95.789 148.148 181.017
XDLM-0.001  53.351 102.601 144.019 167.660
XDLM-0.1   107.403 148.723 165.916 171.046
XDLM-0.5   114.135 145.718 156.339 159.829
UDLM        97.859 123.582 132.099 132.108
""")

# Table 19: ImageNet without guidance at 16 steps, by training step.
IMAGENET_BY_STEP_FID = grid("""
row          100k   200k   300k   400k   500k
MDLM       40.060 33.723 31.090 29.436 28.785
GIDD       42.152 36.878 35.200 35.677 35.403
XDLM-0.001 45.381 38.967 36.061 36.287 35.046
XDLM-0.1   38.358 31.464 27.524 26.853 25.774
XDLM-0.5   37.567 30.098 26.687 23.790 23.417
UDLM       43.316 34.525 30.381 28.086 26.242
""")
IMAGENET_BY_STEP_IS = grid("""
row          100k   200k   300k   400k   500k
MDLM       28.978 36.136 39.804 42.893 44.656
GIDD       27.337 33.042 35.544 35.173 35.698
XDLM-0.001 24.967 30.512 33.948 34.031 35.097
XDLM-0.1   27.949 35.839 41.150 42.222 43.903
XDLM-0.5   27.854 35.682 40.724 45.976 46.620
UDLM       23.619 31.188 35.963 38.588 41.801
""")

# Table 14: CIFAR-10 without guidance.
CIFAR10_FID = grid("""
row             32    128    512
MDLM       211.983 69.151 33.961
GIDD       193.487 72.579 41.809
XDLM-0.001 164.040 50.638 29.079
XDLM-0.1    77.985 48.702 43.210
XDLM-0.5    56.299 37.307 33.030
UDLM        41.027 27.822 25.144
""")
CIFAR10_IS = grid("""
row           32   128   512
MDLM       2.685 5.615 6.801
GIDD       2.737 5.176 6.209
XDLM-0.001 3.427 6.223 7.079
XDLM-0.1   5.316 6.284 6.513
XDLM-0.5   6.077 6.801 6.956
UDLM       6.892 7.345 7.372
""")

# Table 15: CIFAR-10, "CFG scale 2.0".
CIFAR10_GUIDED_FID = grid("""
row             32    128    512
MDLM       181.453 51.113 22.762
GIDD       179.916 60.443 30.812
XDLM-0.001 130.106 35.980 19.877
XDLM-0.1    59.600 36.889 32.444
XDLM-0.5    40.850 27.445 24.445
UDLM        30.328 20.720 18.592
""")
CIFAR10_GUIDED_IS = grid("""
row           32   128   512
MDLM       3.329 6.969 8.078
GIDD       3.054 6.124 7.216
XDLM-0.001 4.559 7.575 8.186
XDLM-0.1   6.699 7.596 7.670
XDLM-0.5   7.560 7.881 7.893
UDLM       8.098 8.392 8.433
""")

_TABLES = {
    ("imagenet", False): (12, IMAGENET_FID, IMAGENET_IS),
    ("imagenet", True): (13, IMAGENET_GUIDED_FID, IMAGENET_GUIDED_IS),
    ("cifar10", False): (14, CIFAR10_FID, CIFAR10_IS),
    ("cifar10", True): (15, CIFAR10_GUIDED_FID, CIFAR10_GUIDED_IS),
}
_READINGS = {
    3.0: '"scale 2.0" read as gamma = 2 (guidance_scale 3), the literal reading of the code\'s option',
    2.0: '"scale 2.0" read as 1 + gamma = 2 (guidance_scale 2)',
}


def published_images(
    dataset: str | None, row: str, steps: int, guidance_scale: float, training_step: int | None = None
) -> dict[str, Any] | None:
    """Published FID and IS, to print beside measured ones.

    Args:
        dataset: "imagenet" or "cifar10".
        row: Name of the model in the tables.
        steps: Sampling steps.
        guidance_scale: 1 + gamma; both 2 and 3 are readings of the guided tables.
        training_step: Optimizer steps of a checkpoint; None for the final model.

    Returns:
        `fid`, `inception_score`, `source`, `samples`, `reference` and, with guidance, the `reading`; None if nothing
        was published.
    """
    if guidance_scale != 1 and guidance_scale not in _READINGS:
        return None
    table, fid, score = _TABLES.get((dataset, guidance_scale != 1), (0, {}, {}))
    column = str(steps)
    if training_step is not None:
        known = dataset == "imagenet" and guidance_scale == 1 and steps == 16 and training_step % 1000 == 0
        table, fid, score = (19, IMAGENET_BY_STEP_FID, IMAGENET_BY_STEP_IS) if known else (0, {}, {})
        column = f"{training_step // 1000}k"
    if column not in fid.get(row, {}):
        return None
    return {
        "fid": fid[row][column],
        "inception_score": score[row][column],
        "source": f"Table {table}, {row}",
        "samples": SAMPLES,
        "reference": REFERENCES[dataset],
        **({"reading": _READINGS[guidance_scale]} if guidance_scale != 1 else {}),
    }
